"""The laws of training on the zoo, on random models and on random configurations."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from pyrsistent import pmap
from torch import nn

from qfunc import (
    CPU,
    QUANTIZABLE_LSTM,
    X86,
    Annotations,
    CustomConfig,
    CustomFusion,
    Derived,
    Edge,
    FakeQuantize,
    MinMax,
    MovingAverageMinMax,
    QParams,
    QuantSpec,
    Standalone,
    for_training,
    render,
)
from qfunc.edge.fake_quantize import FakeQuantizer
from qfunc.errors import BadConfig
from qfunc.numerics.qparams import INT8_SYMMETRIC, UINT8
from qfunc.passes.training import with_fake_quantization
from qfunc.testing import (
    TRAINING_IS_TOTAL,
    TRAINING_LAWS,
    Case,
    TrainingCase,
    check_law,
    check_training_laws,
    trained_walk,
)
from qfunc.testing.training_strategies import training_cases
from tests.zoo import ZOO, ZooCase

FEWER = max(6, settings().max_examples // 8)
WITHOUT_SECOND_WALKS = tuple(
    law for law in TRAINING_LAWS if law.name not in ("training is pure", "training is repeatable")
)
"""The laws that large models are held to: the others train once more."""


def hold(training: TrainingCase) -> None:
    violations = check_training_laws(training)
    assert not violations, "\n".join(map(str, violations))


@settings(max_examples=FEWER)
@given(training=training_cases())
def test_laws_hold_on_random_models(training: TrainingCase) -> None:
    hold(training)


@settings(max_examples=FEWER)
@given(training=training_cases(configured=True))
def test_laws_hold_for_random_configurations(training: TrainingCase) -> None:
    hold(training)


@settings(max_examples=FEWER)
@given(training=training_cases(aliasing=True, max_nodes=5))
def test_laws_hold_where_memory_is_shared(training: TrainingCase) -> None:
    hold(training)


@given(training=training_cases(max_nodes=4, invalid=True))
def test_impossible_configurations_fail_and_never_raise(training: TrainingCase) -> None:
    violation = check_law(TRAINING_IS_TOTAL, training)
    assert violation is None, violation


# On real architectures, and on small models that are awkward in one way each


@pytest.mark.parametrize("zoo", ZOO, ids=str)
def test_laws_hold_on_the_zoo(zoo: ZooCase) -> None:
    index = ZOO.index(zoo)
    model, inputs = zoo.build()
    backend, engine = ((CPU, "onednn"), (X86, "quantized"))[index % 2]
    case = Case(model, inputs, tuple(zoo.batches(1, 3)), backend, engine)
    training = TrainingCase(case, ("approximate", "exact")[index // 2 % 2], evaluates=index % 5 == 4)
    violations = check_training_laws(training, WITHOUT_SECOND_WALKS)
    assert not violations, "\n".join(map(str, violations))
    way = trained_walk(training)
    assert list(way.stages)[-1] == "lower"
    assert zoo.aliasing or any(
        node.kind == "fake_quantize" for node in with_fake_quantization(way.stages["prepare_qat"])
    )


class Model(nn.Module):
    """A model of a function of itself and its input."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def model(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    torch.manual_seed(0)
    return type("Model", (Model,), {"forward": forward})(**{name: make() for name, make in parts.items()})


def conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(4, 4, 3, **{"padding": 1, **options})


def norm() -> nn.Module:
    return nn.BatchNorm2d(4)


class Normed(nn.Module):
    """A functional batch norm, on buffers of the model, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.gamma = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.batch_norm(self.c(x), self.mean, self.var, self.gamma, None, self.training)
        return self.d(F.dropout(x, 0.3, self.training))


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.d.weight = self.c.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.d(self.c(x).relu()))


class Dead(nn.Module):
    """A batch norm that makes a channel zero."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)
        nn.init.zeros_(self.b.weight[:1].detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.c(x))


AWKWARD: dict[str, Callable[[], nn.Module]] = {
    "a functional norm and dropout": Normed,
    "tied weights": Tied,
    "a norm of zero": Dead,
    "a layer called twice": lambda: model(lambda m, x: m.d(m.c(m.c(x).relu())), c=conv(), d=conv()),
    "a normed layer called twice": lambda: model(lambda m, x: m.b(m.c(m.b(m.c(x)))), c=conv(), b=norm),
    "two norms": lambda: model(lambda m, x: m.e(m.b(m.c(x))), c=conv(bias=False), b=norm, e=norm),
    "a norm without a layer": lambda: model(lambda m, x: m.c(m.b(x)), c=conv(), b=norm),
    "padding of every kind": lambda: model(
        lambda m, x: m.e(m.d(m.b(m.c(x)))),
        c=conv(padding_mode="reflect"),
        b=norm,
        d=conv(padding_mode="circular", groups=2),
        e=conv(padding_mode="replicate", stride=2),
    ),
    "a dict of lists": lambda: model(lambda m, x: {"a": [m.c(x), x], "b": (m.c(x), 3, None)}, c=conv()),
    "transposed, in groups, and normed": lambda: model(
        lambda m, x: m.b(m.c(x, output_size=[12, 12])),
        c=lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, groups=2),
        b=norm,
    ),
    "dropout between": lambda: model(
        lambda m, x: m.d(m.o(m.b(m.c(x)).relu())), c=conv(), b=norm, o=lambda: nn.Dropout(0.5), d=conv()
    ),
    "frozen weights": lambda: model(lambda m, x: m.d(m.c(x)), c=lambda: conv()().requires_grad_(False), d=conv()),
    "nothing to quantize": lambda: model(lambda m, x: (x, 3, None)),
}
IMAGES = tuple((torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(seed)),) for seed in range(3))


@pytest.mark.parametrize("learned", [False, True], ids=["measured", "learned"])
@pytest.mark.parametrize("name", AWKWARD)
def test_laws_hold_for_awkward_models(name: str, learned: bool) -> None:
    torch.manual_seed(0)
    mapping = for_training(CPU.qconfig_mapping, learned=learned)
    case = Case(AWKWARD[name]().eval(), IMAGES[0], IMAGES[1:], CPU, "onednn", mapping)
    training = TrainingCase(case, "exact" if learned else "approximate", evaluates=learned)
    hold(training)
    failure = trained_walk(training).failure
    # exact folding is for one norm that is a module
    assert failure is None or (learned and isinstance(failure, BadConfig)), failure


def product(of: tuple[QParams, ...]) -> QParams:
    scale = (of[0].scale * of[1].scale).reshape(())
    return QParams(scale, torch.zeros((), dtype=torch.int64), INT32)


def doubled(of: tuple[QParams, ...]) -> QParams:
    return QParams(of[0].scale * 2, of[0].zero_point // 2, of[0].spec)


INT32 = QuantSpec("int32", -(2**31), 2**31 - 1, "per_tensor_symmetric")
VALUES, WEIGHT = FakeQuantize(MovingAverageMinMax()), FakeQuantize(MinMax(INT8_SYMMETRIC))
LEARNED = FakeQuantize(MovingAverageMinMax(), learned=True)
ANNOTATED = {
    "a bias of its own": Annotations(
        inputs=pmap({Edge("_0", "input"): VALUES}), weights=pmap({"_0": WEIGHT}), biases=pmap({"_0": WEIGHT})
    ),
    "a bias on the grid of the sums": Annotations(
        inputs=pmap({Edge("_0", "input"): LEARNED}),
        weights=pmap({"_0": WEIGHT}),
        biases=pmap({"_0": Derived((Edge("_0", "input"), Edge("_0", "weight")), product, INT32)}),
    ),
    "values that derive from values": Annotations(outputs=pmap({"_1": VALUES, "_2": Derived(("_1",), doubled, UINT8)})),
}


@pytest.mark.parametrize("name", ANNOTATED)
def test_laws_hold_for_annotations(name: str) -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Tanh(), nn.Linear(6, 2))
    case = Case(made.eval(), IMAGES[0], IMAGES[1:], UNFUSED, "reference", ANNOTATED[name])  # type: ignore[arg-type]
    hold(TrainingCase(case))
    way = trained_walk(TrainingCase(case))
    assert way.failure is None
    assert way.absorbed is not None
    assert len(way.absorbed.qparams) >= 1


UNFUSED = replace(CPU, name="unfused", fusions=())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.last = nn.Linear(5, 8), nn.LSTM(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lstm(self.first(x.flatten(0, 1)))[0])


def in_line(is_qat: bool, *parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts)


CUSTOM: dict[str, tuple[Callable[[], nn.Module], CustomConfig]] = {
    "custom modules": (Recurrent, CustomConfig(custom_modules=(QUANTIZABLE_LSTM,))),
    "layers of steps": (Recurrent, CustomConfig()),
    "owned modules": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 1)),
        CustomConfig(fusions=(CustomFusion(in_line, pattern=(nn.Conv2d, nn.Sigmoid)),)),
    ),
    "standalone modules": (
        lambda: nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 1)),
        CustomConfig(standalone_names={"0": Standalone()}),
    ),
    "codes out": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)),
        CustomConfig(output_quantized_indexes=(0,)),
    ),
    "left apart": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
        CustomConfig(unfused_names=("0",)),
    ),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_laws_hold_for_exceptions(name: str) -> None:
    torch.manual_seed(0)
    make, custom = CUSTOM[name]
    case = Case(make().eval(), IMAGES[0], IMAGES[1:], CPU, "onednn", None, None, custom)
    hold(TrainingCase(case))
    failure = trained_walk(TrainingCase(case)).failure
    assert failure is None, render(failure)


# In other processes

_STAGES = """
import sys, torch
from qfunc import absorb, unwrap
from qfunc.ir import digest
from qfunc.testing import Case, TrainingCase, trained_walk
from qfunc.testing.walk import graph_of
from tests.laws.test_training import ZOO
torch.set_num_threads(1)
(zoo,) = (zoo for zoo in ZOO if zoo.name == "mobilenet")
model, inputs = zoo.build()
way = trained_walk(TrainingCase(Case(model, inputs, tuple(zoo.batches(1, 3)))))
for stage in way.stages.values():
    print(digest(graph_of(stage)))
print(*way.module.state_dict(), sep="\\n")
if sys.argv[2] == "save":
    torch.save(way.module.state_dict(), sys.argv[1])
state = torch.load(sys.argv[1], weights_only=True)
print(unwrap(absorb(way.prepared, state)).qparams == way.absorbed.qparams)
"""


def test_names_digests_and_checkpoints_are_the_same_in_other_processes_under_any_hash_seed(tmp_path: Path) -> None:
    outputs = []
    for seed, mode in (("1", "save"), ("2", "load")):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", _STAGES, str(tmp_path / "state.pt"), mode]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].endswith("True\n")


# The laws themselves notice


def test_every_law_has_a_name_and_a_statement_of_its_own() -> None:
    laws = (TRAINING_IS_TOTAL, *TRAINING_LAWS)
    assert len({law.name for law in laws}) == len({law.statement for law in laws}) == len(laws)


def _stretched(self: FakeQuantizer) -> QParams | None:
    found = QPARAMS(self)
    return None if found is None else replace(found, scale=found.scale * 1.1)


QPARAMS = FakeQuantizer.qparams


def _marking(self: FakeQuantizer, x: torch.Tensor) -> torch.Tensor:
    return x * 1.001


def _measuring(self: FakeQuantizer, x: torch.Tensor) -> torch.Tensor:
    self.scale.add_(1.0)
    return x


@pytest.mark.parametrize(
    ("name", "attribute", "function"),
    [
        ("converting keeps what was trained", "qparams", _stretched),
        ("rounding nothing is float", "forward", _marking),
        ("switched off, nothing changes", "forward", _measuring),
        ("absorbing is the inverse of materializing", "qparams", _stretched),
    ],
)
def test_the_laws_notice(name: str, attribute: str, function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (law,) = (law for law in TRAINING_LAWS if law.name == name)
    torch.manual_seed(0)
    case = Case(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)).eval(), IMAGES[0], IMAGES[1:])
    assert check_law(law, trained_walk(TrainingCase(case))) is None
    with monkeypatch.context() as patch:
        patch.setattr(FakeQuantizer, attribute, function)
        with torch.no_grad() if function is _measuring else contextlib.nullcontext():
            assert check_law(law, trained_walk(TrainingCase(case))) is not None
