"""Which part of a measured range to quantize: pure functions of an exact histogram.

All give `(low, high)`, float32 of shape `()`, within the exact range of the values. Bin 0 of the histogram is of double
width; values are taken to be spread evenly in their bins.

`percentile_range` cuts off a share of the values: `(100 - percentile) / 2` per cent at each end, or the largest
`100 - percentile` per cent of |x| for symmetric schemes.

`least_error_range` looks for the least expected squared error

    sum over bins of count * ((dq(q(centre)) - centre)**2 + width**2 / 12) / sum of counts

with scale and zero point as `qparams_of_range` gives them for the candidate. Candidates scale both ends of the range
by one factor, from coarse to fine; where both signs are quantized freely, each end is then scaled in turn, and zero
points near by are tried.

`least_divergence_range` looks for the least Kullback-Leibler divergence, as in Szymon Migacz, "8-bit Inference with
TensorRT", GPU Technology Conference 2017. For a window of bins and n levels

    P = the counts in the window, those outside of it added to its first and last bin, divided by their sum
    Q = the counts in the window without those outside, summed over n cells (bin j of w lies in cell floor(j * n / w)),
        each sum spread evenly over the bins of the cell that are not empty in P, divided by the sum of all
    divergence = sum over bins with P > 0 of P * log(P / Q)

A window has an infinite divergence where one of its end cells holds nothing but counts from outside. For symmetric
schemes the histogram is that of |x| and n half of the levels; otherwise both ends are scaled by one factor. Zero is
exact whatever the range, so that a spike of zeros, as after ReLU, says nothing about it: bin 0 counts no more than its
neighbours do, as in NVIDIA's pytorch-quantization. The measure is meant for values that gather about zero; where
several ranges hold many values each, it can take to the nearest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from qfunc.numerics.exact_histogram import ExactHistogramState
from qfunc.numerics.qparams import QParams, QuantSpec, qparams_of_range

_Factors: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""By what each end of the range is scaled and the error of it, float64 of shape `(1,)`."""

_ELEMENTS = 1 << 16
"""How many pairs of a candidate and a bin are judged at a time."""

_REFINED = 17
"""How many factors are tried between the neighbours of the best one."""

_WINDOWS = 1024
"""How many factors the search by divergence tries."""

_SAME = 1e-12
"""Divergences that differ by no more are equal: rounding makes such."""


def percentile_range(state: ExactHistogramState, percentile: float, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The part that holds `percentile` per cent of the values; with 100 exactly the range of all.

    >>> from qfunc.numerics.exact_histogram import ExactHistogramStatistic
    >>> s = ExactHistogramStatistic()
    >>> low, high = percentile_range(s.update(s.init(), torch.linspace(0, 100, 10001)), 98.0, False)
    >>> round(low.item(), 1), round(high.item(), 1)
    (1.0, 99.0)
    """
    if percentile == 100 or state.counts.numel() == 1:
        return state.range.minimum, state.range.maximum
    least, largest = state.range.minimum.item(), state.range.maximum.item()
    if symmetric:
        counts = _folded(state)
        edges = torch.arange(counts.numel() + 1, dtype=torch.float64) * 2.0**state.exponent
        bound = _quantile(counts, edges.clamp(max=max(-least, largest)), percentile / 100)
        return _within(state, -bound, bound)
    edges = torch.arange(state.first, state.first + state.counts.numel() + 1, dtype=torch.float64)
    # bin 0 and those below it begin one further down
    edges = torch.where(edges <= 0, edges - 1, edges) * 2.0**state.exponent
    edges, cut = edges.clamp(least, largest), (100 - percentile) / 200
    return _within(state, _quantile(state.counts, edges, cut), _quantile(state.counts, edges, 1 - cut))


def _quantile(counts: Tensor, edges: Tensor, share: float) -> float:
    """The value below which a share in (0, 1] of the mass lies."""
    mass = counts.to(torch.float64).cumsum(0)
    target = mass[-1] * share
    # the last bin that holds anything is the last resort against rounding
    place = min(int(torch.searchsorted(mass, target)), int(counts.nonzero()[-1]))
    inside = 1 - ((mass[place] - target) / counts[place]).clamp(0, 1)
    return (edges[place] + inside * (edges[place + 1] - edges[place])).item()


def expected_error(state: ExactHistogramState, spec: QuantSpec, low: Tensor, high: Tensor) -> Tensor:
    """The mean squared error of quantizing the values for each range, by the formula above; float64, as `low`'s shape.

    `low` and `high` have shape `(candidates,)`. Centres are kept within the range of the values.

    >>> from qfunc.numerics.exact_histogram import ExactHistogramStatistic
    >>> from qfunc.numerics.qparams import UINT8
    >>> s = ExactHistogramStatistic()
    >>> state = s.update(s.init(), torch.linspace(0, 255, 100_000))
    >>> expected_error(state, UINT8, torch.tensor([0.0, 0.0]), torch.tensor([255.0, 127.0])).round(decimals=2)
    tensor([8.0000e-02, 2.7414e+03], dtype=torch.float64)
    """
    unit = 2.0**state.exponent
    filled = state.counts.nonzero()[:, 0]
    index = (filled + state.first).to(torch.float64)
    share = state.counts[filled].to(torch.float64) / state.counts.sum()
    bounds = (bound.to(torch.float64) / unit for bound in (state.range.minimum, state.range.maximum))
    centres = (index + 0.5 * index.sign()).clamp(*bounds)
    spread = (1.0 + 3.0 * share[index == 0].sum()) / 12
    qparams = qparams_of_range(low, high, spec)
    scale = (qparams.scale.to(torch.float64) / unit)[:, None]
    least, largest = (limit - qparams.zero_point[:, None] for limit in (spec.quant_min, spec.quant_max))
    size = max(_ELEMENTS // centres.numel(), 1)
    errors = []
    parts = (torch.split(part, size) for part in (scale, least, largest))
    for step, first, last in zip(*parts, strict=True):
        codes = (centres / step).round_().clamp_(first, last)
        errors.append(codes.mul_(step).sub_(centres).square_() @ share)
    return (torch.cat(errors) + spread) * unit * unit


def least_error_range(state: ExactHistogramState, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The part whose quantization has the least expected squared error; never more than that of the whole range.

    Where the bins are not finer than the steps of the whole range (16 bits, say), it is the whole range.

    A valid spec of a per-tensor scheme is assumed, here and below.

    >>> from qfunc.numerics.exact_histogram import ExactHistogramStatistic
    >>> s = ExactHistogramStatistic()
    >>> state = s.update(s.init(), torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([1.5])]))
    >>> low, high = least_error_range(state, QuantSpec("uint8", 0, 15))
    >>> low.item(), high.item() < 1.1
    (0.0, True)
    """
    least, largest = state.range.minimum, state.range.maximum
    if state.counts.numel() == 1 or _coarse(state, spec):
        return least, largest
    low, high = least.item(), largest.item()
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.symmetric:
        low, high = min(low, -high), max(high, -low)

    def ends(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        parts = (a * low).to(torch.float32), (b * high).to(torch.float32)
        return parts[0].clamp(least, largest), parts[1].clamp(least, largest)

    def error(a: Tensor, b: Tensor) -> Tensor:
        return expected_error(state, spec, *ends(a, b))

    one = torch.ones(1, dtype=torch.float64)
    best = _scan(error, (one, one, error(one, one)), (True, True))
    if low < 0 < high and not spec.symmetric:
        for _ in range(2):
            for moves in ((False, True), (True, False)):
                best = _scan(error, best, moves)
            qparams = qparams_of_range(*ends(*best[:2]), spec)
            a, b = _shifted(qparams, low, high)
            best = _least(best, a, b, error(a, b))
    low_end, high_end = ends(*best[:2])
    return low_end[0], high_end[0]


def _coarse(state: ExactHistogramState, spec: QuantSpec) -> bool:
    """Whether bins are as wide as the steps of the whole range, so that they cannot tell what clipping would cost."""
    scale = qparams_of_range(state.range.minimum, state.range.maximum, spec).scale.item()
    return scale <= math.ldexp(1.0, state.exponent)


def _scan(error: Callable[[Tensor, Tensor], Tensor], best: _Factors, moves: tuple[bool, bool]) -> _Factors:
    """The best factors when one end or both move, from all magnitudes to the neighbourhood of the best of these."""
    factors, start = _factors(), best[:2]
    for _ in range(3):
        a, b = (factors if moved else old.expand_as(factors) for moved, old in zip(moves, start, strict=True))
        errors = error(a, b)
        place = int(errors.argmin())
        best = _least(best, a, b, errors)
        around = factors[max(place - 1, 0)].item(), factors[min(place + 1, factors.numel() - 1)].item()
        factors = torch.linspace(*around, _REFINED, dtype=torch.float64)
    return best


def _least(best: _Factors, a: Tensor, b: Tensor, errors: Tensor) -> _Factors:
    """The best of the new factors if they are better, else the old ones."""
    place = int(errors.argmin())
    one = slice(place, place + 1)
    return (a[one], b[one], errors[one]) if errors[place] < best[2] else best


def _factors() -> Tensor:
    """Factors from 2**-12 to 1, dense near 1 and of all magnitudes."""
    even = torch.linspace(0, 1, 33, dtype=torch.float64)[1:]
    return torch.cat([even, 2.0 ** (-torch.arange(4, 72, dtype=torch.float64) / 6)]).sort().values


def _shifted(qparams: QParams, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The factors of ranges with a zero point near by and a scale about the same.

    Zero points are rounded: with few levels, moving one end at a time does not get from one to the next.
    """
    spec = qparams.spec
    zero = (qparams.zero_point + torch.arange(-2, 3)).clamp(spec.quant_min, spec.quant_max)
    scale = qparams.scale.to(torch.float64) * torch.linspace(0.75, 1.25, 17, dtype=torch.float64)[:, None]
    a, b = (zero - spec.quant_min) * scale / -low, (spec.quant_max - zero) * scale / high
    return a.clamp(max=1).view(-1), b.clamp(max=1).view(-1)


def least_divergence_range(state: ExactHistogramState, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The part whose distribution diverges least from its quantized one; all of it where no window has enough bins.

    >>> from qfunc.numerics.exact_histogram import ExactHistogramStatistic
    >>> from qfunc.numerics.qparams import UINT8
    >>> s = ExactHistogramStatistic()
    >>> normal = torch.special.ndtri(torch.linspace(1e-6, 1 - 1e-6, 100_001))
    >>> low, high = least_divergence_range(s.update(s.init(), torch.cat([normal, torch.tensor([-60.0, 60.0])])), UINT8)
    >>> high.item()
    4.25
    """
    levels = spec.quant_max - spec.quant_min + 1
    counts, first = (_folded(state), 0) if spec.symmetric else (state.counts, state.first)
    if spec.symmetric:
        levels = (levels + 1) // 2
    counts = without_spike(counts, -first)
    windows = candidate_windows(first, counts.numel(), levels)
    if windows.numel() == 0 or not counts.any():
        return state.range.minimum, state.range.maximum
    parts = torch.split(windows, max(_ELEMENTS // levels, 1))
    found = torch.cat([divergence(counts, part, levels) for part in parts])
    start, end = windows[int((found <= found.min() + _SAME).nonzero()[0])].tolist()
    unit = 2.0**state.exponent
    bound = (first + end) * unit
    return _within(state, -bound if spec.symmetric else (first + start - 1) * unit, bound)


def candidate_windows(first: int, bins: int, levels: int) -> Tensor:
    """The windows `(start, end)`, end excluded, that the search by divergence tries: int64, shape `(windows, 2)`.

    Both ends of a histogram whose first bin has the index `first` come nearer to bin 0 from window to window; each has
    at least as many bins as there are levels.

    >>> candidate_windows(-2, 7, 4)
    tensor([[0, 7],
            [1, 6],
            [1, 5]])
    """
    k = torch.arange(_WINDOWS, 0, -1)
    start, end = -first - (-first * k) // _WINDOWS, -first + ((first + bins - 1) * k) // _WINDOWS + 1
    windows = torch.stack([start, end], 1)
    new = windows.diff(dim=0, prepend=windows.new_full((1, 2), -1)).any(1)
    return windows[new & (end - start >= max(levels, 2))]


def without_spike(counts: Tensor, zero: int) -> Tensor:
    """The counts with no more at place `zero` than in the bins beside it, which together are as wide.

    >>> without_spike(torch.tensor([1, 2, 50, 4]), 2)
    tensor([1, 2, 6, 4])
    """
    beside = counts[max(zero - 1, 0) : zero + 2].sum() - counts[zero]
    counts = counts.clone()
    counts[zero] = torch.minimum(counts[zero], beside)
    return counts


def divergence(counts: Tensor, windows: Tensor, levels: int) -> Tensor:
    """The divergence of each window, by the formula above: float64, shape `(windows,)`.

    >>> divergence(torch.tensor([3, 3, 5, 5, 0, 1]), torch.tensor([[0, 6], [0, 4]]), 2).round(decimals=4)
    tensor([0.1060, 0.0037], dtype=torch.float64)
    """
    mass = counts.to(torch.float64)
    sums, filled, entropies = (_running(part) for part in (mass, (mass > 0).to(torch.float64), torch.xlogy(mass, mass)))
    start, end = windows[:, :1], windows[:, 1:]
    bounds = start + (torch.arange(levels + 1) * (end - start) + levels - 1) // levels
    inside, occupied = sums[bounds].diff(dim=1), filled[bounds].diff(dim=1)
    reference, entropy = inside.clone(), (entropies[end] - entropies[start])[:, 0]
    for cell, place, outside in ((0, start[:, 0], sums[start[:, 0]]), (-1, end[:, 0] - 1, sums[-1] - sums[end[:, 0]])):
        own, both = mass[place], mass[place] + outside
        reference[:, cell] += outside
        occupied[:, cell] += ((own == 0) & (both > 0)).to(torch.float64)
        entropy += torch.xlogy(both, both) - torch.xlogy(own, own)
    # a cell without bins has no reference either, and 0 * log(0) is 0
    quantized = inside / occupied.clamp(min=1) / inside.sum(1, keepdim=True).clamp(min=1)
    return (entropy - torch.xlogy(reference, quantized).sum(1)) / sums[-1] - sums[-1].log()


def _running(values: Tensor) -> Tensor:
    """The sum of all values before each place, and of all."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _folded(state: ExactHistogramState) -> Tensor:
    """The counts of |x|: int64, from bin 0 on."""
    zero = -state.first
    above, below = state.counts[zero:], state.counts[:zero].flip(0)
    folded = torch.zeros(max(above.numel(), below.numel() + 1), dtype=torch.int64)
    folded[: above.numel()] += above
    folded[1 : below.numel() + 1] += below
    return folded


def _within(state: ExactHistogramState, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The part of the range of the values that lies between two bounds."""
    least, largest = state.range.minimum.item(), state.range.maximum.item()
    low, high = (min(max(bound, least), largest) for bound in (low, high))
    return torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
