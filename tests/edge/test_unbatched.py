"""Modules take inputs without a batch, and so does what is made of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qfunc import materialize, quantize, unwrap
from qfunc.testing import metrics

BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(4),
    "affine InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True),
    "running InstanceNorm2d": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(3),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(3),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "AvgPool2d": lambda: nn.AvgPool2d(2),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(4, 4, 2, 2),
    "PixelShuffle": lambda: nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(1, 4, 1)),
}


def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), BETWEEN[name](), nn.Conv2d(4, 4, 1)).eval()


@torch.no_grad()
@pytest.mark.parametrize("engine", ["onednn", "quantized", "decomposed"])
@pytest.mark.parametrize("name", BETWEEN)
def test_an_example_without_a_batch_gives_a_model_that_takes_none(name: str, engine: str) -> None:
    source, data = model(name), torch.randn(4, 3, 6, 6)
    module = unwrap(materialize(unwrap(quantize(source, list(data), engine=engine))))
    for x in data:
        assert metrics.sqnr(source(x), module(x)) > 15


@torch.no_grad()
@pytest.mark.parametrize("name", BETWEEN)
def test_a_model_for_batches_takes_single_inputs(name: str) -> None:
    source, data = model(name), torch.randn(4, 3, 6, 6)
    module = unwrap(materialize(unwrap(quantize(source, [data]))))
    for x in (data, data[0]):
        assert metrics.sqnr(source(x), module(x)) > 15
