"""Edits: a `Draft` gathers many and commits them as one new graph, in O(nodes)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import replace

from pyrsistent import PMap, pmap

from qfunc.ir.graph import Graph, Note
from qfunc.ir.node import Node, substitute


def users(graph: Graph) -> dict[str, tuple[str, ...]]:
    """For each id, the ids of the nodes that use it, in order and without repetition; O(edges)."""
    found: dict[str, dict[str, None]] = {id: {} for id in graph.order}
    for node in graph:
        for used in node.uses():
            found[used][node.id] = None
    return {id: tuple(by) for id, by in found.items()}


def fresh_id(base: str, taken: Container[str]) -> str:
    """`base`, or `base_1`, `base_2`, ... whichever is free first.

    >>> fresh_id("x", {"x", "x_1"})
    'x_2'
    """
    if base not in taken:
        return base
    index = 1
    while f"{base}_{index}" in taken:
        index += 1
    return f"{base}_{index}"


class Draft:
    """A graph under edit, confined to the function that makes it; `commit` gives the new immutable graph.

    Redirections are kept aside and applied once, so that any number of edits costs one walk over the graph.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._changed: dict[str, Node] = {}
        self._erased: set[str] = set()
        self._before: dict[str, list[str]] = {}
        self._after: dict[str, list[str]] = {}
        self._redirect: dict[str, str] = {}
        self._notes: list[Note] = []

    def __getitem__(self, id: str) -> Node:
        return self._changed.get(id) or self._graph.nodes[id]

    def __contains__(self, id: object) -> bool:
        return id in self._changed or id in self._graph.nodes

    def put(self, node: Node) -> None:
        """Replace the node of the same id."""
        if node is not self[node.id]:
            self._changed[node.id] = node

    def erase(self, ids: Iterable[str]) -> None:
        """Remove nodes; their users must be redirected or removed as well."""
        self._erased.update(ids)

    def fresh(self, base: str) -> str:
        """An id that is neither in the graph nor in this draft."""
        return fresh_id(base, self)

    def insert_before(self, anchor: str, node: Node) -> None:
        """Put a new node right before `anchor`, after what was put there earlier."""
        assert node.id not in self, node.id
        assert anchor in self, anchor
        self._changed[node.id] = node
        self._before.setdefault(anchor, []).append(node.id)

    def insert_after(self, anchor: str, node: Node) -> None:
        """Put a new node right after `anchor`, after what was put there earlier."""
        assert node.id not in self, node.id
        assert anchor in self, anchor
        self._changed[node.id] = node
        self._after.setdefault(anchor, []).append(node.id)

    def redirect(self, old: str, new: str) -> None:
        """Make all users of `old` in the original graph use `new`, or what `new` is redirected to."""
        self._redirect.pop(old, None)
        assert self._target(new) != old, (old, new)
        self._redirect[old] = new

    def note(self, node: str, text: str) -> None:
        """Add a note to the graph."""
        self._notes.append(Note(node, text))

    def commit(self) -> Graph:
        """The edited graph, or the very same one when nothing was edited."""
        known = frozenset(self._graph.notes)
        notes = tuple(note for note in dict.fromkeys(self._notes) if note not in known)
        if not (self._changed or self._erased or self._redirect):
            return replace(self._graph, notes=self._graph.notes + notes) if notes else self._graph
        moved = {old: self._target(old) for old in self._redirect}
        turn = substitute(moved)
        changed: dict[str, Node] = {}
        order: list[str] = []
        for id in self._places():
            if id in self._erased:
                continue
            order.append(id)
            node = self[id]
            if moved and id in self._graph.nodes and not moved.keys().isdisjoint(node.uses()):
                node = node.map(turn)
            if id in self._changed or node is not self._graph.nodes[id]:
                changed[id] = node
        nodes = self._nodes(changed, order)
        return replace(self._graph, nodes=nodes, order=tuple(order), notes=self._graph.notes + notes)

    def _nodes(self, changed: dict[str, Node], order: list[str]) -> PMap[str, Node]:
        """The new map of nodes: made anew, several times as fast, where much has changed, else shared with the old."""
        old = self._graph.nodes
        if 4 * (len(changed) + len(self._erased)) > len(order):
            return pmap({id: changed.get(id) or old[id] for id in order})
        nodes = old.evolver()
        for id, node in changed.items():
            nodes[id] = node
        for id in self._erased:
            if id in old:
                nodes.remove(id)
        return nodes.persistent()

    def _places(self) -> Iterator[str]:
        """All ids in order; what was inserted beside an inserted node has its place beside that."""
        todo = [(id, False) for id in reversed(self._graph.order)]
        while todo:
            id, between = todo.pop()
            if between or not (id in self._before or id in self._after):
                yield id
            else:
                todo += [(new, False) for new in reversed(self._after.get(id, ()))]
                todo.append((id, True))
                todo += [(new, False) for new in reversed(self._before.get(id, ()))]

    def _target(self, id: str) -> str:
        """Where a chain of redirections ends; what lies on it is sent there at once, so that long ones stay linear."""
        path: list[str] = []
        while id in self._redirect:
            path.append(id)
            id = self._redirect[id]
        self._redirect.update(dict.fromkeys(path, id))
        return id
