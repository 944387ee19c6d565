"""Models, batches and shards that other processes can import, and statistics as bits to compare."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from returns.result import Failure
from torch import Tensor, nn
from torch.utils.data import DataLoader

from qfunc import (
    Histogram,
    MeanSquaredError,
    MinMax,
    PerChannelMinMax,
    Prepared,
    QConfig,
    QConfigMapping,
    QuantSpec,
    fuse,
    prepare,
    trace,
    unwrap,
)
from qfunc.errors import problems
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
from qfunc.passes.statistics import Statistics

WEIGHTS = PerChannelMinMax(INT8_NARROW_PER_CHANNEL)
CHANNELS = PerChannelMinMax(QuantSpec("uint8", qscheme="per_channel_affine", ch_axis=1))
OBSERVERS: dict[str, Any] = {"range": MinMax(), "ranges of channels": CHANNELS, "search": MeanSquaredError()}


class Block(nn.Module):
    """Convolutions, a sum and a linear layer, whose last bits depend on how threads divide the work."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head((x + self.second(x)).mean((2, 3)))


def prepared(observer: Any = OBSERVERS["range"], seed: int = 0) -> Prepared:
    return prepared_of(Block(seed).eval(), observer)


def prepared_of(block: nn.Module, observer: Any = OBSERVERS["range"]) -> Prepared:
    """A block that is observed, at one place of its own with channels where the observer has channels."""
    mapping = QConfigMapping().set_global(QConfig(MinMax() if observer == CHANNELS else observer, WEIGHTS))
    if observer == CHANNELS:
        mapping = mapping.set_output("add", CHANNELS)
    return unwrap(trace(block, batches(1)[0]).bind(fuse).bind(partial(prepare, qconfig_mapping=mapping)))


def unmergeable() -> Prepared:
    return prepared(Histogram())


def batches(count: int = 9, start: int = 0) -> list[Tensor]:
    """Batch by batch on another scale, so that each of them matters."""
    made = []
    for index in range(start, start + count):
        generator = torch.Generator().manual_seed(index)
        made.append(torch.randn(2, 3, 12, 12, generator=generator) * (1 + index))
    return made


def bits(value: Any) -> Any:
    """A value with the bytes of its tensors, in an order of its own, to be compared with ==."""
    match value:
        case Tensor():
            return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()
        case Mapping():
            return sorted((repr(key), bits(item)) for key, item in value.items())
        case tuple() | list():
            return [bits(item) for item in value]
        case type():
            return value
        case _ if is_dataclass(value):
            return [(each.name, bits(getattr(value, each.name))) for each in fields(value) if each.name != "merge"]
        case _:
            return value


def assert_same_statistics(a: Statistics, b: Statistics) -> None:
    assert a == b
    assert bits(a) == bits(b)


def told(result: Any) -> list[tuple[str, str]]:
    """The errors of a `Failure`: what and where."""
    assert isinstance(result, Failure), result
    return [(type(problem).__name__, problem.node) for problem in problems(result.failure())]


# Shards


def loader(start: int, count: int) -> DataLoader[Tensor]:
    """Batches out of a data loader that is made where it is run."""
    return DataLoader(batches(count, start), batch_size=None)  # type: ignore[arg-type]


def generated(start: int, count: int) -> Iterator[Tensor]:
    yield from batches(count, start)


def failing(start: int) -> list[Tensor]:
    raise OSError(f"no data from {start}")


def threads_told(path: Path, start: int, count: int) -> Iterator[Tensor]:
    """Writes with how many threads it runs, in which process."""
    for batch in batches(count, start):
        yield batch
        path.write_text(f"{os.getpid()} {torch.get_num_threads()}")


def killed(marker: Path, times: int, start: int, count: int) -> Iterator[Tensor]:
    """Kills its process in the middle, the first `times` times."""
    for index, batch in enumerate(batches(count, start)):
        if index == 1:
            met = len(list(marker.iterdir()))
            if met < times:
                (marker / str(met)).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        yield batch
