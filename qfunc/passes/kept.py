"""Nodes that are kept exactly as written although the vocabulary knows such calls, and why."""

from __future__ import annotations

from qfunc.ir import Graph, Node
from qfunc.ops import BY_NAME, FORMS


def kind_as_written(node: Node, graph: Graph) -> str:
    """The kind of the call that the user wrote, also where it is kept as it is; of a subclass, that of its base."""
    written = node.origin.written
    if node.kind in BY_NAME or written is None:
        return node.kind
    fact = graph.modules.get(written.target) if written.op == "call_module" else None
    target = written.target if fact is None else fact.base or fact.type
    known = FORMS.get((written.op, target))
    return known[0].name if known else node.kind


def why_kept(node: Node, graph: Graph) -> str:
    """Why such a node is kept as it is."""
    if node.aliased:
        return "its memory is changed in place"
    written = node.origin.written
    fact = graph.modules.get(written.target) if written is not None and written.op == "call_module" else None
    if fact is not None and fact.own:
        return f"its module {fact.own}"
    if fact is not None and fact.base:
        return f"its type is a subclass of {fact.base}, which may compute something else"
    return "it is called with arguments that this operator is not known to take"
