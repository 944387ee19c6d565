"""Which module computes a node of qfunc's own: an observer, a quantizer, a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from qfunc.edge.evaluate import Evaluator
from qfunc.edge.kernels.affine import Dequantize, Quantize
from qfunc.edge.observer import ObserverModule
from qfunc.ir import Node, Opaque, Token
from qfunc.numerics.grid import Affine

Builder = Callable[[Node, Evaluator, Mapping[str, Opaque]], nn.Module]


def _observer(node: Node, evaluator: Evaluator, objects: Mapping[str, Opaque]) -> nn.Module:
    token = node.get("site")
    assert isinstance(token, Token)
    return ObserverModule(objects[token.id].value)


def _quantize(node: Node, evaluator: Evaluator, objects: Mapping[str, Opaque]) -> nn.Module:
    return Quantize(affine(node, "output"))


def _dequantize(node: Node, evaluator: Evaluator, objects: Mapping[str, Opaque]) -> nn.Module:
    return Dequantize(affine(node, "input"))


def affine(node: Node, name: str) -> Affine:
    """The qparams that a node holds as an argument."""
    value = node.get(name)
    assert isinstance(value, Affine)
    return value


LEAVES: Mapping[str, Builder] = MappingProxyType(
    {"observe": _observer, "quantize": _quantize, "dequantize": _dequantize}
)
"""Kind of node -> how its module is made. Such a node's `inputs` argument holds what the module is called with."""
