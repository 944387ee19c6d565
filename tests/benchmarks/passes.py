"""The time of qfunc's passes on one model, against torch.ao's FX graph mode in the same run.

    python -m tests.benchmarks.passes                  # ResNet-50
    python -m tests.benchmarks.passes --model resnet   # a small network; needs no torchvision

Both sides are given a traced or an eager model and statistics of one small batch, and end with the quantized model's
description; both compute all activation qparams in it (torch.ao's `convert_fx` calls `calculate_qparams` of every
observer, qfunc's `convert` calls `finish`). torch.ao also traces, quantizes and packs weights in these two calls; qfunc
does so in `trace` and `materialize`, which have rows of their own. Copies that torch.ao needs, because it consumes what
it is given, are made outside of its time.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from qfunc import QConfig, QConfigMapping, calibrate, check_host, convert, fuse, lower, materialize, prepare, trace
from qfunc import unwrap as get
from qfunc.backends import X86
from qfunc.numerics.observers import Histogram, MinMax, PerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC_PER_CHANNEL, UINT8_REDUCED
from tests.benchmarks.measure import interleaved, machine, model_named, resized, table

TARGET = 0.10
OBSERVERS = ("MinMax", "Histogram")
Task = Callable[..., Any]


def mapping(observer: str) -> QConfigMapping:
    """torch.ao's x86 default with the given activation observer."""
    activation = {"MinMax": MinMax(UINT8_REDUCED), "Histogram": Histogram(UINT8_REDUCED)}[observer]
    return QConfigMapping().set_global(QConfig(activation, PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)))


def reference_mapping(observer: str) -> Any:
    """The same for torch.ao."""
    from torch.ao.quantization import QConfig as ReferenceQConfig
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.observer import MinMaxObserver, default_per_channel_weight_observer

    chosen = get_default_qconfig_mapping("x86")
    if observer == "MinMax":
        activation = MinMaxObserver.with_args(reduce_range=True)
        qconfig = ReferenceQConfig(activation=activation, weight=default_per_channel_weight_observer)
        chosen.set_global(qconfig)
        for name, old in chosen.object_type_qconfigs.items():
            if old is not None and "FixedQParams" not in repr(old.activation):
                chosen.set_object_type(name, qconfig)
    return chosen


def ours(model: nn.Module, x: Tensor, observer: str) -> dict[str, Task]:
    """Each step of qfunc as a task on the values that the steps before it gave."""
    config = mapping(observer)
    traced = get(trace(model, x))
    fused = get(fuse(traced, backend=X86))
    prepared = get(prepare(fused, config, backend=X86))
    calibrated = get(calibrate(prepared, [x], progress=False))
    converted = get(convert(calibrated))
    host = check_host()
    lowered = get(lower(converted, host=host))

    # A new value of the same graph each time, because a value keeps its digest once that is known.
    def passes() -> None:
        get(prepare(get(fuse(replace(traced), backend=X86)), config, backend=X86))
        get(convert(calibrated))

    return {
        "fuse+prepare+convert": passes,
        "trace": lambda: get(trace(model)),
        "trace, with shapes": lambda: get(trace(model, x)),
        "fuse": lambda: get(fuse(replace(traced), backend=X86)),
        "prepare": lambda: get(prepare(fused, config, backend=X86)),
        "convert": lambda: get(convert(calibrated)),
        "lower": lambda: get(lower(converted, host=host)),
        "materialize, lowered": lambda: get(materialize(lowered)),
        "materialize, float": lambda: get(materialize(traced)),
    }


def reference(model: nn.Module, x: Tensor, observer: str) -> tuple[dict[str, Task], dict[str, Task]]:
    """torch.ao's two steps, and what makes the copies that they consume."""
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    config = reference_mapping(observer)

    def prepared(given: nn.Module) -> fx.GraphModule:
        return prepare_fx(given, config, (x,))

    calibrated = prepared(copy.deepcopy(model))
    with torch.no_grad():
        calibrated(x)
    tasks: dict[str, Task] = {"torch.ao prepare_fx": prepared, "torch.ao convert_fx": convert_fx}
    return tasks, {
        "torch.ao prepare_fx": lambda: copy.deepcopy(model),
        "torch.ao convert_fx": lambda: copy.deepcopy(calibrated),
    }


def measure(model: nn.Module, x: Tensor, observer: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of one processor by name, for both sides; all of it runs on one thread."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its end in many places
        theirs, setup = reference(model, x, observer)
        seconds = interleaved({**ours(model, x, observer), **theirs}, repeats, setup=setup, clock=time.process_time)
    return {name: 1e3 * value for name, value in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=64, help="of the calibration image: statistics, not passes, see it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, example = model_named(options.model)
    x = resized(example, 1, options.side)
    found = {observer: measure(model, x, observer, options.repeats) for observer in OBSERVERS}
    rows: list[tuple[object, ...]] = [(name, *(found[o][name] for o in OBSERVERS)) for name in found[OBSERVERS[0]]]
    both = [found[o]["torch.ao prepare_fx"] + found[o]["torch.ao convert_fx"] for o in OBSERVERS]
    ratios = [found[o]["fuse+prepare+convert"] / total for o, total in zip(OBSERVERS, both, strict=True)]
    rows += [("torch.ao both", *both), (f"ratio (target {TARGET:.2f})", *(f"{ratio:.3f}" for ratio in ratios))]
    print(f"{options.model}, processor time, median of {options.repeats}; {machine()}")
    print(table(("milliseconds", *OBSERVERS), rows))


if __name__ == "__main__":
    main()
