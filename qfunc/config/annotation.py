"""Annotations: what is quantized, and with what, use by use and value by value, as data.

A quantizer is any function from a graph to `Annotations`; `annotate` is the one that follows a configuration and a
backend. `combine` joins several, `prepare` makes observation sites of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

from pyrsistent import PMap, pmap
from returns.result import Failure, Success

from qfunc.config.qconfig import activation_problems
from qfunc.errors import BadConfig, Problem, UnknownName, UnsupportedDType, several
from qfunc.ir import Expression, Graph, Node, Note, refs
from qfunc.numerics.grid import CODE_RANGE
from qfunc.numerics.observers import Observer, validate_observer
from qfunc.numerics.qparams import DTYPES
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

    `inputs` maps uses of values, `outputs` values (for all their uses), to how; `weights` maps nodes to the observers
    of their weights. All points of one of the `groups` have the same qparams. `taps` are values that the observer of
    their own output sees as well, where that is another's. `floats` says of nodes that stay float why; those in
    `refused` are layers that were meant to be quantized. `notes` tell what deserves telling and is no error.

    A value is quantized once for all uses that are quantized alike; a use whose observer is for another `QuantSpec`
    than the value's own quantizes the value anew.
    """

    inputs: PMap[Edge, Spec] = pmap()
    outputs: PMap[str, Spec] = pmap()
    weights: PMap[str, Observer[Any]] = pmap()
    groups: frozenset[tuple[Point, ...]] = frozenset()
    taps: frozenset[str] = frozenset()
    floats: PMap[str, str] = field(default=pmap(), compare=False)
    refused: frozenset[str] = field(default=frozenset(), compare=False)
    notes: tuple[Note, ...] = field(default=(), compare=False)

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
            self.notes,
        )


def _shares(spec: Spec, gone: set[Point]) -> bool:
    return isinstance(spec, SharedWith) and spec.other in gone


def combine(*annotations: Annotations) -> R[Annotations]:
    """The annotations of several quantizers as one.

    Returns:
        Their union, or a `BadConfig` for each point that two of them quantize differently, with both.
    """
    problems: list[Problem] = [
        BadConfig(f"annotations[{index}]", f"expected Annotations, got a {type(given).__name__}", _REMEDY)
        for index, given in enumerate(annotations)
        if not isinstance(given, Annotations)
    ]
    if problems:
        return Failure(several(problems))
    inputs = _united((given.inputs for given in annotations), problems)
    outputs = _united((given.outputs for given in annotations), problems)
    weights = _united((given.weights for given in annotations), problems)
    if problems:
        return Failure(several(sorted(problems, key=lambda problem: problem.node)))
    quantized = {*outputs, *weights, *(edge.user for edge in inputs)}
    floats = {node: reason for given in annotations for node, reason in given.floats.items() if node not in quantized}
    return Success(
        Annotations(
            inputs,
            outputs,
            weights,
            frozenset().union(*(given.groups for given in annotations)),
            frozenset().union(*(given.taps for given in annotations)),
            pmap(floats),
            frozenset().union(*(given.refused for given in annotations)) - quantized,
            tuple(dict.fromkeys(note for given in annotations for note in given.notes)),
        )
    )


P = TypeVar("P")
S = TypeVar("S")


def _united(tables: Iterable[PMap[P, S]], problems: list[Problem]) -> PMap[P, S]:
    """One table of several; a point with two specs is a problem."""
    united: dict[P, S] = {}
    for table in tables:
        for point, spec in table.items():
            if united.setdefault(point, spec) != spec:
                reason = f"one quantizer gives {united[point]!r}, another {spec!r}"
                problems.append(BadConfig(str(point), reason, _ONE))
    return pmap(united)


_REMEDY = "pass what annotate(graph) and other quantizers return"
_ONE = "have one quantizer annotate it, or take it from the other with keep_float"


def wrong_annotations(annotations: Annotations, graph: Graph) -> Iterator[Problem]:
    """Nodes, uses and observers that do not exist or cannot be meant."""
    specs = (*annotations.inputs.values(), *annotations.outputs.values())
    quantized: tuple[Point, ...] = (*annotations.inputs, *annotations.outputs)
    shared: list[Point] = [spec.other for spec in specs if isinstance(spec, SharedWith)]
    shared += [*annotations.taps, *(point for group in annotations.groups for point in group)]
    for point in dict.fromkeys((*quantized, *annotations.weights, *shared)):
        id = point.user if isinstance(point, Edge) else point
        if id not in graph.nodes:
            yield UnknownName(str(id), "node", graph.order)
        else:
            yield from _wrong_point(point, graph)
    for point in dict.fromkeys(shared):
        if point not in annotations.inputs and point not in annotations.outputs:
            yield BadConfig(str(point), "others share its qparams, and it is not quantized", "annotate it as well")
    for id, observer in annotations.weights.items():
        node = graph.nodes.get(id)
        if node is not None and not (node.has("weight") and isinstance(node.get("weight"), Expression)):
            yield BadConfig(id, "it has no weight that is a parameter", "annotate the weights of layers only")
        yield from validate_observer(observer)
    for spec in dict.fromkeys(spec for spec in specs if not isinstance(spec, SharedWith)):
        yield from validate_observer(spec)
        yield from activation_problems(spec)
        if spec.spec.dtype in DTYPES and spec.spec.dtype not in CODE_RANGE:
            yield UnsupportedDType(type(spec).__name__, f"activations are quantized to 8 bits, not {spec.spec.dtype}")


def _wrong_point(point: Point, graph: Graph) -> Iterator[Problem]:
    id = point.user if isinstance(point, Edge) else point
    value = used(graph[id], point) if isinstance(point, Edge) else id
    if value is None:
        assert isinstance(point, Edge)
        reason = f"it has no value no. {point.index} in its argument {point.slot!r}"
        yield BadConfig(id, reason, "name an argument that holds values, and count them from 0")
    elif graph[value].aliased:
        yield BadConfig(id, f"the memory of {value!r} is changed in place", "leave it float")


def used(node: Node, edge: Edge) -> str | None:
    """The value that an edge carries; None where there is no such use."""
    values = values_in(node, edge.slot)
    return values[edge.index] if 0 <= edge.index < len(values) else None


def values_in(node: Node, slot: str) -> tuple[str, ...]:
    """The values in one argument of a node or of an operator fused behind it, in order."""
    name, args = slot, node.args
    if slot.startswith("post."):
        _, position, name = slot.split(".")
        posts = node.post[int(position) : int(position) + 1]
        args = posts[0].args if posts else ()
    return tuple([value for key, arg in args if key == name for value in refs(arg)])


def edges_by_slot(edges: Iterable[Edge]) -> dict[tuple[str, str], list[Edge]]:
    """Edges by user and slot, each list in order: so that an argument of many values is looked through once."""
    found: dict[tuple[str, str], list[Edge]] = {}
    for edge in sorted(edges, key=lambda edge: (edge.slot, edge.index)):
        found.setdefault((edge.user, edge.slot), []).append(edge)
    return found
