"""`fuse`: fold batch norms into the operators beside them, and put activations and sums behind them, as one node."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from returns.result import Failure, Success

from qfunc.backends.cpu import CPU
from qfunc.config.arguments import wrong_arguments
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig, preserved_problems
from qfunc.errors import InTrainingMode, Problem, UnknownName, WrongStage, several
from qfunc.ir import Graph, Node
from qfunc.passes.fusing import Fusing
from qfunc.passes.fusion_rules import FusionRules
from qfunc.passes.owned import CallFuser
from qfunc.passes.record import recorded
from qfunc.passes.regions import region_problems
from qfunc.result import R

NOTHING = CustomConfig()


def fuse(
    graph: Graph,
    call_fuser: CallFuser,
    *,
    backend: BackendConfig = CPU,
    qat: bool = False,
    custom: CustomConfig = NOTHING,
) -> R[Graph]:
    """The graph with every chain that `backend` or the user fuses made one node.

    For evaluation a batch norm becomes a parameter expression of the operator beside it, so that no weight is read;
    for training (`qat=True`) it stays a post-op with parameters of its own, so that it can train. An activation or a
    residual sum becomes a post-op. The fused node keeps the id and the place of the chain's last node, whose value it
    computes. What does not fit is left alone (`explain_fusion` says why). Running it again changes nothing.

    Nothing is fused across the border of a standalone module, within which its own backend fuses. A user's fuser is
    called at once, on copies of the modules: its result belongs to the graph.

    Returns:
        The fused graph (the same object when nothing fused), or `InTrainingMode` for the model, or for each module of
        it that still trains, unless `qat`; with `qat`, `CannotFuse` for parts whose modes or features differ;
        `UserFunctionFailed` for a fuser; `UnknownName`, `BadConfig`, `WrongStage`.
    """
    if not isinstance(graph, Graph):
        return Failure(WrongStage(type(graph).__name__, "Graph"))
    problems = wrong_arguments(backend=backend, qat=qat, custom=custom)
    problems = problems or [*unknown_names(graph, backend, custom), *([] if qat else training_modules(graph))]
    if problems:
        return Failure(several(problems))
    fusing = Fusing(graph, backend, custom, qat=qat, call_fuser=call_fuser)
    fused = fusing.run()
    problems = [*fusing.log.problems, *fusing.log.unfit]
    if problems:
        return Failure(several(problems))
    kept = custom.preserved_attributes
    if not set(kept) <= set(graph.preserved):
        fused = replace(fused, preserved=tuple(dict.fromkeys((*graph.preserved, *kept))))
    return Success(recorded(graph, fused, "fuse", f"backend={backend.name}, qat={qat}"))


def unknown_names(graph: Graph, backend: BackendConfig, custom: CustomConfig) -> Iterator[Problem]:
    """The modules, patterns and attributes of a configuration that do not exist."""
    for name in custom.unfused_names:
        if name not in graph.modules:
            yield UnknownName(name, "module", tuple(sorted(graph.modules)))
    yield from region_problems(graph, custom)
    every = FusionRules(graph, backend, custom).every if custom.unfused_patterns else ()
    patterns = tuple(sorted(frozenset[str]().union(*(rules.names for rules in every))))
    for name in custom.unfused_patterns:
        if name not in patterns:
            yield UnknownName(name, "pattern", patterns)
    for source in graph.sources.values():
        yield from preserved_problems(source.model, custom.preserved_attributes)


def training_modules(graph: Graph) -> Iterator[Problem]:
    """The model, or each part of it, that is in training mode where that matters."""
    if graph.training:
        yield InTrainingMode("model")
        return
    for node in graph:
        if node.kind in ("batch_norm", "dropout") and node.get("training") is True and not _own_statistics(node):
            yield InTrainingMode(node.place)


def _own_statistics(node: Node) -> bool:
    """A batch norm without running statistics uses the batch's in evaluation as well."""
    return node.kind == "batch_norm" and node.get("running_mean") is None
