"""Calls of operators that a lazy backend runs on integers, which are float all the same, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from qfunc.ir import Graph, Node, Ref, TensorFact
from qfunc.ops import BY_NAME
from qfunc.ops.shapes import PARTS


def float_because(node: Node, graph: Graph) -> str:
    """Why this call of an operator that is quantized otherwise is not; empty where it is.

    >>> from pyrsistent import pmap
    >>> padded = Node("y", "pad", (("input", 0), ("pad", (1, 1)), ("mode", "constant"), ("value", 1.0)))
    >>> float_because(padded, Graph(pmap({"y": padded}), ("y",)))
    'it pads with another number than zero, which has no code of its own'
    """
    found = _EXCEPTIONS.get(node.kind)
    return found(node, graph) if found is not None else ""


def _pad(node: Node, _: Graph) -> str:
    zero = node.get("mode") != "constant" or node.get("value") in (None, 0)
    return "" if zero else "it pads with another number than zero, which has no code of its own"


def _interpolate(node: Node, _: Graph) -> str:
    mode = node.get("mode")
    return "" if mode != "bicubic" else "bicubic interpolation leaves the range of its input"


def _dropout(node: Node, graph: Graph) -> str:
    training = node.get("training")
    follows = training is True and graph.training  # what was traced in training is evaluated in the end
    return "" if training is False or follows else "it drops at random, also in evaluation"


def _getitem(node: Node, graph: Graph) -> str:
    (whole,) = (value for name, value in node.args if name == "input")
    if isinstance(whole, Ref) and graph[whole.id].kind in PARTS:
        return "" if isinstance(node.get("index"), int) else "several parts are taken at once"
    return "" if isinstance(whole, Ref) and gives_tensor(graph[whole.id], graph) else "it takes from what is no tensor"


def gives_tensor(node: Node, graph: Graph) -> bool:
    """Whether a value is known to be a tensor, and not a tuple of them."""
    while node.fact is None and node.kind == "getitem":
        whole = node.get("input")
        if not isinstance(whole, Ref):
            return False
        if graph[whole.id].kind in PARTS:
            return isinstance(node.get("index"), int)
        node = graph[whole.id]
    if node.fact is not None or node.kind not in BY_NAME:
        return isinstance(node.fact, TensorFact)
    return node.kind not in PARTS


def _div(node: Node, _: Graph) -> str:
    if node.get("rounding_mode") is not None:
        return "its result is rounded to whole numbers"
    both = isinstance(node.get("input"), Ref) and isinstance(node.get("other"), Ref)
    return "no kernel divides codes by codes" if both else ""


def _dtype(node: Node, _: Graph) -> str:
    return "" if node.get("dtype") is None else "it is taken in another dtype"


_EXCEPTIONS: Mapping[str, Callable[[Node, Graph], str]] = MappingProxyType(
    {
        "pad": _pad,
        "interpolate": _interpolate,
        "dropout": _dropout,
        "getitem": _getitem,
        "div": _div,
        "sum": _dtype,
        "mean": _dtype,
    }
)
