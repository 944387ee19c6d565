"""Annotations: what is quantized, and with what, use by use and value by value, as data.

A quantizer is any function from a graph to `Annotations`; `annotate` is the one that follows a configuration and a
backend. `combine` joins several, `prepare` makes observation sites of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from pyrsistent import PMap, pmap
from returns.result import Failure, Success

from qfunc.errors import BadConfig, Problem, UnknownName, several
from qfunc.ir import Graph, Node, refs
from qfunc.numerics.observers import Observer, validate_observer
from qfunc.result import R


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


@dataclass(frozen=True, slots=True)
class SharedWith:
    """The qparams of another point."""

    other: Point


Spec: TypeAlias = Observer[Any] | SharedWith
"""How a point is quantized: with what an observer finds (a fixed range is one as well), or as another point is."""


@dataclass(frozen=True, slots=True)
class Annotations:
    """What is quantized.

    `inputs` maps uses of values, `outputs` values (for all their uses), to how; `weights` maps nodes to the observers of
    their weights. All points of one of the `groups` have the same qparams. `taps` are values that the observer of their
    own output sees as well, where that is another's. `floats` says of nodes that stay float why; those in `refused` are
    layers that were meant to be quantized.

    A value is quantized once for all uses that are quantized alike; a use whose observer is for another `QuantSpec` than
    the value's own quantizes the value anew.
    """

    inputs: PMap[Edge, Spec] = pmap()
    outputs: PMap[str, Spec] = pmap()
    weights: PMap[str, Observer[Any]] = pmap()
    groups: frozenset[tuple[Point, ...]] = frozenset()
    taps: frozenset[str] = frozenset()
    floats: PMap[str, str] = field(default=pmap(), compare=False)
    refused: frozenset[str] = field(default=frozenset(), compare=False)

    __hash__ = None  # type: ignore[assignment]

    def keep_float(self, node: str, reason: str = "the annotations keep it float") -> Annotations:
        """These annotations without the uses and the value of one node, and without what shares with them."""
        gone: set[Point] = {node, *(edge for edge in self.inputs if edge.user == node)}
        return Annotations(
            pmap({e: s for e, s in self.inputs.items() if e not in gone and not _shares(s, gone)}),
            pmap({v: s for v, s in self.outputs.items() if v not in gone and not _shares(s, gone)}),
            self.weights.discard(node),
            frozenset(kept for group in self.groups if len(kept := tuple(p for p in group if p not in gone)) > 1),
            self.taps - {node},
            self.floats.set(node, reason),
            self.refused - {node},
        )


def _shares(spec: Spec, gone: set[Point]) -> bool:
    return isinstance(spec, SharedWith) and spec.other in gone


def combine(*annotations: Annotations) -> R[Annotations]:
    """The annotations of several quantizers as one.

    Returns:
        Their union, or a `BadConfig` for each point that two of them quantize differently, with both.
    """
    inputs, outputs, weights = dict[Edge, Spec](), dict[str, Spec](), dict[str, Observer[Any]]()
    floats = dict[str, str]()
    problems: list[Problem] = []
    for index, given in enumerate(annotations):
        if not isinstance(given, Annotations):
            problem = BadConfig(f"annotations[{index}]", f"expected Annotations, got a {type(given).__name__}", _REMEDY)
            problems.append(problem)
            continue
        tables: tuple[tuple[dict[Any, Any], PMap[Any, Any]], ...]
        tables = ((inputs, given.inputs), (outputs, given.outputs), (weights, given.weights))
        for table, more in tables:
            problems += [
                BadConfig(str(point), f"one quantizer gives {table[point]!r}, another {spec!r}", _ONE)
                for point, spec in more.items()
                if table.get(point, spec) != spec
            ]
            table.update(more)
        floats.update(given.floats)
    if problems:
        return Failure(several(sorted(problems, key=lambda problem: problem.node)))
    return Success(
        Annotations(
            pmap(inputs),
            pmap(outputs),
            pmap(weights),
            frozenset().union(*(given.groups for given in annotations)),
            frozenset().union(*(given.taps for given in annotations)),
            pmap({node: reason for node, reason in floats.items() if node not in outputs and node not in weights}),
            frozenset().union(*(given.refused for given in annotations)) - {*outputs, *weights},
        )
    )


_REMEDY = "pass what annotate(graph) and other quantizers return"
_ONE = "have one quantizer annotate it, or take it from the other with keep_float"


def wrong_annotations(annotations: Annotations, graph: Graph) -> Iterator[Problem]:
    """Nodes, uses and observers that do not exist or cannot be meant."""
    known = tuple(graph.order)
    points = [*annotations.inputs, *annotations.outputs, *annotations.weights, *annotations.taps]
    specs = [*annotations.inputs.values(), *annotations.outputs.values()]
    points += [spec.other for spec in specs if isinstance(spec, SharedWith)]
    points += [point for group in annotations.groups for point in group]
    for point in dict.fromkeys(points):
        node = point.user if isinstance(point, Edge) else point
        if node not in graph.nodes:
            yield UnknownName(str(node), "node", known)
        elif isinstance(point, Edge) and used(graph[node], point) is None:
            reason = f"it has no {point.index}-th value in its argument {point.slot!r}"
            yield BadConfig(node, reason, "take edges from describe or from the graph's nodes")
    for spec in (*specs, *annotations.weights.values()):
        if not isinstance(spec, SharedWith):
            yield from validate_observer(spec)


def used(node: Node, edge: Edge) -> str | None:
    """The value that an edge carries."""
    if edge.slot.startswith("post."):
        _, position, name = edge.slot.split(".")
        posts = node.post[int(position) : int(position) + 1]
        args = posts[0].args if posts else ()
    else:
        name, args = edge.slot, node.args
    values = [value for key, arg in args if key == name for value in refs(arg)]
    return values[edge.index] if 0 <= edge.index < len(values) else None
