"""Observers at work hold what the pure fold gives, settle it together and go back to it, in memory of their own."""

from __future__ import annotations

from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qfunc.edge.tally import Tally
from qfunc.numerics import observers as o
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.qparams import UINT8, QuantSpec
from qfunc.numerics.recording import Recording
from qfunc.numerics.search_observers import MeanSquaredError, Percentile
from qfunc.testing.metrics import same_bits

PER_CHANNEL = QuantSpec("int8", -128, 127, "per_channel_symmetric", 1)
OBSERVERS = (
    o.MinMax(),
    o.MovingAverageMinMax(),
    o.PerChannelMinMax(PER_CHANNEL),
    o.MovingAveragePerChannelMinMax(PER_CHANNEL),
    o.Histogram(bins=64),
    o.FixedQParams(UINT8, 0.1, 0),
    MeanSquaredError(bins=64),
    Percentile(bins=32, stride=3),
    Recording(),
    FakeQuantize(o.MinMax()),
)
NUMBERS = st.floats(width=32)
PARTS = st.lists(st.integers(0, 7).flatmap(lambda n: st.lists(NUMBERS, min_size=3 * n, max_size=3 * n)), max_size=5)


def tensors(parts: list[list[float]]) -> list[Tensor]:
    return [torch.tensor(part, dtype=torch.float32).view(-1, 3) for part in parts]


def tally_of(observer: Any) -> Tally:
    return Tally(observer, observer.init(), observer.update)


def fold(observer: Any, parts: list[Tensor]) -> Any:
    return reduce(observer.update, parts, observer.init())


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda observer: type(observer).__name__)
@given(parts=PARTS, more=PARTS)
@settings(max_examples=30)
def test_it_is_the_pure_fold(observer: Any, parts: list[list[float]], more: list[list[float]]) -> None:
    first, second = tensors(parts), tensors(more)
    tally = tally_of(observer)
    for tensor in first:
        tally.add(tensor)
    expected = fold(observer, first)
    assert tally.state == expected
    # settled: the second cell
    assert tally.settled(1) == (expected, sum(tensor.numel() for tensor in first))
    tally.go_on(1)
    for tensor in second:
        tally.add(tensor)
    assert tally.state == fold(observer, first + second)
    assert tally.settled(1)[0] == expected
    # taken back, and done again
    tally.go_on(1)
    assert tally.state == expected
    for tensor in second:
        tally.add(tensor)
    assert tally.settled(0) == (fold(observer, first + second), sum(tensor.numel() for tensor in first + second))


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda observer: type(observer).__name__)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_it_tells_what_is_not_finite_until_it_is_taken_back(observer: Any, value: float) -> None:
    tally = tally_of(observer)
    tally.add(torch.ones(2, 3))
    assert tally.is_finite
    tally.add(torch.tensor([[1.0, value, 2.0]]))
    tally.add(torch.ones(2, 3))
    assert not tally.is_finite
    tally.go_on(0)
    assert tally.is_finite


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda observer: type(observer).__name__)
def test_what_is_settled_has_memory_of_its_own(observer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 3, generator=generator) * 10**n for n in range(4)]
    tally = tally_of(observer)
    tally.add(data[0])
    kept, _ = tally.settled(1)
    before = fold(observer, data[:1])
    tally.go_on(1)
    for tensor in data[1:]:
        tally.add(tensor)
    tally.go_on(0)
    tally.add(data[3])
    assert kept == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_ranges_are_those_of_float32(dtype: torch.dtype) -> None:
    x = torch.tensor([[1e-3, 3.0, -7.1]], dtype=dtype)
    tally = tally_of(o.MinMax())
    tally.add(x)
    expected = fold(o.MinMax(), [x])
    assert same_bits((tally.state.minimum, tally.state.maximum), (expected.minimum, expected.maximum))
