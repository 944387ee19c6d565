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

from qfunc.config.arguments import shown
from qfunc.config.custom_config import CustomModule, Swap
from qfunc.config.point import Edge, Point, used
from qfunc.config.qconfig import QConfig, WeightQuantization
from qfunc.config.resolve import unfit
from qfunc.errors import BadConfig, Problem, UnknownName, several
from qfunc.ir import Expression, Graph, Node, Note
from qfunc.numerics.observers import Observer, is_hashable, validate_observer
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
    `swapped` are the calls of custom modules, which quantize inside themselves. `unrounded` are uses that read a value
    in float although it is quantized for others.

    A value is quantized once for all uses that are quantized alike; a use whose observer is for another `QuantSpec`
    than the value's own quantizes the value anew. A known range (`FixedQParams`) of the value also does for uses of its
    dtype with the same codes or a bit less; that of a use is kept. Points that share qparams are measured with the
    observer of the first one in the graph. `quantized_inputs` and `quantized_outputs` are inputs and positions of the
    output whose codes are taken and given, instead of floats.
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
    unrounded: frozenset[Edge] = frozenset()

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
            unrounded=frozenset(edge for edge in self.unrounded if edge.user != node),
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
            frozenset(edge for given in annotations for edge in given.unrounded if edge not in inputs),
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
    """What is not of the declared types, and nodes, uses and observers that do not exist or cannot be meant.

    In graph order where a problem is of a node, the others behind.
    """
    found = list(_wrong_fields(annotations)) or list(_wrong_specs(annotations))
    found = found or [*_wrong_points(annotations, graph), *_wrong_nodes(annotations, graph)]
    position = {id: index for index, id in enumerate(graph.order)}
    yield from sorted(found, key=lambda p: (position.get(p.node, len(position)), p.node, p.reason))


def _is_id(value: object) -> bool:
    return isinstance(value, str)


def _is_edge(value: object) -> bool:
    return isinstance(value, Edge) and all(map(isinstance, (value.user, value.slot, value.index), (str, str, int)))


def _is_point(value: object) -> bool:
    return _is_id(value) or _is_edge(value)


def _are_points(value: object) -> bool:
    return isinstance(value, tuple) and len(value) > 0 and all(map(_is_point, value))


_FIELDS: tuple[tuple[str, type, Callable[[object], bool], str], ...] = (
    ("inputs", PMap, _is_edge, "an Edge(user, slot, index)"),
    *((name, PMap, _is_id, "the id of a node") for name in ("outputs", "weights", "biases", "floats", "swapped")),
    ("groups", frozenset, _are_points, "a tuple of ids of nodes and of Edges"),
    *((name, frozenset, _is_id, "the id of a node") for name in ("taps", "refused", "quantized_inputs")),
    ("unrounded", frozenset, _is_edge, "an Edge(user, slot, index)"),
    ("quantized_outputs", frozenset, lambda value: isinstance(value, int), "a position in the output"),
    ("notes", tuple, lambda value: isinstance(value, Note), "a Note"),
)
"""The fields of annotations: the container, and what its keys or items are to be."""


def _wrong_fields(annotations: Annotations) -> Iterator[Problem]:
    """Fields that are no such container, or hold something else than they are to."""
    for name, container, is_item, item in _FIELDS:
        given = getattr(annotations, name)
        if not isinstance(given, container):
            reason = f"expected a {container.__name__}, got {shown(given)}"
            yield BadConfig(name, reason, f"give it a {container.__name__}, of which each key or item is {item}")
            continue
        for one in (one for one in given if not is_item(one)):  # type: ignore[attr-defined]
            yield BadConfig(name, f"{shown(one)} is not {item}", f"have each key or item be {item}")


def _wrong_specs(annotations: Annotations) -> Iterator[Problem]:
    """What says how points, parameters and custom modules are quantized, and cannot."""
    for table in (annotations.inputs, annotations.outputs):
        for point, spec in table.items():
            yield from _wrong_spec(_node(point), spec)
    for name, slot in (("weights", "weight"), ("biases", "bias")):
        for id, spec in getattr(annotations, name).items():
            if isinstance(spec, (SharedWith, Unshared, Dynamic)):
                reason = f"its {slot} does not change and has no value to share with, so that it cannot be"
                remedy = "use an observer such as PerChannelMinMax(spec), a Cast, or Derived"
                yield BadConfig(id, f"{reason} {type(spec).__name__}", remedy)
            else:
                yield from _wrong_spec(id, spec)
    for id, swap in annotations.swapped.items():
        if not (isinstance(swap, Swap) and isinstance(swap.module, CustomModule) and isinstance(swap.qconfig, QConfig)):
            yield BadConfig(id, f"{shown(swap)} is no Swap", "give a Swap of a CustomModule and a QConfig")


def _wrong_spec(node: str, spec: Any) -> Iterator[Problem]:
    if not is_hashable(spec):
        yield BadConfig(node, f"{shown(spec)} cannot be hashed", "make it a frozen dataclass of hashable fields")
        return
    match spec:
        case SharedWith(other):
            if not _is_point(other):
                remedy = "name a value by its id, or a use of one: Edge(user, slot, index)"
                yield BadConfig(node, f"it shares with {shown(other)}, which is no point", remedy)
        case Unshared(observer):
            yield from _wrong_observer(observer) or validate_observer(observer)
        case Derived(of, function, quant):
            if not _are_points(of) or not callable(function):
                remedy = "name the points, and give a function from the tuple of their QParams to QParams"
                yield BadConfig("Derived", "it derives from no point, or without a function", remedy)
            yield from _wrong_quant(node, quant)
        case ReuseInput() | KeepFloat():
            remedy = "leave the point out, or share with the input: SharedWith(value)"
            yield BadConfig(type(spec).__name__, "it is for operators, not for single points", remedy)
        case Dynamic(quant):
            yield from _wrong_quant(node, quant)
        case Cast(dtype, dynamic) if not (isinstance(dtype, str) and isinstance(dynamic, bool)):
            yield BadConfig(node, "its Cast is to no dtype", "give the name of a dtype: Cast('float16')")
        case _:
            yield from _wrong_observer(spec)


def _wrong_observer(observer: Any) -> tuple[Problem, ...]:
    """What is wrong with the spec of an observer, or else with the rest of it."""
    spec = getattr(observer, "spec", None)
    wrong = validate(spec) if isinstance(spec, QuantSpec) else ()
    return wrong or tuple(validate_quantization(observer))


def _wrong_quant(node: str, spec: object) -> Iterator[Problem]:
    if isinstance(spec, QuantSpec):
        yield from validate(spec)
    else:
        yield BadConfig(
            node, f"expected a QuantSpec, got {shown(spec)}", "give one, such as QuantSpec('uint8', 0, 255)"
        )


def _wrong_points(annotations: Annotations, graph: Graph) -> Iterator[Problem]:
    """Values and uses that do not exist or cannot be quantized, and those that others rest on and that are not."""
    weights = {Edge(id, "weight") for id in annotations.weights}
    specs: dict[Point, Spec] = dict([*annotations.inputs.items(), *annotations.outputs.items()])
    parameters = (*annotations.weights.values(), *annotations.biases.values())
    derived = [point for spec in (*specs.values(), *parameters) if isinstance(spec, Derived) for point in spec.of]
    shared = [spec.other for spec in specs.values() if isinstance(spec, SharedWith)]
    shared += [point for group in annotations.groups for point in group]
    ways: dict[str, list[Any]] = {}
    for point in dict.fromkeys((*specs, *shared, *annotations.taps, *derived)):
        if _node(point) not in graph.nodes:
            yield UnknownName(_node(point), "node", graph.order)
        elif point in specs:
            ways.setdefault(_value(point, graph) or "", []).append(specs[point])
            yield from _no_use(point, graph)
        elif point not in weights:
            yield BadConfig(str(point), "others rest on its qparams, and it is not quantized", "annotate it as well")
    for edge in annotations.unrounded:
        if edge.user not in graph.nodes:
            yield UnknownName(edge.user, "node", graph.order)
        elif edge in specs:
            yield BadConfig(edge.user, f"{edge} is both quantized and unrounded", "have it be one of the two")
        else:
            yield from _no_use(edge, graph)
    for id in (id for id in graph.order if id in ways):
        yield from unfit(graph[id], [getattr(way, "observer", way) for way in ways[id]])
    for point in dict.fromkeys(point for point in shared if point in weights and point not in specs):
        remedy = f"derive the qparams from it: Derived(({point!r},), function, spec)"
        yield BadConfig(_node(point), "its weight is to share with others, and weights do not", remedy)


def _wrong_nodes(annotations: Annotations, graph: Graph) -> Iterator[Problem]:
    """Layers without such a parameter, and calls that are not of custom modules."""
    for table, slot in ((annotations.weights, "weight"), (annotations.biases, "bias")):
        for id in table:
            node = graph.nodes.get(id)
            if node is None:
                yield UnknownName(id, "node", graph.order)
            elif node.aliased:
                yield BadConfig(id, f"the memory of {id!r} is changed in place", "leave it float")
            elif not (_has_parameter(node, slot) or (slot == "weight" and _is_unknown_call(node))):
                yield BadConfig(id, f"it has no {slot} that is a parameter", f"annotate the {slot} of layers only")
            elif id in annotations.swapped:
                yield BadConfig(id, f"its custom module quantizes its {slot} itself", f"leave the {slot} out")
    for id in annotations.swapped:
        if id not in graph.nodes or not _is_unknown_call(graph[id]):
            yield BadConfig(id, "it is no call of a module of the graph", "swap calls of modules only")


def _has_parameter(node: Node, slot: str) -> bool:
    return node.has(slot) and isinstance(node.get(slot), Expression)


def _is_unknown_call(node: Node) -> bool:
    """Whether it is a call of a module, such as a recurrent layer, whose parameters are no arguments."""
    written = node.origin.written
    return written is not None and written.op == "call_module" and node.kind == node.origin.type


def _node(point: Point) -> str:
    return point.user if isinstance(point, Edge) else point


def _value(point: Point, graph: Graph) -> str | None:
    """The value that is quantized at a point; None for a use that does not exist."""
    return used(graph[point.user], point) if isinstance(point, Edge) else point


def _no_use(point: Point, graph: Graph) -> Iterator[Problem]:
    if isinstance(point, Edge) and used(graph[point.user], point) is None:
        reason = f"it has no value no. {point.index} in its argument {point.slot!r}"
        yield BadConfig(point.user, reason, "name an argument that holds values, and count them from 0")
