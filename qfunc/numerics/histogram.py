"""Histograms over a growing range, and the search for the part of it that is best to quantize.

A histogram has `bins` equal bins over `[minimum, maximum]`; within a bin, values are taken to be spread evenly.

Growing. Each old bin is cut into `upsample_rate` equal parts, and the mass of a part goes to the new bin that holds its
middle.

Search. Let the part of the range that is kept be the bins `start..end`, and let `levels` equal cells cover it; each
value moves to the middle of its cell, values outside to the middle of the nearest cell. For evenly spread values the
squared error of a source bin is an integral of x**2 with a closed form, the sum of (end**3 - begin**3) / 3 over the
cells that it meets. Two quantile bounds, alpha from 0 up and beta from 1 down, advance in steps of 1e-5; in each step,
the one that would drop more bins does. The search ends before the first part whose error is larger than that of the
part before it.

The counts and errors are computed in float32, in the order of torch.ao, because both must stop at the same bin. Only
powers of two are factored out, which changes no digit but keeps the cubes from overflowing or vanishing: torch.ao
compares NaN or zeros where the range is above about 1e12 or below 1e-9.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from itertools import islice

import torch
from torch import Tensor

_STEP = 1e-5
"""How far a quantile bound advances at a time."""

_ELEMENTS = 1 << 17
"""How many values are binned at a time: few enough to stay in the cache between the operations."""

_CANDIDATES = 8
"""How many candidate ranges are judged at a time."""


def count(values: Tensor, bins: int, minimum: float, maximum: float) -> Tensor:
    """How many values lie in each of `bins` equal bins over `[minimum, maximum]`: float32, shape `(bins,)`.

    `values` is a float32 tensor of one axis that lies within the bounds, which are finite float32 numbers. The last
    bin holds its upper edge. Equal to `torch.histc`, several times as fast. If the bounds are equal, all is in the
    middle bin.

    >>> count(torch.tensor([0.0, 0.1, 0.5, 1.0]), 4, 0.0, 1.0)
    tensor([2., 0., 1., 1.])
    """
    if minimum == maximum:
        counts = torch.zeros(bins)
        counts[bins // 2] = values.numel()
        return counts
    unit = _unit(minimum, maximum)
    low, width = minimum * unit, _float32(maximum * unit - minimum * unit)
    total = torch.zeros(bins, dtype=torch.int64)
    for part in torch.split(values, _ELEMENTS):
        place = (part if unit == 1.0 else part * unit) - low
        index = place.mul_(bins).div_(width).to(torch.int32).clamp_(max=bins - 1)
        total += torch.bincount(index, minlength=bins)
    return total.to(torch.float32)


def rescale(counts: Tensor, source: tuple[float, float], target: tuple[float, float], upsample_rate: int) -> Tensor:
    """The histogram `counts` over `source`, as one over `target`, which contains `source`. The total stays.

    >>> rescale(torch.tensor([4.0, 8.0]), (0.0, 1.0), (-1.0, 1.0), 16)
    tensor([ 0., 12.])
    """
    bins = counts.numel()
    if source == target:
        return counts
    if source[0] == source[1]:
        return count(torch.tensor([source[0]]), bins, *target) * counts.sum()
    unit = _unit(*target)
    low, high = (bound * unit for bound in source)
    parts = bins * upsample_rate
    half_part = 0.5 * (torch.tensor(high) - torch.tensor(low)) / parts
    middles = torch.linspace(low, high, parts + 1)[:-1] + half_part
    edges = torch.linspace(target[0] * unit, target[1] * unit, bins + 1)
    # Both are sorted, so that looking up the few edges among the many middles replaces the opposite. cummax: where
    # the range is a few float32 steps wide, linspace is not quite sorted.
    cuts = torch.searchsorted(middles, edges[1:-1]).cummax(0).values
    lengths = torch.diff(cuts, prepend=cuts.new_zeros(1), append=cuts.new_full((1,), parts))
    index = torch.repeat_interleave(torch.arange(bins), lengths)
    return torch.bincount(index, counts.repeat_interleave(upsample_rate) / upsample_rate, minlength=bins)


def best_range(counts: Tensor, minimum: float, maximum: float, levels: int) -> tuple[Tensor, Tensor]:
    """The part of `[minimum, maximum]` that is best to quantize with `levels` levels, by the search above.

    >>> low, high = best_range(torch.tensor([900.0, 100.0] + [0.0] * 1021 + [1.0]), 0.0, 1024.0, 256)
    >>> low.item(), high.item() < 1024
    (0.0, True)
    """
    if minimum == maximum:
        return torch.tensor(minimum), torch.tensor(maximum)
    bins = counts.numel()
    unit = _unit(minimum, maximum)
    start, end = _search(counts, (maximum - minimum) / bins, levels)
    low, high = torch.tensor(minimum * unit), torch.tensor(maximum * unit)
    width = (high - low) / bins
    return (low + width * start) / unit, (low + width * (end + 1)) / unit


def _search(counts: Tensor, width: float, levels: int) -> tuple[int, int]:
    """The part of the bins to keep; `width` is that of a bin."""
    mantissa, _ = math.frexp(width)
    candidates = _candidates(counts)
    kept, least = (0, counts.numel() - 1), math.inf
    while chunk := tuple(islice(candidates, _CANDIDATES)):
        errors: list[float] = _errors(counts, mantissa, levels, chunk).tolist()
        for candidate, error in zip(chunk, errors, strict=True):
            if error > least:
                return kept
            kept, least = candidate, error
    return kept


def _candidates(counts: Tensor) -> Iterator[tuple[int, int]]:
    """The ever smaller parts `(start, end)` that the quantile bounds pass through, the whole range excepted."""
    alpha, beta, drops_left, drops_right = _quantile_steps(counts)
    start, end = 0, counts.numel() - 1
    left, right = start, end
    a = b = 0
    while start < end:
        while left < end and drops_left[left] <= a + 1:
            left += 1
        if left == start:
            # only beta can advance: on to the step in which it drops a bin
            b = max(b, drops_right[end] - 1)
        if b >= beta.numel() or alpha[a] >= beta[b]:
            return
        while right > start and drops_right[right] <= b + 1:
            right -= 1
        if left - start > end - right:
            a, start = a + 1, left
        else:
            b, end = b + 1, right
        left, right = min(max(left, start), end), max(min(right, end), start)
        yield start, end


def _quantile_steps(counts: Tensor) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Alpha and beta after each number of steps, and the step from which on each bin lies outside of alpha, of beta."""
    alpha, beta = _bounds()
    mass, total = counts.cumsum(0), counts.sum().item()
    drops_left: list[int] = torch.searchsorted((alpha * total).to(torch.float32), mass, right=True).tolist()
    drops_right: list[int] = torch.searchsorted((beta * -total).to(torch.float32), -mass, right=True).tolist()
    return alpha, beta, drops_left, drops_right


@cache
def _bounds() -> tuple[Tensor, Tensor]:
    """Alpha and beta after each number of steps, summed up step by step; the same for every histogram."""
    steps = torch.full((round(1 / _STEP) + 2,), _STEP, dtype=torch.float64)
    steps[0] = 0
    alpha = steps.cumsum(0)
    steps.neg_()[0] = 1
    return alpha, steps.cumsum(0)


def _errors(counts: Tensor, width: float, levels: int, parts: tuple[tuple[int, int], ...]) -> Tensor:
    """The squared error of each part when its bins are quantized to `levels` cells; `width` is that of a bin."""
    bounds = torch.tensor(parts)
    starts, ends = bounds[:, :1], bounds[:, 1:]
    cell = (width * (ends - starts + 1).to(torch.float64) / levels).to(torch.float32)
    half = cell / 2
    begin = (torch.arange(counts.numel()) - starts).to(torch.float32) * width
    end = begin + width
    first = torch.div(begin, cell, rounding_mode="floor").clamp_(0, levels - 1)
    last = torch.div(end, cell, rounding_mode="floor").clamp_(0, levels - 1)
    density = counts / width
    head = density * _second_moment(begin - (first + 0.5) * cell, half)
    whole = (last - first - 1) * (density * _second_moment(-half, half))
    tail = density * _second_moment(-half, end - (last * cell + half))
    return (head + whole + tail).sum(1)


def _second_moment(begin: Tensor, end: Tensor) -> Tensor:
    """The integral of x**2 from `begin` to `end`."""
    return (end * end * end - begin * begin * begin) / 3


def _unit(minimum: float, maximum: float) -> float:
    """A power of two that brings a range to a width that float32 can divide and multiply by a number of bins."""
    exponent = math.frexp(maximum - minimum)[1]
    return 1.0 if abs(exponent) < 100 else 2.0 ** max(min(-exponent, 100), -100)


def _float32(value: float) -> float:
    """The float32 nearest to `value`."""
    return torch.tensor(value, dtype=torch.float32).item()
