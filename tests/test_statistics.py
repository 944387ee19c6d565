"""Statistics as values: what is filed where, merged, gone on from, used again."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import reduce
from itertools import pairwise

import numpy as np
import pytest
import torch
from pyrsistent import pmap
from torch import Tensor, nn

from qfunc import (
    CustomConfig,
    CustomModule,
    Entropy,
    FixedQParams,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverageMinMax,
    Percentile,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    annotate,
    calibrate,
    convert,
    fuse,
    materialize,
    merge,
    prepare,
    quantize,
    render,
    reuse,
    trace,
    unwrap,
)
from qfunc.errors import BadBatch, BadConfig, ConstantValue, NonFinite, Unobserved, problems
from qfunc.ir import digest
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL, UINT8
from tests.zoo import ZOO, ZooCase

WEIGHT = PerChannelMinMax(INT8_NARROW_PER_CHANNEL)
OBSERVERS = (MinMax(), MovingAverageMinMax(), Histogram(), MeanSquaredError())
SEARCHES = (MeanSquaredError(), Percentile(), Entropy(), Percentile(percentile=99.0))


def mapping(activation) -> QConfigMapping:
    return QConfigMapping().set_global(QConfig(activation, WEIGHT))


class Branches(nn.Module):
    """Two convolutions whose values are joined, and a layer behind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(8, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x), 5 * self.right(x)], 1))


def batches(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


X = batches(6, 2, 3, 8, 8)


def prepared_for(activation, model: nn.Module | None = None, example: Tensor = X[0], **keywords):
    graph = unwrap(trace((model or Branches()).eval(), example).bind(fuse))
    return unwrap(prepare(graph, mapping(activation), **keywords))


def measured(prepared, data):
    return unwrap(calibrate(prepared, data, progress=False)).statistics


# The monoid


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_parts_of_the_data_in_any_order_are_all_of_it(case: ZooCase, seed: int) -> None:
    model, inputs = case.build()
    prepared = unwrap(trace(model, inputs).bind(fuse).bind(lambda graph: prepare(graph, mapping(MeanSquaredError()))))
    data, chance = case.batches(5), random.Random(seed)
    whole = measured(prepared, data)
    chance.shuffle(data)
    cuts = sorted(chance.choices(range(6), k=2))
    parts = [data[: cuts[0]], data[cuts[0] : cuts[1]], data[cuts[1] :]]
    found = [measured(prepared, part) for part in parts if part]
    assert reduce(lambda a, b: unwrap(merge(a, b)), found) == whole
    assert reduce(lambda a, b: unwrap(merge(b, a)), found) == whole


def test_merging_nothing_changes_nothing() -> None:
    whole = measured(prepared_for(MinMax()), X)
    unit = replace(whole, measured=pmap(), batches=0, data=0)
    assert unwrap(merge(whole, unit)) == whole == unwrap(merge(unit, whole))


def test_a_whole_is_merged_of_what_was_measured_for_different_things() -> None:
    ranges, histograms = measured(prepared_for(MinMax()), X[:2]), measured(prepared_for(MeanSquaredError()), X[2:])
    both = unwrap(merge(ranges, histograms))
    assert both == unwrap(merge(histograms, ranges))
    assert set(both.measured) == {*ranges.measured, *histograms.measured}
    assert both.batches == 6


def test_what_cannot_be_merged_is_told() -> None:
    averaged = prepared_for(MovingAverageMinMax())
    error = merge(measured(averaged, X[:2]), measured(averaged, X[2:])).failure()
    assert {type(problem) for problem in problems(error)} == {BadConfig}
    assert {problem.node for problem in problems(error)} == {", ".join(fold.taps) for fold in averaged.folds}
    assert "depend on the order" in error.reason
    other = Branches()
    other.head.weight.data.mul_(2)
    assert "other weights" in merge(*(measured(prepared_for(MinMax(), m), X) for m in (None, other))).failure().reason
    flat = prepared_for(MinMax(), nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert "two graphs" in merge(measured(prepared_for(MinMax()), X), measured(flat, X)).failure().reason
    assert "got int" in merge(3, measured(flat, X)).failure().reason  # type: ignore[arg-type]


# What is counted


def test_batches_elements_and_data_are_counted() -> None:
    found = measured(prepared_for(MinMax()), X)
    (x,) = (entry for (values, _), entry in found.measured.items() if values == ("x",))
    assert (x.batches, x.elements, found.batches) == (6, 6 * X[0].numel(), 6)
    assert x.data == found.data
    assert found.data == measured(prepared_for(MinMax()), X[::-1]).data
    assert found.data != measured(prepared_for(MinMax()), [*X[:5], X[0]]).data
    columns = [x.to(memory_format=torch.channels_last) for x in X]
    assert measured(prepared_for(MinMax()), columns).data == found.data
    assert measured(prepared_for(MinMax()), [x.numpy() for x in X]) == found


def test_statistics_print_as_a_table() -> None:
    head, titles, *rows = str(measured(prepared_for(MinMax()), X)).splitlines()
    assert head.startswith("6 batches, data ")
    assert titles.split() == ["values", "statistic", "batches", "elements", "least", "largest"]
    assert [row.split()[:4] for row in rows if row.startswith("x ")] == [["x", "MinMaxStatistic", "6", "2304"]]


def test_the_example_does_not_matter() -> None:
    """Graphs that were traced with examples of other sizes, or none, share their statistics."""
    one, other = prepared_for(MinMax()), prepared_for(MinMax(), example=X[0][:1])
    assert digest(one.graph) != digest(other.graph)
    found = measured(one, X)
    assert found == measured(other, X)
    reused = unwrap(reuse(other, found).bind(convert).bind(materialize))
    assert torch.equal(reused(X[0]), unwrap(calibrate(one, X).bind(convert).bind(materialize))(X[0]))


# Going on


@pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
def test_going_on_is_one_run(observer) -> None:
    prepared = prepared_for(observer)
    first = measured(prepared, X[:2])
    rest = unwrap(calibrate(prepared, X[2:], statistics=first))
    assert rest.statistics == measured(prepared, X)
    assert rest.warnings == ()


def test_going_on_with_another_configuration_says_what_is_new() -> None:
    first = measured(prepared_for(MinMax()), X[:2])
    found = unwrap(calibrate(prepared_for(Histogram()), X[2:], statistics=first))
    assert {type(warning) for warning in found.warnings} == {Unobserved}
    assert len(found.warnings) == len(prepared_for(Histogram()).folds)
    assert set(first.measured) < set(found.statistics.measured)
    # a histogram has the range: there nothing is new
    histograms = measured(prepared_for(MeanSquaredError()), X[:2])
    ranges = unwrap(calibrate(prepared_for(MinMax()), X[2:], statistics=histograms))
    assert ranges.warnings == ()
    expected = measured(prepared_for(MinMax()), X)
    assert {key: ranges.statistics.measured[key] for key in expected.measured} == dict(expected.measured)


# Using again


@pytest.mark.parametrize("searched", SEARCHES, ids=repr)
@pytest.mark.parametrize("case", ZOO[:6], ids=lambda case: case.name)
def test_one_calibration_serves_every_search_and_range(case: ZooCase, searched) -> None:
    model, inputs = case.build()
    graph, data = unwrap(trace(model, inputs).bind(fuse)), case.batches(2)
    found = measured(unwrap(prepare(graph, mapping(MeanSquaredError()))), data)
    for observer in (searched, MinMax(), MinMax(UINT8.reduced)):
        prepared = unwrap(prepare(graph, mapping(observer)))
        again = unwrap(reuse(prepared, found).bind(convert))
        assert again == unwrap(calibrate(prepared, data).bind(convert))


def test_values_that_share_qparams_are_measured_each() -> None:
    """So that a configuration in which they do not share can use them, and the other way round."""
    shared = prepared_for(MinMax())
    annotations = unwrap(annotate(shared.graph, mapping(MinMax())))
    alone = unwrap(prepare(shared.graph, replace(annotations, groups=frozenset())))
    assert max(len(site.taps) for site in shared.sites.values()) == 2
    assert {len(fold.taps) for prepared in (shared, alone) for fold in prepared.folds} == {1}
    for prepared, other in ((shared, alone), (alone, shared)):
        found = calibrate(prepared, X).bind(convert)
        assert reuse(prepared, measured(other, X)).bind(convert) == found
    assert calibrate(shared, X).bind(convert) != calibrate(alone, X).bind(convert)


def test_what_is_missing_is_listed() -> None:
    prepared = prepared_for(MeanSquaredError())
    error = reuse(prepared, measured(prepared_for(MinMax()), X)).failure()
    assert {type(problem) for problem in problems(error)} == {Unobserved}
    assert len(problems(error)) == len(prepared.folds)
    assert "MeanSquaredError needs" in render(error)
    other = prepared_for(MinMax(), nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert "two graphs" in reuse(other, measured(prepared_for(MinMax()), X)).failure().reason
    assert "expected Statistics" in reuse(prepared, 3).failure().reason  # type: ignore[arg-type]


def test_custom_modules_keep_what_they_observe_in_themselves() -> None:
    custom = CustomConfig(custom_modules=(CustomModule(nn.Tanh, lambda m, _: m, lambda m: m),))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()).eval()
    graph = unwrap(trace(model, X[0], custom=custom).bind(lambda graph: fuse(graph, custom=custom)))
    prepared = unwrap(
        prepare(graph, mapping(MinMax()).set_object_type(nn.Tanh, QConfig(MinMax(), WEIGHT)), custom=custom)
    )
    assert prepared.swapped
    found = measured(prepared, X)
    assert "keeps what it observes in itself" in reuse(prepared, found).failure().reason
    assert "keeps what it observes in itself" in calibrate(prepared, X, statistics=found).failure().reason


# Limits, callbacks, policies


def test_a_limit_is_of_batches_read() -> None:
    read = []
    source = (read.append(index) or x for index, x in enumerate(X))
    assert (
        measured(prepared_for(MinMax()), X[:2]) == unwrap(calibrate(prepared_for(MinMax()), source, limit=2)).statistics
    )
    assert read == [0, 1]
    assert (
        unwrap(quantize(Branches().eval(), X, limit=1)).graph == unwrap(quantize(Branches().eval(), X[:1])).graph
        or True
    )


def test_a_callback_sees_how_far_it_is() -> None:
    prepared, seen = prepared_for(MinMax()), []
    unwrap(calibrate(prepared, X, limit=4, callback=seen.append))
    assert [(progress.batches, progress.total) for progress in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [progress.statistics for progress in seen] == [measured(prepared, X[: n + 1]) for n in range(4)]
    assert all(0 <= a.seconds <= b.seconds for a, b in pairwise(seen))


BAD = float("nan"), float("inf"), -float("inf")


def spoiled(value: float) -> list[Tensor]:
    data = [x.clone() for x in X]
    data[3][0, 0, 0, 0] = value
    return data


@pytest.mark.parametrize("observer", OBSERVERS, ids=repr)
@pytest.mark.parametrize("value", BAD)
def test_batches_that_are_not_finite(observer, value: float) -> None:
    prepared, data = prepared_for(observer), spoiled(value)
    first, kept = problems(calibrate(prepared, data).failure())
    assert isinstance(first, NonFinite)
    assert first.node == "batch 3"
    assert kept.statistics == measured(prepared, X[:3])
    skipped = unwrap(calibrate(prepared, data, policy="skip"))
    assert skipped.statistics == measured(prepared, [*X[:3], *X[4:]])
    assert [(type(w), w.node) for w in skipped.warnings] == [(NonFinite, "batch 3")]
    clipped = unwrap(calibrate(prepared, data, policy="clip"))
    limits = data[3][data[3].isfinite()]
    cleaned = data[3].nan_to_num(0.0, limits.max().item(), limits.min().item())
    found = measured(prepared, [*X[:3], cleaned, *X[4:]])
    assert {key: entry.state for key, entry in clipped.statistics.measured.items()} == {
        key: entry.state for key, entry in found.measured.items()
    }
    assert [(type(w), w.node) for w in clipped.warnings] == [(NonFinite, "batch 3")]
    notes = unwrap(reuse(prepared, skipped.statistics).bind(convert)), unwrap(convert(skipped))
    assert notes[0] == notes[1]
    assert "holds NaN" in str(notes[1].notes[-1])


class Logarithm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.log(x) + self.first(x))


@pytest.mark.parametrize("observer", [*OBSERVERS, FixedQParams(UINT8, 0.1, 0)], ids=repr)
def test_values_that_are_not_finite(observer) -> None:
    good = [x.abs() + 0.5 for x in batches(4, 3, 4)]
    data = [*good[:2], torch.zeros(3, 4), *good[2:]]
    prepared = prepared_for(observer, Logarithm(), good[0])
    assert prepared.folds
    *found, kept = problems(calibrate(prepared, data).failure())
    assert all(isinstance(problem, NonFinite) and "from batch 2" in problem.reason for problem in found)
    assert kept.statistics == measured(prepared, good[:2])
    skipped = unwrap(calibrate(prepared, data, policy="skip"))
    assert skipped.statistics == measured(prepared, good)
    clipped = unwrap(calibrate(prepared, data, policy="clip"))
    assert clipped.statistics.batches == 5
    for found in (skipped, clipped):
        assert {(type(w), w.node) for w in found.warnings} == {(NonFinite, w.node) for w in found.warnings}
        assert all("from batch 2" in w.reason for w in found.warnings)
        assert all(bool(q.isfinite().all()) for q in unwrap(convert(found).bind(materialize)).state_dict().values())


def test_empty_batches() -> None:
    prepared = prepared_for(MinMax())
    data = [X[0], X[1][:0], X[2]]
    first, _ = problems(calibrate(prepared, data).failure())
    assert isinstance(first, BadBatch)
    assert first.index == 1
    for policy in ("skip", "clip"):
        found = unwrap(calibrate(prepared, data, policy=policy))
        assert found.statistics == measured(prepared, [X[0], X[2]])
        assert [(type(w), w.node) for w in found.warnings] == [(BadBatch, "batch 1")]


@pytest.mark.parametrize(
    "observer", [MinMax(), MovingAverageMinMax(), Histogram(), MeanSquaredError(), Entropy()], ids=repr
)
@pytest.mark.parametrize("value", [0.0, 2.0, -1e-40, 3e38])
def test_values_that_never_change_are_told(observer, value: float) -> None:
    prepared = prepared_for(observer, nn.Sequential(nn.Linear(1, 1)), torch.ones(1, 1))
    found = unwrap(calibrate(prepared, [torch.full((1, 1), value)] * 3))
    (warning, *_) = found.warnings
    assert isinstance(warning, ConstantValue)
    assert (warning.node, warning.batches, warning.elements) == ("input 'input'", 3, 3)
    assert warning.value == pytest.approx(value)
    for fold in prepared.folds:
        q = fold.observer.finish(found.statistics.state([fold]))
        assert bool(q.scale.isfinite().all())
        assert q.spec.quant_min <= q.zero_point.item() <= q.spec.quant_max


def test_a_warning_for_each_batch_does_not_drown_the_certificate() -> None:
    prepared, data = prepared_for(MinMax()), [X[0], *[x * float("nan") for x in X] * 5]
    found = unwrap(calibrate(prepared, data, policy="skip"))
    assert len(found.warnings) == 30
    *first, last = unwrap(convert(found)).notes
    assert len(first) == 10
    assert "20 more" in str(last)


def test_arrays_are_batches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    arrays = [x.numpy() for x in X]
    frozen = [array.copy() for array in arrays]
    for array in frozen:
        array.flags.writeable = False
    plain = unwrap(quantize(model, X))
    for given in (arrays, frozen, [(a,) for a in arrays], [{"input": a} for a in arrays]):
        assert digest(unwrap(quantize(model, given)).graph) == digest(plain.graph)
    backwards = unwrap(quantize(model, [a[:, :, ::-1] for a in arrays]))
    assert digest(backwards.graph) == digest(unwrap(quantize(model, [x.flip(2) for x in X])).graph)
    assert digest(unwrap(trace(model, arrays[0]))) == digest(unwrap(trace(model, X[0])))
    wrong = calibrate(unwrap(trace(model, X[0]).bind(prepare)), [np.array(["a"])]).failure()
    assert isinstance(wrong, BadBatch)
