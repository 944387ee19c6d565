"""Selectors of operators for `QConfigMapping.set_selected`: functions from a graph to the ids of some of its nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from qfunc.ir import Expression, Graph, Node
from qfunc.params import loads

LAYERS = ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear")


def depthwise_convolutions(graph: Graph) -> frozenset[str]:
    """The convolutions whose every group has one input channel.

    >>> from torch import nn
    >>> from qfunc import trace
    >>> model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 8, 3, groups=4)).eval()
    >>> sorted(depthwise_convolutions(trace(model).unwrap()))
    ['_1']
    """
    return frozenset(node.id for node in graph if node.kind.startswith("conv") and _is_depthwise(node))


def layers(graph: Graph) -> frozenset[str]:
    """All convolutions and linear layers."""
    return frozenset(node.id for node in graph if node.kind in LAYERS)


def first_layer(graph: Graph) -> frozenset[str]:
    """The first convolution or linear layer in graph order, which sees the inputs as they are."""
    return frozenset([node.id for node in graph if node.kind in LAYERS][:1])


def last_layer(graph: Graph) -> frozenset[str]:
    """The last convolution or linear layer in graph order, which makes the predictions."""
    return frozenset([node.id for node in graph if node.kind in LAYERS][-1:])


SELECTORS: Mapping[str, Callable[[Graph], frozenset[str]]] = MappingProxyType(
    {function.__name__: function for function in (depthwise_convolutions, first_layer, last_layer, layers)}
)
"""The selectors by the names that they have in documents."""


def _is_depthwise(node: Node) -> bool:
    weight = node.get("weight")
    if not isinstance(weight, Expression):
        return False
    shape = next(loads(weight)).shape
    if node.kind.startswith("conv_transpose"):
        return shape[0] == node.get("groups") and shape[0] > 1
    return shape[1] == 1 and node.get("groups") != 1
