"""Which values of a graph are no tensors."""

from __future__ import annotations

from qfunc.ir import Graph, TensorFact

_NUMBERS = frozenset({".size", ".dim", ".numel", ".ndimension", "builtins.len"})
_ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device"})


def non_tensors(graph: Graph) -> set[str]:
    """Values that are numbers, sizes or other non-tensors: sizes of tensors, and what is computed from such alone."""
    found: set[str] = set()
    for node in graph:
        used = list(node.uses())
        attribute = node.kind == "builtins.getattr" and node.get("1") in _ATTRIBUTES
        derived = bool(used) and node.kind not in ("output", "cat") and all(value in found for value in used)
        if node.kind in _NUMBERS or attribute or (derived and not isinstance(node.fact, TensorFact)):
            found.add(node.id)
    return found
