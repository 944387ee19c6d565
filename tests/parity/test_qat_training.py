"""Whole models train as torch.ao's do: single steps number by number, many steps by what they arrive at."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qfunc import absorb, convert, fuse, materialize, prepare_qat, trace, unwrap
from qfunc.testing import oracle
from tests.parity.structure import Traced
from tests.parity.training_sides import Rounded, Training, TrainingStructure, distance, rounded, step, ties
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-3),
}
TOLERANCE = 1e-5
CANCELLED = {"mobilenet": {"1.layers.8.bias": "1.layers.8.weight"}}
"""Parameters whose gradient is zero but for rounding errors, and one of that layer whose gradient is not.

Another batch norm takes out again what the bias adds, to the sum as well that the norm's result is a part of.
"""


@cache
def structure(name: str, version: int = 1, backend: str = "x86") -> TrainingStructure:
    case = next(case for case in ZOO if case.name == name)
    model, inputs = case.build()
    return TrainingStructure(Traced(model.train(), inputs), backend, version)


def batches(sides: Training, count: int, seed: int, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (size, *sides.structure.graphs.inputs[0].shape[1:])
    images = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [(image.to(sides.dtype), torch.randint(0, 5, (size,), generator=generator)) for image in images]


def optimizers(sides: Training, make: Any, of_theirs: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Ours, in the state of torch.ao's."""
    made, theirs = make(sides.ours.parameters()), {sides.our_name(n): p for n, p in sides.theirs.named_parameters()}
    for name, parameter in sides.ours.named_parameters():
        held = of_theirs.state.get(theirs[name], {})
        made.state[parameter] = {key: copy.deepcopy(value) for key, value in held.items()}
    return made


def check_step(sides: Training, name: str, make: Any, seed: int, before: int) -> bool:
    """One step from one state, `before` steps after the beginning; whether no value was rounded otherwise."""
    data, of_theirs = batches(sides, before + 1, seed), make(sides.theirs.parameters())
    for batch in data[:before]:
        step(sides.theirs, of_theirs, *batch)
    if before:
        sides.begin_alike()
    of_ours = optimizers(sides, make, of_theirs)
    seen = rounded(sides.ours, lambda path: path), rounded(sides.theirs, lambda path: path_of(sides, path))
    ours, theirs = step(sides.ours, of_ours, *data[-1]), step(sides.theirs, of_theirs, *data[-1])
    if ties(*seen):
        return False
    assert distance(ours, theirs) < TOLERANCE
    gradients, cancelled = sides.named_gradients(), CANCELLED.get(name, {})
    for parameter, (one, other) in gradients.items():
        norm = gradients[cancelled[parameter]][1].norm() if parameter in cancelled else other.norm()
        assert (one - other).norm() < TOLERANCE * norm, parameter
    state = sides.their_state()
    assert state.keys() == sides.our_state().keys()
    for tensor, value in sides.our_state().items():
        # Adam makes whole steps of rounding errors
        if not (tensor in cancelled and isinstance(of_ours, torch.optim.Adam)):
            assert distance(value, state[tensor]) < TOLERANCE, tensor
    return True


def path_of(sides: Training, path: str) -> str:
    return sides.our_name(f"{path}.scale").removesuffix(".scale")


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("version", [0, 1])
@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_one_step(name, version, optimizer):
    """At the beginning and after some steps; where a value lies between two numbers, errors of float32 decide."""
    alike = [
        check_step(Training(structure(name, version)), name, OPTIMIZERS[optimizer], seed, before)
        for seed, before in ((0, 0), (1, 0), (2, 2), (3, 2))
    ]
    assert sum(alike) >= 3


def test_what_is_rounded_otherwise_is_found():
    """Where both are right, and where one is wrong."""
    given, scale = torch.tensor([0.1, 0.25, 0.7]), torch.tensor(0.5)
    here = {"": Rounded(given, torch.tensor([0.0, 0.0, 0.5]), scale)}
    assert ties(here, here) == 0
    assert ties(here, {"": Rounded(given + 1e-8, torch.tensor([0.0, 0.5, 0.5]), scale)}) == 1
    with pytest.raises(AssertionError):
        ties(here, {"": Rounded(given, torch.tensor([0.5, 0.0, 0.5]), scale)})


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_one_step_in_double_precision(name):
    """Without errors that could decide anything, every seed agrees; the fused operator is for float32 alone."""
    for seed in range(3):
        sides = Training(structure(name, 0), torch.float64)
        assert check_step(sides, name, OPTIMIZERS["sgd"], seed, before=1)


def test_steps_tell_versions_apart():
    """The fused operator rounds weights by other scales than the observer has."""
    one, other = Training(structure("resnet", 0)), Training(structure("resnet", 1))
    (batch,) = batches(one, 1, 0)
    for sides in (one, other):
        step(sides.ours, OPTIMIZERS["sgd"](sides.ours.parameters()), *batch)
    scale = "0.0.weight_fake_quant.scale"
    assert 1e-3 < distance(one.our_state()[scale], other.our_state()[scale]) < 1e-2


def test_evaluation_takes_what_is_kept():
    """Of what the fused operator rounds with in training, evaluation and `convert` take what the observer gives."""
    sides = Training(structure("mobilenet"))
    batch, _ = batches(sides, 1, 0)[0]
    sides.ours(batch)
    part = sides.ours.get_submodule("1.layers.5.fc2").weight_fake_quant
    assert set(part.zero_point.tolist()) == {0, 127}
    assert (part.qparams().zero_point == 0).all()
    weight = torch.randn(16, 4, 1, 1, generator=torch.Generator().manual_seed(0)).abs()
    sides.ours.eval()
    codes = part(weight) / part.qparams().scale.view(-1, 1, 1, 1)
    assert torch.allclose(codes, codes.round(), atol=1e-4)


def classes(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images of five patterns in noise."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(5, 3, 8, 8, generator=generator)
    targets = [torch.randint(0, 5, (8,), generator=generator) for _ in range(count)]
    return [(patterns[t] + 2.0 * torch.randn(8, 3, 8, 8, generator=generator), t) for t in targets]


def test_two_hundred_steps():
    sides, data = Training(structure("shufflenet")), classes(200, 0)
    means = []
    for model in (sides.ours, sides.theirs):
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9), []
        for batch, target in data:
            losses.append(functional.cross_entropy(step(model, optimizer, batch, target), target).item())
        assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
        means.append(sum(losses[-20:]) / 20)
    assert abs(means[0] - means[1]) < 0.02 * means[1]


def trained(name: str, backend: str) -> tuple[Training, torch.Tensor]:
    """A few steps of both, from which both are taken on in evaluation; and an input."""
    sides = Training(structure(name, backend=backend))
    data = batches(sides, 6, 0)
    for model in (sides.ours, sides.theirs):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for batch in data[:-1]:
            step(model, optimizer, *batch)
        model.eval()
    return sides, data[-1][0]


@pytest.mark.parametrize(
    ("name", "backend"), [("resnet", "qnnpack"), ("mobilenet", "qnnpack"), ("shufflenet", "onednn")]
)
def test_converted_as_evaluated(name, backend):
    """What is converted computes what trained; torch.ao measures the folded weights once more, and moves their scales.

    With all 8 bits: of the 7 of x86, both sides keep in conversion what lies beyond the range, and clip it before.
    Torch.ao's observers are switched off in evaluation, where they would go on measuring.
    """
    sides, batch = trained(name, backend)
    ours = unwrap(absorb(sides.structure.prepared, sides.ours).bind(convert).bind(materialize))
    sides.theirs.apply(torch.ao.quantization.disable_observer)
    with torch.no_grad():
        moved = distance(ours(batch), sides.ours(batch))
        their_move = distance(oracle.reference(sides.theirs)(batch), sides.theirs(batch))
    assert moved < 1e-6
    assert their_move > 1e-3


@pytest.mark.parametrize("name", ["resnet", "shufflenet"])
def test_their_conversion_moves_learned_qparams(name):
    """Torch.ao's weight observers see one more tensor in conversion: ranges that training has settled move."""
    sides, _ = trained(name, "x86")
    before = {
        path.removesuffix(".weight_fake_quant"): module.calculate_qparams()[0].reshape(-1).clone()
        for path, module in sides.theirs.named_modules()
        if path.endswith(".weight_fake_quant")
    }
    after = oracle.weight_qparams(oracle.reference(sides.theirs))
    moved = [path for path, (scales, _) in after.items() if distance(torch.tensor(scales), before[path]) > 1e-5]
    assert moved
    settled = unwrap(absorb(sides.structure.prepared, sides.ours)).qparams
    for part in (part for part in sides.ours.modules() if hasattr(part, "owners")):
        for owner in part.owners:
            assert torch.equal(settled[owner].qparams().scale, part.qparams().scale)


def test_the_source_is_left_alone():
    """Training ours leaves the float model as it was, bit for bit; torch.ao's moves its statistics and weights."""
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    case = next(case for case in ZOO if case.name == "resnet")
    model, inputs = case.build()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def train(module: nn.Module) -> None:
        optimizer = torch.optim.SGD(module.parameters(), 0.05)
        for _ in range(2):
            step(module, optimizer, inputs[0], torch.tensor([0, 1]))

    prepared = unwrap(trace(model, inputs).bind(lambda graph: fuse(graph, qat=True)).bind(prepare_qat))
    module = unwrap(materialize(prepared))
    train(module)
    unwrap(absorb(prepared, module).bind(convert).bind(materialize))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(prepare_qat_fx(model, oracle.default_mapping("x86", qat=True), inputs))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in moved} >= {"running_mean", "running_var", "weight"}
