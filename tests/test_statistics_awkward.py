"""Awkward data, observers and modules in calibration: masks, writers, wrappers, odd dtypes, uneven statistics."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from pyrsistent import pmap
from torch import Tensor, nn

from qfunc import (
    QUANTIZABLE_LSTM,
    Annotations,
    CustomConfig,
    FixedQParams,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverageMinMax,
    Percentile,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    Recording,
    SharedWith,
    calibrate,
    calibrate_sharded,
    convert,
    fuse,
    kept,
    merge,
    prepare,
    quantize,
    reuse,
    trace,
    unwrap,
)
from qfunc.errors import BadBatch, BadConfig, NonFinite, Unobserved, UnsupportedDType, UserFunctionFailed, problems
from qfunc.ir import digest
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL, UINT8
from qfunc.numerics.statistic import RangeState
from qfunc.passes.statistics import Answers
from tests.test_statistics import Branches, X, batches, mapping, measured, prepared_for

WEIGHT = PerChannelMinMax(INT8_NARROW_PER_CHANNEL)
OBSERVERS = [MinMax(), MovingAverageMinMax(), Histogram(), MeanSquaredError(), Recording(), FixedQParams(UINT8, 0.1, 0)]


class Masked(nn.Module):
    """A layer of attention with an additive mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(4, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2) + mask, -1))


@pytest.mark.parametrize("policy", ["fail", "skip", "clip"])
def test_a_mask_that_is_not_quantized_may_be_infinite(policy: str) -> None:
    mask = torch.full((4, 4), -math.inf).triu(1)
    data = [(x, mask) for x in batches(3, 2, 4, 8)]
    prepared = unwrap(trace(Masked().eval(), data[0]).bind(fuse).bind(lambda graph: prepare(graph, mapping(MinMax()))))
    found = unwrap(calibrate(prepared, data, policy=policy))
    assert found.warnings == ()
    assert found.statistics == measured(prepared, data)
    spoiled = [data[0], (data[1][0] * math.nan, mask), data[2]]
    borne = calibrate(prepared, spoiled, policy=policy)
    if policy == "fail":
        assert kept(borne.failure()) == measured(prepared, data[:1])
    if policy == "skip":
        assert unwrap(borne).statistics == measured(prepared, [data[0], data[2]])
        assert "left out" in unwrap(borne).warnings[0].reason
    if policy == "clip":
        assert unwrap(borne).statistics.batches == 3
        assert "clipped" in unwrap(borne).warnings[0].reason


class Doubling(nn.Module):
    """A module of the user's that writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.writes, self.layer = Doubling(), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.log(self.writes(x)))


def test_a_leaf_that_writes_to_its_input_leaves_the_batch_alone() -> None:
    custom = CustomConfig(non_traceable_types=(Doubling,))
    graph = unwrap(trace(Writing().eval(), torch.ones(1, 3), custom=custom).bind(lambda g: fuse(g, custom=custom)))
    prepared = unwrap(prepare(graph, mapping(MinMax()), custom=custom))
    data = [torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[1.0, 2.0, 3.0]])]
    held = [x.clone() for x in data]
    found = [unwrap(calibrate(prepared, data, policy="clip")) for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(data, held, strict=True))
    assert all(each == found[0] for each in found)
    (state,) = {id(e.state): e.state for (v, _), e in found[0].statistics.measured.items() if v == ("log",)}.values()
    assert state.maximum.item() == pytest.approx(math.log(6))


# Which state serves


def test_what_serves_does_not_depend_on_the_order_of_entries() -> None:
    prepared = prepared_for(MinMax())
    found = [measured(prepared_for(o), X[: n + 1]) for n, o in enumerate(Percentile(bins=64 << n) for n in range(3))]
    both = unwrap(merge(unwrap(merge(found[0], found[1])), found[2]))
    items = list(both.measured.items())
    served = [
        [Answers(replace(both, measured=pmap(dict(order)))).entry(fold) for fold in prepared.folds]
        for order in (items, items[::-1], items[3:] + items[:3])
    ]
    assert served[0] == served[1] == served[2]
    assert unwrap(reuse(prepared, both).bind(convert)) == unwrap(calibrate(prepared, X[:3]).bind(convert))


def test_ranges_are_those_of_all_that_tells_of_them() -> None:
    prepared = prepared_for(MinMax())
    ranges, histograms = measured(prepared, X[:2]), measured(prepared_for(Percentile()), [100 * x for x in X[2:]])
    both = unwrap(merge(ranges, histograms))
    (x,) = (fold for fold in prepared.folds if fold.taps == ("x",))
    assert both.state([x]) == RangeState(100 * torch.stack(X[2:]).amin(), 100 * torch.stack(X[2:]).amax())
    averages = measured(prepared_for(MovingAverageMinMax()), X)
    assert averages.state([x]) is None


def test_values_measured_on_less_data_are_told() -> None:
    both = prepared_for(MinMax())
    some = unwrap(prepare(both.graph, mapping(MinMax()).set_node("head", None).set_node("cat", None)))
    found = unwrap(merge(measured(both, X[:2]), measured(some, X[2:])))
    told = unwrap(reuse(both, found)).warnings
    assert {type(warning) for warning in told} == {Unobserved}
    assert all("on 2 batches, others were on 6" in warning.reason for warning in told)
    assert 0 < len(told) < len(both.folds)


def test_statistics_of_other_weights_are_refused() -> None:
    model = Branches().eval()
    found = measured(prepared_for(MinMax(), model), X)
    with torch.no_grad():
        model.head.weight.mul_(50)
    assert "other weights" in reuse(prepared_for(MinMax(), model), found).failure().reason


@dataclass(frozen=True, slots=True, eq=False)
class Quantiles:
    """A state of a user's that has a `range`, which is not that of all values."""

    range: RangeState


@dataclass(frozen=True, slots=True)
class Inner:
    """An observer of a user's with quantiles, or failing where it is told to."""

    spec: QuantSpec = UINT8
    failing: str = ""

    @property
    def statistic(self) -> Any:
        return "quantiles"

    def init(self) -> Any:
        return Quantiles(RangeState.unobserved())

    def update(self, state: Any, tensor: Tensor) -> Any:
        if self.failing == "writes":
            tensor.zero_()
        values = tensor.nan_to_num(0.0)
        return Quantiles(RangeState(values.quantile(0.1), values.quantile(0.9)))

    def merge(self, a: Any, b: Any) -> Any:
        if self.failing == "merge":
            raise KeyError("mine")
        return a

    def finish(self, state: Any) -> Any:
        return FixedQParams(self.spec, 0.1, 3).finish(None)  # type: ignore[arg-type]


def test_the_range_of_a_foreign_state_serves_nobody() -> None:
    found = measured(prepared_for(Inner()), X)
    assert {type(p) for p in problems(reuse(prepared_for(MinMax()), found).failure())} == {Unobserved}
    logs = [x.abs() for x in batches(2, 3, 3)]
    custom = CustomConfig(non_traceable_types=(Doubling,))
    graph = unwrap(trace(Writing().eval(), logs[0], custom=custom))
    prepared = unwrap(prepare(graph, mapping(Inner()), custom=custom))
    error = calibrate(prepared, [*logs, torch.zeros(3, 3)]).failure()
    assert isinstance(problems(error)[0], NonFinite)


def test_a_merge_that_raises_is_told_where_values_share() -> None:
    prepared = prepared_for(Inner(failing="merge"))
    assert max(len(site.taps) for site in prepared.sites.values()) > 1
    (problem,) = problems(calibrate(prepared, X).bind(convert).failure())
    assert isinstance(problem, UserFunctionFailed)
    assert "'mine'" in problem.reason


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A user's observer around one of qfunc's."""

    observer: Any = field(default_factory=MinMax)

    @property
    def spec(self) -> QuantSpec:
        return UINT8

    @property
    def statistic(self) -> Any:
        return ("wrapped", self.observer.statistic)

    def init(self) -> Any:
        return self.observer.init()

    def update(self, state: Any, tensor: Tensor) -> Any:
        return self.observer.update(state, tensor)

    def finish(self, state: Any) -> Any:
        raise KeyError("mine")


def test_a_users_wrapper_is_the_users() -> None:
    failure = calibrate(prepared_for(Wrapper()), X).bind(convert).failure()
    assert {type(problem) for problem in problems(failure)} == {UserFunctionFailed}


def test_observers_and_hooks_may_not_write() -> None:
    data = [x.clone() for x in X[:2]]
    error = calibrate(prepared_for(Inner(failing="writes")), data).failure()
    assert isinstance(error, UserFunctionFailed)
    assert "writes to the tensor" in error.reason
    error = calibrate(prepared_for(MinMax()), data, hook=lambda _, value: value.zero_()).failure()
    assert isinstance(error, UserFunctionFailed)
    assert "writes to the value" in error.reason


class Pair(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_that_differ_cannot_share(channels: int) -> None:
    graph = unwrap(trace(Pair(channels).eval(), X[0]))
    per_channel = PerChannelMinMax(QuantSpec("uint8", 0, 255, "per_channel_affine", 1))
    annotations = Annotations(outputs=pmap({"a": per_channel, "b": SharedWith("a")}), taps=frozenset({"b"}))
    failure = prepare(graph, annotations).bind(lambda p: calibrate(p, X)).bind(convert).failure()
    assert isinstance(failure, BadConfig)
    assert f"3 channels, the other {channels}" in failure.reason


# Types and layouts


class Towers(nn.Module):
    """A quantized tower, and one that stays in another type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) + self.b(y).float()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_clipping_keeps_the_type(dtype: torch.dtype) -> None:
    data = [(x, x.to(dtype)) for x in batches(3, 2, 4)]
    graph = unwrap(trace(Towers(dtype).eval(), data[0]).bind(fuse))
    spoiled = [data[0], (data[1][0] * math.inf, data[1][1] * math.inf), data[2]]
    prepared = unwrap(prepare(graph, mapping(MinMax()).set_module_name("b", None)))
    found = unwrap(calibrate(prepared, spoiled, policy="clip"))
    assert found.statistics.batches == 3
    assert found.warnings


class Casts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_inputs_of_8_bit_floats(dtype: torch.dtype) -> None:
    data = [x.to(dtype) for x in batches(3, 2, 4)]
    prepared = unwrap(trace(Casts().eval(), data[0]).bind(fuse).bind(lambda graph: prepare(graph, mapping(MinMax()))))
    assert measured(prepared, data).batches == 3
    spoiled = [data[0], torch.full((2, 4), math.nan).to(dtype)]
    assert isinstance(problems(calibrate(prepared, spoiled).failure())[0], NonFinite)
    assert unwrap(calibrate(prepared, spoiled, policy="clip")).statistics.batches == 2


def test_sparse_tensors_are_told() -> None:
    prepared = unwrap(prepare(unwrap(trace(nn.Sequential(nn.Linear(4, 4)).eval())), mapping(MinMax())))
    error = calibrate(prepared, [torch.eye(4).to_sparse()]).failure()
    assert isinstance(error, UnsupportedDType)
    assert "sparse" in error.reason


# What errors keep, and how to go on


def test_the_remedy_of_an_error_works() -> None:
    prepared, whole = prepared_for(MinMax()), measured(prepared_for(MinMax()), X)
    error = calibrate(prepared, [*X[:3], X[3] * math.nan, *X[4:]]).failure()
    assert "statistics=kept(error)" in error.remedy
    assert unwrap(calibrate(prepared, X[3:], statistics=kept(error))).statistics == whole
    sharded = calibrate_sharded(prepared, [X[:2], [X[2], X[3] * math.nan], X[4:]]).failure()
    rest = [X[2:4]]
    assert unwrap(calibrate_sharded(prepared, rest, statistics=kept(sharded))).statistics == whole
    one = quantize(Branches().eval(), [X[0], X[1] * math.nan], qconfig_mapping=mapping(MinMax())).failure()
    again = unwrap(quantize(Branches().eval(), X[1:], statistics=kept(one), qconfig_mapping=mapping(MinMax())))
    whole_way = unwrap(quantize(Branches().eval(), X, qconfig_mapping=mapping(MinMax())))
    assert digest(again.graph) == digest(whole_way.graph)


def test_the_same_call_goes_on_from_its_checkpoint(tmp_path) -> None:
    prepared, path = prepared_for(MinMax()), tmp_path / "statistics"
    error = calibrate(prepared, [*X[:3], X[3] * math.nan, *X[4:]], checkpoint=path).failure()
    assert "same call again" in error.remedy
    assert unwrap(calibrate(prepared, X, checkpoint=path)).statistics == measured(prepared, X)


def test_the_layer_that_fails_is_named() -> None:
    bad, _ = problems(calibrate(prepared_for(MinMax()), [X[0], X[0][:, :2]]).failure())
    assert isinstance(bad, BadBatch)
    assert "at left, " in bad.reason
    assert "float32[2, 2, 8, 8]" in bad.reason


def test_custom_modules_are_kept_from_bad_inputs() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.lstm = nn.Linear(4, 4), nn.LSTM(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.first(x))[0]

    custom = CustomConfig(custom_modules=(QUANTIZABLE_LSTM,))
    data = batches(3, 5, 2, 4)
    spoiled = [data[0], data[1] * math.nan, data[2]]
    graph = unwrap(trace(Recurrent().eval(), data[0], custom=custom).bind(lambda g: fuse(g, custom=custom)))
    prepared = unwrap(prepare(graph, mapping(MinMax()), custom=custom))
    assert prepared.swapped
    found = unwrap(calibrate(prepared, spoiled, policy="skip"))
    assert found.statistics == measured(prepared, [data[0], data[2]])
    error = calibrate(prepared, spoiled).failure()
    assert "from the beginning" in error.remedy


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda o: type(o).__name__)
def test_nan_is_seen_whatever_observes(observer: Any) -> None:
    custom = CustomConfig(non_traceable_types=(Doubling,))
    graph = unwrap(trace(Writing().eval(), torch.ones(3, 3), custom=custom))
    entries = QConfigMapping().set_global(QConfig(observer, WEIGHT)).set_output("log", observer)
    prepared = unwrap(prepare(graph, entries, custom=custom))
    assert any(fold.taps == ("log",) and fold.observer == observer for fold in prepared.folds)
    first, *_ = problems(calibrate(prepared, [torch.ones(3, 3), torch.zeros(3, 3)]).failure())
    assert isinstance(first, NonFinite)
    assert (first.node, "batch 1" in first.reason) == ("log", True)
