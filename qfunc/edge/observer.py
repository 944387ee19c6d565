"""Observers as modules, for the time that data runs through them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qfunc.passes.stages import Site


class ObserverModule(nn.Module):
    """Hands its input on and folds it into the statistic of a site.

    The state is a value of the statistic's, replaced at every call; it is no part of the `state_dict`.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.state: Any = site.observer.init()

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        self.state = self.site.observer.update(self.state, x.detach())
        return x

    def extra_repr(self) -> str:
        """The observer, and what it observes."""
        return f"{self.site.observer!r}, taps={', '.join(self.site.taps)}"
