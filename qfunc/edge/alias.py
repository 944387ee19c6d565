"""Which values share memory, and what that means for operators that write in place.

An in-place operator whose memory nobody else reads afterwards is the same as its out-of-place twin. Where only the
very value it wrote to is read later, those readers are given its result instead. Anything else (a view that is read
later, an input or a parameter of the model that is written to) is kept exactly as written, and every value of that
memory is marked `aliased`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from qfunc.ir import Node
from qfunc.ir.node import substitute
from qfunc.ops import BY_NAME

_VIEWS = frozenset(
    ("flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "dropout", "identity")
)


def settle_aliases(nodes: Iterable[Node], inplace: Mapping[str, str], as_written: Mapping[str, Node]) -> list[Node]:
    """The nodes with in-place operators made out-of-place where that is exact, and marked `aliased` where it is not.

    Args:
        nodes: the nodes in order, in the vocabulary's terms (which are out-of-place).
        inplace: for each node that writes in place, the value it writes to ("" where that is no node's).
        as_written: each call exactly as written.
    """
    listed = list(nodes)
    if not inplace:
        return listed
    memory = _Memory(listed)
    renamed: dict[str, str] = {}
    result: list[Node] = []
    for position, original in enumerate(listed):
        node = original.map(substitute(renamed)) if renamed else original
        target = renamed.get(inplace.get(node.id, ""), inplace.get(node.id))
        if target is None:
            memory.add(node.id, _may_alias(node), external=node.kind in ("placeholder", "get_attr"))
        else:
            later = memory.read_after(target, position)
            functional = node.kind in BY_NAME
            if functional and later <= {target} and not memory.is_external(target):
                memory.add(node.id, (), external=False)
                if later:
                    renamed = {k: node.id if v == target else v for k, v in renamed.items()} | {target: node.id}
                    memory.move_uses(target, node.id)
            else:
                memory.add(node.id, (target,) if target else tuple(node.uses()), external=not target)
                if later or memory.is_external(node.id):
                    memory.taint(node.id)
        result.append(node)
    turn = substitute(renamed)
    return [_keep(as_written.get(n.id, n).map(turn)) if memory.is_tainted(n.id) else n for n in result]


def _keep(node: Node) -> Node:
    return replace(node, aliased=True)


class _Memory:
    """Groups of values that may share memory: a disjoint-set forest over the nodes seen so far."""

    def __init__(self, nodes: list[Node]) -> None:
        self._parent: dict[str, str] = {}
        self._members: dict[str, list[str]] = {}
        self._external: set[str] = set()
        self._tainted: set[str] = set()
        self._last: dict[str, int] = {used: i for i, node in enumerate(nodes) for used in node.uses()}

    def add(self, id: str, aliases: Iterable[str], *, external: bool) -> None:
        self._parent[id] = id
        self._members[id] = [id]
        if external:
            self._external.add(id)
        for other in aliases:
            self._join(id, other)

    def _join(self, a: str, b: str) -> None:
        a, b = self._root(a), self._root(b)
        if a == b:
            return
        if len(self._members[a]) < len(self._members[b]):
            a, b = b, a
        self._parent[b] = a
        self._members[a] += self._members.pop(b)
        for marks in (self._external, self._tainted):
            if b in marks:
                marks.add(a)

    def _root(self, id: str) -> str:
        while self._parent[id] != id:
            self._parent[id] = self._parent[self._parent[id]]
            id = self._parent[id]
        return id

    def read_after(self, id: str, position: int) -> set[str]:
        """The values of the group of `id` that are read after a position."""
        return {m for m in self._members[self._root(id)] if self._last.get(m, -1) > position} if id else set()

    def move_uses(self, old: str, new: str) -> None:
        self._last[new] = max(self._last.get(new, -1), self._last.pop(old))

    def is_external(self, id: str) -> bool:
        return not id or self._root(id) in self._external

    def taint(self, id: str) -> None:
        self._tainted.add(self._root(id))

    def is_tainted(self, id: str) -> bool:
        return self._root(id) in self._tainted


def _may_alias(node: Node) -> tuple[str, ...]:
    """The inputs whose memory the node's value may share."""
    if node.kind in BY_NAME:
        first = tuple(node.uses())[:1]
        return first if node.kind in _VIEWS else ()
    written = node.origin.written
    if written is None or written.op in ("placeholder", "get_attr", "output"):
        return ()
    if written.op == "call_module":
        fresh = node.kind.startswith("torch.nn.") and "flatten" not in node.kind.lower()
    else:
        fresh = _returns_fresh_memory(written.target.rpartition(".")[2])
    return () if fresh else tuple(dict.fromkeys(node.uses()))


def _returns_fresh_memory(name: str) -> bool:
    """Whether every overload of an aten operator declares that its results share no memory with its arguments."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    return all(returned.alias_info is None for schema in schemas for returned in schema.returns)
