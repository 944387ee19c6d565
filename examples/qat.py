"""4 bits on real data: a small network in float, quantized after training, and trained with quantization."""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from qfunc import (
    Converted,
    MeanSquaredError,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    absorb,
    calibrate,
    convert,
    for_training,
    fuse,
    lower,
    materialize,
    prepare_qat,
    quantize,
    trace,
    unwrap,
)

EPOCHS, EPOCHS_AT_4_BITS, BATCH = 8, 8, 64
ACTIVATION = MeanSquaredError(QuantSpec("uint8", 0, 15))
WEIGHT = PerChannelMinMax(QuantSpec("int8", -7, 7, "per_channel_symmetric", ch_axis=0))
AFTER_TRAINING = QConfigMapping().set_global(QConfig(ACTIVATION, WEIGHT))
IN_TRAINING = for_training(AFTER_TRAINING)  # ranges are averaged as the model trains


def separable(channels_in: int, channels_out: int, stride: int = 1) -> list[nn.Module]:
    """A convolution of each channel by itself, and one of all channels at each place."""
    depthwise = nn.Conv2d(channels_in, channels_in, 3, stride, padding=1, groups=channels_in, bias=False)
    pointwise = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    return [depthwise, nn.BatchNorm2d(channels_in), nn.ReLU(), pointwise, nn.BatchNorm2d(channels_out), nn.ReLU()]


def network() -> nn.Module:
    """A network for one-channel images and ten classes."""
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    body = [*separable(16, 32), *separable(32, 64, 2), *separable(64, 64, 2)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 1797 handwritten digits of scikit-learn, 16x16, in 0..1: training and test images, and their labels."""
    data = load_digits()
    images = F.interpolate(torch.tensor(data.images).float().unsqueeze(1) / 16, scale_factor=2, mode="bilinear")
    labels = torch.tensor(data.target)
    order = torch.randperm(len(images))
    train, test = order[:1280], order[1280:]
    return images[train], labels[train], images[test], labels[test]


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, rate: float) -> None:
    """Adam with one cycle of the learning rate; a progress bar where there is a terminal."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    steps = [batch for _ in range(epochs) for batch in torch.split(torch.randperm(len(images)), BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=len(steps))
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


def trained_at_4_bits(model: nn.Module, images: Tensor, labels: Tensor) -> Converted:
    """What the model becomes when it trains a little more with every value rounded; the model stays as it is."""
    graph = unwrap(trace(model, images[:1]).bind(lambda graph: fuse(graph, qat=True)))
    prepared = unwrap(prepare_qat(graph, IN_TRAINING))
    measured = unwrap(calibrate(prepared, torch.split(images[:512], BATCH)))  # where scales begin
    module = unwrap(materialize(measured))  # trains like any module
    train(module, images, labels, EPOCHS_AT_4_BITS, rate=3e-3)
    return unwrap(absorb(prepared, module).bind(convert))


def kibibytes(model: nn.Module, bits: int) -> float:
    """Size of the parameters and buffers, where a weight of 4 bits takes so many."""
    tensors = model.state_dict().values()
    return sum(float(t.numel()) * (bits / 8 if t.dtype == torch.int8 else t.element_size()) for t in tensors) / 1024


def main() -> int:
    """Train, quantize in both ways, compare; 1 if training with quantization gives less than half of the loss back."""
    torch.manual_seed(0)
    images, labels, test_images, test_labels = digits()
    model = network()
    train(model, images, labels, EPOCHS, rate=1e-2)

    calibration = torch.split(images[:512], BATCH)
    after = unwrap(quantize(model, calibration, qconfig_mapping=AFTER_TRAINING))
    during = unwrap(lower(trained_at_4_bits(model, images, labels)))

    models = (model, unwrap(materialize(after)), unwrap(materialize(during)))
    reached = [accuracy(m, test_images, test_labels) for m in models]
    names = ("float", "4 bits after training", "4 bits in training")
    table = Table("", *(Column(name, justify="right") for name in names), title="scikit-learn's digits")
    table.add_row("accuracy, %", *(f"{each:.2f}" for each in reached))
    table.add_row("size, KiB", *(f"{kibibytes(m, 8):.1f}" for m in models))
    table.add_row("two weights a byte", "", *(f"{kibibytes(m, 4):.1f}" for m in models[1:]))
    Console().print(table)
    in_int8 = f"{during.certificate.in_int8} of {during.certificate.total}"
    print(f"\n{in_int8} operators run on integers: the kernels for 8 bits, which clamp activations to 4.")
    print("Each weight of 4 bits is kept in a byte here.")
    return int(reached[0] - reached[2] > (reached[0] - reached[1]) / 2)


if __name__ == "__main__":
    sys.exit(main())
