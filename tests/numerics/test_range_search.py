import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qfunc.numerics.affine import fake_quantize
from qfunc.numerics.exact_histogram import ExactHistogramStatistic
from qfunc.numerics.observers import MinMax
from qfunc.numerics.qparams import INT8, INT8_SYMMETRIC, UINT8, QuantSpec, qparams_of_range
from qfunc.numerics.range_search import (
    candidate_windows,
    divergence,
    expected_error,
    least_divergence_range,
    least_error_range,
    percentile_range,
    without_spike,
)
from qfunc.numerics.search_observers import Entropy, MeanSquaredError, Percentile

INT4 = QuantSpec("int8", -8, 7)
UINT8_SYMMETRIC = QuantSpec(qscheme="per_tensor_symmetric")
INT16 = QuantSpec("int16", -(2**15), 2**15 - 1)
SPECS = (UINT8, INT8_SYMMETRIC, UINT8_SYMMETRIC, INT4, INT16, UINT8.reduced, QuantSpec("int8", -1, 0), INT8.reduced)
BIG = torch.finfo(torch.float32).max
NUMBERS = (
    st.floats(width=32, allow_nan=False, allow_infinity=False)
    | st.floats(-4, 4, width=32)
    | st.integers(-9, 9).map(lambda i: i * 2.0**-149)
    | st.sampled_from([0.0, BIG, -BIG, 1.0])
)


def data(kind, size=40_000):
    g = torch.Generator().manual_seed(3)
    normal, even = torch.randn(size, generator=g), torch.rand(size, generator=g)
    laplace = normal.sign() * -even.clamp(min=1e-7).log()
    return {
        "normal": normal * 3 + 1,
        "laplace": laplace,
        "relu": normal.relu(),
        "negative": -normal.relu(),
        "uniform": even * 2 - 0.3,
        "outliers": torch.cat([normal, torch.tensor([300.0, -90.0, 41.0, 40.0])]),
        "bimodal": torch.cat([normal - 20, normal * 0.1 + 5]),
        "gelu": torch.nn.functional.gelu(normal),
    }[kind]


KINDS = ("normal", "laplace", "relu", "negative", "uniform", "outliers", "bimodal", "gelu")
each_kind = pytest.mark.parametrize("kind", KINDS)


def measured(x, bins=4096):
    statistic = ExactHistogramStatistic(bins)
    return statistic.update(statistic.init(), x)


@settings(max_examples=200)
@given(st.lists(NUMBERS, min_size=1, max_size=9), st.sampled_from(SPECS), st.sampled_from([2, 64, 4096]))
@example([-BIG, BIG, 1.0], UINT8, 4096)
@example([2.0**-149, 0.0], INT8_SYMMETRIC, 4096)
@example([5.0, 5.0], UINT8, 2)
def test_any_values_give_a_part_of_their_range_and_finite_qparams_with_zero(values, spec, bins):
    x = torch.tensor(values, dtype=torch.float32)
    state = measured(x, bins)
    searches = (
        percentile_range(state, 99.0, spec.symmetric),
        percentile_range(state, 51, spec.symmetric),
        least_error_range(state, spec),
        least_divergence_range(state, spec),
    )
    for low, high in searches:
        assert x.min() <= low <= high <= x.max()
        assert low.shape == high.shape == ()
        assert low.dtype == high.dtype == torch.float32
    for observer in (Percentile(spec, bins=bins), MeanSquaredError(spec, bins), Entropy(spec, bins)):
        found = observer.finish(state)
        assert torch.isfinite(found.scale).all() and found.scale > 0
        assert spec.quant_min <= found.zero_point <= spec.quant_max
        zero = fake_quantize(torch.zeros(1), found.scale, found.zero_point, spec.quant_min, spec.quant_max)
        assert zero.item() == 0


@given(st.lists(NUMBERS, min_size=1, max_size=9), st.sampled_from(SPECS), st.integers(1, 3))
def test_the_percentile_of_all_is_the_whole_range(values, spec, stride):
    x = torch.tensor(values, dtype=torch.float32)
    observer, whole = Percentile(spec, 100, stride=stride), MinMax(spec)
    assert observer.finish(observer.update(observer.init(), x)) == whole.finish(whole.update(whole.init(), x))


@each_kind
@pytest.mark.parametrize("percentile", [60, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bins", [100, 4096])
def test_percentiles_are_those_of_the_values_within_a_bin(kind, percentile, symmetric, bins):
    x = data(kind)
    state = measured(x, bins)
    # bin 0 is of double width
    width = 2.0 ** (state.exponent + 1)
    ordered = (x.abs() if symmetric else x).double().sort().values
    cut = (100 - percentile) / (100 if symmetric else 200)
    low, high = percentile_range(state, percentile, symmetric)
    wanted = [(1 - cut, max(-low.item(), high.item()) if symmetric else high.item())]
    wanted += [] if symmetric else [(cut, low.item())]
    for share, found in wanted:
        place = share * (ordered.numel() - 1)
        assert torch.quantile(ordered, share).item() == pytest.approx(found, abs=width) or (
            # between two far values any is a quantile
            ordered[max(math.floor(place) - 1, 0)] - width <= found
            and found <= ordered[min(math.ceil(place) + 1, ordered.numel() - 1)] + width
        )


def true_error(x, low, high, spec):
    found = qparams_of_range(low, high, spec)
    back = fake_quantize(x, found.scale, found.zero_point, spec.quant_min, spec.quant_max)
    return (back.double() - x.double()).square().mean().item()


@each_kind
@pytest.mark.parametrize("spec", [UINT8, INT8_SYMMETRIC, INT4, UINT8_SYMMETRIC])
def test_the_expected_error_is_that_of_the_values(kind, spec):
    x = data(kind)
    state = measured(x)
    low, high = torch.stack([x.min(), x.min() / 2, x.min() / 9]), torch.stack([x.max(), x.max() / 3, x.max()])
    found = expected_error(state, spec, low, high)
    real = [true_error(x, a, b, spec) for a, b in zip(low, high, strict=True)]
    # a bin's width of noise: the histogram knows the values no better
    assert found.tolist() == pytest.approx(real, rel=0.03, abs=4.0**state.exponent)


@each_kind
@pytest.mark.parametrize("spec", [UINT8, INT8_SYMMETRIC, INT4, UINT8.reduced])
def test_the_search_by_error_finds_what_a_fine_grid_finds(kind, spec):
    x = data(kind, 20_000)
    state = measured(x)
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    if spec.symmetric:
        low, high = min(low, -high), max(high, -low)
    even = torch.linspace(0.002, 1, 300, dtype=torch.float64)
    a, b = even, even
    if low < 0 < high and not spec.symmetric:
        coarse = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(0.02, 1, 49, dtype=torch.float64)])
        a, b = (part.reshape(-1) for part in torch.meshgrid(coarse, coarse, indexing="ij"))
    grid = expected_error(state, spec, (a * low).float(), (b * high).float())
    found = least_error_range(state, spec)
    error = expected_error(state, spec, found[0].view(1), found[1].view(1)).item()
    assert error <= grid.min().item() * 1.01
    whole = expected_error(state, spec, x.min().view(1), x.max().view(1)).item()
    assert error <= whole
    assert true_error(x, *found, spec) <= true_error(x, x.min(), x.max(), spec) * 1.01


@given(st.lists(NUMBERS, min_size=1, max_size=30), st.sampled_from(SPECS))
def test_the_search_by_error_is_never_worse_than_the_whole_range(values, spec):
    x = torch.tensor(values, dtype=torch.float32)
    state = measured(x)
    found = least_error_range(state, spec)
    error = expected_error(state, spec, found[0].view(1), found[1].view(1)).item()
    # scales are computed in float64 for all candidates once the width of one overflows float32
    assert error <= expected_error(state, spec, x.min().view(1), x.max().view(1)).item() * (1 + 1e-6)


def slow_divergence(counts, start, end, levels):
    """The divergence as it is defined, bin by bin."""
    window, total = counts[start:end], sum(counts)
    p = [c / total for c in window]
    p[0] += sum(counts[:start]) / total
    p[-1] += sum(counts[end:]) / total
    result = 0.0
    for cell in range(levels):
        places = [j for j in range(end - start) if j * levels // (end - start) == cell]
        filled = [j for j in places if p[j] > 0]
        for j in filled:
            quantized = sum(window[k] for k in places) / len(filled) / max(sum(window), 1)
            result += p[j] * math.log(p[j] / quantized) if quantized else math.inf
    return result


COUNTS = st.lists(st.integers(0, 3) | st.integers(0, 2000), min_size=2, max_size=40).filter(any)


@given(COUNTS, st.integers(1, 9), st.data())
def test_the_divergence_is_that_of_the_definition(counts, levels, draw):
    first = -draw.draw(st.integers(0, len(counts) - 1))
    windows = candidate_windows(first, len(counts), levels)
    found = divergence(torch.tensor(counts), windows, levels)
    assert [slow_divergence(counts, *w, levels) for w in windows.tolist()] == pytest.approx(found.tolist(), abs=1e-9)
    for start, end in windows.tolist():
        assert 0 <= start <= -first < end <= len(counts)
        assert end - start >= max(levels, 2)
    assert len(counts) < max(levels, 2) or windows[0].tolist() == [0, len(counts)]


@each_kind
@pytest.mark.parametrize("spec", [UINT8, INT8_SYMMETRIC, INT4])
def test_the_search_by_divergence_finds_the_least_of_its_candidates(kind, spec):
    x = data(kind, 3000)
    state = measured(x, 300)
    if spec.symmetric:
        levels, first = 128, 0
        width = 2.0**state.exponent
        counts = torch.bincount((x.double().abs() / width).long())
    else:
        levels, first, counts = spec.quant_max - spec.quant_min + 1, state.first, state.counts
    counts = without_spike(counts, -first)
    windows = candidate_windows(first, counts.numel(), levels).tolist()
    errors = [slow_divergence(counts.tolist(), *w, levels) for w in windows] or [0.0]
    low, high = least_divergence_range(state, spec)
    ranges = {
        (
            max((-(first + end) if spec.symmetric else first + start - 1) * 2.0**state.exponent, x.min().item()),
            min((first + end) * 2.0**state.exponent, x.max().item()),
        )
        for (start, end), error in zip(windows, errors, strict=False)
        if error <= min(errors) + 1e-9
    } or {(x.min().item(), x.max().item())}
    assert (low.item(), high.item()) in ranges


def test_the_search_by_divergence_keeps_the_bulk_and_drops_outliers():
    normal = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for x in (normal, normal.relu(), torch.cat([normal, torch.tensor([50.0, -50.0])])):
        for spec in (UINT8, INT8_SYMMETRIC):
            low, high = least_divergence_range(measured(x), spec)
            assert 3 < high < 4.8
            assert low == 0 if x.min() == 0 else -5 < low < -3


def test_values_counted_in_part_may_all_be_zero():
    x = torch.tensor([0.0, 5.0] * 100)
    for observer in (Percentile(stride=2), MeanSquaredError(stride=2), Entropy(stride=2)):
        found = observer.finish(observer.update(observer.init(), x))
        assert torch.isfinite(found.scale) and found.scale > 0


@pytest.mark.parametrize("spec", [QuantSpec("int16", -(2**15), 2**15 - 1), QuantSpec("int32", -(2**31), 2**31 - 1)])
@pytest.mark.parametrize("data", [torch.rand(100) + 1000, torch.randn(5000), torch.randn(100).relu()])
def test_bins_that_are_coarser_than_steps_do_not_clip(spec, data):
    observer = MeanSquaredError(spec)
    qparams = observer.finish(observer.update(observer.init(), data))
    whole = MinMax(spec)
    assert qparams == whole.finish(whole.update(whole.init(), data))
