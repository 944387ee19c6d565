"""Models as they are written, all the way: fused, trained, absorbed, converted and lowered, in four configurations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from returns.result import Failure
from torch import Tensor, nn
from torch.nn import functional

from qfunc import (
    CPU,
    X86,
    QConfigMapping,
    absorb,
    convert,
    for_training,
    fuse,
    get_default_qat_qconfig_mapping,
    lower,
    materialize,
    prepare_qat,
    quantize,
    render,
    trace,
    unwrap,
)
from qfunc.backends.qconfigs import UNIT_RANGE
from qfunc.testing import sqnr


class SqueezeExcite(nn.Module):
    """A gate of a sigmoid, whose range is known beforehand, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.down, self.up = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.last, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.silu(self.bn(self.conv(x)))
        gate = torch.sigmoid(self.up(functional.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return functional.relu(self.bn2(self.last(x * gate)) + x)


class Temporal(nn.Sequential):
    """In one dimension, with tanh and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(8, 8, 5, padding=2, padding_mode="replicate"), nn.BatchNorm1d(8), nn.Tanh()),
            *(nn.ConvTranspose1d(8, 4, 2, 2), nn.BatchNorm1d(4)),
        )


class PreActivation(nn.Module):
    """Batch norms before layers, and one without factors behind a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)
        self.last = nn.BatchNorm2d(3, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(functional.relu(self.bn1(x)))
        return self.last(x + self.conv2(functional.relu(self.bn2(y))))


class WithoutStatistics(nn.Module):
    """Batch norms that take the batch's statistics in evaluation as well, as a module and as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.bn(self.conv(x)).relu())
        return self.conv3(functional.batch_norm(x, None, None, training=True).relu())


class InstanceNorms(nn.Sequential):
    """An instance norm with running statistics, which it takes in evaluation alone."""

    def __init__(self) -> None:
        norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        super().__init__(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 3), nn.GroupNorm(2, 4), nn.SiLU())


class Siamese(nn.Module):
    """A backbone that is called twice, with a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.trunk(x).flatten(1), self.trunk(x.flip(0)).flatten(1)
        return self.head(self.drop((one - two).abs()))


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "squeeze_excite": (SqueezeExcite, IMAGES),
    "temporal": (Temporal, IMAGES.flatten(2)[..., :16].contiguous()),
    "pre_activation": (PreActivation, IMAGES),
    "without_statistics": (WithoutStatistics, IMAGES),
    "instance_norms": (InstanceNorms, IMAGES),
    "siamese": (Siamese, IMAGES),
}
CONFIGURATIONS = ("default", "x86", "learned", "exact")


def _options(configuration: str) -> dict[str, Any]:
    match configuration:
        case "x86":
            return {"qconfig_mapping": unwrap(get_default_qat_qconfig_mapping("x86")), "backend": X86}
        case "learned":
            return {"qconfig_mapping": for_training(CPU.qconfig_mapping, learned=True)}
        case "exact":
            return {"folding": "exact"}
        case _:
            return {}


def _prepared(model: nn.Module, x: Tensor, **options: Any) -> Any:
    backend = options.get("backend", CPU)
    graph = trace(model, x).bind(lambda graph: fuse(graph, qat=True, backend=backend))
    return unwrap(graph.bind(lambda graph: prepare_qat(graph, **options)))


def _trained(module: nn.Module, x: Tensor) -> nn.Module:
    optimizer = torch.optim.SGD(module.train().parameters(), lr=1e-3)
    for seed in range(3):
        torch.manual_seed(seed)
        loss = (module(x) - 1).square().mean()
        assert torch.isfinite(loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module.eval()


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_lowered_computes_what_was_trained(name: str, configuration: str) -> None:
    make, x = MODELS[name]
    torch.manual_seed(1)
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    options = _options(configuration)
    prepared = _prepared(model, x, **options)
    module = _trained(unwrap(materialize(prepared)), x)
    again = unwrap(materialize(prepared))
    again.load_state_dict(module.state_dict())
    engine = "quantized" if configuration == "x86" else "onednn"
    stage = unwrap(absorb(prepared, module).bind(convert).bind(lambda made: lower(made, engine=engine)))
    with torch.no_grad():
        expected, actual = module(x), unwrap(materialize(stage))(x)
        assert torch.equal(again.eval()(x), expected)
    # a value between two codes may be rounded to the other; weights that a host limits are rounded anew
    assert sqnr(expected, actual) > (15 if stage.certificate.limited else 35)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    after = quantize(model.eval(), [x], backend=options.get("backend", CPU), engine=engine, progress=False)
    kept = {entry.node for entry in stage.certificate.entries if entry.kernel}
    computed = [entry for entry in unwrap(after).certificate.entries if entry.kernel and entry.operator != "dropout"]
    lost = [entry for entry in computed if entry.node not in kept]
    assert not lost, (lost, stage.certificate)


def test_a_known_range_that_is_only_observed_needs_no_data() -> None:
    mapping = for_training(CPU.qconfig_mapping).set_output("_1", UNIT_RANGE)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.Conv2d(4, 4, 1)).train()
    prepared = _prepared(model, IMAGES, qconfig_mapping=mapping)
    assert [(note.node, "not rounded in training" in note.text) for note in prepared.notes] == [("1", True)]
    module = _trained(unwrap(materialize(prepared)), IMAGES)
    made = unwrap(absorb(prepared, module).bind(convert).bind(materialize))
    assert sqnr(module(IMAGES), made(IMAGES)) > 30


class Functional(nn.Module):
    """A norm and a dropout that are told the mode when they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(self.conv(x), self.mean, self.var, training=self.training)
        return self.head(functional.dropout(x.mean((2, 3)), 0.5, self.training))


@pytest.mark.parametrize("training", [True, False])
def test_functions_that_were_traced_in_evaluation_are_told_of(training: bool) -> None:
    prepared = _prepared(Functional().train(training), IMAGES)
    told = [note.text.split(" ")[0] for note in prepared.notes if "train()" in note.text]
    assert told == ([] if training else ["batch_norm", "dropout"])


def test_modules_that_were_traced_in_evaluation_train_all_the_same() -> None:
    prepared = _prepared(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).eval(), IMAGES)
    assert not prepared.notes
    module = unwrap(materialize(prepared)).train()
    assert not torch.equal(module(IMAGES), module(IMAGES))
    assert module.get_buffer("1.num_batches_tracked") == 2


def test_mistakes_are_told_with_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    prepared = _prepared(model, IMAGES)
    module = _trained(unwrap(materialize(prepared)), IMAGES)
    absorbed: Any = unwrap(absorb(prepared, module))
    told = {
        "qat=True": trace(model, IMAGES).bind(fuse),
        "checkpoint['model']": absorb(prepared, {"model": module.state_dict(), "epoch": 3}),
        "go on training": absorb(absorbed, module),
    }
    for remedy, result in told.items():
        assert isinstance(result, Failure)
        assert remedy in render(result.failure())
    assert not _prepared(model, IMAGES, qconfig_mapping=QConfigMapping()).notes


@pytest.mark.parametrize("training", [True, False])
def test_dropout_costs_no_range_and_no_kernel(training: bool) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
    prepared = _prepared(nn.Sequential(*layers).train(training), IMAGES)
    module = unwrap(materialize(prepared)).train()
    seen: dict[str, Tensor] = {}
    module.get_submodule("4").register_forward_pre_hook(lambda _, given: seen.update(before=given[0]))
    module.get_submodule("5").register_forward_pre_hook(lambda _, given: seen.update(behind=given[0]))
    module(IMAGES)
    kept = seen["behind"] != 0
    assert kept.any()
    assert torch.equal(seen["behind"][kept], 2 * seen["before"][kept])
    certificate = unwrap(absorb(prepared, module).bind(convert).bind(lower)).certificate
    assert certificate.in_int8 == certificate.total
