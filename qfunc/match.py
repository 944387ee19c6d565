"""Patterns as data, and the one matcher.

A pattern is a chain of steps: each takes the value of the step before it, which nobody else uses. What else a step is
given may be restricted too, so that a pattern can be a tree. A non-match is no error; it says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from qfunc.ir import Arg, Graph, Node, Origin, Ref


class MatchAllNode:
    """In a pattern of the user's: any value, which is no part of the match."""


@dataclass(frozen=True, slots=True)
class Anything:
    """A side that may be any value."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A side that must be this value."""

    value: Arg


@dataclass(frozen=True, slots=True)
class Step:
    """One operator of a pattern: its possible kinds, and, where only some ways of writing it are meant, those forms.

    `takes` names the arguments that may hold the previous step's value, `#0` being the first as written. `sides` says
    what other arguments as written must be: anything, a constant, or the end of a chain of its own; with `arity` the
    call must be written with so many operands, and no options by keyword. A step that `repeats` matches one or more
    times.
    """

    kinds: tuple[str, ...] = ()
    forms: frozenset[str] = frozenset()
    takes: tuple[str, ...] = ("input",)
    sides: tuple[tuple[int, Side], ...] = ()
    arity: int | None = None
    repeats: bool = False


Side: TypeAlias = "Anything | Constant | tuple[Step, ...]"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A named chain of steps. With `trains=False` it is for evaluation only.

    It leaves a chain alone that one of `unless` follows: the last operator is to be fused with that one instead.
    """

    name: str
    steps: tuple[Step, ...]
    trains: bool = True
    unless: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True)
class Matched:
    """A node that a step matched: the argument that took the previous value, and what its sides matched.

    A side is the argument itself, or where a chain was asked for, what that matched.
    """

    node: Node
    taken: str = ""
    sides: tuple[tuple[int, Arg | Chain], ...] = ()


Chain: TypeAlias = "tuple[Matched, ...]"


@dataclass(frozen=True, slots=True)
class Match:
    """What the steps of a pattern matched, in order."""

    pattern: Pattern
    parts: Chain

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes that are part of the match, those of sides included."""
        return tuple(_nodes(self.parts))


@dataclass(frozen=True, slots=True)
class NoMatch:
    """Why a pattern does not match; `depth` is how many of its steps did.

    `wanted` are the kinds of operators that the pattern wants there, where that is the reason.
    """

    node: str
    reason: str
    depth: int
    wanted: tuple[str, ...] = ()


WRONG_KIND = "is another operator"

Users: TypeAlias = Mapping[str, tuple[str, ...]]


def form_of(node: Node) -> str:
    """How a node was written, as one name: a module's type, a function's name, or a method's with a leading dot.

    >>> from qfunc.ir import Origin, Written
    >>> form_of(Node("y", "relu", origin=Origin(written=Written("call_method", "relu"))))
    '.relu'
    """
    return form_of_origin(node.origin) or node.kind


def form_of_origin(origin: Origin) -> str:
    """How a call was written; empty for what nobody wrote."""
    written = origin.written
    if written is None:
        return ""
    match written.op:
        case "call_module":
            return origin.type
        case "call_method":
            return f".{written.target}"
        case _:
            return written.target


def match(graph: Graph, users: Users, pattern: Pattern, root: Node) -> Match | NoMatch:
    """Match a pattern whose first step is `root`; `users` is `qfunc.ir.users(graph)`."""
    first = _step(graph, users, pattern.steps[0], root, "", 0)
    if isinstance(first, NoMatch):
        return first
    parts = [first]
    for depth, step in enumerate(pattern.steps[1:], 1):
        part = _next(graph, users, step, parts[-1].node, depth)
        if isinstance(part, NoMatch):
            return part
        parts.append(part)
        while step.repeats and isinstance(part := _next(graph, users, step, parts[-1].node, depth), Matched):
            parts.append(part)
    last = parts[-1].node
    if any(isinstance(_next(graph, users, step, last, len(parts)), Matched) for step in pattern.unless):
        return NoMatch(last.id, "is fused with the operator behind it", len(parts) - 1)
    return Match(pattern, tuple(parts))


def _next(graph: Graph, users: Users, step: Step, previous: Node, depth: int) -> Matched | NoMatch:
    """Match a step with the one user of the previous value."""
    readers = users[previous.id]
    if len(readers) != 1:
        return NoMatch(previous.id, f"its value has {len(readers)} users: {_listed(readers)}", depth)
    node = graph[readers[0]]
    miss = _misfit(step, node)
    if miss is not None:
        return NoMatch(node.id, miss, depth, step.kinds or tuple(sorted(step.forms)))
    slots = [name for name in _slots(node, step) if node.get(name) == Ref(previous.id)]
    if sum(used == previous.id for used in node.uses()) != 1:
        return NoMatch(node.id, "reads it more than once", depth)
    if len(slots) != 1:
        return NoMatch(node.id, f"does not take it as {' or '.join(step.takes)}", depth)
    return _step(graph, users, step, node, slots[0], depth)


def _step(graph: Graph, users: Users, step: Step, node: Node, taken: str, depth: int) -> Matched | NoMatch:
    """Match a step with a node whose argument `taken` is settled."""
    miss = _misfit(step, node)
    if miss is not None:
        return NoMatch(node.id, miss, depth, step.kinds or tuple(sorted(step.forms)))
    return _with_sides(graph, users, step, node, taken, depth)


def _with_sides(graph: Graph, users: Users, step: Step, node: Node, taken: str, depth: int) -> Matched | NoMatch:
    sides: list[tuple[int, Arg | Chain]] = []
    for position, side in step.sides:
        slot = _slot(node, f"#{position}")
        if slot == taken:
            continue
        found = _side(graph, users, side, node.get(slot), depth) if slot else NoMatch(node.id, "is absent", depth)
        if isinstance(found, NoMatch):
            return NoMatch(node.id, f"its argument {position} does not fit: {found.reason}", depth)
        sides.append((position, found))
    return Matched(node, taken, tuple(sides))


def _side(graph: Graph, users: Users, side: Side, value: Arg, depth: int) -> Arg | Chain | NoMatch:
    match side:
        case Anything():
            return value
        case Constant(wanted):
            return value if value == wanted else NoMatch("", f"it is {value!r}, not {wanted!r}", depth)
        case steps:
            return _ending(graph, users, steps, value, depth)


def _ending(graph: Graph, users: Users, steps: tuple[Step, ...], value: Arg, depth: int) -> Chain | NoMatch:
    """Match a chain whose last step computes `value`, which nobody else reads."""
    *before, step = steps
    if not isinstance(value, Ref):
        return NoMatch("", f"it is {value!r}, no value of the graph", depth)
    node = graph[value.id]
    if len(users[node.id]) != 1:
        return NoMatch(node.id, f"{node.id!r} has {len(users[node.id])} users", depth)
    slot = next(_slots(node, step), "") if before else ""
    found = _step(graph, users, step, node, slot, depth)
    if isinstance(found, NoMatch) or not before:
        return found if isinstance(found, NoMatch) else (found,)
    rest = _ending(graph, users, tuple(before), node.get(slot) if slot else None, depth)
    return rest if isinstance(rest, NoMatch) else (*rest, found)


def _slots(node: Node, step: Step) -> Iterator[str]:
    """The arguments of a node that may hold the previous step's value."""
    return (name for name in (_slot(node, take) for take in step.takes) if name)


def _slot(node: Node, name: str) -> str:
    """The name of an argument that is given by name or by position as written; empty where there is none."""
    if not name.startswith("#"):
        return name if node.has(name) else ""
    positions = operands(node)
    position = int(name[1:])
    return positions[position] if position < len(positions) else ""


def operands(node: Node) -> tuple[str, ...]:
    """The names of a call's arguments by position as written; values given by keyword stand where they belong."""
    written = node.origin.written
    if written is None:
        return ()
    given = {name for _, name in written.kwargs if isinstance(node.get(name), Ref)}
    return (*(name.lstrip("*") for name in written.args), *(name for name, _ in node.args if name in given))


def _misfit(step: Step, node: Node) -> str | None:
    """None when the node is what the step wants, else why not; only named, not spelled out, for a wrong kind."""
    if step.kinds and node.kind not in step.kinds:
        return WRONG_KIND
    if step.forms and form_of(node) not in step.forms:
        if not step.kinds:
            return WRONG_KIND
        return f"is written as {form_of(node)}, which this pattern does not cover"
    if node.aliased:
        return "shares memory with a value that is changed in place"
    if node.post or node.kind == "owned":
        return "is fused already"
    return None if step.arity is None else _other_arity(step.arity, node)


def _other_arity(arity: int, node: Node) -> str | None:
    """Why a call does not have so many operands and nothing else."""
    given = len(operands(node))
    if given != arity:
        return f"is written with {given} operands, not {arity}"
    written = node.origin.written
    options = [keyword for keyword, name in written.kwargs if not isinstance(node.get(name), Ref)] if written else []
    return f"is given {', '.join(options)}, which the pattern does not take" if options else None


def _nodes(chain: Chain) -> Iterator[Node]:
    for part in chain:
        for _, side in part.sides:
            if isinstance(side, tuple) and side and all(isinstance(item, Matched) for item in side):
                yield from _nodes(side)  # type: ignore[arg-type]
        yield part.node


def _listed(ids: tuple[str, ...]) -> str:
    more = f" and {len(ids) - 3} more" if len(ids) > 3 else ""
    return ", ".join(ids[:3]) + more
