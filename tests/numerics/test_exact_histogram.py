import itertools
import math
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from qfunc.errors import BadConfig
from qfunc.numerics import observers as o
from qfunc.numerics import qparams as q
from qfunc.numerics.exact_histogram import LEAST_EXPONENT, ExactHistogramStatistic
from qfunc.numerics.recording import Recording
from qfunc.numerics.search_observers import Entropy, MeanSquaredError, Percentile
from qfunc.numerics.statistic import MinMaxStatistic, blocks_in_memory_order, in_memory_order, state_is_finite

BIG = torch.finfo(torch.float32).max
TINY = 2.0**-149
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
NUMBERS = (
    FINITE
    | st.floats(-4, 4, width=32)
    | st.integers(-40, 40).map(lambda i: i * TINY)
    | st.sampled_from([0.0, -0.0, BIG, -BIG, TINY, -TINY, 2.0**-126, 1.0, -1.0, 1.0 - 2.0**-24])
)
ONE_SIDED = st.lists(NUMBERS.map(abs), max_size=12) | st.lists(NUMBERS.map(lambda x: -abs(x)), max_size=12)
CONSTANT = st.tuples(NUMBERS, st.integers(1, 9)).map(lambda given: [given[0]] * given[1])
VALUES = st.lists(NUMBERS, max_size=12) | ONE_SIDED | CONSTANT
BINS = st.sampled_from([2, 3, 7, 64, 4096, 32768])


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def fold(statistic, tensors):
    state = statistic.init()
    for x in tensors:
        state = statistic.update(state, x)
    return state


def window(values, exponent):
    """First and last index, by integers: a float32 is a whole number of 2**-149."""
    places = [index(v, exponent) for v in (min(*values, 0.0), max(*values, 0.0))]
    return places[0], places[1]


def index(value, exponent):
    whole = int(math.ldexp(value, 149)) if abs(value) < 2.0**60 else int(value) << 149
    return (abs(whole) >> (exponent + 149)) * (1 if whole > 0 else -1)


def reference(values, bins):
    """The exponent, the first index and the counts by their definition, bin for bin."""
    exponent = LEAST_EXPONENT
    while window([*values, 0.0], exponent)[1] - window([*values, 0.0], exponent)[0] + 1 > bins:
        exponent += 1
    first, last = window([*values, 0.0], exponent)
    counts = [0] * (last - first + 1)
    for value in values:
        counts[index(value, exponent) - first] += 1
    return exponent, first, counts


@given(VALUES, BINS)
@example([-BIG, BIG], 2)
@example([BIG], 32768)
@example([-BIG], 32768)
@example([TINY, -TINY], 2)
@example([0.0, 0.0], 4096)
def test_counts_are_those_of_the_definition(values, bins):
    statistic = ExactHistogramStatistic(bins)
    state = fold(statistic, [tensor(values)])
    assert (state.exponent, state.first, state.counts.tolist()) == reference(values, bins)
    assert state.counts.sum().item() == len(values)
    assert state.counts.dtype == torch.int64
    assert state.range == fold(MinMaxStatistic(), [tensor(values)])


@given(VALUES, VALUES, VALUES, BINS)
def test_merge_is_exact_associative_commutative_with_init_as_unit(a, b, c, bins):
    statistic = ExactHistogramStatistic(bins)
    merge = statistic.merge
    x, y, z = (fold(statistic, [tensor(values)]) for values in (a, b, c))
    whole = fold(statistic, [tensor(a + b + c)])
    assert merge(merge(x, y), z) == merge(x, merge(y, z)) == whole
    assert merge(x, y) == merge(y, x) == fold(statistic, [tensor(b), tensor(a)])
    assert merge(x, statistic.init()) == merge(statistic.init(), x) == x


@given(VALUES, BINS, st.randoms(use_true_random=False))
def test_split_and_order_do_not_matter(values, bins, random):
    statistic = ExactHistogramStatistic(bins)
    pieces = [tensor([value]) for value in values]
    random.shuffle(pieces)
    assert fold(statistic, pieces) == fold(statistic, [tensor(values)])


@given(VALUES, BINS, NUMBERS)
def test_widening_counts_as_the_data_would_have_been_counted(values, bins, other):
    statistic = ExactHistogramStatistic(bins)
    widened = statistic.update(fold(statistic, [tensor(values)]), tensor([other]))
    assert widened == fold(statistic, [tensor([*values, other])])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def strided(x):
    return torch.stack([x, x + 99], dim=-1)[..., 0]


def test_tensors_of_many_blocks_and_any_layout():
    x = noise(5, 13, 64, 100) ** 3
    statistic = ExactHistogramStatistic()
    whole = fold(statistic, [x])
    assert whole.counts.sum().item() == x.numel()
    index = torch.trunc(x.double() / 2.0**whole.exponent).long().reshape(-1) - whole.first
    assert torch.equal(whole.counts, torch.bincount(index, minlength=whole.counts.numel()))
    for other in (x.to(memory_format=torch.channels_last), strided(x), x.transpose(0, 3), x.flip(1)):
        assert fold(statistic, [other]) == whole
    for part in (x[:, 3:7], x[..., ::3], x[1].expand(7, 13, 64, 100), x[:1, :1, :1, :1].expand(2, 3, 500, 600)):
        assert fold(statistic, [part]) == fold(statistic, [part.contiguous()])


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_does_not_matter(threads):
    x, before = noise(700_000), torch.get_num_threads()
    one = fold(ExactHistogramStatistic(), [x])
    try:
        torch.set_num_threads(threads)
        assert fold(ExactHistogramStatistic(), [x]) == one
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_measured_as_float32(dtype):
    x = (noise(3, 4000) * 100).to(dtype)
    assert fold(ExactHistogramStatistic(), [x]) == fold(ExactHistogramStatistic(), [x.float()])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_is_not_finite_is_known_from_the_state_and_merges(value, place):
    statistic = ExactHistogramStatistic()
    data = [noise(3, 5, seed=i).double() for i in range(3)]
    assert state_is_finite(fold(statistic, data))
    data[place][1, 2] = value
    state = fold(statistic, data)
    assert not state_is_finite(state)
    assert state == statistic.merge(fold(statistic, data[2:]), fold(statistic, data[:2]))


def test_an_empty_tensor_changes_nothing_and_a_state_is_a_plain_value():
    statistic = ExactHistogramStatistic()
    assert statistic.update(statistic.init(), torch.empty(3, 0)) == statistic.init()
    assert state_is_finite(statistic.init())
    state = fold(statistic, [noise(1000)])
    assert pickle.loads(pickle.dumps(state)) == state != statistic.init()
    assert state.counts.numel() <= statistic.bins
    assert state != fold(statistic, [noise(1000)[:-1]])


@pytest.mark.parametrize("stride", [2, 3, 7, 1000, 10**9])
def test_a_stride_counts_every_so_many_values_but_measures_the_range_of_all(stride):
    statistic = ExactHistogramStatistic(512, stride)
    data = [noise(300_000) ** 3, strided(noise(9, 11, 37, 50)), noise(4, 9, 31).transpose(1, 2), noise(9)]
    for x in data:
        state = fold(statistic, [x])
        assert state.range == fold(MinMaxStatistic(), [x])
        values = in_memory_order(x)[::stride]
        places = torch.trunc(values.double() / 2.0**state.exponent).long() - state.first
        assert torch.equal(state.counts, torch.bincount(places, minlength=state.counts.numel()))
    merged = statistic.merge(fold(statistic, data[2:]), fold(statistic, data[:2]))
    assert merged == fold(statistic, data)


class Copies(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the size of the largest tensor that is made anew."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view:
            self.most = max(self.most, out.numel())
        return out


@pytest.mark.parametrize("statistic", [ExactHistogramStatistic(), ExactHistogramStatistic(64, 5), MinMaxStatistic()])
def test_a_tensor_that_is_not_dense_is_never_copied_whole(statistic):
    whole = noise(8, 64, 64, 96)
    part, wide = whole[:, ::2], noise(1, 1024).expand(2000, 1024)
    narrow = whole.transpose(0, 3)[:, :, ::2]
    expected = [fold(statistic, [in_memory_order(x)]) for x in (part, wide, narrow)]
    for x, state in zip((part, wide, narrow), expected, strict=True):
        with Copies() as copies:
            assert fold(statistic, [x]) == state
        assert 0 < copies.most < x.numel()
        assert copies.most <= 2**19


def test_blocks_in_memory_order_are_the_values_in_memory_order():
    x = torch.arange(840.0).view(2, 3, 4, 35)
    for other in (x, x.to(memory_format=torch.channels_last), x[:, :, ::2], x.transpose(0, 3), x[0, 0, 0, 0]):
        for size in (1, 3, 8, 70, 10_000):
            blocks = [block.reshape(-1) for block in blocks_in_memory_order(other, size)]
            assert all(block.numel() <= size for block in blocks)
            assert torch.equal(torch.cat(blocks), in_memory_order(other))


SEARCHING = (Percentile(), MeanSquaredError(), Entropy())


def test_the_searching_observers_share_one_state():
    assert len({observer.statistic for observer in SEARCHING}) == 1
    others = (Percentile(bins=512), Percentile(stride=2), Percentile())
    assert len({observer.statistic for observer in others}) == 3
    state = fold(SEARCHING[0], [noise(5000)])
    scales = [observer.finish(state).scale.item() for observer in (*SEARCHING, Percentile(percentile=100))]
    assert len(set(scales)) == 4


@pytest.mark.parametrize("observer", [*SEARCHING, Recording()], ids=lambda observer: type(observer).__name__)
def test_observers_of_nothing_and_as_plain_values(observer):
    assert observer.finish(observer.init()) is None
    assert observer.finish(observer.update(observer.init(), torch.empty(0, 3))) is None
    assert o.validate_observer(observer) == ()
    assert pickle.loads(pickle.dumps(observer)) == observer
    assert hash(observer) == hash(type(observer)())


@pytest.mark.parametrize(
    ("kind", "change"),
    list(
        itertools.product(
            (Percentile, MeanSquaredError, Entropy),
            (
                *({"bins": 1}, {"bins": 32769}, {"bins": 2.5}, {"stride": 0}, {"stride": None}, {"bins": True}),
                {"spec": q.INT8_SYMMETRIC_PER_CHANNEL},
            ),
        )
    )
    + [(Percentile, {"percentile": p}) for p in (50, 100.1, math.nan, -1, "a")],
)
def test_impossible_observers_are_told(kind, change):
    (problem,) = o.validate_observer(kind(**change))
    assert isinstance(problem, BadConfig)
    assert problem.node == kind.__name__


def test_a_recording_keeps_copies():
    x = noise(3, 4)
    observer = Recording()
    state = fold(observer, [x, x.half()])
    before = x.clone()
    x.fill_(9)
    assert torch.equal(state.tensors[0], before)
    assert state.tensors[1].dtype == torch.float16
    assert state == fold(observer, [before, before.half()]) != fold(observer, [before.half(), before])
    assert observer.finish(state) == fold_to_qparams(o.MinMax(), [before, before.half()])
    assert not hasattr(observer, "merge")
    assert not state_is_finite(observer.update(state, torch.tensor([torch.nan])))
    assert [problem.node for problem in o.validate_observer(Recording(q.INT8_SYMMETRIC_PER_CHANNEL))] == ["Recording"]


def fold_to_qparams(observer, tensors):
    return observer.finish(fold(observer, tensors))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_comes_after_infinity_is_not_counted(value):
    s = ExactHistogramStatistic(64)
    spoiled = s.update(s.update(s.init(), torch.ones(3)), torch.tensor([value, 2.0]))
    after = s.update(spoiled, torch.tensor([1.0, 0.5]))
    assert not state_is_finite(after)
    assert after.counts.sum() == 0
    assert after == s.merge(spoiled, s.update(s.init(), torch.tensor([1.0, 0.5])))
