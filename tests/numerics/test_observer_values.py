import copy
import itertools
import pickle
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qfunc.config.qconfig import QConfig, wrong_qconfig
from qfunc.errors import BadConfig
from qfunc.numerics import observers as o
from qfunc.numerics import qparams as q
from qfunc.numerics.derive import wrong_qparams
from qfunc.numerics.qparams import INT8_SYMMETRIC, UINT8, QParams, QuantSpec
from qfunc.numerics.statistic import MinMaxStatistic, RangeState, finite, in_memory_order, state_is_finite

PER_CHANNEL = q.INT8_SYMMETRIC_PER_CHANNEL
OBSERVERS = (
    o.MinMax(),
    o.MovingAverageMinMax(),
    o.PerChannelMinMax(PER_CHANNEL),
    o.MovingAveragePerChannelMinMax(PER_CHANNEL, 0.1),
    o.Histogram(),
    o.Histogram(q.INT8_SYMMETRIC, 256, 4),
)
MERGEABLE = (o.MinMax(), o.PerChannelMinMax(PER_CHANNEL))

each_observer = pytest.mark.parametrize("observer", OBSERVERS, ids=lambda v: type(v).__name__)
each_mergeable = pytest.mark.parametrize("observer", MERGEABLE, ids=lambda v: type(v).__name__)
row = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3)
batches = st.lists(st.lists(row, max_size=4).map(lambda rows: torch.tensor(rows).reshape(-1, 3).T), max_size=4)


def fold(observer, tensors):
    state = observer.init()
    for tensor in tensors:
        state = observer.update(state, tensor)
    return state


@each_mergeable
@given(a=batches, b=batches, c=batches)
def test_law_9_merge_is_exact_associative_commutative_with_init_as_unit(observer, a, b, c):
    x, y, z = fold(observer, a), fold(observer, b), fold(observer, c)
    merge = observer.merge
    assert merge(x, y) == fold(observer, a + b)
    assert merge(x, y) == merge(y, x)
    assert merge(merge(x, y), z) == merge(x, merge(y, z))
    assert merge(x, observer.init()) == x


@each_mergeable
@given(data=batches, random=st.randoms(use_true_random=False))
def test_law_9_split_and_order_do_not_matter(observer, data, random):
    columns = [column for batch in data for column in batch.split(1, dim=1)]
    random.shuffle(columns)
    assert fold(observer, columns) == fold(observer, data)


@each_observer
def test_update_neither_changes_nor_keeps_anything(observer):
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    first = observer.update(observer.init(), x)
    copied, before = copy.deepcopy(first), x.detach().clone()
    second = observer.update(first, x * 2)
    again = observer.update(first, x * 2)
    assert first == copied
    assert second == again
    assert torch.equal(x, before)
    with torch.no_grad():
        x.fill_(99)
    assert first == copied
    assert not observer.finish(first).scale.requires_grad


@each_observer
@pytest.mark.parametrize("shape", [(3,), (3, 1)])
def test_the_state_of_few_values_is_not_their_memory(observer, shape):
    x = torch.ones(shape)
    state = observer.update(observer.init(), x)
    before = copy.deepcopy(state)
    x.fill_(7)
    assert state == before


@each_observer
def test_empty_tensors_and_no_tensors(observer):
    assert observer.finish(observer.init()) is None
    state = observer.update(observer.init(), torch.empty(3, 0))
    assert state == observer.init()
    assert observer.finish(state) is None
    assert state_is_finite(state)


@each_observer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types_are_measured_as_float32(observer, dtype):
    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert fold(observer, [x, x * 2]) == fold(observer, [x.float(), (x * 2).float()])


@each_observer
def test_every_memory_format_gives_the_same(observer):
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = fold(observer, [x])
    strided = torch.stack([x, x + 9], dim=-1)[..., 0]
    for other in (x.to(memory_format=torch.channels_last), strided, x.permute(0, 3, 1, 2), x.flip(2)):
        assert fold(observer, [other]) == expected
    assert fold(observer, [x[:, :1].expand(3, 8, 5, 6)]) is not None


@each_observer
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_known_from_the_state(observer, value, place):
    data = [torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    assert state_is_finite(fold(observer, data))
    data[place][1, 2] = value
    state = fold(observer, data)
    assert not state_is_finite(state)
    assert torch.isfinite(observer.finish(fold(observer, data[:place] + data[place + 1 :])).scale).all()


@each_observer
def test_the_largest_values_give_finite_qparams(observer):
    big = torch.finfo(torch.float32).max
    x = torch.tensor([[-big, big], [1.0, big], [0.0, 2.0]])
    state = fold(observer, [x, -x, x])
    assert state_is_finite(state)
    found = observer.finish(state)
    assert torch.isfinite(found.scale).all()
    assert (found.scale > 0).all()


@each_observer
def test_observers_are_plain_values(observer):
    assert observer == pickle.loads(pickle.dumps(observer))
    assert hash(observer) == hash(copy.deepcopy(observer))
    assert o.validate_observer(observer) == ()
    state = fold(observer, [torch.ones(3, 2)])
    assert pickle.loads(pickle.dumps(state)) == state
    assert state != observer.init()


def test_observers_that_differ_in_spec_only_share_their_statistic():
    for a, b in (
        (o.MinMax(q.UINT8), o.MinMax(q.INT8)),
        (o.Histogram(q.UINT8), o.Histogram(q.UINT8_REDUCED)),
        (o.PerChannelMinMax(PER_CHANNEL), o.PerChannelMinMax(q.INT8_NARROW_PER_CHANNEL)),
        (o.MovingAverageMinMax(q.UINT8), o.MovingAverageMinMax(q.INT8)),
    ):
        assert a.statistic == b.statistic
        assert hash(a.statistic) == hash(b.statistic)
        state = fold(a, [torch.randn(4, 9, generator=torch.Generator().manual_seed(0))])
        assert b.finish(state).spec == b.spec


def test_statistics_that_measure_differently_differ():
    statistics = {
        o.MinMax().statistic,
        o.PerChannelMinMax(PER_CHANNEL).statistic,
        o.PerChannelMinMax(QuantSpec("int8", -128, 127, "per_channel_symmetric", 1)).statistic,
        o.MovingAverageMinMax().statistic,
        o.MovingAverageMinMax(averaging_constant=0.1).statistic,
        o.MovingAveragePerChannelMinMax(PER_CHANNEL).statistic,
        o.Histogram().statistic,
        o.Histogram(bins=64).statistic,
        o.Histogram(upsample_rate=8).statistic,
        o.FixedQParams(q.UINT8, 0.5, 0).statistic,
    }
    assert len(statistics) == 10


def test_the_order_of_tensors_moves_an_average():
    observer, x, y = o.MovingAverageMinMax(averaging_constant=0.5), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 5.0])
    assert fold(observer, [x, y]).maximum.item() == 3.0
    assert fold(observer, [y, x, x]).maximum.item() == 2.0


def test_a_moving_average_keeps_its_order_where_differences_cancel():
    observer = o.MovingAverageMinMax(averaging_constant=1.0)
    state = fold(observer, [torch.tensor([-2.0, 2.0**25]), torch.tensor([1.0, 1.0])])
    assert (state.minimum.item(), state.maximum.item()) == (1.0, 1.0)


def test_fixed_qparams_measure_nothing():
    observer = o.FixedQParams(q.UINT8, 1 / 256, 3)
    state = fold(observer, [torch.tensor([torch.nan])])
    found = observer.finish(state)
    assert state == observer.init() == observer.statistic.merge(state, state)
    assert (found.scale.item(), found.zero_point.item()) == (1 / 256, 3)
    assert (found.scale.dtype, found.zero_point.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize(
    "observer",
    [
        o.MinMax(PER_CHANNEL),
        o.Histogram(PER_CHANNEL),
        o.PerChannelMinMax(q.UINT8),
        o.MovingAveragePerChannelMinMax(q.UINT8),
        o.MovingAverageMinMax(averaging_constant=0.0),
        o.MovingAverageMinMax(averaging_constant=float("nan")),
        o.Histogram(bins=1),
        o.Histogram(upsample_rate=0),
        o.FixedQParams(q.UINT8, 0.0, 0),
        o.FixedQParams(q.UINT8, 0.5, 256),
        o.MinMax(QuantSpec(quant_max=256)),
    ],
)
def test_impossible_observers_are_told(observer):
    (problem,) = o.validate_observer(observer)
    assert isinstance(problem, BadConfig)


@dataclass(frozen=True)
class Percentile:
    """A user's own observer, with a range state of its own making."""

    spec: QuantSpec = q.UINT8
    fraction: float = 0.99

    @property
    def statistic(self):
        return MinMaxStatistic()

    def init(self):
        return self.statistic.init()

    def update(self, state, tensor):
        return self.statistic.merge(state, RangeState(tensor.min(), tensor.quantile(self.fraction)))

    def finish(self, state):
        return q.qparams_of_range(state.minimum, state.maximum, self.spec) if state.observed else None


def test_a_users_own_observer():
    observer: o.Observer[RangeState] = Percentile()
    state = fold(observer, [torch.linspace(0, 1, 101)])
    assert observer.finish(state).scale.item() == pytest.approx(0.99 / 255)
    assert o.validate_observer(observer) == ()
    assert state_is_finite("the state of someone else")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite(dtype):
    for value, shape in itertools.product((torch.nan, torch.inf, -torch.inf), ((7,), (2, 3, 4, 5))):
        x = torch.zeros(shape, dtype=dtype)
        assert finite(x)
        x.view(-1)[-2] = value
        assert not finite(x)
    assert finite(torch.empty(0, dtype=dtype))
    assert finite(torch.tensor([2**62]))


def test_in_memory_order_keeps_all_values():
    x = torch.arange(120.0).view(2, 3, 4, 5)
    for other in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x.transpose(0, 3), x[0, 0, 0, 0]):
        assert sorted(in_memory_order(other).tolist()) == sorted(other.reshape(-1).tolist())


@pytest.mark.parametrize(
    ("qparams", "reason"),
    [
        (QParams(torch.tensor(0.5), torch.tensor(3), None), "their spec is a NoneType"),
        (QParams(torch.tensor(0.5, device="meta"), torch.tensor(3), UINT8), "holds no numbers"),
        (QParams(torch.tensor(0.5), torch.tensor(True), UINT8), "holds no numbers"),
        (QParams(torch.tensor(0.5), torch.tensor(3), INT8_SYMMETRIC), "not for"),
        (QParams(torch.tensor(0.5), 3, UINT8), "not both tensors"),
        (QParams(torch.tensor(0.5), torch.tensor(3), UINT8), ""),
    ],
)
def test_qparams_of_the_users_are_checked(qparams, reason):
    found = wrong_qparams(qparams, UINT8)
    assert reason in found
    assert bool(reason) == bool(found)


@pytest.mark.parametrize(
    "observer",
    [
        o.FixedQParams(UINT8, "a", 0),
        o.FixedQParams(UINT8, 0.5, None),
        o.FixedQParams(UINT8, 0.5, True),
        o.MovingAverageMinMax(UINT8, "a"),
        o.MovingAveragePerChannelMinMax(q.INT8_SYMMETRIC_PER_CHANNEL, None),
        o.Histogram(UINT8, None),
        o.Histogram(UINT8, 2.5),
        o.MinMax(QuantSpec(qscheme=None)),
    ],
)
def test_parameters_of_wrong_types_are_told(observer):
    found = o.validate_observer(observer)
    assert len(found) == 1
    qconfig = QConfig(observer, o.MinMax(INT8_SYMMETRIC))
    assert set(found) <= set(wrong_qconfig(qconfig))
