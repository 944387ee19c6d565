"""How the modules of qfunc's own nodes are made: of literal arguments, and of what the evaluator makes of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qfunc.edge.evaluate import Evaluator
from qfunc.ir import Arg, Expression, Node, Opaque
from qfunc.numerics.grid import Affine
from qfunc.params import QuantizeWeight

Builder = Callable[[Node, Evaluator, Mapping[str, Opaque]], nn.Module]
Weights = tuple[Tensor, Tensor, Tensor | None]


class Literals:
    """A node's arguments as attributes."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return self._node.get(name)


def literal(make: Callable[[Any], nn.Module]) -> Builder:
    """A module made of the node's literal arguments alone."""
    return lambda node, _evaluator, _objects: make(Literals(node))


def weights(node: Node, evaluator: Evaluator) -> Weights:
    """Integer weight, its scale per output channel, and the bias, as kernels take them."""
    weight, bias = node.get("weight"), node.get("bias")
    assert isinstance(weight, QuantizeWeight)
    quantized = evaluator.quantized(weight)
    channels = quantized.values.shape[0]
    scale = quantized.qparams.scale.to(torch.float32).expand(channels).contiguous()
    floats = evaluator.tensor(bias).to(torch.float32).clone() if isinstance(bias, Expression) else None
    return quantized.values.contiguous(), scale, floats


def output(affine: Affine | None) -> tuple[float, int, Any]:
    """Scale, zero point and dtype of a kernel's result; None is float32."""
    return (1.0, 0, "float32") if affine is None else (affine.scale, affine.zero_point, affine.dtype)


def dims(dim: Arg) -> tuple[int, ...]:
    """Dimensions to reduce, all for None."""
    match dim:
        case None:
            return ()
        case int():
            return (dim,)
        case _:
            return tuple(getattr(dim, "items", dim))  # type: ignore[arg-type]
