"""What calibration costs: time over the float forward, memory over it, and what a second process gains.

    python -m tests.benchmarks.calibration                          # the models of MODELS, one thread
    python -m tests.benchmarks.calibration --models resnet --parts time memory
    python -m tests.benchmarks.calibration --smoke                  # something tiny, once

Time. A batch of calibration is what one more batch costs: the whole of `calibrate` on 1 + N batches less that on 1,
divided by N. So all that is done for each batch is in it (reading it, checking it, the forward, the observers), and
what is done once is not (materializing, digests). Both are measured by turns with the float forward of the fused graph,
whose time the others are divided by, on the same N batches. torch.ao's prepared modules are run on these batches too,
and compared to the float forward of the model as it is. Everything runs once before the clock.

Memory. Each figure is the peak of resident memory of a process of its own, forked when the model is traced, fused and
prepared: only what comes after counts as a peak. Batches are made one by one.

Processes. The wall time of `calibrate` on all batches in one process, against half of the batches in each of two at the
same time, all on one thread and with their models and data at hand. Joining the statistics is not in it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import multiprocessing
import os
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch import Tensor, nn

from qfunc import (
    Histogram,
    MinMax,
    PerChannelMinMax,
    Prepared,
    QConfig,
    QConfigMapping,
    calibrate,
    fuse,
    materialize,
    prepare,
    trace,
)
from qfunc import unwrap as get
from qfunc.ir import Graph
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
from qfunc.testing import oracle
from tests.benchmarks.measure import interleaved, machine, model_named, table
from tests.benchmarks.passes import reference_mapping

MODELS = ("resnet50", "mobilenet_v2", "densenet121", "vit_blocks")
PARTS = ("time", "memory", "processes")
FORWARD, REFERENCE_FORWARD = "float forward, fused", "torch.ao: float forward"
STRIDE = 8
TIME_TARGETS = {"MinMax": 1.15, "exact histograms": 2.5, f"exact histograms, stride {STRIDE}": 1.5}
"""The most that a batch of calibration may take, in float forwards."""

MEMORY_TARGET = (20.0, 64 / 1024)
"""The most memory over the float forward's: MB in all, and MB for each site."""

PROCESSES_TARGET = 0.65
"""The most that two processes may take, in times of one."""

Task = Callable[[], Any]
Row = tuple[object, ...]


class Block(nn.Module):
    """A pre-norm block of a vision transformer (Dosovitskiy et al. 2020), its attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, tokens, width)` to the same."""
        y = self.norm1(x)
        q, k, v = self._split(self.query(y)), self._split(self.key(y)), self._split(self.value(y))
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * self.scale, -1)
        x = x + self.out(torch.matmul(weights, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


def vit_blocks() -> tuple[nn.Module, Tensor]:
    """Five blocks of the width of ViT-S, and the tokens of one image."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(384, 6) for _ in range(5))).eval(), torch.randn(1, 197, 384)


@dataclass(frozen=True, slots=True)
class Setting:
    """A model by its name and the size of a batch: what a process needs to be told to build all by itself."""

    model: str
    batch_size: int

    def build(self) -> tuple[nn.Module, Tensor]:
        """The model, and one input."""
        return vit_blocks() if self.model == "vit_blocks" else model_named(self.model)

    def data(self, example: Tensor, count: int, seed: int = 0) -> Iterator[Tensor]:
        """Batches of noise of the shape of the example, made when they are asked for."""
        noise = torch.Generator().manual_seed(seed)
        for _ in range(count):
            yield torch.randn(self.batch_size, *example.shape[1:], generator=noise)


def observers() -> dict[str, Any]:
    """The observers by name; those that this version of qfunc does not have are None."""
    try:
        search: Any = importlib.import_module("qfunc.numerics.search_observers")
    except ModuleNotFoundError:
        exact, strided = None, None
    else:
        spec = MinMax().spec
        exact, strided = search.MeanSquaredError(spec), search.MeanSquaredError(spec, stride=STRIDE)
    names = tuple(TIME_TARGETS)
    return {names[0]: MinMax(), names[1]: exact, names[2]: strided, "Histogram": Histogram()}


def prepared_with(fused: Graph, observer: Any) -> Prepared:
    """The fused graph with that observer for activations."""
    qconfig = QConfig(observer, PerChannelMinMax(INT8_NARROW_PER_CHANNEL))
    return get(prepare(fused, QConfigMapping().set_global(qconfig)))


def fused_graph(model: nn.Module, example: Tensor) -> Graph:
    """The graph that is calibrated."""
    return get(trace(model, example).bind(fuse))


def _calibrate(prepared: Prepared, data: Any) -> None:
    get(calibrate(prepared, data, progress=False))


def _forward(module: nn.Module, data: Any) -> None:
    with torch.no_grad():
        for x in data:
            module(x)


# Time -----------------------------------------------------------------------------------------------------------------


def references(model: nn.Module, x: Tensor) -> dict[str, nn.Module]:
    """torch.ao's prepared models, and the model itself; none where torch.ao is missing."""
    if not oracle.available():
        return {}
    from torch.ao.quantization.quantize_fx import prepare_fx

    made = {REFERENCE_FORWARD: model}
    for observer in ("MinMax", "Histogram"):
        made[f"torch.ao: {observer}"] = prepare_fx(copy.deepcopy(model), reference_mapping(observer), (x,))
    return made


def batch_seconds(setting: Setting, count: int, repeats: int) -> dict[str, float | None]:
    """The seconds of one batch by what is done with it; None for what there is not."""
    model, example = setting.build()
    data = list(setting.data(example, 1 + count))
    first, rest = data[:1], data[1:]
    fused = fused_graph(model, example)
    chosen = observers()
    calibrations = {name: prepared_with(fused, observer) for name, observer in chosen.items() if observer is not None}
    forwards: dict[str, nn.Module] = {FORWARD: get(materialize(fused)), **references(model, data[0])}
    tasks: dict[str, Task] = {name: _task(_forward, module, rest) for name, module in forwards.items()}
    for name, prepared in calibrations.items():
        tasks[f"{name}, one batch"] = _task(_calibrate, prepared, first)
        tasks[f"{name}, all"] = _task(_calibrate, prepared, data)
    for module in forwards.values():
        _forward(module, first)
    for prepared in calibrations.values():
        _calibrate(prepared, first)
    seconds = interleaved(tasks, repeats)
    found: dict[str, float | None] = {name: seconds[name] / count for name in forwards}
    for name in chosen:
        known = name in calibrations
        found[name] = (seconds[f"{name}, all"] - seconds[f"{name}, one batch"]) / count if known else None
    return found


def _task(function: Callable[..., None], *args: Any) -> Task:
    return lambda: function(*args)


def time_rows(setting: Setting, count: int, repeats: int) -> list[Row]:
    """A line for each way: milliseconds, in float forwards, the most it should be."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its end in many places
        found = batch_seconds(setting, count, repeats)
    return [
        (setting.model, name, 1e3 * value, value / _base(found, name), TIME_TARGETS.get(name, "-"))
        if value is not None
        else (setting.model, name, "-", "-", TIME_TARGETS.get(name, "-"))
        for name, value in sorted(found.items(), key=lambda item: item[0].startswith("torch.ao"))
    ]


def _base(found: dict[str, float | None], name: str) -> float:
    base = found[REFERENCE_FORWARD if name.startswith("torch.ao") else FORWARD]
    assert base is not None
    return base


# Memory ---------------------------------------------------------------------------------------------------------------


def peak(work: Task) -> float:
    """The most resident memory, in MB, that a copy of this process has while it does some work."""
    gc.collect()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001 - a copy of the process must end here, whatever happens
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"a process that was to be measured ended with {status}")
    return usage.ru_maxrss / 1024


def peaks(setting: Setting, counts: Sequence[int]) -> list[Row]:
    """A line for each observer and number of batches; to be called in a fresh process.

    The columns: model, observer, batches, MB of the forward, MB of calibration, how much more, the most it may be.
    """
    torch.set_num_threads(1)  # threads do not survive a fork
    model, example = setting.build()
    fused = fused_graph(model, example)
    stages = {
        name: prepared_with(fused, observer) if observer is not None else None for name, observer in observers().items()
    }
    rows: list[Row] = []
    for count in counts:
        forward = peak(lambda count=count: _forward(get(materialize(fused)), setting.data(example, count)))
        for name, prepared in stages.items():
            if prepared is None:
                rows.append((setting.model, name, count, forward, "-", "-", "-"))
                continue
            used = peak(lambda stage=prepared, count=count: _calibrate(stage, setting.data(example, count)))
            most = MEMORY_TARGET[0] + MEMORY_TARGET[1] * len(prepared.measured)
            rows.append((setting.model, name, count, forward, used, used - forward, most))
    return rows


def memory_rows(setting: Setting, counts: Sequence[int]) -> list[Row]:
    """`peaks` in a process of its own, which has not held anything else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peaks, setting, counts).result()


# Processes ------------------------------------------------------------------------------------------------------------


def worker(setting: Setting, index: int, batches: int, repeats: int, gate: Barrier) -> None:
    """By turns: the first worker calibrates with all batches, each with its half; the gate is passed around each."""
    try:
        torch.set_num_threads(1)
        model, example = setting.build()
        prepared = prepared_with(fused_graph(model, example), MinMax())
        data = list(setting.data(example, batches, seed=index))
        _calibrate(prepared, data[:1])
        for _ in range(repeats):
            for share in (data if index == 0 else [], data[: batches // 2]):
                gate.wait()
                if share:
                    _calibrate(prepared, share)
                gate.wait()
    except BaseException:
        gate.abort()  # else the others wait for ever
        raise


def processes_row(setting: Setting, batches: int, repeats: int) -> Row:
    """Seconds of one process, seconds of two, their ratio, and the most it should be."""
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(3, timeout=3600)  # seconds: a worker that was killed must not be waited for for ever
    workers = [context.Process(target=worker, args=(setting, i, batches, repeats, gate), daemon=True) for i in range(2)]
    for process in workers:
        process.start()
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for times in seconds:
            gate.wait()
            start = time.perf_counter()
            gate.wait()
            times.append(time.perf_counter() - start)
    for process in workers:
        process.join()
    one, two = map(statistics.median, seconds)
    return (setting.model, batches, one, two, two / one, PROCESSES_TARGET)


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="vit_blocks, of torchvision, or of tests/zoo.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4, help="that the time of one is the mean of")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="for the time; the other parts have one")
    parser.add_argument("--counts", type=int, nargs="+", default=(2, 12), help="of batches, for the memory")
    parser.add_argument("--shared-out", type=int, default=16, help="batches, for the processes: an even number")
    parser.add_argument("--smoke", action="store_true", help="one tiny model, one repeat, few batches")
    options = parser.parse_args(arguments)
    if options.smoke:
        smoke = {"models": ("squeezenet",), "batch_size": 2, "batches": 1, "repeats": 1, "counts": (1, 2)}
        vars(options).update({**smoke, "shared_out": 2})
    if options.shared_out % 2:
        parser.error("--shared-out must be even")
    torch.set_num_threads(options.threads)
    settings = [Setting(name, options.batch_size) for name in options.models]
    print(f"batches of {options.batch_size}; median of {options.repeats}; {machine()}")
    if "time" in options.parts:
        lines = [row for setting in settings for row in time_rows(setting, options.batches, options.repeats)]
        print(table(("model", "time of a batch", "ms", "forwards", "target"), lines))
    if "memory" in options.parts:
        lines = [row for setting in settings for row in memory_rows(setting, options.counts)]
        print("\n" + table(("model", "peak memory, MB", "batches", "forward", "calibrate", "more", "target"), lines))
    if "processes" in options.parts:
        lines = [processes_row(setting, options.shared_out, options.repeats) for setting in settings]
        print("\n" + table(("model", "batches", "one process, s", "two", "ratio", "target"), lines))


if __name__ == "__main__":
    main()
