"""Modules with switches: plain booleans for their forward, so that nothing waits for a tensor, kept in the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Switched(nn.Module):
    """A module of `SWITCHES`, each on or off: a `uint8` buffer of its name in the `state_dict`, a boolean in `on`.

    Its floating-point buffers and parameters keep their dtype through `.half()` and `.to(dtype)`.
    """

    SWITCHES: ClassVar[tuple[tuple[str, bool], ...]] = ()
    """Name, and whether it is on at first."""

    def add_switches(self) -> None:
        """Set all switches as they are at first; for `__init__`."""
        self.on: dict[str, bool] = dict(self.SWITCHES)
        for name, on in self.SWITCHES:
            self.register_buffer(name, torch.tensor(on, dtype=torch.uint8))

    def switch(self, name: str, on: bool) -> None:
        """Turn one switch on or off; other modules' switches are not this one's."""
        if name in self.on:
            self.on[name] = on
            self.get_buffer(name).fill_(on)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.on = {name: bool(self.get_buffer(name).item()) for name in self.on}


class KeepsDType(nn.Module):
    """A module whose tensors keep their dtype through `.half()` and `.to(dtype)`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
