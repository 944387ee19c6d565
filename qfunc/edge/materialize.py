"""`materialize`: from a stage back to an ordinary `torch.fx.GraphModule`."""

from __future__ import annotations

import copy as copying
from typing import Any

from returns.result import Failure, Success
from torch import fx, nn

from qfunc.edge.emit import Emitter, UncopyableModuleError
from qfunc.edge.evaluate import check_sources
from qfunc.errors import UserFunctionFailed, WrongStage, several
from qfunc.ir import Graph
from qfunc.passes.lower import Lowered
from qfunc.passes.observe import with_observers
from qfunc.passes.stages import Calibrated, Converted, Prepared
from qfunc.result import R

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_KEEP = "_user_preserved_attributes"  # what fx's deepcopy carries over


def materialize(stage: Any, *, copy: bool = False) -> R[fx.GraphModule]:
    """A `GraphModule` that computes what the stage describes, with the model's parameter names, attributes and hooks.

    Its parameters share the source model's memory until either side writes to them, unless `copy` is asked for; ties
    between parameters are kept. The source model is never changed.

    Args:
        stage: a `Graph`, `Prepared`, `Calibrated`, `Converted` or `Lowered`.
        copy: whether to copy the parameters at once.

    Returns:
        The module, or `StaleSource` for source tensors that changed since tracing, `NonFinite` for weights that are to
        be quantized and hold NaN or infinity, `WrongStage`, `UserFunctionFailed`.
    """
    graph = _graph_of(stage)
    if graph is None:
        return Failure(WrongStage(type(stage).__name__, "Graph, Prepared, Calibrated, Converted or Lowered"))
    problems = check_sources(graph)
    if problems:
        return Failure(several(problems))
    emitter = Emitter(graph, copy=copy)
    try:
        fx_graph = emitter.emit()
    except UncopyableModuleError as error:
        return Failure(UserFunctionFailed(error.path, str(error)))
    module = fx.GraphModule(emitter.root, fx_graph, class_name=graph.title or "GraphModule")
    module.training = graph.training
    _keep_attributes(module, graph)
    return Success(module)


def _graph_of(stage: object) -> Graph | None:
    match stage:
        case Graph():
            return stage
        case Prepared():
            return with_observers(stage)
        case Calibrated(prepared):
            return with_observers(prepared)
        case Converted(graph) | Lowered(graph):
            return graph
        case _:
            return None


def _keep_attributes(module: fx.GraphModule, graph: Graph) -> None:
    """Carry over the model's own data attributes and hooks, in a way that survives `deepcopy`."""
    kept: dict[str, Any] = {}
    for source in graph.sources.values():
        model: nn.Module = source.model
        for name, value in vars(model).items():
            plain = not name.startswith("_") and not hasattr(module, name)
            if plain or (name in _HOOKS and value):
                kept[name] = _copied(value)
    module.meta[_KEEP] = kept
    for name, value in kept.items():
        setattr(module, name, value)


def _copied(value: Any) -> Any:
    """A copy, so that the source is not reached through the new module; what cannot be copied is shared."""
    try:
        return copying.deepcopy(value)
    except (TypeError, RuntimeError, NotImplementedError):
        return value
