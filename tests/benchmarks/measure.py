"""Timing by interleaved repeats, tables, and the models that the programs measure."""

from __future__ import annotations

import gc
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo import ZOO

SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def model_named(name: str) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode and one input: of torchvision, or of `tests/zoo.py`."""
    for case in ZOO:
        if case.name == name:
            model, inputs = case.build()
            assert isinstance(inputs[0], Tensor) and len(inputs) == 1
            return model, inputs[0][:1]
    path = SHARED / "zoo.py"
    if not path.exists() or importlib.util.find_spec("torchvision") is None:
        sys.exit(f"{name} needs torchvision and ../shared/zoo.py; without them: {', '.join(c.name for c in ZOO)}")
    spec = importlib.util.spec_from_file_location("shared_zoo", path)
    assert spec is not None and spec.loader is not None
    zoo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    built: tuple[nn.Module, Tensor] = zoo.build(name)
    return built


def resized(x: Tensor, batch: int, side: int | None = None) -> Tensor:
    """Noise of the shape of `x` with another batch size and, for images, another side."""
    spatial = x.shape[2:] if side is None else (side,) * (x.dim() - 2)
    return torch.randn(batch, x.shape[1], *spatial, generator=torch.Generator().manual_seed(0))


def interleaved(
    tasks: dict[str, Callable[[], Any]],
    repeats: int,
    *,
    setup: dict[str, Callable[[], Any]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    collect: bool = True,
) -> dict[str, float]:
    """The median seconds of each task over `repeats` rounds in which every task runs once.

    Whatever slows the machine for a while slows all tasks alike. A task with a `setup` is called with what that gives,
    made outside of the time. Garbage is collected before each task; during it as ever, for users pay for it as well,
    or not at all where `collect` is false.
    """
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            given = (setup[name](),) if setup and name in setup else ()
            gc.collect()
            if not collect:
                gc.disable()
            try:
                start = clock()
                task(*given)
                times[name].append(clock() - start)
            finally:
                gc.enable()
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lined-up columns: the first to the left, the others to the right.

    >>> print(table(("pass", "ms"), [("fuse", 1.25), ("lower", "-")]))
    pass     ms
    fuse   1.25
    lower     -
    """
    cells = [list(titles), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(titles))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def machine() -> str:
    """What to know of the machine beside any figure."""
    load = "/".join(f"{value:.1f}" for value in os.getloadavg())
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {capability}, {torch.get_num_threads()} thread(s), load {load}"
