"""qparams equal torch.ao's wherever those are finite, on thousands of generated tensors; what differs has a reason.

A failure names the seed of the case and the observer: `judge(setting, case(seed), Tally())` is all there is to do
again; for a histogram, `case(seed, *HISTOGRAM_AXIS)`.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

import pytest
import torch
from torch import Tensor

from qfunc.testing import oracle
from tests.parity.generated_tensors import KINDS, Case, case, kind_of
from tests.parity.histogram_sides import DIFFERENCES, HALF, can_count, place, well_told
from tests.parity.observer_exceptions import EXCEPTIONS, Seen
from tests.parity.observer_settings import SETTINGS
from tests.parity.observer_sides import Ours, Setting, Theirs, agree, finite, meant, ours_of, range_of, theirs_of

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
TENSORS = 2500
"""How many a part has; four parts an observer."""

SPECS = 8 if DEEP else 1
"""With how many of the specs each case is judged."""

HISTOGRAM_TENSORS = 2500 if DEEP else 60
HISTOGRAM_AXIS = (100, 300)
"""The last axis of a tensor for a histogram: long enough to fill bins."""

SLOW = {"subnormal", "mixed magnitudes", "border", "huge", "narrow", "single", "huge beside small"}
SLOW |= {kind for kind in KINDS if "constant" in kind}
"""The classes on which torch.ao's search takes all its 100,000 steps, a second or two: of these one case in eight."""


@dataclass(slots=True)
class Tally:
    """How many channels came out how; `worst` is the largest relative difference of finite scales that count as one."""

    tensors: int = 0
    channels: Counter[str] = field(default_factory=Counter)
    worst: float = 0.0

    def same(self, ours: Ours, theirs: Theirs, where: Tensor) -> None:
        """Count the channels `where` both agree."""
        if ours.found is None or theirs.found is None or not where.any():
            return
        a, b = ours.found.scale.double()[where], theirs.found.scale.double()[where]
        exact = (a == b) & (ours.found.zero_point[where] == theirs.found.zero_point[where])
        self.channels["exact"] += int(exact.sum())
        self.channels["close"] += int((~exact).sum())
        self.worst = max(self.worst, ((a - b).abs() / b).max().item())


def judge(setting: Setting, tested: Case, tally: Tally) -> None:
    """Ours equal torch.ao's, or there is a reason why not and ours mean the range."""
    told = f"{setting} on {tested}"
    tensors = _fitting(setting, tested)
    tally.tensors += len(tensors)
    ours = ours_of(setting, tensors)
    if not any(x.numel() for x in tensors):
        _nothing_seen(setting, ours, theirs_of(setting, tensors), told)
        tally.channels["nothing seen"] += 1
        return
    assert ours.found is not None, told
    assert finite(ours.found).all(), told
    if setting.name == "HistogramObserver":
        _judge_histogram(setting, tensors, ours, told, tally)
        return
    theirs = theirs_of(setting, tensors)
    if setting.name == "FixedQParamsObserver":
        assert theirs.found is not None, told
        assert agree(ours.found, theirs.found, ours.spec).all(), told
        tally.same(ours, theirs, torch.tensor([True]))
        return
    _compare(_seen(setting, tensors, ours, theirs), told, tally)


def _seen(setting: Setting, tensors: tuple[Tensor, ...], ours: Ours, theirs: Theirs) -> Seen:
    """The range is the true one; but where torch.ao only rounds its average, it is that average, which is ours too."""
    low, high = range_of(setting, tensors)
    dims, rounding = min(x.dim() for x in tensors if x.numel()), 0.0
    if "Moving" in setting.name and theirs.found is not None:
        rounded = ~(theirs.overflowed | theirs.crossed)
        low = torch.where(rounded, theirs.low.double(), low)
        high = torch.where(rounded, theirs.high.double(), high)
    if "Moving" in setting.name:
        rounding = 2.0**-22 * max(x.double().abs().max().item() for x in tensors if x.numel())
    return Seen(setting, ours, theirs, dims, low, high, rounding)


def _fitting(setting: Setting, tested: Case) -> tuple[Tensor, ...]:
    """A tensor of no axis has no channels."""
    if "ch_axis" not in setting.given:
        return tested.tensors
    return tuple(x if x.dim() else x.reshape((1,) * (tested.ch_axis + 1)) for x in tested.tensors)


def _nothing_seen(setting: Setting, ours: Ours, theirs: Theirs, told: str) -> None:
    """torch.ao has a scale of 1 for what it never saw; ours is no qparams, which `convert` refuses by name."""
    if setting.name != "FixedQParamsObserver":
        assert ours.found is None, told
        assert theirs.found is not None, told
        assert (theirs.found.scale.tolist(), theirs.found.zero_point.tolist()) == ([1.0], [0]), told


def _compare(seen: Seen, told: str, tally: Tally) -> None:
    ours, theirs = seen.ours, seen.theirs
    assert ours.found is not None
    same = torch.zeros_like(seen.low, dtype=torch.bool)
    if theirs.found is not None:
        same = agree(ours.found, theirs.found, ours.spec) & finite(theirs.found)
    tally.same(ours, theirs, same)
    differs = ~same
    if not differs.any():
        return
    right = meant(ours.found, ours.spec, seen.low, seen.high, seen.rounding)
    assert right[differs].all(), f"{told}: {ours.found} is not the range"
    for name, row in EXCEPTIONS.items():
        excused = differs & row.applies(seen)
        tally.channels[name] += int(excused.sum())
        differs = differs & ~excused
    assert not differs.any(), f"{told}: {ours.found}, torch.ao {theirs.found or theirs.error}"


def _judge_histogram(setting: Setting, tensors: tuple[Tensor, ...], ours: Ours, told: str, tally: Tally) -> None:
    """As `_compare`; what the search itself does otherwise is judged by torch.ao's search in other words."""
    assert ours.found is not None
    if can_count(setting, tensors):
        theirs = theirs_of(setting, tensors)
        if theirs.found is not None and (agree(ours.found, theirs.found, ours.spec) & finite(theirs.found)).all():
            tally.same(ours, theirs, torch.tensor([True]))
            return
        names = [name for name, row in DIFFERENCES.items() if row.applies(setting, tensors)]
        names = names or ["of the spec"]
    else:
        half = any(x.dtype in HALF for x in tensors)
        names = ["histc of half precision" if half else "histc overflows"]
    right = well_told(setting, tensors)
    judged = Theirs(right.found, "", torch.tensor([False]), torch.tensor([False]), right.low, right.high)
    if names == ["of the spec"]:
        # in range and precision there is no excuse: the search must be the same, and only a table row can differ
        _compare(Seen(setting, ours, judged, 1, right.low, right.high), told, counted := Tally())
        assert not counted.channels["exact"] + counted.channels["close"], f"{told}: nothing excuses the search"
        tally.channels.update(counted.channels)
        return
    _compare(Seen(setting, ours, judged, 1, right.low, right.high), told, Tally())
    tally.channels[names[0]] += 1


def _chosen(name: str, tested: Case, specs: int) -> list[Setting]:
    fitting = [s for s in SETTINGS[name] if s.given.get("ch_axis", tested.ch_axis) == tested.ch_axis]
    return random.Random(tested.seed).sample(fitting, min(specs, len(fitting)))


def _seeds(name: str, part: int) -> Iterator[int]:
    for seed in count(100_000 * part):
        if name != "HistogramObserver" or kind_of(seed) not in SLOW or seed // len(KINDS) % 8 == 0:
            yield seed


def tally_of(name: str, part: int, tensors: int, specs: int) -> Tally:
    """Cases of a part through an observer, until they held that many tensors."""
    tally, made = Tally(), 0
    for seed in _seeds(name, part):
        tested = case(seed, *HISTOGRAM_AXIS) if name == "HistogramObserver" else case(seed)
        made += len(tested.tensors)
        for setting in _chosen(name, tested, specs):
            judge(setting, tested, tally)
        if made >= tensors:
            break
    return tally


def _told(name: str, part: int, tally: Tally) -> None:
    """`pytest -rP` shows the counts."""
    print(name, part, f"tensors: {tally.tensors}, largest difference: {tally.worst:.1e}", dict(tally.channels))
    assert tally.channels["exact"] > sum(tally.channels.values()) / 3


@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "HistogramObserver"])
def test_ranges(name, part):
    _told(name, part, tally_of(name, part, TENSORS, SPECS))


@pytest.mark.parametrize("part", range(4))
def test_histograms(part):
    _told("HistogramObserver", part, tally_of("HistogramObserver", part, HISTOGRAM_TENSORS, 1))


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_each_exception_is_one(name):
    """torch.ao differs on the example, and not for another reason; the float meaning says who is right."""
    row = EXCEPTIONS[name]
    ours, theirs = ours_of(row.setting, row.tensors), theirs_of(row.setting, row.tensors)
    seen = _seen(row.setting, row.tensors, ours, theirs)
    low, high = seen.low, seen.high
    if row.setting.name == "HistogramObserver":
        low, high, _ = well_told(row.setting, row.tensors)
    assert row.applies(seen).all()
    assert {other for other, tried in EXCEPTIONS.items() if tried.applies(seen).any()} <= {
        other for other, tried in EXCEPTIONS.items() if tried.applies is row.applies
    }
    assert ours.found is not None
    assert meant(ours.found, ours.spec, low, high).all()
    if theirs.found is None:
        assert row.fails
        assert theirs.error
    else:
        assert not (agree(ours.found, theirs.found, ours.spec) & finite(theirs.found)).any()
        assert meant(theirs.found, ours.spec, low, high).all() == (not row.fails)


@pytest.mark.parametrize("name", DIFFERENCES)
def test_each_difference_of_histograms_is_one(name):
    """torch.ao differs from itself when it is told in other words, and then agrees with ours."""
    row = DIFFERENCES[name]
    ours, theirs = ours_of(row.setting, row.tensors), theirs_of(row.setting, row.tensors)
    told = well_told(row.setting, row.tensors)
    assert row.applies(row.setting, row.tensors)
    assert ours.found is not None
    assert theirs.found is not None
    assert not agree(theirs.found, told.found, ours.spec).any()
    assert agree(ours.found, told.found, ours.spec).all()


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float32, -1e38, 1e38), (torch.float16, -250.0, 250.0), (torch.bfloat16, -2.9375, 15.4375)],
)
def test_what_cannot_be_counted_has_no_bin(dtype, low, high):
    """The place of the last number is infinite, or behind the last bin and its end."""
    bins = 500
    ends = torch.tensor([low, high]).to(dtype)
    setting = Setting("HistogramObserver", (("dtype", torch.quint8), ("bins", bins)))
    assert not can_count(setting, (ends,))
    assert place(ends[1], *ends, bins) > bins
    assert can_count(setting, (ends.float() * 1e-3,))


def test_a_case_is_made_again_from_its_seed():
    for seed in range(60):
        first, again = case(seed), case(seed)
        assert str(first) == str(again)
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(first.tensors, again.tensors, strict=True))


def test_the_comparison_sees_what_differs():
    """A scale 2e-6 off, a zero point one off, a code that leaves the range: none passes."""
    setting = SETTINGS["MinMaxObserver"][0]
    tensors = (torch.tensor([-1.0, 2.0]),)
    ours, theirs = ours_of(setting, tensors), theirs_of(setting, tensors)
    assert ours.found is not None
    assert theirs.found is not None
    scale, zero_point = theirs.found
    low, high = range_of(setting, tensors)
    assert agree(ours.found, theirs.found, ours.spec).all()
    assert meant(theirs.found, ours.spec, low, high).all()
    for wrong in (theirs.found._replace(scale=scale * (1 + 2e-6)), theirs.found._replace(zero_point=zero_point + 1)):
        assert not agree(ours.found, wrong, ours.spec).any()
    for wrong in (theirs.found._replace(scale=scale * 0.9), theirs.found._replace(zero_point=zero_point + 300)):
        assert not meant(wrong, ours.spec, low, high).any()
