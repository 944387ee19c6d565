"""Every way of writing an activation behind every operator that takes one: one node, the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from tests.fusion.models import conv, fused, image, kinds, model, norm

Act = Callable[[nn.Module, Tensor], Tensor]

RELU: dict[str, Act] = {
    "module": lambda self, x: self.relu(x),
    "module inplace": lambda self, x: self.relu_inplace(x),
    "F.relu": lambda self, x: F.relu(x),
    "F.relu input=": lambda self, x: F.relu(input=x),
    "F.relu inplace=": lambda self, x: F.relu(x, inplace=True),
    "F.relu inplace by position": lambda self, x: F.relu(x, True),
    "F.relu_": lambda self, x: F.relu_(x),
    "torch.relu": lambda self, x: torch.relu(x),
    "torch.relu_": lambda self, x: torch.relu_(x),
    ".relu": lambda self, x: x.relu(),
    ".relu_": lambda self, x: x.relu_(),
}
CLAMP: dict[str, Act] = {
    "ReLU6": lambda self, x: self.relu6(x),
    "F.relu6": lambda self, x: F.relu6(x, inplace=True),
    "Hardtanh": lambda self, x: self.hardtanh(x),
    "F.hardtanh": lambda self, x: F.hardtanh(x, max_val=0.5),
    "F.hardtanh by position": lambda self, x: F.hardtanh(x, -0.25, 0.5, True),
    "F.hardtanh_": lambda self, x: F.hardtanh_(x),
    "torch.clamp": lambda self, x: torch.clamp(x, 0, 0.5),
    "torch.clamp by keyword": lambda self, x: torch.clamp(max=0.5, input=x, min=-0.25),
    "torch.clamp one bound": lambda self, x: torch.clamp(x, min=0.0),
    ".clamp": lambda self, x: x.clamp(max=0.5),
    ".clamp_": lambda self, x: x.clamp_(-0.5, 0.5),
    "torch.clip": lambda self, x: torch.clip(x, -0.5, 0.5),
    ".clip_": lambda self, x: x.clip_(min=0),
    ".clamp_min": lambda self, x: x.clamp_min(0.0),
    ".clamp_max": lambda self, x: x.clamp_max(0.5),
}
CURVED: dict[str, Act] = {
    "hardswish": lambda self, x: F.hardswish(x, inplace=True),
    "Hardswish": lambda self, x: self.hardswish(x),
    "silu": lambda self, x: F.silu(x),
    "SiLU": lambda self, x: self.silu(x),
}
LINEAR: dict[str, Act] = {
    "leaky_relu": lambda self, x: F.leaky_relu(x, negative_slope=0.2),
    "leaky_relu_": lambda self, x: F.leaky_relu_(x, 0.2),
    "LeakyReLU": lambda self, x: self.leaky(x),
    "tanh": lambda self, x: x.tanh_(),
    "torch.tanh": lambda self, x: torch.tanh(x),
    "gelu": lambda self, x: F.gelu(x, approximate="tanh"),
    "GELU": lambda self, x: self.gelu(x),
}
LAYERS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], tuple[dict[str, Act], ...]]] = {
    "conv1d": (lambda self, x: self.conv1(x.flatten(2)), (RELU, CLAMP, CURVED)),
    "conv2d": (lambda self, x: self.conv2(x), (RELU, CLAMP, CURVED)),
    "F.conv2d": (lambda self, x: F.conv2d(x, bias=None, weight=self.conv2.weight), (RELU, CLAMP, CURVED)),
    "conv3d": (lambda self, x: self.conv3(x[..., None]), (RELU, CLAMP)),
    "linear": (lambda self, x: self.fc(x), (RELU, CLAMP, CURVED, LINEAR)),
    "F.linear": (lambda self, x: F.linear(x, self.fc.weight, self.fc.bias), (RELU, CLAMP, CURVED, LINEAR)),
    "batch_norm": (lambda self, x: self.bn(x), (RELU, CLAMP)),
    "add": (lambda self, x: x + self.other, (RELU, CLAMP)),
    "torch.add": (lambda self, x: torch.add(x, self.other, alpha=2), (RELU, CLAMP)),
    "iadd": (lambda self, x: x.sigmoid().add_(1.0), (RELU, CLAMP)),
    "mul": (lambda self, x: x * self.other, (RELU, CLAMP)),
    "mul by number": (lambda self, x: torch.mul(x, 0.5), (RELU, CLAMP)),
}
CASES = [
    pytest.param(layer, act, id=f"{name}, {written}")
    for name, (layer, tables) in LAYERS.items()
    for table in tables
    for written, act in table.items()
]


@pytest.mark.parametrize(("layer", "act"), CASES)
def test_an_activation_is_fused_however_it_is_written(layer: Act, act: Act) -> None:
    torch.manual_seed(0)
    made = model(
        lambda self, x: act(self, layer(self, x)),
        conv1=nn.Conv1d(4, 4, 1),
        conv2=conv(),
        conv3=nn.Conv3d(4, 4, 1),
        fc=nn.Linear(8, 8),
        bn=norm(),
        other=nn.Parameter(torch.randn(2, 4, 8, 8)),
        relu=nn.ReLU(),
        relu_inplace=nn.ReLU(inplace=True),
        relu6=nn.ReLU6(inplace=True),
        hardtanh=nn.Hardtanh(-0.25, 0.5),
        hardswish=nn.Hardswish(),
        silu=nn.SiLU(inplace=True),
        leaky=nn.LeakyReLU(0.2),
        gelu=nn.GELU(),
    )
    found = [kind for kind in kinds(fused(made, image(), tolerance=0)) if kind not in ("flatten", "getitem", "sigmoid")]
    assert len(found) == 1
    assert " + " in found[0]


@pytest.mark.parametrize("written", RELU)
@pytest.mark.parametrize("layer", ["conv", "fc", "deconv"])
def test_a_norm_between_is_folded(layer: str, written: str) -> None:
    torch.manual_seed(0)
    layers = {"conv": conv(), "deconv": nn.ConvTranspose2d(4, 4, 2), "fc": nn.Linear(4, 4)}
    made = model(
        lambda self, x: RELU[written](self, self.bn(self.layer(x))),
        layer=layers[layer],
        bn=nn.BatchNorm1d(4) if layer == "fc" else norm(),
        relu=nn.ReLU(),
        relu_inplace=nn.ReLU(inplace=True),
    )
    found = kinds(fused(made, image()[:, :, 0, 0] if layer == "fc" else image()))
    expected = {"conv": ["conv2d + relu"], "fc": ["linear + relu"], "deconv": ["conv_transpose2d + relu"]}
    assert found == expected[layer]


@pytest.mark.parametrize(
    "add",
    [
        lambda a, b: a + b,
        lambda a, b: b + a,
        lambda a, b: torch.add(a, b),
        lambda a, b: torch.add(b, other=a),
        lambda a, b: a.add(other=b),
        lambda a, b: a.add_(b),
        lambda a, b: torch.add(a, b, alpha=1),
    ],
)
@pytest.mark.parametrize("activation", [lambda x: x, torch.relu, F.relu6])
def test_a_sum_is_fused_however_it_is_written(add: Act, activation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    made = model(lambda self, x: activation(add(self.conv(x), x)), conv=conv())
    (found,) = kinds(fused(made, image(), tolerance=0))
    assert found.startswith("conv2d + add")


@pytest.mark.parametrize(
    "clamp",
    [lambda x: x.clamp(0.5, 1.0), lambda x: F.hardtanh(x, -2.0, -1.0), lambda x: torch.clamp(x, min=0.1)],
)
def test_a_clamp_without_zero_is_fused_behind_a_layer_only(clamp: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    layer = kinds(fused(model(lambda self, x: clamp(self.conv(x)), conv=conv()), image(), tolerance=0))
    assert layer == ["conv2d + clamp"]
    product = kinds(fused(model(lambda self, x: clamp(x * self.conv(x)), conv=conv()), image(), tolerance=0))
    assert product == ["conv2d", "mul", "clamp"]


def test_a_clamp_with_computed_bounds_stays() -> None:
    torch.manual_seed(0)
    made = model(lambda self, x: torch.clamp(self.conv(x), x.mean(), x.max()), conv=conv())
    assert "conv2d" in kinds(fused(made, image(), tolerance=0))
