"""Which values of a graph are no tensors."""

from __future__ import annotations

from qfunc.ir import Graph, Node, TensorFact

_NUMBERS = frozenset({".size", ".dim", ".numel", ".ndimension", "builtins.len"})
_SIZES = frozenset({"shape", "ndim"})
_ATTRIBUTES = _SIZES | {"dtype", "device"}


def asks_size(node: Node) -> bool:
    """Whether it asks a tensor for nothing but its size.

    >>> asks_size(Node("n", ".size", (("0", 3),))), asks_size(Node("n", "relu"))
    (True, False)
    """
    return node.kind in _NUMBERS or (node.kind == "builtins.getattr" and node.get("1") in _SIZES)


def non_tensors(graph: Graph) -> set[str]:
    """Values that are numbers, sizes or other non-tensors: sizes of tensors, and what is computed from such alone.

    An input is one when its default is a number, or when the example showed tensors, but none for it.
    """
    found: set[str] = set()
    example = any(isinstance(node.fact, TensorFact) for node in graph)
    for node in graph:
        if node.kind == "placeholder" and not isinstance(node.fact, TensorFact):
            default = node.get("default") if node.has("default") else None
            if (example and node.fact is None) or isinstance(default, (bool, int, float)):
                found.add(node.id)
            continue
        used = list(node.uses())
        attribute = node.kind == "builtins.getattr" and node.get("1") in _ATTRIBUTES
        derived = bool(used) and node.kind not in ("output", "cat", "stack") and all(value in found for value in used)
        if node.kind in _NUMBERS or attribute or (derived and not isinstance(node.fact, TensorFact)):
            found.add(node.id)
    return found
