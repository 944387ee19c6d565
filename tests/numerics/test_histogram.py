import itertools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qfunc.numerics.histogram import best_range, count, rescale

single = st.floats(width=32, allow_nan=False, allow_infinity=False)
BIG = torch.finfo(torch.float32).max


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 100, 2048]), st.floats(-8, 8), st.booleans())
def test_counts_equal_those_of_histc(seed, bins, exponent, wider):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3000, generator=g) * 10**exponent
    low, high = x.min().item(), x.max().item()
    if wider:
        low, high = (torch.tensor([low, high]) * 3).tolist()
    assert torch.equal(count(x, bins, low, high), torch.histc(x, bins, low, high))


def test_counts_of_more_values_than_are_binned_at_a_time():
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    low, high = x.min().item(), x.max().item()
    assert torch.equal(count(x, 2048, low, high), torch.histc(x, 2048, low, high))


@given(st.lists(single, min_size=1, max_size=20))
@example([-BIG, BIG, 0.0])
@example([0.0, 1e-45])
@example([1.0, 1.0])
def test_every_value_is_counted_whatever_the_range(data):
    x = torch.tensor(data)
    assert count(x, 64, x.min().item(), x.max().item()).sum().item() == len(data)


def test_an_overflowing_range_is_counted_in_its_bins():
    assert count(torch.tensor([-BIG, 0.0, BIG]), 4, -BIG, BIG).tolist() == [1, 0, 1, 1]


@given(st.lists(single, min_size=1, max_size=9), st.lists(single, min_size=1, max_size=9))
@example([1.0, 1.0], [1.0000001])
@example([-BIG], [BIG, 1.0])
def test_rescaling_keeps_the_mass(first, more):
    x = torch.tensor(first)
    source, target = (x.min().item(), x.max().item()), (min(first + more), max(first + more))
    moved = rescale(count(x, 64, *source), source, target, 16)
    assert moved.sum().item() == pytest.approx(len(first), rel=1e-5)
    assert (moved >= 0).all()


def test_rescaling_moves_mass_by_less_than_a_bin():
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    source, target = (x.min().item(), x.max().item()), (-0.7, 1.9)
    moved = rescale(count(x, 512, *source), source, target, 16).cumsum(0)
    direct = count(x, 512, *target).cumsum(0)
    assert (moved[1:] >= direct[:-1] - 1).all()
    assert (moved[:-1] <= direct[1:] + 1).all()


def error_of(counts, start, end, levels, points=40):
    """The squared error by summing over points within each bin, in units of a bin: an oracle for the closed form."""
    offsets = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    x = torch.arange(counts.numel(), dtype=torch.float64)[:, None] + offsets - start
    cell = (end - start + 1) / levels
    middle = (torch.floor(x / cell).clamp(0, levels - 1) + 0.5) * cell
    return (((x - middle) ** 2).mean(1) * counts).sum().item()


def searched(counts, levels):
    """The search as it is told: one quantile step after the other, errors by `error_of`."""
    mass, total = counts.double().cumsum(0), counts.sum().item()
    start, end = 0, counts.numel() - 1
    alpha, beta, least = 0.0, 1.0, float("inf")
    while alpha < beta:
        left = next((i for i in range(start, end) if mass[i] >= (alpha + 1e-5) * total), end)
        right = next((i for i in range(end, start, -1) if mass[i] <= (beta - 1e-5) * total), start)
        before = start, end
        if left - start > end - right:
            alpha, start = alpha + 1e-5, left
        else:
            beta, end = beta - 1e-5, right
        if (start, end) == before:
            continue
        error = error_of(counts, start, end, levels)
        if error > least:
            return before
        least = error
    return start, end


@pytest.mark.parametrize(("seed", "kind"), list(itertools.product(range(3), ("normal", "tail", "two sides"))))
def test_the_search_finds_what_its_definition_finds(seed, kind):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(20_000, generator=g)
    x = {"normal": x, "tail": x.abs() ** 3, "two sides": x**3}[kind]
    bins, low, high = 128, x.min().item(), x.max().item()
    counts = count(x, bins, low, high)
    start, end = searched(counts, 16)
    found = best_range(counts, low, high, 16)
    width = (high - low) / bins
    # a bin of slack: the oracle samples what the search integrates
    assert abs(found[0].item() - (low + start * width)) <= 1.01 * width
    assert abs(found[1].item() - (low + (end + 1) * width)) <= 1.01 * width


@pytest.mark.parametrize("exponent", [-120, -60, -30, 30, 60, 120])
def test_the_search_does_not_depend_on_the_unit(exponent):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) ** 3
    low, high = x.min().item(), x.max().item()
    counts, unit = count(x, 2048, low, high), 2.0**exponent
    assert torch.equal(count(x * unit, 2048, low * unit, high * unit), counts)
    small, large = best_range(counts, low, high, 256)
    assert (small.item(), large.item()) != (low, high)
    scaled = best_range(counts, low * unit, high * unit, 256)
    assert [bound.item() / unit for bound in scaled] == [small.item(), large.item()]


def test_the_range_of_equal_values_is_that_value():
    low, high = best_range(count(torch.full((7,), 3.0), 8, 3.0, 3.0), 3.0, 3.0, 256)
    assert low.item() == high.item() == 3.0
