"""Between two convolutions, every operator of the reference's list keeps the values integers.

The list has what the reference keeps on integers and what it breaks to float; here both stay: on integer kernels, on
codes that only move, or as islands that take codes and give them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc import (
    CPU,
    X86,
    BackendConfig,
    Lowered,
    calibrate,
    convert,
    fuse,
    lower,
    materialize,
    prepare,
    quantize,
    trace,
    unwrap,
)
from qfunc.testing import metrics

KEPT_BY_THE_REFERENCE: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "F.relu": lambda: F.relu,
    "x.relu()": lambda: lambda x: x.relu(),
    "nn.ReLU6": nn.ReLU6,
    "torch.flatten": lambda: lambda x: torch.flatten(x, 2).view(x.size(0), 16, 8, 8),
    "x.reshape()": lambda: lambda x: x.reshape(x.size(0), 8, 2, 8, 8).reshape(x.shape),
    "x.permute()": lambda: lambda x: x.permute(0, 1, 3, 2),
    "x.transpose()": lambda: lambda x: x.transpose(2, 3),
    "x.contiguous()": lambda: lambda x: x.contiguous(),
    "x.repeat()": lambda: lambda x: x.repeat(1, 1, 2, 1),
    "torch.transpose": lambda: lambda x: torch.transpose(x, 2, 3),
    "torch.cat": lambda: lambda x: torch.cat([x, x], 2),
    "F.interpolate": lambda: lambda x: F.interpolate(x, scale_factor=2),
    "nn.Dropout": nn.Dropout,
    "nn.Identity": nn.Identity,
    "nn.Softmax": lambda: nn.Softmax(1),
    "nn.Hardswish": nn.Hardswish,
    "F.hardswish": lambda: F.hardswish,
    "nn.Hardsigmoid": nn.Hardsigmoid,
    "torch.sigmoid": lambda: torch.sigmoid,
    "torch.tanh": lambda: torch.tanh,
    "F.leaky_relu": lambda: F.leaky_relu,
    "nn.PReLU": lambda: nn.PReLU(16),
    "nn.LayerNorm": lambda: nn.LayerNorm(8),
    "nn.InstanceNorm2d": lambda: nn.InstanceNorm2d(16, affine=True),
    "x * 2": lambda: lambda x: x * 2,
    "x + x": lambda: lambda x: x + x,
    "x * x": lambda: lambda x: x * x,
    "torch.matmul": lambda: lambda x: torch.matmul(x, x),
    "x.mean()": lambda: lambda x: x.mean((2, 3), keepdim=True),
    "nn.AvgPool2d": lambda: nn.AvgPool2d(2),
    "nn.MaxPool2d": lambda: nn.MaxPool2d(2),
    "nn.AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(2),
    "torch.clamp": lambda: lambda x: torch.clamp(x, -0.5, 0.7),
    "nn.ChannelShuffle": lambda: nn.ChannelShuffle(4),
}
BROKEN_BY_THE_REFERENCE: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "torch.relu": lambda: torch.relu,
    "x.flatten()": lambda: lambda x: x.flatten(2).reshape(x.shape),
    "torch.reshape": lambda: lambda x: torch.reshape(x, (x.shape[0], 16, 4, 16)),
    "torch.permute": lambda: lambda x: torch.permute(x, (0, 1, 3, 2)),
    "x[:, :, 1:]": lambda: lambda x: x[:, :, 1:, ::2],
    "torch.chunk": lambda: lambda x: torch.cat([torch.chunk(x, 2, 1)[1], torch.chunk(x, 2, 1)[0]], 1),
    "x.split()": lambda: lambda x: torch.cat([x.split([4, 12], 1)[1], x.split([4, 12], 1)[0]], 1),
    "x.unbind()": lambda: lambda x: x.unbind(2)[3].unsqueeze(2),
    "x.narrow()": lambda: lambda x: x.narrow(2, 1, 3),
    "torch.stack": lambda: lambda x: torch.stack([x, x], 2).flatten(2, 3),
    "torch.concat": lambda: lambda x: torch.concat([x, x], 2),
    "F.pad": lambda: lambda x: F.pad(x, (1, 2, 0, 1)),
    "F.pad reflect": lambda: lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"),
    "nn.ZeroPad2d": lambda: nn.ZeroPad2d(1),
    "nn.Upsample": lambda: nn.Upsample(scale_factor=2),
    "nn.Upsample bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "nn.Dropout2d": nn.Dropout2d,
    "nn.GELU": nn.GELU,
    "nn.SiLU": nn.SiLU,
    "F.softmax": lambda: lambda x: F.softmax(x, 1),
    "torch.softmax": lambda: lambda x: torch.softmax(x, 1),
    "nn.GroupNorm": lambda: nn.GroupNorm(4, 16),
    "F.group_norm": lambda: lambda x: F.group_norm(x, 4),
    "x - y": lambda: lambda x: x - x.transpose(2, 3),
    "1 - x": lambda: lambda x: 1 - x,
    "x / 2": lambda: lambda x: x / 2,
    "x / y": lambda: lambda x: x / x.transpose(2, 3).clamp_min(0.5),
    "x.add(y)": lambda: lambda x: x.add(x.transpose(2, 3)),
    "x @ y": lambda: lambda x: x @ x,
    "torch.bmm": lambda: lambda x: torch.bmm(x[:, 0], x[:, 1]).unsqueeze(1).expand(-1, 16, -1, -1),
    "x.sum()": lambda: lambda x: x.sum((2, 3), keepdim=True),
    "nn.AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(2),
    "x.clamp_min()": lambda: lambda x: x.clamp_min(0.1),
    "x.expand()": lambda: lambda x: x.mean(1, keepdim=True).expand(-1, 16, -1, -1),
    "nn.Flatten": lambda: nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (4, 16))),
    "nn.BatchNorm2d": lambda: nn.Sequential(nn.Identity(), nn.MaxPool2d(1, 1), nn.BatchNorm2d(16)),
    "nn.PixelShuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
    "torch.roll": lambda: lambda x: torch.roll(x, (1, 2), (2, 3)),
    "torch.flip": lambda: lambda x: torch.flip(x, (2,)),
    "x.index_select()": lambda: lambda x: x.index_select(1, torch.arange(15, -1, -1)),
}
PARTS_OF_TUPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.max": lambda x: torch.max(x, 1, keepdim=True)[0].expand(-1, 16, -1, -1),
    "torch.topk": lambda x: torch.topk(x, 16, 1)[0],
    "torch.sort": lambda x: torch.sort(x, 2)[0].flip(2),
    "torch.aminmax": lambda x: torch.aminmax(x, dim=1, keepdim=True)[1].expand(-1, 16, -1, -1),
    "F.max_pool2d": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
}
ALL = KEPT_BY_THE_REFERENCE | BROKEN_BY_THE_REFERENCE


class Between(nn.Module):
    """An operator between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 16, 3, padding=1)
        self.function = function
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def lowered(name: str, backend: BackendConfig) -> tuple[nn.Module, Lowered, Tensor]:
    torch.manual_seed(0)
    model = Between(ALL[name]()).eval()
    data = torch.randn(4, 4, 8, 8)
    return model, unwrap(quantize(model, [data], backend=backend, engine="onednn")), data


@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
@pytest.mark.parametrize("name", ALL)
def test_nothing_is_left_in_float(name: str, backend: BackendConfig) -> None:
    model, stage, data = lowered(name, backend)
    certificate = stage.certificate
    # the model's input, and with the x86 backend its output
    assert certificate.conversions <= (1 if backend is CPU else 2), certificate
    assert not certificate.fallbacks, certificate
    with torch.no_grad():
        expected, got = model(data), unwrap(materialize(stage))(data)
    least = 20 if backend is CPU else 12
    assert metrics.sqnr(expected, got) > least


def test_nothing_is_left_in_float_by_the_reference_of_the_same_stage() -> None:
    """The certificate can tell: the reference engine leaves everything in float."""
    _, stage, _ = lowered("torch.relu", CPU)
    assert stage.certificate.in_int8 == 2


@pytest.mark.parametrize("engine", ["onednn", "quantized"])
@pytest.mark.parametrize("name", PARTS_OF_TUPLES)
def test_a_part_of_a_tuple_of_floats_is_quantized_itself(name: str, engine: str) -> None:
    torch.manual_seed(0)
    model, data = Between(PARTS_OF_TUPLES[name]).eval(), torch.randn(4, 4, 8, 8)
    module = unwrap(materialize(unwrap(quantize(model, [data], engine=engine))))
    with torch.no_grad():
        assert metrics.sqnr(model(data), module(data)) > 12


def _sliced(x: Tensor) -> Tensor:
    y = torch.chunk(x, 2, dim=1)[0]
    for _ in range(600):
        y = y[:, :8]
    return torch.cat([y, y], dim=1)


@pytest.mark.parametrize("known", [False, True], ids=["no facts", "facts"])
def test_a_long_chain_of_slices_is_a_tensor_where_it_begins_with_one(known: bool) -> None:
    torch.manual_seed(0)
    model, data = Between(_sliced).eval(), torch.randn(4, 4, 8, 8)
    traced = trace(model, data) if known else trace(model)
    calibrated = traced.bind(fuse).bind(prepare).bind(lambda stage: calibrate(stage, [data], progress=False))
    stage = unwrap(calibrated.bind(convert).bind(lower))
    assert stage.certificate.in_int8 == len(stage.certificate.entries) > 600
    with torch.no_grad():
        assert metrics.sqnr(model(data), unwrap(materialize(stage))(data)) > 20
