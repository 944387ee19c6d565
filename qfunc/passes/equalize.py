"""Where input-weight equalization measures: the values that layers read, channel by channel.

Dividing a layer's input by a scale per channel and multiplying the weight's columns by it changes nothing in float, and
lets one scale of the tensor suit all channels (Nagel et al., "Data-Free Quantization through Weight Equalization and
Bias Correction", 2019).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from pyrsistent import PMap, pmap

from qfunc.config.annotation import Annotations
from qfunc.config.point import Edge
from qfunc.config.qconfig_mapping import Selector
from qfunc.config.resolve import picked_by
from qfunc.errors import BadConfig, Problem, UnknownName, UserFunctionFailed
from qfunc.ir import Graph, Node, Note, Ref, TensorFact, fresh_id
from qfunc.numerics.observers import PerChannelMinMax
from qfunc.numerics.qparams import QuantSpec
from qfunc.passes.stages import Equalization, Site, measures

_SPATIAL = {"conv1d": 1, "conv2d": 2, "conv3d": 3}


def equalizations(
    graph: Graph, annotations: Annotations, select: Selector | None, sites: Collection[str] = ()
) -> tuple[PMap[str, Equalization], tuple[Note, ...], list[Problem]]:
    """The equalizations of the layers that `select` picks, a note for each one picked in vain, and the problems.

    Layers that read one value have one equalization; other uses of the value are not touched by it. `sites` are the
    names that other sites have already.
    """
    problems: list[Problem] = []
    chosen = [] if select is None else list(_selected(graph, select, problems))
    reasons = {id: _hindrance(graph[id], graph, annotations) for id in chosen}
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
        found[site.id] = Equalization(site, tuple(uses))
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


def _hindrance(node: Node, graph: Graph, annotations: Annotations) -> str:
    """Why a layer cannot be equalized; empty where it can."""
    spec = annotations.inputs.get(Edge(node.id, "input"))
    if node.kind != "linear" and node.kind not in _SPATIAL:
        return f"only the inputs of convolutions and linear layers are, it is a {node.kind}"
    if spec is None or node.id not in annotations.weights:
        return "its input and its weight are not both quantized"
    if not measures(spec):  # type: ignore[arg-type]
        return "the qparams of its input are not measured"
    value = node.get("input")
    assert isinstance(value, Ref), node
    if not isinstance(graph[value.id].fact, TensorFact) and node.kind == "linear":
        return "the rank of its input is unknown: trace with example_inputs"
    return ""


def _channels(node: Node, graph: Graph) -> tuple[str, int]:
    """The value that a layer reads, and the axis of its channels."""
    value = node.get("input")
    assert isinstance(value, Ref), node
    fact = graph[value.id].fact
    if not isinstance(fact, TensorFact):
        return value.id, 1
    return value.id, len(fact.shape) - 1 - _SPATIAL.get(node.kind, 0)
