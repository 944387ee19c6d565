"""Recording what `torch.fx` loses or refuses: statements that write in place, lists of parts of a tensor."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

AUGMENTED = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod"),
    *("ipow", "iand", "ior", "ixor", "ilshift", "irshift"),
)
"""The augmented assignments, `x += y` and its like, by their name in `operator`."""


class StatementProxy(fx.Proxy):
    """A traced value whose augmented assignments and item assignments are recorded as calls of `operator`'s.

    Where it is a tensor divided into a known number of parts, as `x.chunk(2)` is, it can be iterated and has a length.
    """

    def __len__(self) -> int:
        count = _count_of_parts(self.node)
        return super().__len__() if count is None else count

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


def _records(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda proxy, other: proxy.tracer.create_proxy("call_function", function, (proxy, other), {})


for _name in AUGMENTED:
    setattr(StatementProxy, f"__{_name}__", _records(getattr(operator, _name)))


class StatementTracer(fx.Tracer):
    """Symbolic tracing with `StatementProxy`.

    A `GraphModule` traces its own code when it is unpickled; one that holds such statements names this class for it.
    """

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        """The parts of a tensor that is divided into a known number; else as fx has it."""
        count = _count_of_parts(obj.node)
        if count is None:
            return super().iter(obj)
        parts: list[Any] = [self.create_proxy("call_function", operator.getitem, (obj, i), {}) for i in range(count)]
        return iter(parts)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The value that stands for `node` in the user's code."""
        return StatementProxy(node, self)


def _count_of_parts(node: fx.Node) -> int | None:
    """How many parts a call of `chunk` or `split` gives; None where that takes a size to tell.

    A tensor with fewer elements along the dimension has fewer chunks than asked for, which is an error when it runs.
    """
    if node.target not in (torch.chunk, torch.split, "chunk", "split"):
        return None
    by_name = {**dict(zip(("input", "parts", "dim"), node.args, strict=False)), **node.kwargs}
    names = ("parts", "chunks", "split_size", "split_size_or_sections")
    parts = next((by_name[name] for name in names if name in by_name), None)
    if node.target in (torch.chunk, "chunk"):
        return parts if isinstance(parts, int) else None
    return len(parts) if isinstance(parts, (list, tuple)) else None
