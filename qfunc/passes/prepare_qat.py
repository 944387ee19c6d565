"""`prepare_qat`: make of a graph one that trains with what quantization will do to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from returns.result import Failure, Success

from qfunc.backends.cpu import CPU
from qfunc.config.annotation import Annotations
from qfunc.config.arguments import shown, wrong_arguments
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.training import for_training
from qfunc.config.weights import RECURRENT
from qfunc.errors import BadConfig, Problem, WrongStage, several
from qfunc.ir import Expression, Graph, Node, Note, PostOp
from qfunc.params import Load
from qfunc.passes.annotate import NOTHING
from qfunc.passes.fold import norms_behind
from qfunc.passes.prepare import prepare
from qfunc.passes.stages import Folding, Prepared
from qfunc.passes.training import Rounding
from qfunc.result import R

FOLDINGS: tuple[Folding, ...] = ("approximate", "exact")


def prepare_qat(
    graph: Graph,
    qconfig_mapping: QConfigMapping | Annotations | None = None,
    *,
    backend: BackendConfig = CPU,
    custom: CustomConfig = NOTHING,
    folding: Folding = "approximate",
) -> R[Prepared]:
    """The graph with its values and weights to be rounded while it trains.

    What `materialize` makes of it trains like any module, under the model's own names; `absorb` brings back what it has
    learned. Batch norms behind layers train as themselves: the weight is rounded as it will be with them in it. With
    `folding="exact"`, each layer runs twice in training, so that the statistics of a batch are those of the weight
    before rounding (in the reference, the slow path).

    Args:
        graph: a traced graph, fused for training: `fuse(graph, qat=True)`.
        qconfig_mapping: what to quantize, and how: a mapping or annotations whose observers are in `FakeQuantize`; what
            is not is only observed, and its weights are rounded after training. By default the backend's own mapping,
            `for_training`.
        backend: what can be quantized.
        custom: exceptions for the model, as for `prepare`.
        folding: how the norms behind layers take part in rounding their weights.

    Returns:
        The prepared graph, or what `prepare` reports; `BadConfig` for layers that have a batch norm folded in already,
        for a configuration that rounds nothing in training, for norms that exact folding cannot run, and for rounded
        tables with sparse gradients.

    >>> from torch import nn
    >>> from qfunc import fuse, trace, unwrap
    >>> graph = unwrap(trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU())))
    >>> unwrap(prepare_qat(unwrap(fuse(graph, qat=True)))).folding
    'approximate'
    """
    if not isinstance(graph, Graph):
        return Failure(WrongStage(type(graph).__name__, "Graph"))
    problems: list[Problem] = wrong_arguments(backend=backend)
    if folding not in FOLDINGS:
        problems.append(
            BadConfig("folding", f"there is no folding {shown(folding)}", 'choose "approximate" or "exact"')
        )
    if problems:
        return Failure(several(problems))
    chosen = for_training(backend.qconfig_mapping) if qconfig_mapping is None else qconfig_mapping
    return prepare(graph, chosen, backend=backend, custom=custom).bind(lambda made: _trainable(made, folding))


def _trainable(prepared: Prepared, folding: Folding) -> R[Prepared]:
    problems = [*_folded_already(prepared), *_unfoldable(prepared, folding), *_sparse(prepared)]
    if _is_quantized(prepared) and not any(map(_rounds, _ways(prepared))):
        reason = "nothing that it quantizes is rounded in training: its observers are in no FakeQuantize"
        remedy = "make a configuration for training of it: for_training(mapping)"
        problems.append(BadConfig("qconfig_mapping", reason, remedy))
    if problems:
        return Failure(several(problems))
    return Success(replace(prepared, folding=folding, notes=(*prepared.notes, *_untrained(prepared))))


def _ways(prepared: Prepared) -> Iterator[object]:
    """How what is quantized is, weights and biases included."""
    yield from (site.observer for site in prepared.sites.values())
    yield from prepared.weights.values()
    yield from prepared.biases.values()


def _is_quantized(prepared: Prepared) -> bool:
    return any(True for _ in _ways(prepared))


def _rounds(way: object) -> bool:
    return isinstance(way, Rounding)


def _folded_already(prepared: Prepared) -> Iterator[Problem]:
    """Layers whose weight is made of several tensors: what is trained has to be what the model has."""
    remedy = "fuse the traced graph for training: fuse(graph, qat=True)"
    for node in prepared.graph:
        weight = node.get("weight") if node.has("weight") else None
        if isinstance(weight, Expression) and not isinstance(weight, Load):
            yield BadConfig(node.place, "a batch norm is folded into its weight, and neither could train", remedy)


def _unfoldable(prepared: Prepared, folding: Folding) -> Iterator[Problem]:
    """Norms behind layers with rounded weights that cannot be folded, or not exactly."""
    for node in prepared.graph:
        norms = norms_behind(node)
        if not norms or node.id not in prepared.weights:
            continue
        tensors = (norm.get(name) for norm in norms for name in ("running_mean", "running_var", "weight", "bias"))
        computed = any(not (value is None or isinstance(value, Load)) for value in tensors)
        if computed or not isinstance(node.get("groups") if node.has("groups") else 1, int):
            reason = "the batch norm behind it has tensors that the graph computes, which no weight can take in"
            yield BadConfig(node.place, reason, "leave them apart: CustomConfig(unfused_names=...)")
        elif folding == "exact" and (len(norms) > 1 or not _are_modules(node)):
            reason = "exact folding is for a layer and one batch norm that are modules of the model"
            yield BadConfig(node.place, reason, 'write them as modules, or choose folding="approximate"')


def _sparse(prepared: Prepared) -> Iterator[Problem]:
    """Tables whose gradients tell of single rows: rounding takes and gives whole ones."""
    for id in (id for id in prepared.graph.order if _rounds(prepared.weights.get(id))):
        node = prepared.graph[id]
        if node.has("sparse") and node.get("sparse") is not False:
            reason = "its weight is rounded in training, and has no sparse gradients then"
            yield BadConfig(
                node.place, reason, "train it with sparse=False, or keep it float: set_module_name(name, None)"
            )


def _are_modules(node: Node) -> bool:
    written = (node.origin.written, norms_behind(node)[0].origin.written)
    return all(each is not None and each.op == "call_module" for each in written)


def _is_told_to_evaluate(part: Node | PostOp) -> bool:
    written = part.origin.written
    return any(name == "training" and value is False for name, value in part.args) and (
        written is not None and written.op != "call_module"
    )


def _untrained(prepared: Prepared) -> Iterator[Note]:
    """What is quantized in the end, and not rounded in training, and what does not train."""
    for id in (id for id in prepared.graph.order if id in prepared.weights):
        node, spec = prepared.graph[id], prepared.weights[id]
        if node.kind in RECURRENT and _rounds(spec):
            yield Note(node.place, "trains with its weights as they are: they are rounded afterwards")
    sites = {site.taps[0] for site in prepared.sites.values() if not _rounds(site.observer)}
    weights = {id for id, spec in prepared.weights.items() if not _rounds(spec)}
    for id in (id for id in prepared.graph.order if id in sites | weights):
        what = "its value" if id in sites else "its weight"
        yield Note(prepared.graph[id].place, f"{what} is not rounded in training: its observer is in no FakeQuantize")
    for node in prepared.graph if not prepared.graph.training else ():
        parts: tuple[Node | PostOp, ...] = (node, *node.post)
        for part in filter(_is_told_to_evaluate, parts):
            reason = f"{part.kind} does not follow train(): it was traced in evaluation; trace(model.train(), ...)"
            yield Note(node.place, reason)
    for id in (id for id in prepared.graph.order if id in prepared.swapped):
        yield Note(prepared.graph[id].place, "is a custom module, which trains as its own functions have it")
