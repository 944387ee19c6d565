"""The laws of training with fake quantization as values, for any model, configuration, folding and backend."""

from __future__ import annotations

import copy
import io
import traceback
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from returns.result import Failure
from torch import Tensor, nn

from qfunc.edge.absorb import absorb
from qfunc.edge.materialize import materialize
from qfunc.edge.switch import Switches, switch, switched
from qfunc.errors import render
from qfunc.ir import digest, verify
from qfunc.passes.stages import Calibrated
from qfunc.passes.training import with_fake_quantization
from qfunc.testing.laws import Law, Violation, check_law
from qfunc.testing.metrics import relative_error, same_bits
from qfunc.testing.training_walk import (
    TrainingCase,
    TrainingWalk,
    steps_back,
    train,
    trained_step,
    trained_walk,
    training_steps,
    trains,
)
from qfunc.testing.value_by_value import differences
from qfunc.testing.walk import fingerprint, graph_of, made, run


def check_training_laws(
    training: TrainingCase, laws: Iterable[Law[TrainingWalk]] | None = None
) -> tuple[Violation, ...]:
    """The laws of training that do not hold for a case, of `TRAINING_LAWS` by default.

    A model that cannot be trained in float has nothing to hold to, but that it fails as a value, if at all.

    >>> from qfunc.testing.walk import Case
    >>> x = torch.randn(4, 3)
    >>> check_training_laws(TrainingCase(Case(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), (x,), ((x,),))))
    ()
    """
    broken = check_law(TRAINING_IS_TOTAL, training)
    if broken is not None:
        return (broken,)
    if not trains(training):
        return ()
    way = trained_walk(training)
    found = (check_law(law, way) for law in (TRAINING_LAWS if laws is None else laws))
    return tuple(violation for violation in found if violation is not None)


# Purity ---------------------------------------------------------------------------------------------------------------


def _nothing_changes(way: TrainingWalk) -> str:
    training = way.case
    model = training.model()
    _seeded(model, training.case.inputs)
    output, mode = _seeded(copy.deepcopy(model), training.case.inputs), model.training
    outside = (model, training.case.inputs, training.case.batches)
    before = fingerprint(outside)
    stage: Any = model
    for name, function in training_steps(training):
        result = function(stage)
        if fingerprint(outside) != before:
            return f"{name} changes the model or the data"
        if isinstance(result, Failure):
            return ""
        stage = result.unwrap()
    prepared, held = stage, fingerprint(stage)
    module = made(prepared)
    train(module.train(), training)
    if (fingerprint(outside), fingerprint(prepared)) != (before, held):
        return "training changes the model, the data or the prepared stage"
    trained = fingerprint(module)
    for name, function in steps_back(training, module):
        earlier = fingerprint(stage)
        result = function(stage)
        if fingerprint(stage) != earlier:
            return f"{name} changes the stage it is given"
        if isinstance(result, Failure):
            break
        stage = result.unwrap()
        run(made(stage).eval(), training.case.inputs)
        if (fingerprint(outside), fingerprint(prepared), fingerprint(module)) != (before, held, trained):
            return f"{name}, or running what it gave, changes the model, the prepared stage or the module that trains"
    same = model.training is mode and same_bits(_seeded(model, training.case.inputs), output)
    return "" if same else "the model computes something else now"


def _seeded(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a model computes, where what drops drops the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return run(model, inputs)


# Graphs ---------------------------------------------------------------------------------------------------------------


def _well_formed(way: TrainingWalk) -> str:
    graphs = {name: graph_of(stage) for name, stage in way.stages.items()}
    if way.prepared is not None:
        graphs["with fake quantization"] = with_fake_quantization(way.prepared)
    if way.absorbed is not None:
        graphs["with what was absorbed"] = with_fake_quantization(way.absorbed)
    for name, graph in graphs.items():
        result = verify(graph)
        if isinstance(result, Failure):
            return f"after {name}: {render(result.failure())}"
    return ""


def _repeatable(way: TrainingWalk) -> str:
    again = trained_walk(way.case)
    if type(again.failure) is not type(way.failure):
        return "the second walk fails otherwise"
    for name, stage in way.stages.items():
        if digest(graph_of(stage)) != digest(graph_of(again.stages[name])):
            return f"{name} gives another digest the second time"
    if way.absorbed is not None and again.absorbed is not None:
        return _unlike(way.absorbed, again.absorbed)
    return ""


# Totality -------------------------------------------------------------------------------------------------------------


def _total(training: TrainingCase) -> str:
    reached = "copying the model"
    try:
        stage: Any = training.model()
        for name, function in training_steps(training):
            reached = name
            result = function(stage)
            if isinstance(result, Failure):
                render(result.failure())
                return ""
            stage = result.unwrap()
        reached = "materialize"
        module = materialize(stage)
        if isinstance(module, Failure):
            render(module.failure())
            return ""
        if not trains(training):
            return ""
        reached = "training"
        train(module.unwrap().train(), training)
        for name, function in steps_back(training, module.unwrap()):
            reached = name
            result = function(stage)
            if isinstance(result, Failure):
                render(result.failure())
                return ""
            stage = result.unwrap()
            module = materialize(stage)
            if isinstance(module, Failure):
                render(module.failure())
    except Exception as error:  # noqa: BLE001 - any exception whatever breaks this law
        last = "".join(traceback.format_exception(error)[-8:])
        return f"{reached} raises {type(error).__name__}: {error}\n{last}"
    return ""


# What is computed -----------------------------------------------------------------------------------------------------


def _converted_is_trained(way: TrainingWalk) -> str:
    if way.absorbed is None or way.converted is None or way.module is None:
        return ""
    if any(node.aliased for node in way.absorbed.graph):
        return ""  # values are written to after they were looked at
    trained, again = copy.deepcopy(way.module).eval(), made(way.absorbed).eval()
    for inputs in way.case.inputs():
        if not same_bits(_seeded(trained, inputs), _seeded(again, inputs)):
            return "what was absorbed evaluates otherwise than the module that was trained"
        reason = "; ".join(differences(way.absorbed, way.converted, inputs))
        if reason:
            return reason
    return ""


_EXACT, _NEAR = 1e-9, 1e-4
"""Of results in float64, and in float32 where a model runs only so; what cancels most of its sums loses digits."""


def _unrounded_is_float(way: TrainingWalk) -> str:
    if way.prepared is None or way.fused is None or way.prepared.swapped:
        return ""  # custom modules train as their own functions have it
    doubled = _runs(_doubled(way.case.model()).train(), _doubled(way.case.case.inputs))
    for mode in (False, True):
        # what was traced in training has its functional operators drop for ever
        plain = made(way.fused) if mode else way.case.model()
        module = switch(made(way.prepared), Switches(fake_quantize=False))
        reason = _trains_otherwise(plain.train(mode), module.train(mode), way, doubled=doubled)
        if reason:
            return f"{'training' if mode else 'evaluating'}, {reason}"
    return ""


def _trains_otherwise(plain: nn.Module, module: nn.Module, way: TrainingWalk, *, doubled: bool) -> str:
    if doubled:
        plain, module = _doubled(plain), _doubled(module)
    allowed = _EXACT if doubled else _NEAR
    for index, inputs in enumerate(way.case.inputs()):
        x = _doubled(inputs) if doubled else inputs
        expected, actual = trained_step(plain, x, index), trained_step(module, x, index)
        error = relative_error(expected, actual)
        if error > allowed:
            return f"it is off by {error:.1e}"
    return _trained_otherwise(plain, module, 1e3 * allowed)


def _runs(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether a model runs: one that makes float32 tensors of its own may not in float64."""
    try:
        _seeded(model, inputs)
    except RuntimeError:
        return False
    return True


def _trained_otherwise(plain: nn.Module, module: nn.Module, allowed: float) -> str:
    """Which gradients and statistics are others."""
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    state = module.state_dict()
    for name, parameter in plain.named_parameters():
        found = gradients.get(name)
        if name not in gradients and not plain.training:
            continue  # a fuser of the user's names its parts as it likes
        if parameter.grad is None and (found is None or not found.any()):
            continue
        if parameter.grad is None or found is None or _off(parameter.grad, found, allowed):
            return f"the gradient of {name} is another"
    for name, tensor in plain.state_dict().items():
        if name not in state and not plain.training:
            continue
        if name not in state or _off(tensor, state[name], allowed):
            return f"{name} becomes another"
    return ""


def _off(expected: Tensor, actual: Tensor, allowed: float) -> bool:
    """Whether tensors differ by more than rounding; sums may cancel to zero."""
    if expected.shape != actual.shape:
        return True
    error = (expected.to(torch.float64) - actual.to(torch.float64)).abs()
    size = max(1e-3, float(expected.abs().max())) if expected.numel() else 1.0
    return bool((error > allowed * size).any())


def _doubled(value: Any) -> Any:
    """A module or inputs in float64."""
    match value:
        case nn.Module():
            return value.double()
        case Tensor():
            return value.double() if value.is_floating_point() else value
        case dict():
            return {key: _doubled(part) for key, part in value.items()}
        case tuple() | list():
            return type(value)(map(_doubled, value))
        case _:
            return value


# There and back -------------------------------------------------------------------------------------------------------


def _absorbing_is_inverse(way: TrainingWalk) -> str:
    if way.absorbed is None or way.prepared is None or way.module is None:
        return ""
    again = absorb(way.prepared, way.module)
    if isinstance(again, Failure):
        return f"absorbed again, it fails: {render(again.failure())}"
    if reason := _unlike(way.absorbed, again.unwrap()):
        return f"absorbed again: {reason}"
    for prepared in (way.prepared, way.absorbed.prepared):
        fresh = made(prepared)
        for name, state in _states(way.module, fresh):
            result = absorb(prepared, state)
            if isinstance(result, Failure):
                return f"through {name}: {render(result.failure())}"
            if reason := _unlike(way.absorbed, result.unwrap()):
                return f"through {name}: {reason}"
    going_on = absorb(way.absorbed.prepared, made(way.absorbed))
    if isinstance(going_on, Failure):
        return f"materialized again, it cannot be absorbed: {render(going_on.failure())}"
    reason = _unlike(way.absorbed, going_on.unwrap())
    return f"materialized again: {reason}" if reason else ""


def _states(module: nn.Module, fresh: nn.Module) -> Iterator[tuple[str, nn.Module | Mapping[str, Any]]]:
    """What a module can be absorbed through; `fresh` is one of the same stage."""
    state = module.state_dict()
    written = io.BytesIO()
    torch.save(state, written)
    written.seek(0)
    fresh.load_state_dict(torch.load(written, weights_only=True))
    yield "a checkpoint loaded into another module", fresh
    unsaved = [name for name, _ in module.named_buffers() if name not in state]
    if not unsaved:
        yield "its state", state
        yield "wrappers' names", {f"module._orig_mod.{name}": tensor for name, tensor in state.items()}
    yield "a copy", copy.deepcopy(module)


def _unlike(a: Calibrated, b: Calibrated) -> str:
    """In what two stages that were absorbed differ; their models are copies of one."""
    if a.qparams != b.qparams:
        wrong = sorted(str(owner) for owner in {*a.qparams, *b.qparams} if a.qparams.get(owner) != b.qparams.get(owner))
        return f"the qparams differ: {', '.join(wrong)}"
    if a.statistics.measured.keys() != b.statistics.measured.keys():
        return "what was measured is filed otherwise"
    for key, measured in a.statistics.measured.items():
        if fingerprint(measured.state) != fingerprint(b.statistics.measured[key].state):
            return f"the state of {key} differs"
    ours, theirs = a.graph.sources["model"].tensors, b.graph.sources["model"].tensors
    if ours.keys() != theirs.keys():
        return f"tensors are missing: {sorted(ours.keys() ^ theirs.keys())}"
    wrong = [name for name, (tensor, _) in ours.items() if not same_bits(tensor, theirs[name][0])]
    if wrong:
        return f"tensors differ: {', '.join(wrong)}"
    return "" if digest(a.graph) == digest(b.graph) else "the graphs have other digests"


# Switches -------------------------------------------------------------------------------------------------------------


def _switched_off(way: TrainingWalk) -> str:
    if way.module is None or way.prepared is None:
        return ""
    everything = Switches(observe=False, learn=False, freeze_norms=True)
    module = switch(copy.deepcopy(way.module).train(), everything)
    if not same_bits(switched(way.module.state_dict(), everything), module.state_dict()):
        return "the state with its switches turned is not that of the module with its switches turned"
    loaded = made(way.prepared).train()
    loaded.load_state_dict(module.state_dict())
    before = copy.deepcopy(module.state_dict())
    for index, inputs in enumerate(way.case.inputs()):
        outputs = [trained_step(each.train(), inputs, index) for each in (module, loaded)]
        if not same_bits(*outputs):
            return "with the state of a module that is switched off, another one computes something else"
    user_owned = _own_statistics(module)
    changed = [
        name
        for name, tensor in module.state_dict().items()
        if not same_bits(tensor, before[name]) and name.rpartition(".")[0] not in user_owned
    ]
    if changed:
        return f"switched off, it changes {', '.join(changed)}"
    back = switch(module, Switches(observe=True, learn=True, freeze_norms=False)).state_dict()
    unlike = [name for name, tensor in way.module.state_dict().items() if not same_bits(tensor, back[name])]
    unlike = [name for name in unlike if name.rpartition(".")[0] not in user_owned]
    return f"switched on again, it has another state: {', '.join(unlike)}" if unlike else ""


def _own_statistics(module: nn.Module) -> set[str]:
    """The norms that no switch is for: those of instances."""
    return {path for path, part in module.named_modules() if isinstance(part, nn.modules.instancenorm._InstanceNorm)}


# The table ------------------------------------------------------------------------------------------------------------

TRAINING_IS_TOTAL: Law[TrainingCase] = Law(
    11,
    "training is total",
    "Every function of training gives Success or Failure; what was materialized trains on what the model trains on.",
    _total,
)

TRAINING_LAWS: tuple[Law[TrainingWalk], ...] = (
    Law(
        1,
        "rounding nothing is float",
        "With fake quantization off a module computes in evaluation what the model does, and in training what the fused"
        " model does, with the same gradients and statistics.",
        _unrounded_is_float,
    ),
    Law(
        1,
        "converting keeps what was trained",
        "Converted, each operator gives on the values of the module that was trained what it gave there in evaluation.",
        _converted_is_trained,
    ),
    Law(2, "training is pure", "Training changes no model, no data and no stage.", _nothing_changes),
    Law(3, "training is well-formed", "verify holds of graphs with fake quantization.", _well_formed),
    Law(8, "training is repeatable", "The same steps give the same digests, qparams and tensors.", _repeatable),
    Law(
        9,
        "absorbing is the inverse of materializing",
        "What was absorbed and materialized is absorbed as it was, through a checkpoint, a copy or a wrapper as well.",
        _absorbing_is_inverse,
    ),
    Law(
        9,
        "switched off, nothing changes",
        "Without observers, learning and statistics of norms, training changes no state but by its optimizer; switches"
        " are turned in a state as in a module.",
        _switched_off,
    ),
)
"""The laws of training."""
