"""`materialize`: from a stage back to an ordinary `torch.fx.GraphModule`."""

from __future__ import annotations

import copy as copying
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from returns.result import Failure, Success
from torch import Tensor, fx, nn

from qfunc.edge.custom_modules import CustomModuleError, stale_modules
from qfunc.edge.decomposed import REGISTERED, missing_operators
from qfunc.edge.emit import Emitter, UncopyableModuleError
from qfunc.edge.emit_training import TrainingEmitter
from qfunc.edge.evaluate import check_sources, tensors_of
from qfunc.edge.observer import ObserverError
from qfunc.engines.decomposed import uses_decomposed
from qfunc.errors import BadConfig, UserFunctionFailed, WrongStage, several
from qfunc.ir import Graph
from qfunc.passes.lower import Lowered
from qfunc.passes.observe import with_observers
from qfunc.passes.stages import Calibrated, Converted, Prepared
from qfunc.passes.training import rounds, with_fake_quantization
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
_INTERNAL = frozenset(vars(fx.GraphModule(nn.Module(), fx.Graph())))
_KEEP = "_user_preserved_attributes"  # what fx's deepcopy carries over


@dataclass(frozen=True, slots=True, eq=False)
class Emitted:
    """The module of a graph, and which node of its code gives which value."""

    module: fx.GraphModule
    values: Mapping[str, fx.Node]
    """By the ids of the graph's nodes, in their order: the node that gives the value with all that is fused behind."""
    memo: Mapping[int, Any]
    """What stands for a source's tensors and modules, by their ids."""


def materialize(stage: Any, *, copy: bool = False) -> R[fx.GraphModule]:
    """A `GraphModule` that computes what the stage describes, with the model's parameter names, attributes and hooks.

    Its parameters share the source model's memory until either side writes to them, unless `copy` is asked for; ties
    between parameters are kept. The source model is never changed. What was prepared for training has memory of its
    own, and rounds while it trains.

    Where `convert` was asked for the original weights, the module has them as `original_weights`, a dict of dicts of
    tensors, by the paths of layers: no part of its `state_dict`, sharing memory as parameters do.

    Args:
        stage: a `Graph`, `Prepared`, `Calibrated`, `Converted` or `Lowered`.
        copy: whether to copy the parameters at once.

    Returns:
        The module, or `StaleSource` for source tensors that changed since tracing, `NonFinite` for weights that are to
        be quantized and hold NaN or infinity, `EngineMissing` for a decomposed graph where torch has no such operators,
        `WrongStage`, `UserFunctionFailed`; `BadConfig` for a model with an attribute `original_weights` of its own,
        where those are asked for.
    """
    graph = graph_to_run(stage)
    if graph is None:
        return Failure(not_a_stage(stage))
    made = emitted(graph, copy=copy, trains=_trains(stage)).map(lambda made: made.module)
    if isinstance(stage, (Converted, Lowered)) and stage.original_weights is not None:
        tensors = tensors_of(stage.original_weights, graph.sources, copy=copy)
        return made.bind(lambda module: _with_originals(module, tensors))
    return made


def _with_originals(module: fx.GraphModule, tensors: dict[str, dict[str, Tensor]]) -> R[fx.GraphModule]:
    """The module with the original weights, in a way that survives `deepcopy`."""
    if hasattr(module, "original_weights"):
        remedy = "rename the model's attribute, or convert without keep_original_weights"
        return Failure(BadConfig("original_weights", "the model has an attribute of this name", remedy))
    module.meta[_KEEP]["original_weights"] = tensors
    module.original_weights = tensors  # type: ignore[assignment]
    return Success(module)


def emitted(graph: Graph, *, copy: bool = False, trains: bool = False) -> R[Emitted]:
    """`materialize` of a graph, which also tells where each value is in the module's code.

    What `trains`, as all does that rounds, has memory of its own, and norms that can be frozen.
    """
    problems = [*check_sources(graph), *stale_modules(graph), *missing_operators(graph)]
    if problems:
        return Failure(several(problems))
    emitter = TrainingEmitter(graph, copy=True) if trains or rounds(graph) else Emitter(graph, copy=copy)
    try:
        fx_graph = emitter.emit()
    except (ObserverError, CustomModuleError) as error:
        return Failure(error.problem)
    except UncopyableModuleError as error:
        return Failure(UserFunctionFailed(error.path, str(error)))
    module = fx.GraphModule(emitter.root, fx_graph, class_name=graph.title or "GraphModule")
    _set_flags(module, graph)
    _keep_attributes(module, graph, emitter.memo)
    if uses_decomposed(graph):
        module.meta["registered"] = REGISTERED
    if emitter.unsaved:
        unsave = partial(_unsave, names=tuple(emitter.unsaved))
        unsave(module)
        module._register_deepcopy_hook(unsave)
    return Success(Emitted(module, emitter.values, emitter.memo))


def graph_to_run(stage: object) -> Graph | None:
    """The graph that the module of a stage computes, observers included; None for what is no stage."""
    match stage:
        case Graph():
            return stage
        case Prepared(folding=str()) | Calibrated(Prepared(folding=str())):
            return with_fake_quantization(stage)
        case Prepared():
            return with_observers(stage)
        case Calibrated(prepared):
            return with_observers(prepared, stage.modules)
        case Converted(graph) | Lowered(graph):
            return graph
        case _:
            return None


def _trains(stage: object) -> bool:
    """Whether a stage was prepared for training, even if there is nothing in it to be rounded."""
    prepared = stage.prepared if isinstance(stage, Calibrated) else stage
    return isinstance(prepared, Prepared) and prepared.folding is not None


def not_a_stage(given: object) -> WrongStage:
    """What to say of something that has no graph to run."""
    return WrongStage(type(given).__name__, "Graph, Prepared, Calibrated, Converted or Lowered")


def _set_flags(module: fx.GraphModule, graph: Graph) -> None:
    """Give the containers, which are new, and modules of qfunc's own the training flags of the source."""
    flags = {path: m.training for source in graph.sources.values() for path, m in source.model.named_modules()}
    for path, part in module.named_modules():
        if part is module or type(part) is nn.Module or type(part).__module__.startswith("qfunc."):
            part.training = flags.get(path, graph.training)
    if not graph.training and any(source.model.training for source in graph.sources.values()):
        module.eval()  # it was traced for training, and evaluates now


def _unsave(module: nn.Module, names: tuple[str, ...]) -> None:
    """Take buffers out of the `state_dict`."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path)._non_persistent_buffers_set.add(leaf)


def _keep_attributes(module: fx.GraphModule, graph: Graph, memo: dict[int, Any]) -> None:
    """Carry over the model's own data attributes and hooks, in a way that survives `deepcopy`."""
    kept: dict[str, Any] = {}
    for source in graph.sources.values():
        model: nn.Module = source.model
        memo.setdefault(id(model), module)
        memo.setdefault(id(source.original), module)
        for name, value in vars(model).items():
            if name in _HOOKS and value:
                kept[name] = value.copy()
            elif name not in _INTERNAL and not hasattr(module, name):
                kept[name] = _copied(value, memo)
        kept.update(_preserved(model, graph.preserved, memo))
        if methods := _methods(model, graph.preserved):
            give = partial(_give_methods, methods=methods)
            give(module)
            module._register_deepcopy_hook(give)
    module.meta[_KEEP] = kept
    for name, value in kept.items():
        setattr(module, name, value)


def _preserved(model: nn.Module, names: tuple[str, ...], memo: dict[int, Any]) -> dict[str, Any]:
    """The attributes that the user asked for, copied; methods of the model are not among them."""
    values = {name: getattr(model, name) for name in names if hasattr(model, name)}
    return {name: _copied(value, memo) for name, value in values.items() if not _is_method(value, model)}


def _methods(model: nn.Module, names: tuple[str, ...]) -> dict[str, Any]:
    """The methods that the user asked for, as functions of the module."""
    values: list[tuple[str, Any]] = [(name, getattr(model, name, None)) for name in names]
    return {name: value.__func__ for name, value in values if _is_method(value, model)}


def _is_method(value: object, model: nn.Module) -> bool:
    return isinstance(value, MethodType) and value.__self__ is model


def _give_methods(module: nn.Module, methods: dict[str, Any]) -> None:
    """Make functions methods of the module, whose class is its own."""
    for name, function in methods.items():
        setattr(type(module), name, function)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A copy, so that the source is not reached through the new module; what cannot be copied is shared."""
    try:
        return copying.deepcopy(value, memo)
    except Exception:  # noqa: BLE001 - the copying of a user's object is the user's code
        return value
