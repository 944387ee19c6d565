"""Modules with switches: plain booleans for their forward, so that nothing waits for a tensor, kept in the state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qfunc.errors import BadConfig
from qfunc.result import QuantException


class Switched(nn.Module):
    """A module of `SWITCHES`, each on or off: a `uint8` buffer of its name in the `state_dict`, a boolean in `on`."""

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

    def read_switches(self) -> None:
        """Take the switches as they are in the state, which others may have written to."""
        held = {name: self.get_buffer(name) for name in self.on}
        self.on = {name: self.on[name] if value.is_meta else bool(value.item()) for name, value in held.items()}

    def train(self, mode: bool = True) -> Any:
        """Set the mode, and see how the switches are in the state: averages of models, say, copy buffers alone."""
        self.read_switches()
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.read_switches()

    def __prepare_scriptable__(self) -> Any:
        """Refuse `torch.jit.script`, which has no gradients of qfunc's."""
        remedy = "script what materialize gives after absorb and convert"
        raise QuantException(
            BadConfig(type(self).__name__, "what trains with fake quantization is not scripted", remedy)
        )


class KeepsDType(nn.Module):
    """A module whose tensors keep their dtype through `.half()` and `.to(dtype)`."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
