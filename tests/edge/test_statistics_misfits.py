"""Files whose states do not suit the values that they are of: typed errors wherever they are used, no exceptions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pyrsistent import pmap
from returns.result import Failure, Success

from qfunc import Entropy, Histogram, MeanSquaredError, MinMax, Percentile, calibrate, convert, reuse, unwrap
from qfunc.edge.statistics_file import from_bytes, to_bytes
from qfunc.errors import BadConfig, Unobserved, UserFunctionFailed, problems
from qfunc.numerics.exact_histogram import ExactHistogramState
from qfunc.numerics.statistic import HistogramState, MinMaxStatistic, NoState, RangeState
from qfunc.passes.finish import finish
from qfunc.passes.stages import Calibrated
from qfunc.passes.statistics import Statistics
from tests.edge.measuring import OBSERVERS, TYPES, batches, prepared_for, with_channels


def measured(observer) -> Statistics:
    return unwrap(calibrate(prepared_for(observer), batches(3))).statistics


def loaded(statistics: Statistics) -> Statistics:
    return unwrap(from_bytes(unwrap(to_bytes(statistics, types=TYPES)), types=TYPES))[0]


def with_states(statistics: Statistics, change) -> Statistics:
    """The statistics as a file holds them whose states were changed."""
    changed = {key: replace(entry, state=change(key[1], entry.state)) for key, entry in statistics.measured.items()}
    return loaded(replace(statistics, measured=pmap(changed)))


def kinds(result) -> set[type]:
    assert isinstance(result, Failure), result
    found = problems(result.failure())
    assert all(problem.reason and problem.remedy for problem in found)
    return {type(problem) for problem in found}


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_channels(channels: int) -> None:
    prepared = prepared_for(OBSERVERS["PerChannelMinMax"])
    right = measured(OBSERVERS["PerChannelMinMax"])
    assert isinstance(convert(Calibrated(prepared, loaded(right))), Success)
    assert isinstance(convert(Calibrated(prepared, loaded(with_channels(right, 5)))), Success)
    wrong = loaded(with_channels(right, channels))
    assert kinds(calibrate(prepared, batches(2), statistics=wrong)) == {BadConfig}
    found = convert(Calibrated(prepared, wrong))
    assert kinds(found) == {BadConfig}
    (problem,) = problems(found.failure())
    assert problem.node == "0"
    assert problem.reason == f"along ch_axis 1 the example had 5 channels, its statistics are of {channels} channels"
    assert kinds(calibrate(prepared, (), statistics=wrong).bind(convert)) == {BadConfig}
    assert kinds(reuse(prepared, wrong).bind(convert)) == {BadConfig}


FOREIGN = {
    "a range": RangeState(torch.tensor(-1.0), torch.tensor(1.0)),
    "ranges": RangeState(-torch.ones(3), torch.ones(3)),
    "nothing": RangeState.unobserved(),
    "None": None,
    "a number": 3,
    "tensors": (torch.ones(2), torch.ones(3)),
    "a tensor": torch.ones(3),
    "no state": NoState(),
}


@pytest.mark.parametrize("state", FOREIGN)
@pytest.mark.parametrize("name", ["Sketching", "plain"])
def test_states_of_others_for_an_observer_of_the_users(name: str, state: str) -> None:
    prepared = prepared_for(OBSERVERS[name])
    own = MinMaxStatistic()
    wrong = with_states(measured(OBSERVERS[name]), lambda of, was: was if of == own else FOREIGN[state])
    assert kinds(calibrate(prepared, batches(2), statistics=wrong)) == {UserFunctionFailed}
    assert kinds(convert(Calibrated(prepared, wrong))) == {UserFunctionFailed}


@pytest.mark.parametrize("name", [name for name in OBSERVERS if name not in ("Sketching", "plain")])
def test_states_of_no_data(name: str) -> None:
    prepared, statistics = prepared_for(OBSERVERS[name]), measured(OBSERVERS[name])
    for given in (with_states(statistics, lambda of, _: of.init()), loaded(replace(statistics, measured=pmap()))):
        assert kinds(convert(Calibrated(prepared, given))) == {Unobserved}
        assert isinstance(calibrate(prepared, batches(2), statistics=given).bind(convert), Success)


MOST = torch.finfo(torch.float32).max
LEAST = math.ldexp(1.0, -149)
RANGING = [MinMax(), Histogram(bins=32), Percentile(bins=32), MeanSquaredError(bins=64), Entropy(bins=64)]
RANGES = [(-1.0, 2.0), (-MOST, MOST), (0.0, LEAST), (-LEAST, 0.0), (0.0, 0.0), (5.0, 5.0), (MOST, MOST), (-LEAST, MOST)]


def extreme(low: float, high: float, most: bool):
    """States of a range with as much counted in every bin as can be, or in the last one."""

    def change(statistic, state):
        if isinstance(state, HistogramState):
            counts = torch.full_like(state.counts, MOST)
            counts[:-1] *= most
            return HistogramState(counts, RangeState(torch.tensor(low), torch.tensor(high)))
        if isinstance(state, ExactHistogramState):
            made = statistic.update(statistic.init(), torch.tensor([low, high]))
            counts = torch.full_like(made.counts, 2**47)
            counts[:-1] *= most
            return replace(made, counts=counts)
        return RangeState(torch.full_like(state.minimum, low), torch.full_like(state.maximum, high))

    return change


@pytest.mark.parametrize("most", [True, False], ids=["everywhere", "last"])
@pytest.mark.parametrize("ends", RANGES, ids=str)
@pytest.mark.parametrize(
    "observer",
    [MinMax(), Histogram(bins=32), Percentile(bins=32), MeanSquaredError(bins=64), Entropy(bins=64)],
    ids=repr,
)
def test_extreme_states_give_finite_scales(observer, ends: tuple[float, float], most: bool) -> None:
    prepared = prepared_for(observer)
    wrong = with_states(measured(observer), extreme(*ends, most))
    made = Calibrated(prepared, wrong)
    found, told = finish(made)
    assert found
    assert not told
    assert all(math.isfinite(q.scale.item()) and q.scale.item() > 0 for q in found.values())
    assert isinstance(convert(made), Success)
    # What goes on from it is right, or told when it is written.
    went_on = unwrap(calibrate(prepared, batches(2), statistics=wrong))
    written = to_bytes(went_on.statistics)
    assert isinstance(written, Success) or kinds(written) == {BadConfig}
