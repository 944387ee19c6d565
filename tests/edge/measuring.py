"""What tests of files of statistics calibrate: a small model, its batches, and observers of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qfunc import (
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverageMinMax,
    Percentile,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    Recording,
    fuse,
    prepare,
    trace,
    unwrap,
)
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL, UINT8, QParams, qparams_of_range
from qfunc.numerics.statistic import MinMaxStatistic, RangeState
from qfunc.passes.statistics import Statistics

WEIGHT = PerChannelMinMax(INT8_NARROW_PER_CHANNEL)


@dataclass(frozen=True)
class Moment:
    """A part of a state."""

    total: Tensor
    count: int
    least: float | None = None


@dataclass(frozen=True)
class Sketch:
    """A state of the user's, of everything that files hold."""

    moment: Moment
    recent: tuple[Tensor, ...] = ()
    names: tuple[str, ...] = ()
    bound: float = float("inf")
    flag: bool = False


@dataclass(frozen=True)
class SketchStatistic:
    """A statistic of the user's."""

    rate: float = 0.5
    words: tuple[str, ...] = ("a", "b")


SKETCH = SketchStatistic()


@dataclass(frozen=True)
class Sketching:
    """An observer of the user's, which has the merge; its statistic has none."""

    spec: QuantSpec = UINT8
    statistic: object = SKETCH

    def init(self) -> Sketch:
        return Sketch(Moment(torch.zeros((), dtype=torch.float64), 0))

    def update(self, state: Sketch, tensor: Tensor) -> Sketch:
        found = Sketch(Moment(tensor.abs().double().sum(), tensor.numel(), tensor.min().item()), (tensor.amax(),))
        return self.merge(state, found)

    def merge(self, a: Sketch, b: Sketch) -> Sketch:
        ends = [end for end in (a.moment.least, b.moment.least) if end is not None]
        moment = Moment(a.moment.total + b.moment.total, a.moment.count + b.moment.count, min(ends, default=None))
        both = tuple(sorted((*a.recent, *b.recent), reverse=True)[:2])
        return Sketch(moment, both, ("é", "\N{GRINNING FACE}"), flag=bool(both))

    def finish(self, state: Sketch) -> QParams | None:
        if not state.recent:
            return None
        return qparams_of_range(torch.tensor(state.moment.least), state.recent[0], self.spec)


TYPES = {"mine.Moment": Moment, "mine.Sketch": Sketch, "mine.SketchStatistic": SketchStatistic}

PER_CHANNEL = QuantSpec("int8", -128, 127, "per_channel_symmetric", 1)
OBSERVERS = {
    "MinMax": MinMax(),
    "MovingAverageMinMax": MovingAverageMinMax(averaging_constant=0.25),
    "Histogram": Histogram(bins=32),
    "Percentile": Percentile(bins=32),
    "MeanSquaredError": MeanSquaredError(bins=64),
    "Recording": Recording(),
    "PerChannelMinMax": PerChannelMinMax(PER_CHANNEL),
    "Sketching": Sketching(),
    "plain": Sketching(statistic=("sketch", 1, True, None, 0.5)),
}


def prepared_for(observer, seed: int = 0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
    whole = MinMax() if observer.spec.per_channel else observer
    # Activations have scales of channels at single places only.
    mapping = QConfigMapping().set_global(QConfig(whole, WEIGHT)).set_output("_1", observer)
    return unwrap(trace(model, torch.zeros(2, 4)).bind(fuse).bind(lambda graph: prepare(graph, mapping)))


def batches(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 4, generator=generator) for _ in range(count)]


def with_channels(statistics: Statistics, count: int) -> Statistics:
    """The statistics with so many channels wherever they have any."""
    changed = statistics.measured
    for key, entry in changed.items():
        if key[1] != MinMaxStatistic():
            state = RangeState(torch.linspace(-2, -1, count), torch.linspace(1, 2, count))
            changed = changed.set(key, replace(entry, state=state))
    return replace(statistics, measured=changed)


def same(a: object, b: object) -> bool:
    """Whether two states are bit for bit the same."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n)) for n in a.__dataclass_fields__)
    return type(a) is type(b) and (a == b)


def same_statistics(a, b) -> bool:
    if (a.graph, a.weights, a.batches, a.data) != (b.graph, b.weights, b.batches, b.data):
        return False
    pairs = [(a.measured.get(key), b.measured.get(key)) for key in {*a.measured, *b.measured}]
    return all(
        x is not None
        and y is not None
        and (x.batches, x.elements, x.data) == (y.batches, y.elements, y.data)
        and same(x.state, y.state)
        for x, y in pairs
    )
