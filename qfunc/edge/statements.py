"""Recording the statements that write in place, which `torch.fx` loses (`x += y`) or refuses (`x[i] = y`)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

AUGMENTED = (
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod"),
    *("ipow", "iand", "ior", "ixor", "ilshift", "irshift"),
)
"""The augmented assignments, `x += y` and its like, by their name in `operator`."""


class StatementProxy(fx.Proxy):
    """A traced value whose augmented assignments and item assignments are recorded as calls of `operator`'s."""

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

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The value that stands for `node` in the user's code."""
        return StatementProxy(node, self)
