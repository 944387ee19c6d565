"""A histogram on a fixed dyadic grid, whose states join exactly.

Value x lies in the bin of index `trunc(x / 2**exponent)`, rounded toward zero: bin 0 holds the values between
`-2**exponent` and `2**exponent` and is of double width, every other bin is `2**exponent` wide. Since truncation twice
is truncation once,

    trunc(x / 2**(e + d)) = trunc(trunc(x / 2**e) / 2**d)

counts at a coarser exponent are exactly those that the data would have given. The exponent is the least one, of at
least -149, for which the window of indexes from that of min(minimum, 0) to that of max(maximum, 0) has at most `bins`
bins. It depends on the range alone, so that a state depends on nothing but which values were seen, how often each.

A float32 has no digit below 2**-149, and multiplying by a power of two rounds only what becomes subnormal, which is
truncated to zero either way: indexes are exact.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from qfunc.numerics.qparams import same_values
from qfunc.numerics.statistic import MinMaxStatistic, RangeState, blocks_in_memory_order, extremes

LEAST_EXPONENT = -149
"""That of the least float32."""

_BLOCK = 1 << 17
"""How many values are counted at a time: few enough to stay in the cache between the operations."""

_JOIN = MinMaxStatistic()


@dataclass(frozen=True, slots=True, eq=False)
class ExactHistogramState:  # noqa: PLW1641 - compared, never a key
    """How many values lie in each bin, int64 of shape `(window,)`, and the exact range of the values.

    `counts[i]` is that of the bin with index `first + i`. Before any value, and once NaN or infinity was seen, there is
    one empty bin.
    """

    counts: Tensor
    exponent: int
    range: RangeState

    @property
    def first(self) -> int:
        """The index of the first bin, at most 0."""
        return math.trunc(math.ldexp(_bounds(self.range)[0], -self.exponent))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExactHistogramState):
            return NotImplemented
        return self.range == other.range and self.exponent == other.exponent and same_values(self.counts, other.counts)


@dataclass(frozen=True, slots=True)
class ExactHistogramStatistic:
    """How often the values fall in each of at most `bins` bins of a dyadic grid, which are 2 to 32768.

    The state depends on the values alone, bit for bit: not on how they are split over tensors, ordered in them or laid
    out in memory, nor on the number of threads; `merge` is exact. It takes at most `8 * bins` bytes.

    With a `stride`, only every stride-th value of a tensor is counted, in the order in which they lie in memory, from
    the first on; the range is still that of all values. Then the same tensors still give the same state, in whatever
    order and merged in whatever way, but other splits of the values, and other memory formats, count others of them.

    >>> s = ExactHistogramStatistic(bins=8)
    >>> state = s.update(s.init(), torch.tensor([-1.0, 0.5, 1.5, 2.5, 2.75]))
    >>> state.first, state.exponent, state.counts
    (-2, -1, tensor([1, 0, 0, 1, 0, 1, 0, 2]))
    >>> s.merge(state, state) == s.update(state, torch.tensor([0.5, 1.5, -1.0, 2.75, 2.5]))
    True
    """

    bins: int = 4096
    stride: int = 1

    def init(self) -> ExactHistogramState:
        """No values yet: the unit of `merge`."""
        return _empty(RangeState.unobserved())

    def update(self, state: ExactHistogramState, tensor: Tensor) -> ExactHistogramState:
        """With the values of `tensor` counted, as float32; an empty one changes nothing.

        After NaN or infinity only the range is kept up, so that `state_is_finite` tells.
        """
        if tensor.numel() == 0:
            return state
        low, high = extremes(tensor)
        least, largest = state.range.minimum.item(), state.range.maximum.item()
        if -math.inf < least <= low and high <= largest < math.inf:
            # no new bins: the usual case, once some data was seen
            counts = state.counts + _counted(tensor.detach(), self.stride, state)
            return ExactHistogramState(counts, state.exponent, state.range)
        seen = RangeState(torch.tensor(low), torch.tensor(high))
        joined = _with_range(self.bins, _joined(state.range, seen), (state,))
        if _finite(joined.range):
            joined.counts.add_(_counted(tensor.detach(), self.stride, joined))
        return joined

    def merge(self, a: ExactHistogramState, b: ExactHistogramState) -> ExactHistogramState:
        """The state after all tensors of both; exact."""
        return _with_range(self.bins, _joined(a.range, b.range), (a, b))


def _empty(seen: RangeState) -> ExactHistogramState:
    return ExactHistogramState(torch.zeros(1, dtype=torch.int64), LEAST_EXPONENT, seen)


def _joined(a: RangeState, b: RangeState) -> RangeState:
    both = _JOIN.merge(a, b)
    # adding zero makes -0.0 zero: which of them is the least of both depends on the order
    return RangeState(both.minimum + 0.0, both.maximum + 0.0)


def _finite(seen: RangeState) -> bool:
    return math.isfinite(seen.minimum.item()) and math.isfinite(seen.maximum.item())


def _bounds(seen: RangeState) -> tuple[float, float]:
    """The range with zero; zeros where there is none."""
    return (min(seen.minimum.item(), 0.0), max(seen.maximum.item(), 0.0)) if _finite(seen) else (0.0, 0.0)


def _exponent(low: float, high: float, bins: int) -> int:
    """The least exponent at which the window of `[low, high]`, which holds zero, has at most `bins` bins."""
    if low == high:
        return LEAST_EXPONENT
    # (high - low) / 2**exponent is less than bins + 1, so that none below this one will do
    exponent = max(math.frexp(high - low)[1] - 1 - bins.bit_length(), LEAST_EXPONENT)
    while math.trunc(math.ldexp(high, -exponent)) - math.trunc(math.ldexp(low, -exponent)) >= bins:
        exponent += 1
    return exponent


def _with_range(bins: int, seen: RangeState, states: Iterable[ExactHistogramState]) -> ExactHistogramState:
    """The counts of some states over `seen`, which contains their ranges; in new memory."""
    if not _finite(seen):
        return _empty(seen)
    low, high = _bounds(seen)
    exponent = _exponent(low, high, bins)
    first, last = (math.trunc(math.ldexp(bound, -exponent)) for bound in (low, high))
    counts = torch.zeros(last - first + 1, dtype=torch.int64)
    for state in states:
        shift = exponent - state.exponent
        index = torch.arange(state.first, state.first + state.counts.numel())
        if shift:
            # beyond 2**32 there is no index but 0
            index = index.div_(1 << min(shift, 32), rounding_mode="trunc")
        counts.index_add_(0, index.sub_(first), state.counts)
    return ExactHistogramState(counts, exponent, seen)


def _counted(tensor: Tensor, stride: int, state: ExactHistogramState) -> Tensor:
    """How many of every stride-th value of a tensor, all of which lie in the range of a state, are in each bin."""
    first, bins = state.first, state.counts.numel()
    total = torch.zeros(bins, dtype=torch.int64)
    scales = _scales(state.exponent)
    seen = 0
    for block in blocks_in_memory_order(tensor, _BLOCK * min(stride, 4)):
        places = block.reshape(-1)[-seen % stride :: stride].to(torch.float32)
        for scale in scales:
            places = places * scale
        total += torch.bincount(places.to(torch.int16).sub_(first), minlength=bins)
        seen += block.numel()
    return total


def _scales(exponent: int) -> tuple[float, ...]:
    """Normal float32 powers of two whose product is `2**-exponent`."""
    if -126 <= -exponent <= 127:
        return (math.ldexp(1.0, -exponent),)
    half = exponent // 2
    return math.ldexp(1.0, -half), math.ldexp(1.0, half - exponent)
