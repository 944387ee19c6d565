"""`absorb`: what a module has learned, back into a value."""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyrsistent import PMap, pmap
from returns.result import Failure, Success
from torch import Tensor, nn

from qfunc.config.arguments import shown
from qfunc.edge.content import statistics_of
from qfunc.edge.custom_modules import calibrated_modules
from qfunc.edge.fake_quantize import FakeQuantizer
from qfunc.edge.materialize import Emitted, emitted
from qfunc.edge.tensors import named_tensors, source_of
from qfunc.errors import BadConfig, NonFinite, Problem, UserFunctionFailed, WrongStage, several, told
from qfunc.ir import Graph, Opaque, Source, Token
from qfunc.numerics.grid import Grid
from qfunc.numerics.statistic import finite
from qfunc.passes.stages import Calibrated, Owner, Prepared
from qfunc.passes.statistics import Key, Measured, Statistics, merge_of
from qfunc.passes.training import with_fake_quantization
from qfunc.result import QuantException, R


def absorb(prepared: Prepared, module: nn.Module | Mapping[str, Any]) -> R[Calibrated]:
    """The prepared stage with what a module that was materialized from it has learned, for `convert`.

    That is its parameters, the running statistics of its batch norms, what its observers have found and the qparams
    that it rounds with: converted, the graph computes what the module computes in evaluation. The module can go on
    training; nothing is shared with it. `materialize` of the result gives a module that goes on from there.

    Args:
        prepared: the stage that was materialized, from `prepare_qat`.
        module: the module, as it is or wrapped for distributed training or compiled, on any device; or its
            `state_dict`, such as a checkpoint's.

    Returns:
        The calibrated stage, or `WrongStage`, `BadConfig` for each tensor that is missing, of another shape or that
        the stage does not have, `NonFinite` for each that holds NaN or infinity, `BadFile` for an observer's state that
        cannot be read, `UserFunctionFailed` for a model that cannot be copied, or what `materialize` reports.

    >>> import torch
    >>> from qfunc import convert, fuse, materialize, prepare_qat, trace, unwrap
    >>> graph = unwrap(trace(nn.Sequential(nn.Linear(4, 2), nn.ReLU())).bind(lambda graph: fuse(graph, qat=True)))
    >>> prepared = unwrap(prepare_qat(graph))
    >>> module = unwrap(materialize(prepared))
    >>> _ = module(torch.randn(8, 4)).sum().backward()
    >>> quantized = unwrap(absorb(prepared, module).bind(convert).bind(materialize))
    """
    if not isinstance(prepared, Prepared) or prepared.folding is None:
        given = type(prepared).__name__
        given = f"{given} that is not for training" if isinstance(prepared, Prepared) else given
        return Failure(WrongStage(given, "Prepared, from prepare_qat"))
    state = _state_of(module)
    if isinstance(state, BadConfig):
        return Failure(state)
    graph = with_fake_quantization(prepared)
    parts = _parts_of(module) if isinstance(module, nn.Module) else {}
    return emitted(graph, trains=True).bind(lambda made: _absorbed(prepared, made, state, parts))


def _state_of(module: object) -> dict[str, Tensor] | BadConfig:
    """The tensors of a module or state by name, without what wrappers put before the names."""
    remedy = "pass the module that materialize(prepared) gave, or its state_dict"
    if isinstance(module, nn.Module):
        # buffers that are not saved are part of what a module has learned
        own = {**dict(named_tensors(module)), **module.state_dict()}
        found: Mapping[Any, Any] = {**own, **dict(_never_frozen(module))}
    elif isinstance(module, Mapping):
        found = module
        inner = [name for name, value in module.items() if isinstance(value, Mapping) and _has_tensors(value)]
        if inner and not _has_tensors(module):
            reason = f"it holds no tensors, but other states: {', '.join(map(shown, inner))}"
            return BadConfig("module", reason, f"pass the one of the module, such as checkpoint[{shown(inner[0])}]")
    else:
        return BadConfig("module", f"expected a module, got {shown(module)}", remedy)
    return {_unwrapped(str(name)): value for name, value in found.items() if isinstance(value, Tensor)}


def _has_tensors(state: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in state.values())


def _never_frozen(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The switches that norms lose when they are made synchronous."""
    for path, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm):
            yield f"{path}.frozen", torch.tensor(False, dtype=torch.uint8)


_SEGMENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module"})
"""What `torch.compile` and the wrapper of checkpointed parts put into the names of tensors."""
_WRAPPER, _OF_WRAPPERS = "module.", frozenset({"n_averaged"})
"""What `DistributedDataParallel` and `AveragedModel` put before names, and what they have beside them."""


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _SEGMENTS)


def _inside(state: Mapping[str, Tensor], known: Container[str]) -> Mapping[str, Tensor]:
    """The tensors of what is wrapped, however often; a part of the model may be called `module` as well."""
    found = state
    while not any(name in known for name in found):
        names = [name for name in found if name not in _OF_WRAPPERS]
        if not (names and all(name.startswith(_WRAPPER) for name in names)):
            return state
        found = {name.removeprefix(_WRAPPER): found[name] for name in names}
    return found


def _parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """The modules in a module by their paths, without what wrappers put before these."""
    return {_unwrapped(path): part for path, part in module.named_modules()}


def _absorbed(
    prepared: Prepared, made: Emitted, state: Mapping[str, Tensor], parts: Mapping[str, nn.Module]
) -> R[Calibrated]:
    """What a module made anew has once it has the state: it knows by itself what is where."""
    state = _inside(state, made.module.state_dict())
    problems = list(_misfits(made.module, state))
    if problems:
        return Failure(several(problems))
    try:
        _load(made.module, state)
    except QuantException as unread:
        return Failure(unread.error)
    trained = _trained_source(prepared.graph.sources["model"], made.memo)
    if isinstance(trained, UserFunctionFailed):
        return Failure(trained)
    graph = replace(
        prepared.graph,
        sources=prepared.graph.sources.set("model", trained),
        objects=prepared.graph.objects.update(dict(_owned(prepared.graph, made))),
    )
    stage = replace(prepared, graph=graph)
    rounding = [part for part in made.module.modules() if isinstance(part, FakeQuantizer)]
    of_owner = {owner: part for part in rounding for owner in part.owners}
    settled = {owner: Grid.of(known) for owner, part in of_owner.items() if part.rounds and (known := part.qparams())}
    found = {
        owner: state for owner, part in of_owner.items() if owner[0] != "site" and (state := part.state()) is not None
    }
    statistics = _statistics(stage, of_owner)
    modules = _custom_modules(stage, made, parts)
    if isinstance(modules, UserFunctionFailed):
        return Failure(modules)
    return Success(Calibrated(stage, statistics, modules, qparams=pmap(settled), states=pmap(found)))


def _custom_modules(
    stage: Prepared, made: Emitted, parts: Mapping[str, nn.Module]
) -> PMap[str, Opaque] | UserFunctionFailed:
    """Copies of the custom modules that were trained, since what they observe may be in no `state_dict`."""
    fresh = calibrated_modules(stage, made.module)
    paths = {id(part): path for path, part in made.module.named_modules()}
    found: dict[str, Opaque] = {}
    for place, held in fresh.items():
        trained = parts.get(paths[id(held.value)])
        try:
            found[place] = held if trained is None else Opaque(copy.deepcopy(trained))
        except Exception as error:  # noqa: BLE001 - the copying of a user's module is the user's code
            return UserFunctionFailed(place, f"it cannot be copied: {told(error)}")
    return pmap(found)


def _misfits(module: nn.Module, state: Mapping[str, Tensor]) -> Iterator[Problem]:
    """What a state lacks, has too much or has in another shape, and what in it is not finite."""
    remedy = "absorb into the stage that the module was materialized from"
    if any(name.endswith("_orig") or ".parametrizations." in name for name in state):
        remedy = "take parametrizations off first: parametrize.remove_parametrizations, prune.remove"
    known = {**module.state_dict(), **dict(named_tensors(module))}
    rounding = {path: part for path, part in module.named_modules() if isinstance(part, FakeQuantizer)}
    if known and not state:
        yield BadConfig("module", "it has no tensors", remedy)
        return
    for name in (name for name in module.state_dict() if name not in state):
        yield BadConfig(name, "the module does not have this tensor", remedy)
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        part = rounding.get(path)
        if name not in known:
            yield BadConfig(name, "the stage does not have this tensor", remedy)
        elif value.shape != known[name].shape and (part is None or not _resizes(part, leaf, value, known[name])):
            shapes = f"{tuple(value.shape)}, in the stage {tuple(known[name].shape)}"
            yield BadConfig(name, f"its shape is {shapes}", remedy)
        elif part is not None and leaf == "scale" and not part.learned and bool((value < 0).any()):
            yield BadConfig(name, "it holds a scale below zero", "go back to an earlier checkpoint")
        # ranges are infinite as long as nothing was measured
        elif not (part is not None and _is_unmeasured(part, leaf, value)) and _diverged(value, known[name]):
            reason = "it holds NaN or infinity: training has diverged"
            yield NonFinite(name, reason, "go back to an earlier checkpoint, and train with smaller steps")


def _resizes(part: FakeQuantizer, leaf: str, value: Tensor, known: Tensor) -> bool:
    """Whether a tensor of a fake quantizer may have another shape: bytes may, and channels that nobody has counted."""
    if leaf == "observer_state":
        return value.dim() == 1 and value.dtype == torch.uint8
    return part.spec.per_channel and value.dim() == 1 and known.numel() <= 1 and leaf not in part.on


def _is_unmeasured(part: FakeQuantizer, leaf: str, value: Tensor) -> bool:
    """Whether it is a range of nothing; averages of such ranges are NaN where qparams are learned, and need none."""
    return leaf in ("min_val", "max_val") and (part.learned or not bool(value.isnan().any()))


def _diverged(value: Tensor, before: Tensor) -> bool:
    """Whether a tensor holds NaN or infinity that the model did not have there: masks do hold infinity."""
    if finite(value):
        return False
    return value.shape != before.shape or not (value.isfinite() | (value == before.to(value.device))).all()


def _load(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    saved = module.state_dict()
    module.load_state_dict({name: value for name, value in state.items() if name in saved}, strict=False)
    with torch.no_grad():
        for name, tensor in named_tensors(module):
            if name not in saved and name in state:
                tensor.copy_(state[name])


def _trained_source(source: Source, memo: Mapping[int, Any]) -> Source | UserFunctionFailed:
    """A copy of the model that has the trained tensors in place of its own; `memo` has them by the ids of these."""
    copies: dict[int, Any] = {}
    try:
        model = copy.deepcopy(source.model, copies)
    except Exception as error:  # noqa: BLE001 - the copying of a user's model is the user's code
        return UserFunctionFailed("model", f"it cannot be copied: {told(error)}")
    others: dict[str, Tensor] = {}
    held = {name: id(tensor) for name, tensor in named_tensors(source.model)}
    with torch.no_grad():
        for name, (tensor, _) in source.tensors.items():
            if held.get(name) != id(tensor):
                others[name] = tensor
            elif id(tensor) in memo:
                copies[id(tensor)].copy_(memo[id(tensor)])
    return source_of(model, others)


def _owned(graph: Graph, made: Emitted) -> Iterator[tuple[str, Opaque]]:
    """The modules that fusers of the user's made, as they are trained."""
    for node in (node for node in graph if node.kind == "owned"):
        token = node.get("module")
        assert isinstance(token, Token)
        yield token.id, Opaque(made.module.get_submodule(str(made.values[node.id].target)))


def _statistics(prepared: Prepared, of_owner: Mapping[Owner, FakeQuantizer]) -> Statistics:
    """What the observers of sites have found; that of a site of several values is filed under each of them."""
    measured: dict[Key, Measured] = {}
    for site in prepared.sites.values():
        part = of_owner.get(("site", site.id))
        state = None if part is None else part.state()
        if state is not None:
            measured |= {fold.key: Measured(state, merge=merge_of(fold.observer)) for fold in site.folds}
    return replace(statistics_of(prepared), measured=pmap(measured))
