"""The small models and steps that tests of training share."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qfunc import (
    CPU,
    FakeQuantize,
    Histogram,
    PerChannelMinMax,
    Prepared,
    QConfig,
    QConfigMapping,
    QuantSpec,
    for_training,
    fuse,
    materialize,
    prepare_qat,
    trace,
    unwrap,
)


class Residual(nn.Module):
    """Convolutions with norms, a sum, pooling and a classifier: each kind of site and of rounded parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv(x)))
        return self.head(torch.flatten(self.pool(x), 1))


def inputs(seed: int = 0, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def prepared(
    *, learned: bool = False, folding: Any = "approximate", model: nn.Module | None = None, example: Any = None
) -> Prepared:
    """`Residual`, or another model, prepared for training; `example` False is without any."""
    if model is None:
        torch.manual_seed(0)
        model = Residual()
    given = inputs() if example is None else None if example is False else example
    graph = unwrap(trace(model.train(), given).bind(lambda graph: fuse(graph, qat=True)))
    mapping = for_training(CPU.qconfig_mapping, learned=learned)
    return unwrap(prepare_qat(graph, mapping, folding=folding))


def histograms() -> Prepared:
    """A stage whose activations have observers with states of other kinds than ranges."""
    torch.manual_seed(0)
    graph = unwrap(trace(Residual().train(), inputs()).bind(lambda graph: fuse(graph, qat=True)))
    weight = FakeQuantize(PerChannelMinMax(QuantSpec("int8", -127, 127, "per_channel_symmetric", 0)))
    return unwrap(prepare_qat(graph, QConfigMapping().set_global(QConfig(FakeQuantize(Histogram()), weight))))


def training(**options: Any) -> tuple[Prepared, nn.Module]:
    stage = prepared(**options)
    return stage, unwrap(materialize(stage))


def loss(module: Any, x: Tensor) -> Tensor:
    """The cross entropy of classes that the inputs tell."""
    out = module(x)
    target = (x.detach().float().mean((1, 2, 3)) * 100).long() % 4
    return nn.functional.cross_entropy(out.float() if out.element_size() < 4 else out, target)


def train(module: nn.Module, optimizer: Any, batches: Iterable[Tensor]) -> list[float]:
    losses = []
    for x in batches:
        optimizer.zero_grad()
        value = loss(module, x)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """A snapshot of the state."""
    return copy.deepcopy(dict(module.state_dict()))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def differing(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0.0) -> list[str]:
    """The names under which tensors differ by more than the tolerance, relative to the norm."""
    assert list(found) == list(expected)

    def differs(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape or a.dtype != b.dtype:
            return True
        if tolerance == 0 or not a.is_floating_point():
            return not torch.equal(a, b)
        return bool((a - b).norm() > tolerance * b.norm().clamp(min=1.0))

    return [name for name, tensor in found.items() if differs(tensor, expected[name])]
