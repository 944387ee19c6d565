"""What can be measured of the tensors that pass a place: pure folds, `init` / `update` / (where exact) `merge`.

A `Statistic` is a small hashable value: it names what is measured and with which parameters, and several observers may
share it. Its state is a value too, a frozen dataclass of small tensors; `update` gives a new one and keeps nothing of
the tensor it was given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from qfunc.numerics.histogram import count, rescale
from qfunc.numerics.qparams import same_values

State = TypeVar("State")

_COPIED = 1 << 19
"""How many values of a tensor that is not dense are copied at a time."""


class Statistic(Protocol[State]):
    """What a statistic has to offer; it must be hashable and equal to another one that measures the same."""

    def init(self) -> State:
        """The state before any tensor."""
        ...

    def update(self, state: State, tensor: Tensor) -> State:
        """The state after `tensor`; pure: changes neither and keeps no reference to the tensor's memory."""
        ...


class MergeableStatistic(Statistic[State], Protocol[State]):
    """A statistic whose states can be joined exactly."""

    def merge(self, a: State, b: State) -> State:
        """The state after all tensors of `a` and of `b`: associative, commutative, with `init()` as unit."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class RangeState:  # noqa: PLW1641 - compared, never a key
    """The least and largest values, float32, shape `()` or `(channels,)`; inf and -inf (shape `()`) before any tensor.

    >>> RangeState.unobserved() == RangeState.unobserved()
    True
    """

    minimum: Tensor
    maximum: Tensor

    @staticmethod
    def unobserved() -> RangeState:
        """The state of no tensor."""
        return RangeState(torch.tensor(math.inf), torch.tensor(-math.inf))

    @property
    def observed(self) -> bool:
        """Whether any value was seen."""
        return self.minimum.dim() > 0 or (self.minimum.item(), self.maximum.item()) != (math.inf, -math.inf)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeState):
            return NotImplemented
        return same_values(self.minimum, other.minimum) and same_values(self.maximum, other.maximum)


@dataclass(frozen=True, slots=True, eq=False)
class HistogramState:  # noqa: PLW1641 - compared, never a key
    """Counts, float32 of shape `(bins,)`, over the range of the values seen so far."""

    counts: Tensor
    range: RangeState

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, HistogramState):
            return NotImplemented
        return self.range == other.range and same_values(self.counts, other.counts)


@dataclass(frozen=True, slots=True)
class NoState:
    """The state of what measures nothing."""


@dataclass(frozen=True, slots=True)
class MinMaxStatistic:
    """Least and largest value, of everything or, with `ch_axis`, of each channel.

    >>> s = MinMaxStatistic()
    >>> s.update(s.init(), torch.tensor([1.0, -2.0])).minimum
    tensor(-2.)
    """

    ch_axis: int | None = None

    def init(self) -> RangeState:
        """No values yet: the unit of `merge`."""
        return RangeState.unobserved()

    def update(self, state: RangeState, tensor: Tensor) -> RangeState:
        """Widened by the values of `tensor`; an empty one changes nothing. NaN stays once seen."""
        return state if tensor.numel() == 0 else self.merge(state, _range(tensor, self.ch_axis))

    def merge(self, a: RangeState, b: RangeState) -> RangeState:
        """The range of both."""
        return RangeState(torch.minimum(a.minimum, b.minimum), torch.maximum(a.maximum, b.maximum))


@dataclass(frozen=True, slots=True)
class MovingAverageStatistic:
    """Exponential moving average of each tensor's least and largest value: `v + averaging_constant * (new - v)`.

    The first tensor counts in full. The order of tensors matters, so that there is no `merge`.
    """

    averaging_constant: float = 0.01
    ch_axis: int | None = None

    def init(self) -> RangeState:
        """No values yet."""
        return RangeState.unobserved()

    def update(self, state: RangeState, tensor: Tensor) -> RangeState:
        """Moved towards the range of `tensor`; an empty one changes nothing. NaN and infinity stay once seen."""
        if tensor.numel() == 0:
            return state
        new = _range(tensor, self.ch_axis)
        c = self.averaging_constant
        minimum = state.minimum + c * (new.minimum - state.minimum)
        maximum = state.maximum + c * (new.maximum - state.maximum)
        # Differences of large numbers overflow or cancel, down to a minimum above the maximum. The convex form does
        # neither, but rounds otherwise than torch.ao: only the channels that need it are computed so.
        sound = torch.isfinite(minimum) & torch.isfinite(maximum) & (minimum <= maximum)
        minimum = torch.where(sound, minimum, state.minimum * (1 - c) + new.minimum * c)
        maximum = torch.where(sound, maximum, state.maximum * (1 - c) + new.maximum * c)
        first = state.minimum > state.maximum
        return RangeState(torch.where(first, new.minimum, minimum), torch.where(first, new.maximum, maximum))


@dataclass(frozen=True, slots=True)
class HistogramStatistic:
    """A histogram over the range seen so far, whose bins are spread over the new range when it grows.

    Spreading loses where in a bin a value was, so that order matters a little and there is no `merge`.
    """

    bins: int = 2048
    upsample_rate: int = 16

    def init(self) -> HistogramState:
        """Empty bins."""
        return HistogramState(torch.zeros(self.bins), RangeState.unobserved())

    def update(self, state: HistogramState, tensor: Tensor) -> HistogramState:
        """With the values of `tensor` added; an empty one changes nothing.

        After NaN or infinity only the range is kept up, so that `state_is_finite` tells.
        """
        if tensor.numel() == 0:
            return state
        values = in_memory_order(tensor.detach()).to(torch.float32)
        old = state.range
        new = _JOIN.merge(old, _range(values, None))
        target = new.minimum.item(), new.maximum.item()
        if not all(map(math.isfinite, target)):
            return HistogramState(state.counts, new)
        counts = count(values, self.bins, *target)
        if old.observed:
            source = old.minimum.item(), old.maximum.item()
            counts = rescale(state.counts, source, target, self.upsample_rate) + counts
        return HistogramState(counts, new)


@dataclass(frozen=True, slots=True)
class NoStatistic:
    """Measures nothing, for observers whose result is known beforehand."""

    def init(self) -> NoState:
        """The only state."""
        return NoState()

    def update(self, state: NoState, tensor: Tensor) -> NoState:  # noqa: ARG002 - nothing of it is measured
        """The same state."""
        return state

    def merge(self, a: NoState, b: NoState) -> NoState:  # noqa: ARG002 - all states are equal
        """The same state."""
        return a


_JOIN = MinMaxStatistic()


def derived(measured: object, state: object, wanted: object) -> object | None:
    """What the statistic `wanted` would have found, where the state that `measured` has found tells it; None otherwise.

    >>> of_channels = MinMaxStatistic(0)
    >>> state = of_channels.update(of_channels.init(), torch.tensor([[1.0], [3.0]]))
    >>> derived(of_channels, state, MinMaxStatistic()).maximum
    tensor(3.)
    """
    if wanted != MinMaxStatistic():
        return None
    if isinstance(measured, MinMaxStatistic) and isinstance(state, RangeState):
        return RangeState(state.minimum.amin(), state.maximum.amax())
    return None if isinstance(state, RangeState) else range_in(state)


def range_in(state: object) -> RangeState | None:
    """The range that a state is or has; None for states of what measures none, and for those of a user's statistic."""
    if isinstance(state, RangeState):
        return state
    seen = getattr(state, "range", None) if type(state).__module__.startswith("qfunc.") else None
    return seen if isinstance(seen, RangeState) else None


def state_is_finite(state: object) -> bool:
    """Whether no NaN or infinity reached a `RangeState`, or a state that has one as its `range`.

    True before any tensor and for states without a range. A float64 value beyond float32 counts as infinite. Cheaper
    than a check of every tensor: calibration asks once.

    >>> s = MinMaxStatistic()
    >>> state_is_finite(s.init()), state_is_finite(s.update(s.init(), torch.tensor([1.0, math.nan])))
    (True, False)
    """
    seen = range_in(state)
    if seen is None:
        return True
    if seen.minimum.dim():
        return bool(torch.isfinite(seen.minimum).all() and torch.isfinite(seen.maximum).all())
    low, high = seen.minimum.item(), seen.maximum.item()
    return (math.isfinite(low) and math.isfinite(high)) or low > high


def finite(tensor: Tensor) -> bool:
    """Whether a tensor has neither NaN nor infinity; one pass, no copy. True for integers and for no values.

    >>> finite(torch.tensor([1.0, -3.0])), finite(torch.tensor([1.0, -math.inf]))
    (True, False)
    """
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    # NaN propagates through the minimum and the maximum, and infinity is one of them
    low, high = _extremes(tensor.detach())
    return math.isfinite(low.item()) and math.isfinite(high.item())


def clipped(tensor: Tensor) -> Tensor:
    """The tensor with infinities as its largest and least finite values and NaN as zero; itself if all is finite.

    >>> clipped(torch.tensor([1.0, math.inf, math.nan, -math.inf]))
    tensor([1., 1., 0., 0.])
    """
    if finite(tensor):
        return tensor
    if tensor.element_size() == 1:
        return clipped(tensor.to(torch.float32)).to(tensor.dtype)
    kept = torch.where(torch.isfinite(tensor), tensor, 0)
    return torch.nan_to_num(tensor, nan=0.0, posinf=kept.max().item(), neginf=kept.min().item())


def in_memory_order(tensor: Tensor) -> Tensor:
    """All values as one axis, in the order they lie in memory: a view for every dense memory format.

    Reductions are an order of magnitude faster this way on channels-last tensors.

    >>> image = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    >>> in_memory_order(image).data_ptr() == image.data_ptr()
    True
    """
    if tensor.is_contiguous():
        return tensor.view(-1)
    strides = tensor.stride()
    return tensor.permute(sorted(range(tensor.dim()), key=lambda axis: -strides[axis])).reshape(-1)


def blocks_in_memory_order(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """The values of `in_memory_order`, as views of at most `size` values, some still to be flattened by a copy.

    Whoever flattens one after the other never copies a tensor whole that is not dense.

    >>> x = torch.arange(8).view(4, 2)[:, :1]
    >>> [block.reshape(-1).tolist() for block in blocks_in_memory_order(x, 3)]
    [[0, 2, 4], [6]]
    """
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), size)
        return
    strides = tensor.stride()
    ordered = tensor.permute(sorted(range(tensor.dim()), key=lambda axis: -strides[axis]))
    yield from _blocks(ordered, size)


def _blocks(tensor: Tensor, size: int) -> Iterator[Tensor]:
    """The values in the order of the axes, which are at least one."""
    row = math.prod(tensor.shape[1:])
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), size)
    elif row <= size:
        yield from torch.split(tensor, max(size // row, 1))
    else:
        for part in tensor:
            yield from _blocks(part, size)


def _extremes(data: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest of all values, of which there are some, in new memory."""
    data = _comparable(data)
    if data.is_contiguous() or data.numel() <= _COPIED:
        return torch.aminmax(in_memory_order(data))
    blocks = [torch.aminmax(in_memory_order(block)) for block in blocks_in_memory_order(data, _COPIED)]
    lows, highs = zip(*blocks, strict=True)
    return torch.stack(lows).amin(), torch.stack(highs).amax()


def extremes(tensor: Tensor) -> tuple[float, float]:
    """The least and the largest value as float32 has them, of a tensor that is not empty; NaN where there is NaN.

    >>> extremes(torch.tensor([1.5, -2.0]))
    (-2.0, 1.5)
    """
    low, high = _extremes(tensor.detach())
    return low.to(torch.float32).item(), high.to(torch.float32).item()


def _comparable(data: Tensor) -> Tensor:
    """In a type that torch compares: it has no order of 8-bit floats."""
    return data.to(torch.float32) if data.is_floating_point() and data.element_size() == 1 else data


def _range(tensor: Tensor, ch_axis: int | None) -> RangeState:
    """The range of a tensor that is not empty, in new memory."""
    data = _comparable(tensor.detach())
    if ch_axis is None:
        low, high = _extremes(data)
    else:
        # two reductions over several axes are far faster than one aminmax over a flattened copy
        others = [axis for axis in range(data.dim()) if axis != ch_axis]
        low, high = (data.amin(others), data.amax(others)) if others else (data.clone(), data.clone())
    return RangeState(low.to(torch.float32), high.to(torch.float32))
