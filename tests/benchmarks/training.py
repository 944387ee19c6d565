"""Milliseconds of a training step with fake quantization: forward, backward and optimizer, beside torch.ao's.

    python -m tests.benchmarks.training                                    # ResNet-18, MobileNet v2, DenseNet-121
    python -m tests.benchmarks.training --models resnet --batch 4          # a small network; needs no torchvision

All variants start from one model and see one batch; "x86" is torch.ao's default configuration for training on its
backend of that name, on both sides, "cpu" qfunc's own. The ratio is to torch.ao's step.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qfunc import X86, fuse, get_default_qat_qconfig_mapping, materialize, prepare_qat, trace
from qfunc import unwrap as get
from qfunc.testing import oracle, oracle_training
from tests.benchmarks.measure import interleaved, machine, model_named, resized, table

MODELS = ("resnet18", "mobilenet_v2", "densenet121")
TARGET = 0.9


def variants(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """The model to be trained in float, and with fake quantization."""
    graph = get(trace(model, x))
    x86 = get_default_qat_qconfig_mapping("x86")
    made = {
        "float": copy.deepcopy(model),
        "qfunc cpu": get(fuse(graph, qat=True).bind(prepare_qat).bind(materialize)),
        "qfunc x86": get(
            fuse(graph, qat=True, backend=X86)
            .bind(lambda fused: prepare_qat(fused, get(x86), backend=X86))
            .bind(materialize)
        ),
    }
    if oracle.available():
        made["torch.ao x86"] = oracle_training.prepare_qat(model, (x,), oracle.default_mapping("x86", qat=True))
    return made


def step(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    """One training step on `x`."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()

    run()
    return run


def rows(name: str, batch: int, repeats: int) -> list[tuple[object, ...]]:
    """A line for each variant: milliseconds, and the ratio to torch.ao's."""
    model, example = model_named(name)
    x = resized(example, batch)
    tasks = {variant: step(module.train(), x) for variant, module in variants(model.train(), x).items()}
    seconds = interleaved(tasks, repeats)
    theirs = seconds.get("torch.ao x86")
    return [
        (name, variant, 1e3 * value, "-" if theirs is None else value / theirs) for variant, value in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its end
        lines = [row for name in options.models for row in rows(name, options.batch, options.repeats)]
    print(f"batch {options.batch}, median of {options.repeats}, target {TARGET:.2f}; {machine()}")
    print(table(("model", "variant", "ms", "ratio"), lines))


if __name__ == "__main__":
    main()
