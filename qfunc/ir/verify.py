"""The invariants of a graph, checked as data."""

from __future__ import annotations

from returns.result import Failure, Success

from qfunc.errors import InvalidGraph, Problem, several
from qfunc.ir.graph import Graph
from qfunc.ir.node import Node
from qfunc.ir.value import Arg, Token
from qfunc.result import R


def verify(graph: Graph) -> R[Graph]:
    """The same graph when it is well formed, else every broken invariant.

    Each node is listed once under its own id, is defined before it is used, names only objects of the graph's table,
    and exactly one `output` ends the graph.
    """
    found: list[Problem] = []
    if set(graph.order) != set(graph.nodes) or len(graph.order) != len(graph.nodes):
        found.append(InvalidGraph("graph", "the order does not list each node exactly once"))
    defined: set[str] = set()
    for id in graph.order:
        node = graph.nodes.get(id)
        if node is None:
            continue
        if node.id != id:
            found.append(InvalidGraph(id, f"is stored under another id than its own, {node.id!r}"))
        late = [used for used in node.uses() if used not in defined]
        found += [InvalidGraph(id, f"uses {used!r} before its definition") for used in late]
        defined.add(id)
        found += [InvalidGraph(id, f"names an object that is not there, {token!r}") for token in _missing(graph, node)]
    outputs = [id for id in graph.order if id in graph.nodes and graph.nodes[id].kind == "output"]
    if len(outputs) != 1 or graph.order[-1:] != tuple(outputs):
        found.append(InvalidGraph("graph", "there must be exactly one output node, at the end"))
    return Failure(several(found)) if found else Success(graph)


def _missing(graph: Graph, node: Node) -> list[Token]:
    found: list[Token] = []

    def look(leaf: Arg) -> Arg:
        if isinstance(leaf, Token) and leaf.id not in graph.objects:
            found.append(leaf)
        return leaf

    node.map(look)
    return found
