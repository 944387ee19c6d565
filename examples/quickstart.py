"""From a float model to int8 in one call, on real data: train a small residual network, quantize it, compare."""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from qfunc import materialize, quantize, unwrap

EPOCHS, BATCH = 5, 64


class Block(nn.Module):
    """Two 3x3 convolutions and a way around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.around = nn.Conv2d(channels_in, channels_out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Halves height and width where the stride is 2."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.around(x))


def network() -> nn.Module:
    """A residual network for one-channel images and ten classes."""
    stem = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*stem, Block(32, 32), Block(32, 64, 2), Block(64, 128, 2), *head)


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1797 handwritten digits of scikit-learn, 16x16, in 0..1: training and test images, and their labels."""
    data = load_digits()
    images = F.interpolate(torch.tensor(data.images).float().unsqueeze(1) / 16, scale_factor=2, mode="bilinear")
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images))
    train, test = order[:1280], order[1280:]
    return images[train], labels[train], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Adam with one cycle of the learning rate; a progress bar where there is a terminal."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-2)
    steps = [batch for _ in range(EPOCHS) for batch in torch.split(torch.randperm(len(images)), BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=len(steps))
    model.train()
    for batch in track(steps, "training", disable=not sys.stdout.isatty(), transient=True):
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(images[batch]), labels[batch]))
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent of the images that get their label."""
    return 100 * float((model(images).argmax(1) == labels).float().mean())


@torch.no_grad()
def latencies(models: Sequence[nn.Module], batch: Tensor, repeats: int = 30) -> list[float]:
    """Median milliseconds of each model for one batch, after a few to warm up; in turn, so that all share the noise."""
    times: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 5):
        for model, measured in zip(models, times, strict=True):
            start = time.perf_counter()
            model(batch)
            measured.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(measured[5:]) for measured in times]


def kibibytes(model: nn.Module) -> float:
    """Size of the saved parameters and buffers."""
    torch.save(model.state_dict(), file := io.BytesIO())
    return len(file.getbuffer()) / 1024


def main() -> int:
    """Train, quantize, compare; 1 if int8 costs more than one point of accuracy."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    model = network()
    train(model, images, labels)

    lowered = unwrap(quantize(model, torch.split(images[:512], BATCH)))
    int8 = unwrap(materialize(lowered))

    table = Table("", *(Column(name, justify="right") for name in ("float", "int8")), title="scikit-learn's digits")
    models = (model, int8)
    before, after = (accuracy(m, test_images, test_labels) for m in models)
    fast, many = latencies(models, images[:1]), latencies(models, images[:BATCH])
    table.add_row("accuracy, %", f"{before:.2f}", f"{after:.2f}")
    table.add_row("size, KiB", *(f"{kibibytes(m):.0f}" for m in models))
    table.add_row("latency of 1 image, ms", *(f"{ms:.2f}" for ms in fast))
    table.add_row(f"latency of {BATCH} images, ms", *(f"{ms:.2f}" for ms in many))
    table.add_row("operators on integers", "0", f"{lowered.certificate.in_int8} of {lowered.certificate.total}")
    Console().print(table)
    print(f"\n{lowered.certificate}")
    return int(before - after > 1)


if __name__ == "__main__":
    sys.exit(main())
