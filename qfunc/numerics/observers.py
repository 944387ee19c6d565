"""Observers: a statistic, how a range is made of it, and the `QuantSpec` that the range is for.

An observer is a frozen value. It is folded over data (`init`, then `update` per tensor) and read with `finish`;
observers with equal `statistic` can read one and the same state. A user's own observer is any value that satisfies
`Observer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from qfunc.errors import BadConfig, Problem, told
from qfunc.numerics.folding import Folding
from qfunc.numerics.histogram import best_range
from qfunc.numerics.qparams import UINT8, QParams, QuantSpec, qparams_of_range, validate
from qfunc.numerics.recording import Recording
from qfunc.numerics.search_observers import Entropy, MeanSquaredError, Percentile
from qfunc.numerics.statistic import (
    HistogramState,
    HistogramStatistic,
    MinMaxStatistic,
    MovingAverageStatistic,
    NoState,
    NoStatistic,
    RangeState,
    State,
    Statistic,
)


class Observer(Protocol[State]):
    """What an observer has to offer: a hashable value of a spec, a statistic and a way from its state to qparams."""

    @property
    def spec(self) -> QuantSpec:
        """How the observed tensor will be quantized."""
        ...

    @property
    def statistic(self) -> Statistic[State]:
        """What is measured; observers with equal statistics share one state."""
        ...

    def init(self) -> State:
        """The state before any tensor."""
        ...

    def update(self, state: State, tensor: Tensor) -> State:
        """The state after `tensor`; pure."""
        ...

    def finish(self, state: State) -> QParams | None:
        """The qparams of what was seen, or None if nothing was."""
        ...


class _OfRange(Folding[RangeState]):
    """The qparams of the measured range, all of it."""

    __slots__ = ()
    spec: QuantSpec

    def finish(self, state: RangeState) -> QParams | None:
        """The qparams of the range, or None if nothing was seen; `state_is_finite(state)` is assumed."""
        return qparams_of_range(state.minimum, state.maximum, self.spec) if state.observed else None


@dataclass(frozen=True, slots=True)
class MinMax(_OfRange):
    """The range of all values of all tensors.

    >>> observer = MinMax()
    >>> qparams = observer.finish(observer.update(observer.init(), torch.tensor([-1.0, 1.55])))
    >>> qparams.zero_point.item()
    100
    """

    spec: QuantSpec = UINT8

    @property
    def statistic(self) -> MinMaxStatistic:
        """Least and largest value."""
        return MinMaxStatistic()

    def merge(self, a: RangeState, b: RangeState) -> RangeState:
        """The state after all tensors of both; exact."""
        return self.statistic.merge(a, b)


@dataclass(frozen=True, slots=True)
class PerChannelMinMax(_OfRange):
    """The range of each channel, along `spec.ch_axis`.

    >>> from qfunc.numerics.qparams import INT8_SYMMETRIC_PER_CHANNEL
    >>> observer = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
    >>> observer.finish(observer.update(observer.init(), torch.tensor([[255.0, 0.0], [-51.0, 5.0]]))).scale
    tensor([2.0000, 0.4000])
    """

    spec: QuantSpec

    @property
    def statistic(self) -> MinMaxStatistic:
        """Least and largest value of each channel."""
        return MinMaxStatistic(self.spec.ch_axis)

    def merge(self, a: RangeState, b: RangeState) -> RangeState:
        """The state after all tensors of both; exact."""
        return self.statistic.merge(a, b)


@dataclass(frozen=True, slots=True)
class MovingAverageMinMax(_OfRange):
    """The moving average of each tensor's range."""

    spec: QuantSpec = UINT8
    averaging_constant: float = 0.01

    @property
    def statistic(self) -> MovingAverageStatistic:
        """Averaged least and largest value."""
        return MovingAverageStatistic(self.averaging_constant)


@dataclass(frozen=True, slots=True)
class MovingAveragePerChannelMinMax(_OfRange):
    """The moving average of the range of each channel, along `spec.ch_axis`."""

    spec: QuantSpec
    averaging_constant: float = 0.01

    @property
    def statistic(self) -> MovingAverageStatistic:
        """Averaged least and largest value of each channel."""
        return MovingAverageStatistic(self.averaging_constant, self.spec.ch_axis)


@dataclass(frozen=True, slots=True)
class Histogram(Folding[HistogramState]):
    """The part of the range that is best to quantize in the mean-square sense, by search over a histogram.

    The algorithm is that of `qfunc.numerics.histogram`; like torch.ao's, it counts on all the levels of the dtype even
    when `spec` uses only a part of them.
    """

    spec: QuantSpec = UINT8
    bins: int = 2048
    upsample_rate: int = 16

    @property
    def statistic(self) -> HistogramStatistic:
        """The histogram."""
        return HistogramStatistic(self.bins, self.upsample_rate)

    def finish(self, state: HistogramState) -> QParams | None:
        """The qparams of the best range, or None if nothing was seen; `state_is_finite(state)` is assumed."""
        if not state.range.observed:
            return None
        least, largest = self.spec.limits
        levels = largest - least + 1
        low, high = best_range(state.counts, state.range.minimum.item(), state.range.maximum.item(), levels)
        return qparams_of_range(low, high, self.spec)


@dataclass(frozen=True, slots=True)
class FixedQParams(Folding[NoState]):
    """Qparams known beforehand, such as those of a sigmoid's output: nothing is measured.

    >>> FixedQParams(QuantSpec(), 1 / 256, 0).finish(NoState()).scale.item()
    0.00390625
    """

    spec: QuantSpec
    scale: float
    zero_point: int

    @property
    def statistic(self) -> NoStatistic:
        """Nothing."""
        return NoStatistic()

    def finish(self, state: NoState) -> QParams:  # noqa: ARG002 - nothing was measured
        """The fixed qparams, whatever was seen."""
        return QParams(torch.tensor(self.scale, dtype=torch.float32), torch.tensor(self.zero_point), self.spec)


def is_own(observer: object) -> bool:
    """Whether an observer, and the one that it wraps, is qfunc's, so that what it raises is a bug of ours.

    >>> is_own(MinMax())
    True
    """
    inner = getattr(observer, "observer", None)
    return type(observer).__module__.startswith("qfunc.") and (inner is None or is_own(inner))


def finished(observer: Observer[Any], state: Any) -> QParams | None | str:
    """What `observer.finish(state)` gives, or in words how an observer of the user's failed to give qparams."""
    if is_own(observer):
        return observer.finish(state)
    name = type(observer).__name__
    try:
        qparams = observer.finish(state)
    except Exception as error:  # noqa: BLE001 - the user's code: anything may come out of it
        return f"{name}.finish raised {told(error)}"
    if qparams is None or isinstance(qparams, QParams):
        return qparams
    return f"{name}.finish gave a {type(qparams).__name__}, not QParams"


def validate_observer(observer: Observer[Any]) -> tuple[Problem, ...]:
    """All that is impossible about an observer and its spec; empty when it can be meant.

    >>> [problem.reason for problem in validate_observer(MinMax(QuantSpec(qscheme="per_channel_affine", ch_axis=0)))]
    ['MinMax measures whole tensors, the qscheme per_channel_affine is per channel']
    """
    broken = tuple(_protocol_problems(observer))
    return broken or (*validate(observer.spec), *_scheme_problems(observer), *_parameter_problems(observer))


def _protocol_problems(observer: Any) -> Iterator[Problem]:
    name, remedy = type(observer).__name__, "pass an observer such as MinMax(), Histogram() or PerChannelMinMax(spec)"
    if isinstance(observer, type):
        yield BadConfig(
            observer.__name__, "it is a class, not an observer", f"make one of it: {observer.__name__}(...)"
        )
    elif not all(callable(getattr(observer, part, None)) for part in ("init", "update", "finish")):
        lacking = [part for part in ("init", "update", "finish") if not callable(getattr(observer, part, None))]
        yield BadConfig(name, f"it is no observer: it has no {' and no '.join(lacking)}", remedy)
    elif not isinstance(getattr(observer, "spec", None), QuantSpec):
        yield BadConfig(name, "its spec is no QuantSpec", "give it one: spec=QuantSpec('uint8', 0, 255), say")
    elif not hasattr(observer, "statistic"):
        yield BadConfig(name, "it does not name its statistic", "give it a hashable value that says what it measures")
    elif not all(map(is_hashable, (observer, observer.statistic))):
        yield BadConfig(name, "it or its statistic is not hashable", "make it a frozen dataclass of hashable fields")


def is_hashable(value: object) -> bool:
    """Whether it is, with all that is in it: a frozen dataclass that holds a list only seems to be."""
    try:
        hash(value)
    except Exception:  # noqa: BLE001 - the hash may be the user's code
        return False
    return True


def _scheme_problems(observer: object) -> Iterator[Problem]:
    name = type(observer).__name__
    match observer:
        case (
            MinMax()
            | MovingAverageMinMax()
            | Histogram()
            | FixedQParams()
            | Percentile()
            | MeanSquaredError()
            | Entropy()
            | Recording()
        ) if observer.spec.per_channel:
            reason = f"{name} measures whole tensors, the qscheme {observer.spec.qscheme} is per channel"
            yield BadConfig(name, reason, "use a per-channel observer or a per_tensor qscheme")
        case PerChannelMinMax() | MovingAveragePerChannelMinMax() if not observer.spec.per_channel:
            reason = f"{name} measures channels, the qscheme {observer.spec.qscheme} is not per channel"
            yield BadConfig(name, reason, "use a per-channel qscheme with ch_axis, or a per-tensor observer")


_PARAMETERS: Mapping[str, tuple[tuple[str, type | tuple[type, ...]], ...]] = MappingProxyType(
    {
        "MovingAverageMinMax": (("averaging_constant", (int, float)),),
        "MovingAveragePerChannelMinMax": (("averaging_constant", (int, float)),),
        "Histogram": (("bins", int), ("upsample_rate", int)),
        "Percentile": (("percentile", (int, float)), ("bins", int), ("stride", int)),
        "MeanSquaredError": (("bins", int), ("stride", int)),
        "Entropy": (("bins", int), ("stride", int)),
        "FixedQParams": (("scale", (int, float)), ("zero_point", int)),
    }
)


def _parameter_problems(observer: object) -> Iterator[Problem]:
    name = type(observer).__name__
    limits = torch.finfo(torch.float32)
    for field, kind in _PARAMETERS.get(name, ()) if is_own(observer) else ():
        value = getattr(observer, field)
        if not isinstance(value, kind) or isinstance(value, bool):
            yield BadConfig(name, f"its {field} is {value!r:.40}, no number", f"give it a number as its {field}")
            return
    match observer:
        case MovingAverageMinMax(_, c) | MovingAveragePerChannelMinMax(_, c) if not 0 < c <= 1:
            yield BadConfig(name, f"averaging_constant {c} is not in (0, 1]", "choose a constant such as 0.01")
        case Histogram(_, bins, rate) if bins < 2 or rate < 1:
            yield BadConfig(name, f"{bins} bins, upsample_rate {rate}", "use at least 2 bins and a rate of at least 1")
        case Percentile() | MeanSquaredError() | Entropy():
            yield from _search_problems(observer)
        case FixedQParams(spec, scale, zero_point):
            if not limits.tiny <= scale <= limits.max:
                yield BadConfig(name, f"{scale} is not a scale", "choose a positive, normal float32 number")
            if not spec.quant_min <= zero_point <= spec.quant_max:
                reason = f"zero_point {zero_point} is outside of {spec.quant_min}..{spec.quant_max}"
                yield BadConfig(name, reason, "choose a zero point within the range of the spec")


def _search_problems(observer: Percentile | MeanSquaredError | Entropy) -> Iterator[Problem]:
    name, bins, stride = type(observer).__name__, observer.bins, observer.stride
    if isinstance(observer, Percentile) and not 50 < observer.percentile <= 100:
        yield BadConfig(name, f"percentile {observer.percentile} is not in (50, 100]", "choose one such as 99.99")
    if not 2 <= bins <= 2**15 or stride < 1:
        reason = f"{bins} bins, stride {stride}"
        yield BadConfig(name, reason, "use from 2 to 32768 bins and a stride of at least 1")
