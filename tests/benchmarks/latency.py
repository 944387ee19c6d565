"""Milliseconds per batch and signal-to-noise of int8 against float, for qfunc's engines and torch.ao.

    python -m tests.benchmarks.latency                                   # ResNet-18, ResNet-50, MobileNet v2
    python -m tests.benchmarks.latency --models resnet --batches 1 2     # a small network; needs no torchvision

Every variant of a model gets the same calibration batches; the signal-to-noise ratio is that of its output on another
batch against the float model's. Float runs eagerly in channels-last memory, as the integer kernels do.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qfunc import materialize, quantize, trace
from qfunc import unwrap as get
from qfunc.testing import oracle, sqnr
from tests.benchmarks.measure import interleaved, machine, model_named, resized, table

MODELS = ("resnet18", "resnet50", "mobilenet_v2")
BATCHES = (1, 8)


def variants(model: nn.Module, data: list[Tensor]) -> dict[str, nn.Module]:
    """The float model in channels-last memory, and its quantized forms."""
    made: dict[str, nn.Module] = {
        f"qfunc {engine}": get(materialize(get(quantize(model, data, engine=engine, progress=False))))
        for engine in ("onednn", "quantized")
    }
    if oracle.available():
        made["torch.ao x86"] = oracle.quantize(model, [(x,) for x in data], "x86")
    return {"float": get(materialize_float(model)), **made}


def materialize_float(model: nn.Module) -> Any:
    """A channels-last copy of the model, not fused: what a user starts from."""
    return trace(model).bind(lambda graph: materialize(graph, copy=True)).map(_channels_last)


def _channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _task(module: nn.Module, x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return module(x)

    return run


def rows(name: str, batches: Sequence[int], repeats: int, calibration: int) -> list[tuple[object, ...]]:
    """A line for each batch size and variant: milliseconds, how much faster than float, decibels."""
    model, example = model_named(name)
    noise = torch.Generator().manual_seed(1)
    data = [torch.randn(4, *example.shape[1:], generator=noise) for _ in range(calibration)]
    made = variants(model, data)
    found: list[tuple[object, ...]] = []
    for batch in batches:
        x = resized(example, batch).contiguous(memory_format=torch.channels_last)
        tasks = {variant: _task(module, x) for variant, module in made.items()}
        outputs = {variant: task() for variant, task in tasks.items()}
        seconds = interleaved(tasks, repeats)
        for variant, value in seconds.items():
            quality = "-" if variant == "float" else sqnr(outputs["float"], outputs[variant])
            found.append((name, variant, batch, 1e3 * value, seconds["float"] / value, quality))
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--calibration", type=int, default=2, help="batches of four to calibrate with")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao and the quantized dtypes announce their end
        lines = [
            row for name in options.models for row in rows(name, options.batches, options.repeats, options.calibration)
        ]
    print(f"median of {options.repeats}; {machine()}")
    print(table(("model", "variant", "batch", "ms", "speed-up", "SQNR, dB"), lines))


if __name__ == "__main__":
    main()
