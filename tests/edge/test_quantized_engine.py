"""The `quantized` engine against the reference: what stays on integers, how well, and on which of torch's engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

import qfunc
from qfunc import NATIVE, ONEDNN, QNNPACK, X86, QConfigMapping, check_host, unwrap
from qfunc.backends import qconfigs
from qfunc.errors import EngineMissing
from qfunc.testing import oracle, sqnr
from qfunc.testing.kernel_law import kernels_off

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
TORCH_ENGINES = check_host().quantized_engines

Function = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """A convolution, an operator, and a convolution."""

    def __init__(self, operator: Function, channels: int = 8) -> None:
        super().__init__()
        self.first, self.operator, self.last = nn.Conv2d(3, 8, 3, padding=1), operator, nn.Conv2d(channels, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operator(self.first(x)))


def _batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(4)]


# What the reference keeps on integers, and the channels that the operator gives.
STAYS: dict[str, tuple[Callable[[], Function], int]] = {
    "F.relu": (lambda: F.relu, 8),
    "relu6": (nn.ReLU6, 8),
    "flatten": (lambda: lambda x: torch.flatten(x, 2).unsqueeze(1), 1),
    "reshape": (lambda: lambda x: x.reshape(x.shape[0], 4, -1, x.shape[3]), 4),
    "view": (lambda: lambda x: x.view(-1, 4, 16, 8), 4),
    "permute": (lambda: lambda x: x.permute(0, 1, 3, 2), 8),
    "transpose": (lambda: lambda x: torch.transpose(x, 2, 3), 8),
    "contiguous": (lambda: lambda x: x.contiguous(), 8),
    "repeat": (lambda: lambda x: x.repeat(1, 2, 1, 1), 16),
    "repeat_interleave": (lambda: lambda x: torch.repeat_interleave(x, 2, 1), 16),
    "cat": (lambda: lambda x: torch.cat([x, x], 1), 16),
    "stack": (lambda: lambda x: torch.stack([x, x], 1).flatten(1, 2), 16),
    "nearest": (lambda: lambda x: F.interpolate(x, scale_factor=2), 8),
    "bilinear": (lambda: lambda x: F.interpolate(x, size=5, mode="bilinear"), 8),
    "dropout": (nn.Dropout, 8),
    "identity": (nn.Identity, 8),
    "softmax": (lambda: nn.Softmax(1), 8),
    "hardswish": (lambda: F.hardswish, 8),
    "hardsigmoid": (nn.Hardsigmoid, 8),
    "sigmoid": (lambda: torch.sigmoid, 8),
    "tanh": (lambda: torch.tanh, 8),
    "elu": (nn.ELU, 8),
    "leaky_relu": (lambda: lambda x: F.leaky_relu(x, 0.2), 8),
    "layer_norm": (lambda: nn.LayerNorm(8), 8),
    "instance_norm": (lambda: nn.InstanceNorm2d(8), 8),
    "batch_norm": (lambda: nn.Sequential(nn.MaxPool2d(1), nn.BatchNorm2d(8), nn.ReLU()), 8),
    "x*2": (lambda: lambda x: x * 2, 8),
    "x*-0.5": (lambda: lambda x: x * -0.5, 8),
    "x+1": (lambda: lambda x: x + 1, 8),
    "x+x": (lambda: lambda x: x + x, 8),
    "x*x": (lambda: lambda x: x * x, 8),
    "matmul": (lambda: lambda x: torch.matmul(x, x), 8),
    "mean": (lambda: lambda x: x.mean([2, 3], keepdim=True), 8),
    "avg_pool": (lambda: lambda x: F.avg_pool2d(x, 2), 8),
    "max_pool": (lambda: lambda x: F.max_pool2d(x, 2), 8),
    "adaptive_avg_pool": (lambda: lambda x: F.adaptive_avg_pool2d(x, 2), 8),
    "clamp": (lambda: lambda x: x.clamp(-0.3, 0.5), 8),
    "pixel_shuffle": (lambda: nn.PixelShuffle(2), 2),
    "reflect": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), 8),
}
# What it computes in float, or not at all; `PReLU` it computes wrong.
BREAKS: dict[str, tuple[Callable[[], Function], int]] = {
    "torch.relu": (lambda: torch.relu, 8),
    "x.flatten": (lambda: lambda x: x.flatten(2).unsqueeze(1), 1),
    "torch.reshape": (lambda: lambda x: torch.reshape(x, (-1, 4, 16, 8)), 4),
    "torch.permute": (lambda: lambda x: torch.permute(x, (0, 1, 3, 2)), 8),
    "slice": (lambda: lambda x: x[:, :4], 4),
    "chunk": (lambda: lambda x: x.chunk(2, 1)[0], 4),
    "split": (lambda: lambda x: x.split(4, 1)[1], 4),
    "concat": (lambda: lambda x: torch.concat([x, x], 1), 16),
    "F.pad": (lambda: lambda x: F.pad(x, (1, 1, 1, 1)), 8),
    "ZeroPad2d": (lambda: nn.ZeroPad2d(1), 8),
    "Upsample": (lambda: nn.Upsample(scale_factor=2), 8),
    "Dropout2d": (nn.Dropout2d, 8),
    "GELU": (nn.GELU, 8),
    "SiLU": (nn.SiLU, 8),
    "F.softmax": (lambda: lambda x: F.softmax(x, 1), 8),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), 8),
    "F.group_norm": (lambda: lambda x: F.group_norm(x, 2), 8),
    "sub": (lambda: lambda x: x - torch.ones(8, 1, 1), 8),
    "div": (lambda: lambda x: x / 2, 8),
    "x.add": (lambda: lambda x: x.add(x), 8),
    "x@x": (lambda: lambda x: x @ x, 8),
    "bmm": (lambda: lambda x: torch.bmm(x[:, 0], x[:, 1]).unsqueeze(1), 1),
    "sum": (lambda: lambda x: x.sum(1, keepdim=True), 1),
    "AdaptiveMaxPool": (lambda: nn.AdaptiveMaxPool2d(2), 8),
    "clamp_min": (lambda: lambda x: x.clamp_min(0.1), 8),
    "expand": (lambda: lambda x: x[:, :1].expand(-1, 6, -1, -1), 6),
    "Flatten": (lambda: nn.Sequential(nn.Flatten(2), nn.Unflatten(1, (1, 8))), 1),
    "BatchNorm1d": (lambda: nn.Sequential(nn.Flatten(2), nn.BatchNorm1d(8), nn.Unflatten(1, (2, 4))), 2),
    "PReLU": (nn.PReLU, 8),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(8, 4, 2, 2), 4),
    "two rows": (lambda: nn.ConvTranspose2d(8, 8, (2, 3), 2), 8),
    "same": (lambda: nn.Conv2d(8, 4, 4, padding="same"), 4),
    "circular": (lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="circular"), 4),
    "replicate": (lambda: nn.Conv2d(8, 4, 3, padding=2, dilation=2, padding_mode="replicate"), 4),
}


def _model(case: tuple[Callable[[], Function], int]) -> nn.Module:
    torch.manual_seed(0)
    return Between(case[0](), case[1]).eval()


def _checked(model: nn.Module, batches: list[Tensor], engine: str = "quantized", backend: object = NATIVE):
    """The lowered stage and its noise; every kernel is within a step of what it stands for."""
    graph = unwrap(qfunc.fuse(unwrap(qfunc.trace(model, batches[0])), backend=backend))
    calibrated = unwrap(qfunc.calibrate(unwrap(qfunc.prepare(graph, backend=backend)), batches[:3]))
    converted = unwrap(qfunc.convert(calibrated))
    lowered = unwrap(qfunc.lower(converted, engine=engine))
    module = unwrap(qfunc.materialize(lowered))
    with torch.no_grad():
        assert [why for why in kernels_off(converted, lowered, [(batches[3],)]) if why] == []
        return lowered, sqnr(model(batches[3]), module(batches[3]))


def _theirs(model: nn.Module, batches: list[Tensor]) -> float:
    with torch.no_grad():
        quantized = oracle.quantize(model, [(batch,) for batch in batches[:3]])
        return sqnr(model(batches[3]), quantized(batches[3]))


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_on_integers_in_the_reference_does_here_as_well(name: str) -> None:
    model, batches = _model(STAYS[name]), _batches()
    lowered, noise = _checked(model, batches)
    floats = [e for e in lowered.certificate.entries if not e.kernel or e.kernel == "float island"]
    assert floats == []
    # A product with a number has the qparams of its operand, in the reference's own reference form as well, but its
    # kernel keeps scales of its own. Of memory that is channels-last it can make no view.
    if name not in ("x*-0.5", "view"):
        # Where the host's kernels would overflow, and torch.ao lets them, weights may lose a bit.
        assert noise >= _theirs(model, batches) - (6.02 if lowered.certificate.limited else 0.1)


@pytest.mark.parametrize("name", BREAKS)
def test_what_the_reference_computes_in_float_is_right(name: str) -> None:
    model, batches = _model(BREAKS[name]), _batches()
    lowered, noise = _checked(model, batches)
    assert noise > 20
    last = next(entry for entry in lowered.certificate.entries if entry.node == "last")
    assert last.kernel == "quantized.conv2d"


@pytest.mark.parametrize("engine", TORCH_ENGINES)
@pytest.mark.parametrize("name", ["F.relu", "avg_pool", "clamp", "hardswish", "x+x", "matmul", "layer_norm", "sigmoid"])
def test_torchs_engine_can_be_chosen(name: str, engine: str) -> None:
    backend = {"onednn": ONEDNN, "qnnpack": QNNPACK}.get(engine, X86)
    lowered, noise = _checked(_model(STAYS[name]), _batches(), f"quantized.{engine}", backend)
    assert noise > 20
    assert lowered.certificate.engine == f"quantized.{engine}"
    packed = [node.get("engine") for node in lowered.graph if node.has("engine")]
    assert packed == [engine, engine]


def test_an_engine_that_the_host_lacks_is_an_error() -> None:
    model, batches = _model(STAYS["F.relu"]), _batches()
    host = replace(check_host(), quantized_engines=("qnnpack",))
    failed = qfunc.quantize(model, batches, engine="quantized.x86", host=host).failure()
    assert isinstance(failed, EngineMissing)
    assert "quantized.qnnpack" in failed.available
    best = unwrap(qfunc.quantize(model, batches, engine="quantized", host=host))
    assert {node.get("engine") for node in best.graph if node.has("engine")} == {"qnnpack"}


class Sums(nn.Module):
    """What torch's onednn engine fuses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()
        self.side, self.pool = nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1)
        self.leaky, self.tanh = (
            nn.Sequential(nn.Linear(4, 5), nn.LeakyReLU(0.2)),
            nn.Sequential(nn.Linear(5, 3), nn.Tanh()),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.relu(self.body(x) + x)
        x = self.side(x) + x
        return self.tanh(self.leaky(self.pool(x).flatten(1)))


@pytest.mark.skipif("onednn" not in TORCH_ENGINES, reason="torch has no onednn engine here")
def test_the_onednn_engine_fuses_more() -> None:
    torch.manual_seed(0)
    model, batches = Sums().eval(), _batches()
    before = torch.backends.quantized.engine
    lowered, noise = _checked(model, batches, "quantized.onednn", ONEDNN)
    assert torch.backends.quantized.engine == before
    kernels = [(entry.operator, entry.kernel) for entry in lowered.certificate.entries if "+" in entry.operator]
    assert ("conv2d + add + relu", "quantized.conv2d_add") in kernels
    assert ("conv2d + add", "quantized.conv2d_add") in kernels
    assert ("linear + leaky_relu", "quantized.linear") in kernels
    assert noise > 20
    module = unwrap(qfunc.materialize(lowered))
    single = torch.randn(1, 3, 5, 7)
    assert sqnr(model(single), module(single)) > 15


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag, self.fc = nn.Embedding(10, 8), nn.EmbeddingBag(10, 8, mode="sum"), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.relu(self.fc(self.words(ids).sum(1) + self.bag(ids)))


@pytest.mark.parametrize("engine", TORCH_ENGINES)
@pytest.mark.parametrize("qconfig", ["dynamic", "float16"])
def test_layers_that_read_floats(engine: str, qconfig: str) -> None:
    torch.manual_seed(0)
    model, ids = Words().eval(), torch.tensor([[1, 2], [3, 4], [9, 0]])
    table = qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY
    layer = {"dynamic": qconfigs.DEFAULT_DYNAMIC, "float16": qconfigs.FLOAT16_DYNAMIC}[qconfig]
    mapping = QConfigMapping().set_object_type(nn.Embedding, table).set_object_type(nn.EmbeddingBag, table)
    mapping = mapping.set_object_type(nn.Linear, layer)
    graph = unwrap(qfunc.fuse(unwrap(qfunc.trace(model, ids)), backend=X86))
    converted = unwrap(
        qfunc.convert(unwrap(qfunc.calibrate(unwrap(qfunc.prepare(graph, mapping, backend=X86)), [ids])))
    )
    lowered = unwrap(qfunc.lower(converted, engine=f"quantized.{engine}"))
    kernels = {entry.node: entry.kernel for entry in lowered.certificate.entries}
    assert (kernels["words"], kernels["bag"]) == ("quantized.embedding", "quantized.embedding_bag")
    name = {"dynamic": "linear_dynamic", "float16": "linear_float16"}[qconfig]
    holds = check_host().verdict(f"quantized.{name}[{engine}]").ok
    assert kernels["fc"] == (f"quantized.{name}" if holds else f"onednn.{name}")
    with torch.no_grad():
        assert [why for why in kernels_off(converted, lowered, [(ids,)]) if why] == []
        module = unwrap(qfunc.materialize(lowered))
        assert sqnr(model(ids), module(ids)) > 30
        state = module.state_dict()
        assert state["words.weight"].dtype is torch.uint8
        if holds:
            scripted = torch.jit.script(module)
            assert torch.equal(scripted(ids), module(ids))


def test_a_kernel_that_breaks_its_contract_is_not_taken() -> None:
    report = check_host()
    verdicts = tuple(
        replace(v, ok=not v.kernel.startswith("quantized.matmul"), reason="wrong") for v in report.verdicts
    )
    host = replace(report, verdicts=verdicts)
    lowered = unwrap(qfunc.quantize(_model(STAYS["matmul"]), _batches(), engine="quantized", backend=NATIVE, host=host))
    (entry,) = [entry for entry in lowered.certificate.entries if entry.operator == "matmul"]
    assert entry.kernel == "float island"
    assert "wrong" in entry.reason
