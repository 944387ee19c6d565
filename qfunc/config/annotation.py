"""Annotations: what is quantized, and with what, use by use and value by value, as data.

A quantizer is any function from a graph to `Annotations`; `annotate` is the one that follows a configuration and a
backend. `combine` joins several, `prepare` makes observation sites of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

from pyrsistent import PMap, pmap
from returns.result import Failure, Success

from qfunc.config.custom_config import Swap
from qfunc.config.point import Edge, Point, used
from qfunc.config.qconfig import WeightQuantization
from qfunc.errors import BadConfig, Problem, UnknownName, several
from qfunc.ir import Expression, Graph, Node, Note
from qfunc.numerics.observers import Observer
from qfunc.numerics.qparams import QParams, QuantSpec, validate
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, ReuseInput, told, validate_quantization
from qfunc.result import R


@dataclass(frozen=True, slots=True)
class SharedWith:
    """The qparams of another point."""

    other: Point


@dataclass(frozen=True, slots=True)
class Unshared:
    """What an observer finds, for this point alone.

    A use and its value otherwise have one observer where both are quantized alike.
    """

    observer: Observer[Any]


@dataclass(frozen=True, slots=True)
class Derived:
    """Qparams that a function makes of those of other points, in their order.

    The points are values and uses that are quantized, or the weight of a layer: `Edge(node, "weight")`. A bias, say,
    has the product of the scales of the input and the weight.
    """

    of: tuple[Point, ...]
    function: Callable[[tuple[QParams, ...]], QParams]
    spec: QuantSpec


Spec: TypeAlias = Observer[Any] | SharedWith | Unshared | Derived | Dynamic | Cast
"""How a point is quantized: with what an observer finds, as another point is, by a function, or without measuring."""

ParameterSpec: TypeAlias = WeightQuantization | Derived
"""How a parameter is quantized."""


@dataclass(frozen=True, slots=True)
class Annotations:
    """What is quantized.

    `inputs` maps uses of values, `outputs` values (for all their uses), to how; `weights` and `biases` map nodes to how
    these parameters of theirs are. All points of one of the `groups` have the same qparams. `taps` are values that the
    observer of their own output sees as well, where that is another's. `floats` says of nodes that stay float why;
    those in `refused` are layers that were meant to be quantized. `notes` tell what deserves telling and is no error.
    `swapped` are the calls of custom modules, which quantize inside themselves.

    A value is quantized once for all uses that are quantized alike; a use whose observer is for another `QuantSpec`
    than the value's own quantizes the value anew. `quantized_inputs` and `quantized_outputs` are inputs and positions
    of the output whose codes are taken and given, instead of floats.
    """

    inputs: PMap[Edge, Spec] = pmap()
    outputs: PMap[str, Spec] = pmap()
    weights: PMap[str, ParameterSpec] = pmap()
    groups: frozenset[tuple[Point, ...]] = frozenset()
    taps: frozenset[str] = frozenset()
    floats: PMap[str, str] = field(default=pmap(), compare=False)
    refused: frozenset[str] = field(default=frozenset(), compare=False)
    notes: tuple[Note, ...] = field(default=(), compare=False)
    biases: PMap[str, ParameterSpec] = pmap()
    quantized_inputs: frozenset[str] = frozenset()
    quantized_outputs: frozenset[int] = frozenset()
    swapped: PMap[str, Swap] = pmap()

    __hash__ = None  # type: ignore[assignment]

    def keep_float(self, node: str, reason: str = "the annotations keep it float") -> Annotations:
        """These annotations without the uses and the value of one node, and without what shares with them."""
        gone: set[Point] = {node, *(edge for edge in self.inputs if edge.user == node), Edge(node, "weight")}
        biases = {id: spec for id, spec in self.biases.items() if id != node and not _rests_on(spec, gone)}
        groups = (tuple(point for point in group if point not in gone) for group in self.groups)
        return replace(
            self,
            inputs=pmap({e: s for e, s in self.inputs.items() if e not in gone and not _rests_on(s, gone)}),
            outputs=pmap({v: s for v, s in self.outputs.items() if v not in gone and not _rests_on(s, gone)}),
            weights=self.weights.discard(node),
            groups=frozenset(group for group in groups if len(group) > 1),
            taps=self.taps - {node},
            floats=self.floats.set(node, reason),
            refused=self.refused - {node},
            biases=pmap(biases),
            swapped=self.swapped.discard(node),
        )


def points_of(spec: Spec | ParameterSpec) -> tuple[Point, ...]:
    """The other points whose qparams a spec takes."""
    match spec:
        case SharedWith(other):
            return (other,)
        case Derived(of):
            return of
        case _:
            return ()


def _rests_on(spec: Spec | ParameterSpec, gone: set[Point]) -> bool:
    return any(point in gone for point in points_of(spec))


def combine(*annotations: Annotations) -> R[Annotations]:
    """The annotations of several quantizers as one.

    Returns:
        Their union, or a `BadConfig` for each point that two of them quantize differently, which names both by their
        positions and tells what each says.
    """
    problems: list[Problem] = [
        BadConfig(f"annotations[{index}]", f"expected Annotations, got a {type(given).__name__}", _REMEDY)
        for index, given in enumerate(annotations)
        if not isinstance(given, Annotations)
    ]
    if problems:
        return Failure(several(problems))
    inputs = _united([given.inputs for given in annotations], "", problems)
    outputs = _united([given.outputs for given in annotations], "", problems)
    weights = _united([given.weights for given in annotations], "its weight: ", problems)
    biases = _united([given.biases for given in annotations], "its bias: ", problems)
    swapped = _united([given.swapped for given in annotations], "its custom module: ", problems)
    if problems:
        return Failure(several(sorted(problems, key=lambda problem: problem.node)))
    quantized = {*outputs, *weights, *biases, *(edge.user for edge in inputs)}
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
            biases,
            frozenset().union(*(given.quantized_inputs for given in annotations)),
            frozenset().union(*(given.quantized_outputs for given in annotations)),
            swapped,
        )
    )


P = TypeVar("P")
S = TypeVar("S")


def _united(tables: Sequence[PMap[P, S]], what: str, problems: list[Problem]) -> PMap[P, S]:
    """One table of several; a point with two specs is a problem."""
    united: dict[P, S] = {}
    givers: dict[P, int] = {}
    for index, table in enumerate(tables):
        for point, spec in table.items():
            first = givers.setdefault(point, index)
            if united.setdefault(point, spec) != spec:
                one, other = _told_apart(united[point], spec)
                reason = f"{what}annotations[{first}] says {one}, annotations[{index}] says {other}"
                problems.append(BadConfig(str(point), reason, _ONE))
    return pmap(united)


def _told_apart(one: object, other: object) -> tuple[str, str]:
    """Two specs in words, or in full where the words are the same."""
    words = told(one), told(other)
    return words if words[0] != words[1] else (repr(one), repr(other))


_REMEDY = "pass what annotate(graph) and other quantizers return"
_ONE = "have one quantizer annotate it, or take it from the other with keep_float"


def wrong_annotations(annotations: Annotations, graph: Graph) -> Iterator[Problem]:
    """Nodes, uses and observers that do not exist or cannot be meant."""
    specs = (*annotations.inputs.values(), *annotations.outputs.values())
    parameters = (*annotations.weights.values(), *annotations.biases.values())
    quantized: tuple[Point, ...] = (*annotations.inputs, *annotations.outputs)
    others = [point for spec in (*specs, *parameters) for point in points_of(spec)]
    others += [*annotations.taps, *(point for group in annotations.groups for point in group)]
    weights = {Edge(id, "weight") for id in annotations.weights}
    for point in dict.fromkeys((*quantized, *annotations.weights, *annotations.biases, *others)):
        id = point.user if isinstance(point, Edge) else point
        if id not in graph.nodes:
            yield UnknownName(str(id), "node", graph.order)
        elif point not in weights:
            yield from _wrong_point(point, graph)
    for point in dict.fromkeys(others):
        if point not in annotations.inputs and point not in annotations.outputs and point not in weights:
            yield BadConfig(str(point), "others rest on its qparams, and it is not quantized", "annotate it as well")
    for table, slot in ((annotations.weights, "weight"), (annotations.biases, "bias")):
        for id in table:
            node = graph.nodes.get(id)
            if node is not None and not (_has_parameter(node, slot) or (slot == "weight" and _is_unknown_call(node))):
                yield BadConfig(id, f"it has no {slot} that is a parameter", f"annotate the {slot} of layers only")
    yield from _wrong_swaps(annotations, graph)
    yield from _wrong_specs((*specs, *parameters))


def _has_parameter(node: Node, slot: str) -> bool:
    return node.has(slot) and isinstance(node.get(slot), Expression)


def _is_unknown_call(node: Node) -> bool:
    """Whether it is a call of a module, such as a recurrent layer, whose parameters are no arguments."""
    written = node.origin.written
    return written is not None and written.op == "call_module" and node.kind == node.origin.type


def _wrong_swaps(annotations: Annotations, graph: Graph) -> Iterator[Problem]:
    for id in annotations.swapped:
        written = graph[id].origin.written if id in graph.nodes else None
        if written is None or written.op != "call_module":
            yield BadConfig(str(id), "it is no call of a module of the graph", "swap calls of modules only")


def _wrong_specs(specs: tuple[object, ...]) -> Iterator[Problem]:
    # By identity: a wrong one need not be hashable.
    for spec in {id(spec): spec for spec in specs}.values():
        yield from _wrong_spec(spec)


def _wrong_spec(spec: Any) -> Iterator[Problem]:
    match spec:
        case SharedWith():
            return
        case Unshared(observer):
            yield from validate_quantization(observer)
        case Derived(of, function, quant):
            yield from validate(quant)
            if not of or not callable(function):
                remedy = "name the points, and give a function from the tuple of their QParams to QParams"
                yield BadConfig("Derived", "it derives from no point, or without a function", remedy)
        case ReuseInput() | KeepFloat():
            remedy = "leave the point out, or share with the input: SharedWith(value)"
            yield BadConfig(type(spec).__name__, "it is for operators, not for single points", remedy)
        case _:
            yield from validate_quantization(spec)


def _wrong_point(point: Point, graph: Graph) -> Iterator[Problem]:
    id = point.user if isinstance(point, Edge) else point
    value = used(graph[id], point) if isinstance(point, Edge) else id
    if value is None:
        assert isinstance(point, Edge)
        reason = f"it has no value no. {point.index} in its argument {point.slot!r}"
        yield BadConfig(id, reason, "name an argument that holds values, and count them from 0")
    elif graph[value].aliased:
        yield BadConfig(id, f"the memory of {value!r} is changed in place", "leave it float")
