"""A channel has the range and the qparams that it would have alone, whatever the others hold, bit for bit."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qfunc.numerics import qparams as q
from qfunc.numerics.qparams import QuantSpec, qparams_of_range, same_values
from qfunc.numerics.statistic import MovingAverageStatistic

BIG = torch.finfo(torch.float32).max
SPECS = (
    QuantSpec("uint8", 0, 255, "per_channel_affine", 0),
    QuantSpec("int32", -(2**31), 2**31 - 1, "per_channel_affine", 0, 1e-30),
    q.INT8_SYMMETRIC_PER_CHANNEL,
    q.UINT4_FLOAT_QPARAMS,
)

bounded = st.floats(-BIG, BIG, width=32) | st.floats(-9, 9, width=32)
ranges = st.lists(st.tuples(bounded, bounded).map(sorted), min_size=1, max_size=5)


@given(ranges, st.sampled_from(SPECS))
@example([[-BIG, BIG], [-1.3, 1.3], [-0.7, 0.7]], SPECS[0])
def test_qparams(bounds, spec):
    low, high = torch.tensor(bounds).unbind(1)
    together = qparams_of_range(low, high, spec)
    for c in range(len(bounds)):
        alone = qparams_of_range(low[c : c + 1], high[c : c + 1], spec)
        assert same_values(alone.scale, together.scale[c : c + 1])
        assert same_values(alone.zero_point, together.zero_point[c : c + 1])


def test_qparams_beside_a_width_that_overflows():
    """Of many channels, of which every fourth would round otherwise in float64."""
    low, high = torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) * 10
    big = torch.tensor([BIG])
    for spec in SPECS:
        alone = qparams_of_range(-low, high, spec)
        beside = qparams_of_range(torch.cat((-big, -low)), torch.cat((big, high)), spec)
        assert same_values(beside.scale[1:], alone.scale)
        assert same_values(beside.zero_point[1:], alone.zero_point)


def test_averages_beside_one_that_overflows():
    batches = torch.randn(3, 500, 2, generator=torch.Generator().manual_seed(0))
    big = torch.tensor([[[BIG, BIG]], [[-BIG, -BIG]], [[BIG, BIG]]])
    statistic = MovingAverageStatistic(0.3, 0)
    alone = beside = statistic.init()
    for batch, row in zip(batches, big, strict=True):
        alone, beside = statistic.update(alone, batch), statistic.update(beside, torch.cat((row, batch)))
    assert torch.isfinite(beside.minimum).all()
    assert same_values(beside.minimum[1:], alone.minimum)
    assert same_values(beside.maximum[1:], alone.maximum)


@given(st.lists(st.tuples(bounded, bounded, bounded), min_size=1, max_size=5), st.sampled_from([0.01, 0.3, 1.0]))
@example([(-BIG, BIG, -BIG), (0.1, 0.7, 0.3)], 0.3)
@example([(-1e8, 1.4, 0.5), (0.1, 0.7, 0.3)], 1.0)
def test_moving_averages(rows, constant):
    statistic = MovingAverageStatistic(constant, 0)
    data = torch.tensor(rows)
    state = statistic.init()
    for column in data.unbind(1):
        state = statistic.update(state, torch.stack((column, column / 2), 1))
    for c in range(len(rows)):
        own = statistic.init()
        for value in data[c].tolist():
            own = statistic.update(own, torch.tensor([[value, value / 2]]))
        assert same_values(own.minimum, state.minimum[c : c + 1])
        assert same_values(own.maximum, state.maximum[c : c + 1])
