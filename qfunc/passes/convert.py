"""`convert`: from a calibrated stage to the reference form, a float graph with explicit quantization."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyrsistent import pmap
from returns.result import Failure, Success

from qfunc.config.point import Edge, edges_by_slot, values_in
from qfunc.errors import BadConfig, Problem, Unobserved, UserFunctionFailed, WrongStage, several
from qfunc.ir import Arg, Draft, Expression, Graph, Node, Opaque, Origin, PostOp, Ref, digest, map_arg
from qfunc.ir.node import NamedArgs, fact_in
from qfunc.numerics.grid import Affine
from qfunc.numerics.observers import Observer, finished
from qfunc.numerics.qparams import QParams
from qfunc.params import DequantizeWeight, QuantizeWeight
from qfunc.passes.custom_modules import custom_node, to_quantize, uncalibrated
from qfunc.passes.record import recorded
from qfunc.passes.stages import Calibrated, Converted, Prepared, measures
from qfunc.result import R


def convert(calibrated: Calibrated) -> R[Converted]:
    """The reference form: every quantized value goes through `quantize` and `dequantize`, every weight expression too.

    A value with a site of its own is quantized once, right behind its producer, for all its users; a float value with
    quantized uses once for each site, for those uses alone. Nothing of the input changes, so that it can be converted
    any number of times.

    Returns:
        The converted graph, or `Unobserved` for every site that no data reached, or `WrongStage`.
    """
    if not isinstance(calibrated, Calibrated):
        return Failure(WrongStage(type(calibrated).__name__, "Calibrated"))
    prepared = calibrated.prepared
    found, problems = _qparams(calibrated)
    problems += uncalibrated(calibrated)
    if problems:
        return Failure(several(problems))
    qparams = {site: affine_of(q) for site, q in found.items()}
    graph = _insert(prepared, qparams, to_quantize(calibrated))
    intended = {
        node.id: node.origin.module
        for node in prepared.graph
        if (node.id in prepared.outputs or node.id in prepared.weights or node.id in prepared.refused)
        and node.id not in prepared.swapped
    }
    return Success(Converted(graph, prepared.backend, pmap(intended), prepared.floats))


def _qparams(calibrated: Calibrated) -> tuple[dict[str, QParams], list[Problem]]:
    """The qparams of each site, and what is wrong where there are none."""
    prepared, states = calibrated.prepared, calibrated.statistics.states
    if prepared.sites and calibrated.statistics.graph != digest(prepared.graph):
        reason = "the statistics were measured on another graph"
        remedy = "calibrate this one: calibrate(prepared, batches)"
        return {}, [Unobserved(_place(prepared, id), reason, remedy) for id in _in_order(prepared)]
    found: dict[str, QParams] = {}
    problems: list[Problem] = []
    for id in _in_order(prepared):
        site, key = prepared.sites[id], prepared.sites[id].key
        if not measures(site.observer):
            reason = f"its values are quantized by {type(site.observer).__name__}, of which there is no reference form"
            problems.append(BadConfig(_place(prepared, id), reason, "configure an observer, such as Histogram()"))
            continue
        qparams = finished(site.observer, states[key]) if key is not None and key in states else None
        if isinstance(qparams, QParams):
            found[id] = qparams
        elif qparams is None:
            problems.append(Unobserved(_place(prepared, id)))
        else:
            problems.append(UserFunctionFailed(_place(prepared, id), qparams))
    for id, observer in prepared.weights.items():
        if not measures(observer):
            reason = f"its weight is quantized by {type(observer).__name__}, of which there is no reference form"
            problems.append(BadConfig(prepared.graph[id].place, reason, "configure an observer, such as MinMax(spec)"))
    return found, problems


def _in_order(prepared: Prepared) -> list[str]:
    position = {id: index for index, id in enumerate(prepared.graph.order)}
    return sorted(prepared.sites, key=lambda id: position[prepared.sites[id].taps[0]])


def _place(prepared: Prepared, site: str) -> str:
    return prepared.graph[prepared.sites[site].taps[0]].place


_HEADROOM = frozenset({("uint8", 0, 127), ("int8", -64, 63)})


def affine_of(qparams: QParams) -> Affine:
    """The qparams as literals.

    Seven bits of eight leave headroom, they do not clip: what lies beyond the observed range is kept as far as the
    dtype goes, as in the reference and as kernels do. Any other range is the range of the codes.
    """
    spec = qparams.spec
    assert spec.dtype in ("uint8", "int8"), spec
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    headroom = (spec.dtype, spec.quant_min, spec.quant_max) in _HEADROOM
    return Affine(scale, zero_point, spec.dtype, spec.quant_min, spec.quant_max, headroom)  # type: ignore[arg-type]


def _insert(prepared: Prepared, qparams: dict[str, Affine], custom: dict[str, Opaque]) -> Graph:
    graph = prepared.graph
    draft = Draft(graph)
    for value in (id for id in graph.order if id in prepared.outputs):
        draft.redirect(value, _quantized(draft, graph[value], qparams[prepared.outputs[value]]))
    pairs: dict[tuple[str, str], str] = {}
    turned: dict[str, dict[Edge, str]] = {}
    position = {id: index for index, id in enumerate(graph.order)}
    slots = edges_by_slot(prepared.inputs)
    for user, slot in sorted(slots, key=lambda key: (position[key[0]], key[1])):
        values = values_in(graph[user], slot)
        for edge in slots[user, slot]:
            pair = (values[edge.index], prepared.inputs[edge])
            if pair not in pairs:
                pairs[pair] = _quantized(draft, graph[pair[0]], qparams[pair[1]])
            turned.setdefault(user, {})[edge] = pairs[pair]
    for user, edges in turned.items():
        draft.put(_turn(draft[user], edges))
    for id in prepared.swapped:
        draft.put(custom_node(draft[id]))
    for id, observer in prepared.weights.items():
        assert measures(observer), observer
        draft.put(_quantize_weight(draft[id], observer))
    made = draft.commit()
    made = replace(made, objects=made.objects.update(custom)) if custom else made
    return recorded(graph, made, "convert", f"backend={prepared.backend}")


def _quantized(draft: Draft, node: Node, affine: Affine) -> str:
    """Insert the pair behind a value; gives the id of the dequantized one."""
    codes = draft.fresh(f"{node.id}_q")
    given: NamedArgs = (("inputs", (Ref(node.id),)), ("output", affine))
    fact = fact_in(node.fact, affine.dtype)
    draft.insert_after(node.id, Node(codes, "quantize", given, fact=fact, origin=Origin(codes)))
    floats = draft.fresh(f"{node.id}_dq")
    taken: NamedArgs = (("inputs", (Ref(codes),)), ("input", affine))
    draft.insert_after(node.id, Node(floats, "dequantize", taken, fact=node.fact, origin=Origin(floats)))
    return floats


def _turn(node: Node, edges: dict[Edge, str]) -> Node:
    """The node with some of its uses redirected."""
    args = tuple((name, _turn_arg(value, node.id, name, edges)) for name, value in node.args)
    post = tuple(
        PostOp(
            p.kind,
            tuple((name, _turn_arg(value, node.id, f"post.{i}.{name}", edges)) for name, value in p.args),
            p.origin,
        )
        for i, p in enumerate(node.post)
    )
    return Node(node.id, node.kind, args, post, node.origin, node.fact, node.aliased)


def _turn_arg(arg: Arg, user: str, slot: str, edges: dict[Edge, str]) -> Arg:
    count = -1

    def leaf(value: Arg) -> Arg:
        nonlocal count
        if not isinstance(value, Ref):
            return value
        count += 1
        return Ref(edges.get(Edge(user, slot, count), value.id))

    return map_arg(arg, leaf)


def _quantize_weight(node: Node, observer: Observer[Any]) -> Node:
    weight = node.get("weight")
    assert isinstance(weight, Expression)
    return node.with_args(weight=DequantizeWeight(QuantizeWeight(weight, observer)))
