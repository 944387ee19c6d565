"""Patterns as data, and the one matcher.

A pattern is a chain: each step takes the value of the step before it, which nobody else uses. A non-match is no error;
it says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qfunc.ir import Graph, Node, Ref


@dataclass(frozen=True, slots=True)
class Step:
    """One operator of a pattern: its possible kinds, and, where only some ways of writing it are meant, those forms.

    `takes` names the arguments that may hold the previous step's value.
    """

    kinds: tuple[str, ...]
    forms: frozenset[str] = frozenset()
    takes: tuple[str, ...] = ("input",)


@dataclass(frozen=True, slots=True)
class Pattern:
    """A named chain of steps."""

    name: str
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """The nodes that a pattern matched, in its order, and for each the argument that took the previous value."""

    pattern: Pattern
    nodes: tuple[Node, ...]
    taken: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NoMatch:
    """Why a pattern does not match; `depth` is how many of its steps did."""

    node: str
    reason: str
    depth: int


def form_of(node: Node) -> str:
    """How a node was written, as one name: a module's type, a function's name, or a method's with a leading dot.

    >>> from qfunc.ir import Origin, Written
    >>> form_of(Node("y", "relu", origin=Origin(written=Written("call_method", "relu"))))
    '.relu'
    """
    written = node.origin.written
    if written is None:
        return node.kind
    match written.op:
        case "call_module":
            return node.origin.type
        case "call_method":
            return f".{written.target}"
        case _:
            return written.target


def match(graph: Graph, users: Mapping[str, tuple[str, ...]], pattern: Pattern, root: Node) -> Match | NoMatch:
    """Match a pattern whose first step is `root`; `users` is `qfunc.ir.users(graph)`."""
    nodes, taken = [root], [""]
    miss = _fits(pattern.steps[0], root)
    if miss:
        return NoMatch(root.id, miss, 0)
    for depth, step in enumerate(pattern.steps[1:], 1):
        previous = nodes[-1]
        if len(users[previous.id]) != 1:
            return NoMatch(previous.id, f"its value has {len(users[previous.id])} users", depth)
        node = graph[users[previous.id][0]]
        miss = _fits(step, node)
        if miss:
            return NoMatch(node.id, miss, depth)
        slots = [name for name in step.takes if node.has(name) and _is(node, name, previous)]
        if len(slots) != 1 or sum(used == previous.id for used in node.uses()) != 1:
            return NoMatch(node.id, f"does not take {previous.id!r} exactly once, as {' or '.join(step.takes)}", depth)
        nodes.append(node)
        taken.append(slots[0])
    return Match(pattern, tuple(nodes), tuple(taken))


def _is(node: Node, name: str, value: Node) -> bool:
    return node.get(name) == Ref(value.id)


def _fits(step: Step, node: Node) -> str:
    """An empty text when the node is what the step wants, else why not."""
    if node.kind not in step.kinds:
        return f"is {node.kind}, not {' or '.join(step.kinds)}"
    if step.forms and form_of(node) not in step.forms:
        return f"is written as {form_of(node)}, which this pattern does not cover"
    if node.aliased:
        return "shares memory with a value that is changed in place"
    if node.post:
        return "is fused already"
    return ""
