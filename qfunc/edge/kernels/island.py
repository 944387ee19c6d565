"""Float islands: an operator computed in float, on operands of which some are codes, whose result may become codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from qfunc.edge.kernels.affine import Dequantize, Quantize
from qfunc.edge.kernels.base import Kernel
from qfunc.engines.island import IslandCall
from qfunc.ir import Arg, DictArg, ListArg, Name, Ref, SliceArg
from qfunc.ops import BY_NAME, KINDS, canonical_call, resolve

# Looked up once: a name costs imports, which each call would try anew, and which end a graph of torch.compile.
_FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {target: resolve(target) for row in KINDS for target, _ in (row.call, row.full_call) if target}
)


class Island(Kernel):
    """`quantize(operator(dequantize(codes), ...))`; the operator's parameters are float buffers under their names.

    An input of less than `batched_rank` axes is no batch, where the operator needs one.
    """

    def __init__(self, call: IslandCall, parameters: Mapping[str, Tensor], *, batched_rank: int | None = None) -> None:
        super().__init__()
        self.call, self.batched_rank = call, batched_rank or 0
        for name, value in parameters.items():
            self.register_buffer(name, value)
        self._parameters_named = tuple(parameters)
        self._into = nn.ModuleList(nn.Identity() if grid is None else Dequantize(grid) for grid in call.grids)
        self._out_of = nn.Identity() if call.output is None else Quantize(call.output)

    def forward(self, *inputs: Any) -> Tensor:
        """The result on operands given as the call's `grids` say."""
        values = [decode(value) for decode, value in zip(self._into, inputs, strict=True)]
        named = {name: filled(arg, values) for name, arg in self.call.args}
        named |= {name: getattr(self, name) for name in self._parameters_named}
        result = self._computed(named)
        for post in self.call.posts:
            result = computed(post.kind, {"input": result, **{name: filled(arg, values) for name, arg in post.args}})
        floats: Tensor = self._out_of(result)
        return floats

    def _computed(self, named: Mapping[str, Any]) -> Tensor:
        if self.batched_rank and named["input"].dim() < self.batched_rank:
            return computed(self.call.kind, {**named, "input": named["input"].unsqueeze(0)}).squeeze(0)
        return computed(self.call.kind, named)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return " + ".join([self.call.kind, *(post.kind for post in self.call.posts)])


def computed(kind: str, named: Mapping[str, Any]) -> Tensor:
    """An operator of the vocabulary on values."""
    target, names = canonical_call(BY_NAME[kind], tuple(named.items()))
    positional = [named[name] for name in names if not name.endswith("=")]
    keywords = {name[:-1]: named[name[:-1]] for name in names if name.endswith("=")}
    result: Tensor = _FUNCTIONS[target](*positional, **keywords)
    return result


def filled(arg: Arg, values: list[Any]) -> Any:
    """An argument with what the kernel is called with in the places kept for it."""
    match arg:
        case Ref(index):
            return values[int(index)]
        case tuple():
            return tuple(filled(item, values) for item in arg)
        case ListArg(items):
            return [filled(item, values) for item in items]
        case DictArg(items):
            return {filled(key, values): filled(value, values) for key, value in items}
        case SliceArg(start, stop, step):
            return slice(filled(start, values), filled(stop, values), filled(step, values))
        case Name(name):
            return resolve(name)
        case _:
            return arg
