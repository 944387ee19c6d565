"""Layers that train with rounded weights are torch.ao's: outputs, gradients, statistics and qparams, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc import FBGEMM, QConfig, QConfigMapping, Switches, fuse, materialize, prepare_qat, switch, trace, unwrap
from qfunc.backends import qconfigs
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import MinMax, MovingAverageMinMax, MovingAveragePerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8, qparams_of_range
from qfunc.testing import oracle, oracle_training
from tests.parity.observer_meaning import meaning
from tests.training.comparing import assert_close, gradients

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """The model in training, its norms as if it had trained: gammas of both signs, far from their beginning."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, tuple(NORM.values())):
                count = part.num_features
                sign = torch.randint(0, 2, (count,), generator=random) * 2 - 1
                part.weight.copy_((torch.rand(count, generator=random) + 0.3) * sign)
                part.bias.copy_(torch.randn(count, generator=random))
                part.running_mean.copy_(torch.randn(count, generator=random) / 2)
                part.running_var.copy_(torch.rand(count, generator=random) + 0.2)
    return model.train()


def ours_of(model: nn.Module, x: Tensor, qconfig: QConfig | None = None, *, folding: Any = "approximate") -> Any:
    mapping = QConfigMapping().set_global(qconfig or qconfigs.DEFAULT_QAT)
    graph = unwrap(fuse(unwrap(trace(model, (x,))), qat=True, backend=FBGEMM))
    return unwrap(materialize(unwrap(prepare_qat(graph, mapping, backend=FBGEMM, folding=folding))))


def only_weights_rounded(module: Any) -> Any:
    for name, part in module.named_modules():
        if name.startswith("activation_post_process"):
            switch(part, Switches(observe=False, fake_quantize=False))
    return module


@dataclass
class Sides:
    """One model as it trains here and there, where only weights are rounded: activations may go either way at a half."""

    ours: Any
    theirs: Any

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, weight: str, *, exact: bool = False, frozen: bool = False) -> Sides:
        names = oracle_training.named_fake_quantizers()
        theirs_of = oracle_training.qconfig(names["default_fake_quant"], names[weight])
        their_mapping = oracle.default_mapping("fbgemm", qat=True, version=0).set_global(theirs_of)
        their_mapping.object_type_qconfigs.clear()
        theirs = oracle_training.prepare_qat(
            model, (x,), their_mapping, exact=exact, frozen=frozen, backend_config=oracle.backend_config("fbgemm")
        )
        qconfig = QConfig(meaning(names["default_fake_quant"]), meaning(names[weight]))
        ours = ours_of(model, x, qconfig, folding="exact" if exact else "approximate")
        switch(ours, Switches(freeze_norms=frozen))
        return cls(only_weights_rounded(ours), oracle_training.only_weights_rounded(theirs))

    def their_name(self, name: str) -> str:
        """A fused module has the norm within the layer: `0.bn` is what `1` is here."""
        layer, _, leaf = name.rpartition(".")
        fused = hasattr(dict(self.theirs.named_modules()).get("0"), "bn")
        return f"0.bn.{leaf}" if fused and layer == "1" else name

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What both have: parameters, running statistics, and the state of the weights' fake quantizers."""
        theirs = dict(self.theirs.state_dict())
        found, expected = {}, {}
        for name, value in self.ours.state_dict().items():
            key = self.their_name(name)
            if key.endswith(("min_val", "max_val")):
                key = key.replace("fake_quant.", "fake_quant.activation_post_process.")
            if key in theirs and not name.startswith("activation_post_process") and "enabled" not in name:
                found[name], expected[name] = value.float(), theirs[key].float().view(value.shape)
        assert {name for name, _ in self.ours.named_parameters()} <= found.keys()
        return found, expected

    def step(self, x: Tensor, seed: int, rate: float = 0.05) -> None:
        """One step of both, from the same state."""
        self.match()
        results = []
        for side in (self.ours, self.theirs):
            given = x.clone().requires_grad_(x.is_floating_point())
            y = side(given)
            of = dict(side.named_parameters()) | ({"input": given} if given.requires_grad else {})
            results.append({"output": y.detach(), **gradients(y, of, seed)})
            with torch.no_grad():
                for name, parameter in side.named_parameters():
                    parameter -= rate * results[-1][name]
        expected = {name: results[1][self.their_name(name)] for name in results[0]}
        assert_close(results[0], expected)
        assert_close(*self.state())

    def match(self) -> None:
        """Give ours the parameters and running statistics of theirs, so that no rounding error adds up."""
        theirs = dict(self.theirs.state_dict())
        with torch.no_grad():
            for name, value in self.ours.state_dict().items():
                if self.their_name(name) in theirs and "fake_quant" not in name and "activation" not in name:
                    value.copy_(theirs[self.their_name(name)])


def run(sides: Sides, draw: Callable[[torch.Generator], Tensor], steps: int = 3) -> None:
    random = torch.Generator().manual_seed(1)
    for index in range(steps):
        sides.step(draw(random), index)


WEIGHTS = ("default_weight_fake_quant", "default_per_channel_weight_fake_quant")
LAYERS = (
    {"padding": 1},
    {"padding": 1, "bias": False},
    {"groups": 2, "stride": 2, "padding": 2, "dilation": 2},
    {"groups": 4, "padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "bias": False},
    {"padding": "same", "padding_mode": "replicate"},
)


def images(rank: int) -> Callable[[torch.Generator], Tensor]:
    return lambda random: torch.randn(3, 4, *[{1: 12, 2: 6, 3: 5}[rank]] * rank, generator=random)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_convolution_and_norm(rank, relu, exact, frozen, weight):
    index = rank + 2 * relu + exact + 3 * frozen
    for options in (LAYERS[index % 6], LAYERS[(index + 1) % 6]):
        norm = NORM[rank](8, eps=1e-3, momentum=0.3)
        parts = [CONV[rank](4, 8, 3, **options), norm, *([nn.ReLU()] if relu else [])]
        draw = images(rank)
        model = drawn(nn.Sequential(*parts), index)
        run(Sides.of(model, draw(torch.Generator()), weight, exact=exact, frozen=frozen), draw)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_exact_folding_of_norms_that_are_zero(exact, frozen, bias):
    """Approximate, torch.ao divides by zero; both of ours give what a layer that is not rounded gives there."""
    draw = images(2)
    model = drawn(nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU()), 5)
    with torch.no_grad():
        model[1].weight[::2] = 0
    x = draw(torch.Generator().manual_seed(2))
    if exact:
        run(Sides.of(model, x, WEIGHTS[1], exact=True, frozen=frozen), draw)
        return
    module = only_weights_rounded(ours_of(model, x, QConfig(qconfigs.DEFAULT_QAT.activation, _PER_CHANNEL)))
    switch(module, Switches(freeze_norms=frozen))
    given = model[:2]
    if frozen:
        given[1].eval()
    expected, found = torch.relu(given(x)), module(x)
    assert torch.allclose(found[:, ::2], expected[:, ::2], atol=1e-6)
    of_ours, of_float = (
        gradients(found, dict(module.named_parameters())),
        gradients(expected, dict(given.named_parameters())),
    )
    assert all(gradient.isfinite().all() for gradient in of_ours.values())
    assert_close(
        {name: of_ours[name][::2] for name in ("0.weight", "1.weight", "1.bias")},
        {name: of_float[name][::2] for name in ("0.weight", "1.weight", "1.bias")},
    )


_PER_CHANNEL = FakeQuantize(MovingAveragePerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL))
_PER_TENSOR = FakeQuantize(MovingAverageMinMax(INT8_SYMMETRIC))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear_and_norm(weight, bias, frozen):
    model = drawn(nn.Sequential(nn.Linear(6, 5, bias=bias), nn.BatchNorm1d(5)), 2)
    draw = lambda random: torch.randn(9, 6, generator=random)  # noqa: E731
    run(Sides.of(model, draw(torch.Generator()), weight, frozen=frozen), draw)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolution(rank, options, relu):
    draw = images(rank)
    torch.manual_seed(rank)
    model = nn.Sequential(CONV[rank](4, 8, 3, **options), *([nn.ReLU()] if relu else [])).train()
    run(Sides.of(model, draw(torch.Generator()), WEIGHTS[rank % 2]), draw)


@pytest.mark.parametrize("shape", [(7, 6), (6,), (2, 3, 6)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear(weight, relu, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=len(shape) > 1), *([nn.ReLU()] if relu else [])).train()
    draw = lambda random: torch.randn(shape, generator=random)  # noqa: E731
    run(Sides.of(model, draw(torch.Generator()), weight), draw)
