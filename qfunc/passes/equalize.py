"""Where input-weight equalization measures: the values that layers read, channel by channel.

Multiplying a layer's input by a scale per channel and dividing the weight's columns by it changes nothing in float, and
lets one scale of the tensor suit all channels: see `qfunc.numerics.equalization`, and `equalized`, which does it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

from pyrsistent import PMap, pmap

from qfunc.config.annotation import Annotations, SharedWith, Unshared
from qfunc.config.point import Edge, Point
from qfunc.config.qconfig_mapping import Selector
from qfunc.config.resolve import picked_by
from qfunc.errors import BadConfig, Problem, UnknownName, UserFunctionFailed
from qfunc.ir import Expression, Graph, Node, Note, Ref, TensorFact, fresh_id
from qfunc.numerics.observers import PerChannelMinMax
from qfunc.numerics.qparams import QuantSpec
from qfunc.numerics.unmeasured import Cast
from qfunc.passes.stages import Equalization, Site, measures

SPATIAL: Mapping[str, int] = MappingProxyType({"conv1d": 1, "conv2d": 2, "conv3d": 3})
"""How many axes follow that of the channels in what a convolution reads."""


def equalizations(
    graph: Graph, annotations: Annotations, select: Selector | None, sites: Collection[str] = ()
) -> tuple[PMap[str, Equalization], tuple[Note, ...], list[Problem]]:
    """The equalizations of the layers that `select` picks, a note for each one picked in vain, and the problems.

    Layers that read one value have one equalization; other uses of the value are not touched by it. `sites` are the
    names that other sites have already.
    """
    problems: list[Problem] = []
    chosen = [] if select is None else list(_selected(graph, select, problems))
    shared = _shared(annotations) if chosen else frozenset()
    reasons = {id: _hindrance(graph[id], graph, annotations, shared) for id in chosen}
    notes = tuple(Note(graph[id].place, f"is not equalized: {reason}") for id, reason in reasons.items() if reason)
    edges: dict[tuple[str, int], list[Edge]] = {}
    for node in (graph[id] for id in chosen if not reasons[id]):
        edges.setdefault(_channels(node, graph), []).append(Edge(node.id, "input"))
    found: dict[str, Equalization] = {}
    taken = {*graph.order, *sites}
    for (value, axis), uses in edges.items():
        spec = QuantSpec(qscheme="per_channel_affine", ch_axis=axis)
        site = Site(fresh_id(f"{value}_equalization", taken), PerChannelMinMax(spec), (value,))
        taken.add(site.id)
        found[site.id] = Equalization(site, tuple(uses), tuple(_spec(annotations, edge) for edge in uses))
    return pmap(found), notes, problems


def _selected(graph: Graph, select: Selector, problems: list[Problem]) -> Iterator[str]:
    """The ids that a selector picks, in graph order."""
    if not callable(select):
        remedy = "pass a function from a graph to the ids of its nodes, such as layers"
        problems.append(BadConfig("equalize", f"{select!r} is no function", remedy))
        return
    picked = picked_by(select, graph)
    if isinstance(picked, UserFunctionFailed):
        problems.append(picked)
        return
    ids = {id for id in picked if isinstance(id, str)}
    unknown = {str(id) for id in picked if not isinstance(id, str) or id not in graph.nodes}
    problems += [UnknownName(id, "node", graph.order) for id in sorted(unknown)]
    yield from (id for id in graph.order if id in ids)


def _hindrance(node: Node, graph: Graph, annotations: Annotations, shared: frozenset[Point]) -> str:
    """Why a layer cannot be equalized; empty where it can."""
    edge = Edge(node.id, "input")
    spec = annotations.inputs.get(edge)
    if node.kind != "linear" and node.kind not in SPATIAL:
        return f"only the inputs of convolutions and linear layers are, it is a {node.kind}"
    if spec is None or node.id not in annotations.weights:
        return "its input and its weight are not both quantized"
    if isinstance(spec, SharedWith) or edge in shared:
        return "its input shares its qparams with other values"
    if not measures(spec):  # type: ignore[arg-type]
        return "the qparams of its input are not measured"
    if _spec(annotations, edge).per_channel:
        return "its input has qparams for each channel already"
    value = node.get("input")
    assert isinstance(value, Ref), node
    if not isinstance(graph[value.id].fact, TensorFact) and node.kind == "linear":
        return "the rank of its input is unknown: trace with example_inputs"
    if node.kind in SPATIAL and not isinstance(node.get("groups"), int):
        return "its groups are computed by the graph"
    return ""


def _shared(annotations: Annotations) -> frozenset[Point]:
    """The points whose qparams others have, too."""
    specs = (*annotations.inputs.values(), *annotations.outputs.values())
    others = (spec.other for spec in specs if isinstance(spec, SharedWith))
    return frozenset().union(others, *annotations.groups)


def _spec(annotations: Annotations, edge: Edge) -> QuantSpec:
    """What the input of a layer is quantized for."""
    given = annotations.inputs[edge]
    observer = given.observer if isinstance(given, Unshared) else given
    assert not isinstance(observer, (SharedWith, Cast)), edge
    return observer.spec


def _channels(node: Node, graph: Graph) -> tuple[str, int]:
    """The value that a layer reads, and the axis of its channels."""
    value = node.get("input")
    assert isinstance(value, Ref), node
    fact = graph[value.id].fact
    if not isinstance(fact, TensorFact):
        return value.id, 1
    return value.id, len(fact.shape) - 1 - SPATIAL.get(node.kind, 0)


def grouped_weight(layer: Node) -> tuple[Expression, int]:
    """The weight of a layer that is equalized, and into how many groups its channels fall."""
    weight, groups = layer.get("weight"), layer.get("groups") if layer.has("groups") else 1
    assert isinstance(weight, Expression) and isinstance(groups, int), layer
    return weight, groups
