"""Points of a graph that qparams belong to: values, and single uses of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from qfunc.ir import Node, refs


@dataclass(frozen=True, slots=True)
class Edge:
    """One use of a value: the `index`-th reference in the argument `slot` of the node `user`.

    Arguments of post-ops have slots `post.0.other`, ....
    """

    user: str
    slot: str
    index: int = 0


Point: TypeAlias = Edge | str
"""Where qparams belong: to one use of a value, or to the value of a node, by its id."""


def used(node: Node, edge: Edge) -> str | None:
    """The value that an edge carries; None where there is no such use."""
    values = values_in(node, edge.slot)
    return values[edge.index] if 0 <= edge.index < len(values) else None


def values_in(node: Node, slot: str) -> tuple[str, ...]:
    """The values in one argument of a node or of an operator fused behind it, in order."""
    name, args = slot, node.args
    if slot.startswith("post."):
        position, _, name = slot.removeprefix("post.").partition(".")
        args = next((post.args for index, post in enumerate(node.post) if str(index) == position), ())
    return tuple([value for key, arg in args if key == name for value in refs(arg)])


def edges_by_slot(edges: Iterable[Edge]) -> dict[tuple[str, str], list[Edge]]:
    """Edges by user and slot, each list in order: so that an argument of many values is looked through once."""
    found: dict[tuple[str, str], list[Edge]] = {}
    for edge in sorted(edges, key=lambda edge: (edge.slot, edge.index)):
        found.setdefault((edge.user, edge.slot), []).append(edge)
    return found
