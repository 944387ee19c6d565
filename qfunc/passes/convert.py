"""`convert`: from a calibrated stage to the reference form, a float graph with explicit quantization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from pyrsistent import pmap
from returns.result import Failure, Success

from qfunc.config.annotation import ParameterSpec
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.weights import RECURRENT, weights_of
from qfunc.errors import BadConfig, Problem, WrongStage, several
from qfunc.ir import Arg, Draft, Expression, Graph, Node, Note, Opaque, Origin, Ref
from qfunc.ir.node import NamedArgs, Written
from qfunc.ir.value import Name
from qfunc.numerics.grid import Grid, literals
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat
from qfunc.params import CastWeight, DequantizeWeight, DeriveQParams, QuantizeWeight
from qfunc.passes.codes import How, code_dtype, decode, given_codes, insert_behind, with_codes_given, without_unread
from qfunc.passes.custom_modules import custom_node, to_quantize, uncalibrated
from qfunc.passes.derived import Derivations, wrong_derived
from qfunc.passes.equalized import equalized
from qfunc.passes.evaluation import evaluating, folded, without_folded
from qfunc.passes.finish import finish
from qfunc.passes.originals import original_weights
from qfunc.passes.partial import partly
from qfunc.passes.record import recorded
from qfunc.passes.reroute import reroute, with_unrounded
from qfunc.passes.stages import Calibrated, Converted, Prepared, measures
from qfunc.result import R


def convert(
    calibrated: Calibrated, *, qconfig_mapping: QConfigMapping | None = None, keep_original_weights: bool = False
) -> R[Converted]:
    """The reference form: every quantized value goes through `quantize` and `dequantize`, every weight expression too.

    A value with a site of its own is quantized once, right behind its producer, for all its users; a float value with
    quantized uses once for each site, for those uses alone; what nobody reads quantized is not. What is quantized
    dynamically goes through one node, which rounds it to codes of its own range and gives float again; what is cast
    through two casts, there and back, where float16 overflows to infinity as `Tensor.to` does. Qparams that a function
    makes of a weight's are an expression, like the weight. Nothing of the input changes, so that it can be converted
    any number of times. Operators whose results nobody reads are left out, as a note tells.

    What was prepared for training becomes what it is in evaluation: batch norms are folded into the weights before
    them, nothing drops, and qparams are those that training has settled, to whose range values are clipped as there.

    What equalized layers read is multiplied by a scale per channel before it is quantized, with qparams of the scaled
    range, and their weights are divided by it: see `qfunc.passes.equalized`. The weights of the model stay as they are.

    Args:
        calibrated: a prepared stage and its statistics.
        qconfig_mapping: the mapping that was prepared with some of its entries, or new ones, set to `None`: what they
            name stays float, as if it had been prepared so.
        keep_original_weights: whether materialized modules are to have `original_weights`: of each layer whose weight
            became integers, the float `"weight"` and `"bias"` (those of a fused layer, with its batch norm folded in),
            by the path of its module, or the id of its node if that is no module, or one that is called elsewhere too.

    Returns:
        The converted graph, or `Unobserved` for every site that no data reached, `UserFunctionFailed` for an observer
        or a function of the user's that gives no qparams, `BadConfig` for a node whose weights are no parameters, for
        statistics of other channels than the value has, and for each entry of a second mapping that is not the first's
        and does not keep float, or `WrongStage`.
    """
    if not isinstance(calibrated, Calibrated):
        return Failure(WrongStage(type(calibrated).__name__, "Calibrated"))
    if qconfig_mapping is None:
        return _converted(calibrated, keep_original_weights)
    return partly(calibrated, qconfig_mapping).bind(lambda stage: _converted(stage, keep_original_weights))


def _converted(calibrated: Calibrated, keep_original_weights: bool) -> R[Converted]:
    found, problems = finish(calibrated)
    before = calibrated.prepared
    prepared, scaled, wrong = equalized(calibrated)
    found, problems = found | scaled, problems + wrong
    floats = prepared.graph if before.folding is None else folded(prepared.graph)
    weights = {id: weights_of(floats, floats[id]) for id in prepared.weights}
    problems += [_no_weight(prepared.graph, id) for id, parts in weights.items() if not parts]
    underivable = list(wrong_derived(prepared))
    if underivable:
        return Failure(several([*problems, *underivable]))
    derivations = Derivations(prepared, found, weights, calibrated.qparams)
    hows = {id: how for id in prepared.sites if (how := _how(prepared, derivations, id)) is not None}
    parameters = {
        id: dict(_parameters(prepared, floats[id], derivations, weights)) for id in _with_parameters(prepared)
    }
    problems += [*derivations.problems, *uncalibrated(calibrated)]
    if problems:
        return Failure(several(problems))
    made = _insert(prepared, hows, _with_folded(floats, before, parameters), to_quantize(calibrated))
    meant = {*prepared.outputs, *prepared.weights, *prepared.refused}
    meant |= {edge.user for edge, site in prepared.inputs.items() if isinstance(hows[site], (Dynamic, Cast))}
    intended = {
        node.id: node.origin.module
        for node in prepared.graph
        if node.id in meant and node.id in made.nodes and node.id not in prepared.swapped
    }
    taken = {id: hows[prepared.outputs[id]] for id in prepared.graph.order if id in prepared.quantized_inputs}
    given = {index: hows[prepared.outputs[id]] for index, id in given_codes(prepared).items()}
    return Success(
        Converted(
            recorded(before.graph, made, "convert", f"backend={prepared.backend}"),
            prepared.backend,
            pmap(intended),
            prepared.floats,
            (*prepared.notes, *_warned(calibrated.warnings), *_dropped(before.graph, made)),
            pmap(taken),
            pmap(given),
            original_weights(before if before.folding is None else replace(before, graph=floats))
            if keep_original_weights
            else None,
        )
    )


def _dropped(before: Graph, made: Graph) -> Iterator[Note]:
    for id in before.order:
        if id not in made.nodes and before[id].kind != "dropout":
            yield Note(id, "is not computed: nobody reads what it gives")


MOST_WARNINGS = 10
"""Of the warnings of calibration, which may be one for each batch, the first are told again."""


def _warned(warnings: tuple[Problem, ...]) -> Iterator[Note]:
    yield from (Note(warning.node, f"warns: {warning.reason}") for warning in warnings[:MOST_WARNINGS])
    if len(warnings) > MOST_WARNINGS:
        more = len(warnings) - MOST_WARNINGS
        yield Note("calibration", f"warns of {more} more: the warnings of the calibrated stage have them all")


def _how(prepared: Prepared, derivations: Derivations, site: str) -> How | None:
    """How a site is quantized; None where a problem is told."""
    observer = prepared.sites[site].observer
    if isinstance(observer, (Dynamic, Cast)):
        return observer
    found = derivations.of("site", site)
    assert not isinstance(found, QuantizeWeight), site
    # what was trained was trained within the range, which may be less than the codes have
    trained = ("site", site) in derivations.settled
    return literals(found.qparams(), headroom=not trained) if isinstance(found, Grid) else found


def _no_weight(graph: Graph, id: str) -> Problem:
    node = graph[id]
    if node.kind in RECURRENT:
        reason = f"its weights are to be quantized, and are not its alone: its module {graph.modules[node.place].own}"
        return BadConfig(node.place, reason, "remove that, or keep the module float: set_module_name(name, None)")
    reason = f"its weight is to be quantized, and it is no parameter called 'weight' of the {node.kind}"
    return BadConfig(node.place, reason, "quantize it where it is used, as set_edge does, or keep the module float")


def _with_parameters(prepared: Prepared) -> list[str]:
    return [id for id in prepared.graph.order if id in prepared.weights or id in prepared.biases]


def _parameters(
    prepared: Prepared, node: Node, derivations: Derivations, weights: Mapping[str, Mapping[str, Expression]]
) -> Iterator[tuple[str, Arg]]:
    """The parameters of a node that are quantized, by the names of its arguments."""
    id = node.id
    spec = prepared.weights.get(id, KeepFloat())
    for name, value in weights.get(id, {}).items():
        yield name, _rounded(value, spec, derivations, "weight", id)
    bias = node.get("bias") if id in prepared.biases else None
    if isinstance(bias, Expression):
        yield "bias", _rounded(bias, prepared.biases[id], derivations, "bias", id)


def _with_folded(
    floats: Graph, before: Prepared, parameters: Mapping[str, Mapping[str, Arg]]
) -> Mapping[str, Mapping[str, Arg]]:
    """The parameters with those that have a batch norm in them and are not quantized."""
    if before.folding is None:
        return parameters
    changed = (node for node in floats if node is not before.graph[node.id])
    kept = {node.id: {"weight": node.get("weight"), "bias": node.get("bias")} for node in changed}
    return {id: {**kept.get(id, {}), **parameters.get(id, {})} for id in (*kept, *parameters)}


def _rounded(value: Expression, spec: ParameterSpec, derivations: Derivations, kind: str, id: str) -> Expression:
    match spec:
        case KeepFloat():
            return value
        case Cast(dtype):
            return CastWeight(value, dtype)
        case _ if measures(spec) and (kind, id) not in derivations.settled:
            return DequantizeWeight(QuantizeWeight(value, spec))
        case _:
            found = derivations.of(kind, id)
            # Where there are none a problem is told, and the value is of no account.
            return value if found is None or isinstance(found, QuantizeWeight) else _on(value, found)


def _on(value: Expression, qparams: Grid | DeriveQParams) -> Expression:
    return DequantizeWeight(QuantizeWeight(value, qparams))


def _insert(
    prepared: Prepared,
    hows: Mapping[str, How],
    parameters: Mapping[str, Mapping[str, Arg]],
    custom: Mapping[str, Opaque],
) -> Graph:
    graph = prepared.graph
    draft = Draft(graph)
    decoded: dict[str, str] = {}

    def of_output(node: Node, site: str) -> str:
        if node.id in prepared.quantized_inputs:
            decoded[node.id] = decode(draft, node, hows[site])
        return decoded.get(node.id) or _quantized(draft, node, hows[site])

    def of_use(node: Node, site: str) -> str:
        return _quantized(draft, node, hows[site], decoded.get(node.id, node.id))

    reroute(draft, prepared, of_output, of_use)
    for id in prepared.swapped:
        draft.put(custom_node(draft[id]))
    for id, given in parameters.items():
        draft.put(draft[id].with_args(**given))
    made = with_codes_given(with_unrounded(prepared, draft.commit()), prepared.quantized_outputs)
    made = made if prepared.folding is None else evaluating(without_folded(made))
    made = without_unread(made, graph)
    return replace(made, objects=made.objects.update(custom)) if custom else made


def _quantized(draft: Draft, node: Node, how: How, floats: str = "") -> str:
    """Insert the quantization behind a value, whose `floats` may be another's; gives the id of the float value."""
    source = floats or node.id
    match how:
        case Dynamic(spec):
            return insert_behind(
                draft, node, "dq", "quantize_dynamically", (("inputs", (Ref(source),)), ("spec", spec))
            )
        case Cast(dtype):
            small = _cast(draft, node, source, dtype, dtype)
            return _cast(draft, node, small, "float32", "dq")
        case _:
            given: NamedArgs = (("inputs", (Ref(source),)), ("output", how))
            codes = insert_behind(draft, node, "q", "quantize", given, code_dtype(how))
            return insert_behind(draft, node, "dq", "dequantize", (("inputs", (Ref(codes),)), ("input", how)))


def _cast(draft: Draft, node: Node, value: str, dtype: str, suffix: str) -> str:
    """A conversion written as `value.to(dtype)`."""
    args: NamedArgs = (("input", Ref(value)), ("dtype", Name(f"torch.{dtype}")))
    origin = Origin(written=Written("call_method", "to", ("input", "dtype")))
    return insert_behind(draft, node, suffix, "cast", args, dtype, origin)
