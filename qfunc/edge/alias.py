"""Which values share memory, and what that means for operators that write in place.

An in-place operator is the same as its out-of-place twin where nobody reads that memory afterwards but under the name
written to; those readers are given the result instead. Anything else (a view or a base that is read later, an input or
a parameter of the model that is written to) is kept exactly as written: every value of that memory, inputs too, every
operator that reads it before the last write, and every layer that has it as a parameter, is marked `aliased`, so that
no pass moves, replaces or quantizes it.

Out-of-place twins promote dtypes where writing in place converts; where an example shows that it matters, the operator
is kept as written (see `trace`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from qfunc.edge.schema import is_tensor, may_alias
from qfunc.ir import Arg, Node, Ref
from qfunc.ops import BY_NAME
from qfunc.params import Load


@dataclass(frozen=True, slots=True)
class Write:
    """What a node writes to: the values it may change, whether it gives the one it changed back.

    A `statement`, `x += y`, writes in place only where x is a tensor; a number is left as it was.
    """

    targets: tuple[str, ...]
    returns_target: bool = True
    statement: bool = False


@dataclass(frozen=True, slots=True)
class Settled:
    """The nodes, and for each write that became out-of-place the value that was written to."""

    nodes: tuple[Node, ...]
    converted: Mapping[str, str]


def settle_aliases(
    nodes: Iterable[Node],
    writes: Mapping[str, Write],
    as_written: Mapping[str, Node],
    frozen: Collection[str] = (),
) -> Settled:
    """Make in-place operators out-of-place where that is exact, and mark `aliased` what must stay as it is.

    Args:
        nodes: the nodes in order, in the vocabulary's terms (which are out-of-place).
        writes: the nodes that write in place.
        as_written: each call exactly as written.
        frozen: writes to keep in any case.
    """
    listed = tuple(nodes)
    if not writes:
        return Settled(listed, {})
    return _Settling(listed, writes, as_written, frozen).run()


class _Settling:
    """One run over the nodes. Values go by their current name: that of the write that changed them last."""

    def __init__(
        self,
        nodes: tuple[Node, ...],
        writes: Mapping[str, Write],
        as_written: Mapping[str, Node],
        frozen: Collection[str],
    ) -> None:
        self._nodes, self._writes, self._as_written, self._frozen = nodes, writes, as_written, frozen
        self._memory = _Memory()
        self._now: dict[str, str] = {}
        self._last = {used: position for position, node in enumerate(nodes) for used in node.uses()}
        self._tensors: dict[str, bool | None] = {}
        self._converted: dict[str, str] = {}
        self._kept: set[str] = set()

    def run(self) -> Settled:
        pairs: list[tuple[Node, Node]] = []
        for position, original in enumerate(self._nodes):
            node, plain = original.map(self._turn), self._as_written.get(original.id, original).map(self._turn)
            self._tensors[node.id] = is_tensor(plain, self._tensors)
            write = self._writes.get(node.id)
            if write is None or (write.statement and self._tensors[node.id] is False):
                aliases, external = may_alias(node, plain)
                self._memory.add(node.id, aliases, external=external)
            else:
                self._write(node, write, position)
            pairs.append((node, plain))
        parameters = self._written_parameters(node for node, _ in pairs)
        marked = tuple(self._marked(i, *pair, parameters) for i, pair in enumerate(pairs))
        return Settled(marked, self._converted)

    def _write(self, node: Node, write: Write, position: int) -> None:
        memory = self._memory
        targets = tuple(dict.fromkeys(self._current(target) for target in write.targets))
        one = targets[0] if len(targets) == 1 else ""
        returned = bool(one) and write.returns_target and (not write.statement or self._tensors[one] is True)
        later = {m for target in targets for m in memory.members(target) if self._last.get(m, -1) > position}
        external = not targets or any(memory.is_external(target) for target in targets)
        harmless = not external and (not later or (returned and later == {one}))
        known = node.kind in BY_NAME and bool(one) and node.id not in self._frozen
        if harmless and known:
            self._converted[node.id] = one
            memory.add(node.id, (), external=False)
        else:
            self._kept.add(node.id)
            memory.add(node.id, targets, external=external)
            if not harmless:
                memory.taint(node.id, position)
        if returned:
            self._rename(one, node.id)

    def _rename(self, old: str, new: str) -> None:
        """Whoever reads `old` from here on reads `new`."""
        self._now[old] = new
        self._last[new] = max(self._last.get(new, -1), self._last.pop(old, -1))

    def _current(self, id: str) -> str:
        path = []
        while id in self._now:
            path.append(id)
            id = self._now[id]
        self._now.update(dict.fromkeys(path, id))
        return id

    def _turn(self, leaf: Arg) -> Arg:
        return Ref(self._current(leaf.id)) if isinstance(leaf, Ref) and leaf.id in self._now else leaf

    def _written_parameters(self, nodes: Iterable[Node]) -> frozenset[str]:
        """The names of the model's tensors that are written to."""
        read = ((node.id, node.get("value")) for node in nodes if node.kind == "get_attr")
        return frozenset(
            value.name for id, value in read if isinstance(value, Load) and self._memory.last_write(id) >= 0
        )

    def _marked(self, position: int, node: Node, plain: Node, parameters: Collection[str]) -> Node:
        memory = self._memory
        early = any(memory.last_write(used) > position for used in plain.uses())
        written = early or memory.last_write(node.id) >= 0 or (bool(parameters) and _has_one(node, parameters))
        if node.id in memory and written:
            return replace(plain, aliased=True)
        return plain if node.id in self._kept else node


def _has_one(node: Node, parameters: Collection[str]) -> bool:
    """Whether one of these is a parameter of a call, or of the module that it calls; the write then lasts."""
    written = node.origin.written
    if written is not None and written.op == "call_module":
        return any(name.startswith(f"{written.target}.") for name in parameters)
    return any(isinstance(value, Load) and value.name in parameters for _, value in node.args)


class _Memory:
    """Groups of values that may share memory: a disjoint-set forest over the nodes seen so far."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}
        self._members: dict[str, list[str]] = {}
        self._external: set[str] = set()
        self._written: dict[str, int] = {}

    def __contains__(self, id: object) -> bool:
        return id in self._parent

    def add(self, id: str, aliases: Iterable[str], *, external: bool) -> None:
        self._parent[id] = id
        self._members[id] = [id]
        if external:
            self._external.add(id)
        for other in aliases:
            self._join(id, other)

    def members(self, id: str) -> list[str]:
        return self._members[self._root(id)]

    def is_external(self, id: str) -> bool:
        return self._root(id) in self._external

    def taint(self, id: str, position: int) -> None:
        """Note a write at a position, after which other values of the group are read."""
        self._written[self._root(id)] = position

    def last_write(self, id: str) -> int:
        """Where the group of `id` is written to last, of the writes noted; -1 where there is none."""
        return self._written.get(self._root(id), -1)

    def _join(self, a: str, b: str) -> None:
        a, b = self._root(a), self._root(b)
        if a == b:
            return
        if len(self._members[a]) < len(self._members[b]):
            a, b = b, a
        self._parent[b] = a
        self._members[a] += self._members.pop(b)
        if b in self._external:
            self._external.add(a)
        if b in self._written:
            self._written[a] = max(self._written.get(a, -1), self._written.pop(b))

    def _root(self, id: str) -> str:
        while self._parent[id] != id:
            self._parent[id] = self._parent[self._parent[id]]
            id = self._parent[id]
        return id
