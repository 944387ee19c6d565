"""What calibration has measured, as a value: per value of a graph and kind of statistic, with what it was measured on.

`merge` makes `Statistics` of one graph a commutative monoid wherever their statistics can be merged, so that data may
be split over runs, processes and machines: associative and commutative, with the statistics of no data as unit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, TypeAlias

from pyrsistent import PMap, pmap
from returns.result import Failure, Success

from qfunc.config.columns import aligned
from qfunc.errors import BadConfig, Problem, UserFunctionFailed, WrongStage, several, told
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import Observer
from qfunc.numerics.statistic import MinMaxStatistic, RangeState, derived, range_in
from qfunc.result import R

Key: TypeAlias = tuple[tuple[str, ...], Any]
"""What a state is filed under: the values that were observed, and the statistic."""

Merge: TypeAlias = Callable[[Any, Any], Any]

MODULUS = 2**256
"""Digests of data are sums of the digests of its batches, to this modulus."""


@dataclass(frozen=True, slots=True)
class Fold:
    """What calibration does at one key: folds all that the values `taps` hold with `observer`, in graph order."""

    taps: tuple[str, ...]
    observer: Observer[Any]

    @property
    def key(self) -> Key:
        """Equal for observers that measure the same."""
        return self.taps, self.observer.statistic


def folds_of(taps: tuple[str, ...], observer: Observer[Any]) -> tuple[Fold, ...]:
    """One fold for each value where states can be merged, so that other configurations can use each; else one for all.

    >>> from qfunc.numerics.observers import MinMax, MovingAverageMinMax
    >>> len(folds_of(("a", "b"), MinMax())), len(folds_of(("a", "b"), MovingAverageMinMax()))
    (2, 1)
    """
    return (Fold(taps, observer),) if merge_of(observer) is None else tuple(Fold((tap,), observer) for tap in taps)


def merge_of(observer: Any) -> Merge | None:
    """How states of an observer are merged: by its `merge`, or its statistic's; None where there is none."""
    inner = observer.observer if isinstance(observer, FakeQuantize) else observer
    offered = (getattr(each, "merge", None) for each in (inner, inner.statistic))
    return next((merge for merge in offered if callable(merge)), None)


@dataclass(frozen=True, slots=True)
class Measured:
    """A state, and how much data it is of: batches, elements, and the sum of the batches' digests."""

    state: Any
    batches: int = 0
    elements: int = 0
    data: int = 0
    merge: Merge | None = field(default=None, compare=False, repr=False)
    """How the state is merged with another one; None where it cannot be."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was measured on the values of one graph with its weights; independent of what asked for it.

    `graph` is the digest of the fused graph without what examples showed of it, `weights` that of what its tensors
    hold; `batches` and `data` count all that was run through it: the number, and the sum of the SHA-256 digests of the
    batches modulo 2**256, which does not depend on their order or on how they were spread.
    """

    graph: str
    weights: str = ""
    measured: PMap[Key, Measured] = pmap()
    batches: int = 0
    data: int = 0

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Statistics({self.batches} batches, {len(self.measured)} measured)"

    def __str__(self) -> str:
        rows = sorted(_row(key, entry) for key, entry in self.measured.items())
        head = f"{self.batches} batches, data {self.data:064x}"
        return "\n".join([head, *aligned([("values", "statistic", "batches", "elements", "least", "largest"), *rows])])

    def state(self, folds: Iterable[Fold]) -> Any | None:
        """The state of all that some folds of one observer are of; None where any of it is missing: see `Answers`."""
        found = Answers(self).find(folds)
        return found.state if isinstance(found, Measured) else None


class Answers:
    """What statistics tell of folds, whatever they were measured for; looked over once, for any number of questions."""

    def __init__(self, statistics: Statistics) -> None:
        self._of: dict[tuple[str, ...], dict[Any, Measured]] = {}
        for (values, statistic), entry in statistics.measured.items():
            self._of.setdefault(values, {})[statistic] = entry

    def find(self, folds: Iterable[Fold]) -> Measured | Problem | None:
        """What was measured for all folds of one observer, merged; None where any is missing, or there are none.

        A problem where the states cannot be merged: the values have different numbers of channels, or a user's `merge`
        raises.
        """
        asked = tuple(folds)
        found = [entry for fold in asked if (entry := self.entry(fold)) is not None]
        if not found or len(found) < len(asked):
            return None
        whole: Measured | Problem = found[0]
        for fold, entry in zip(asked[1:], found[1:], strict=True):
            if isinstance(whole, Measured):
                whole = _joined(fold.key, replace(whole, merge=merge_of(fold.observer)), entry)
        return whole

    def uneven(self, folds: Iterable[Fold]) -> Iterator[tuple[Fold, Measured, int]]:
        """The folds that were measured on fewer batches than another one; with how many that has seen."""
        found = [(fold, entry) for fold in folds if (entry := self.entry(fold)) is not None]
        most = max((entry.batches for _, entry in found), default=0)
        yield from ((fold, entry, most) for fold, entry in found if entry.batches < most)

    def missing(self, folds: Iterable[Fold]) -> tuple[Fold, ...]:
        """The folds that are still to be run over data."""
        return tuple(fold for fold in folds if self.entry(fold) is None)

    def entry(self, fold: Fold) -> Measured | None:
        """What was measured for a fold, or for something else that tells as much: a histogram has the range.

        Where several tell of a range, it is that of them all, which is right however their data overlap; the counts are
        of the one that saw most.
        """
        values, wanted = fold.key
        entries = self._of.get(values, {})
        direct = entries.get(wanted)
        if not isinstance(wanted, MinMaxStatistic):
            return direct
        found = [] if direct is None else [direct]
        for statistic, entry in entries.items():
            if statistic != wanted and (state := derived(statistic, entry.state, wanted)) is not None:
                found.append(replace(entry, state=state))
        if len(found) < 2:
            return next(iter(found), None)
        most = max(found, key=lambda entry: (entry.elements, entry.batches, entry.data))
        return replace(most, state=reduce(wanted.merge, (entry.state for entry in found)))


def merge(a: Statistics, b: Statistics) -> R[Statistics]:
    """The statistics of all data of both, whatever the order: what one run over all of it would have given.

    Returns:
        The statistics, or `BadConfig` for those of other graphs or other weights, and for each value that both measured
        with a statistic that cannot be merged (moving averages, reference histograms), or in shapes that do not go
        together; `UserFunctionFailed` for a user's `merge` that raises; `WrongStage`.

    >>> merge(Statistics("g", batches=2, data=5), Statistics("g", batches=1, data=7)).unwrap().batches
    3
    """
    wrong = [WrongStage(type(one).__name__, "Statistics") for one in (a, b) if not isinstance(one, Statistics)]
    if wrong:
        return Failure(several(wrong))
    problems: list[Problem] = list(differences(a, b))
    merged = a.measured.evolver()
    for key, entry in b.measured.items():
        made = _joined(key, a.measured[key], entry) if key in a.measured else entry
        if isinstance(made, Measured):
            merged[key] = made
        else:
            problems.append(made)
    if problems:
        return Failure(several(sorted(problems, key=lambda problem: problem.node)))
    return Success(
        replace(a, measured=merged.persistent(), batches=a.batches + b.batches, data=(a.data + b.data) % MODULUS)
    )


def differences(a: Statistics, b: Statistics) -> Iterator[Problem]:
    """Why statistics are of no one model."""
    if a.graph != b.graph:
        remedy = "prepare the same model, fused alike, wherever statistics are to go together"
        yield BadConfig("statistics", "they were measured on two graphs", remedy)
    elif a.weights != b.weights:
        yield BadConfig("statistics", "they were measured with other weights", "calibrate again with these weights")


def _joined(key: Key, a: Measured, b: Measured) -> Measured | Problem:
    name, of = ", ".join(key[0]), _name(key[1])
    # States that come from files know of no merge that is their observer's.
    merge = a.merge or b.merge
    if merge is None:
        remedy = "measure all of it in one run, or configure observers that merge: MinMax, MeanSquaredError, Percentile"
        return BadConfig(name, f"states of {of} depend on the order of the data: two cannot be merged", remedy)
    if not _alike(a.state, b.state):
        reason = f"one has {len(a.state.minimum)} channels, the other {len(b.state.minimum)}"
        return BadConfig(
            name, reason, "choose the axis of the channels as ch_axis, or let the values not share qparams"
        )
    try:
        state = merge(a.state, b.state)
    except Exception as error:
        if str(getattr(merge, "__module__", "")).startswith("qfunc."):
            raise
        return UserFunctionFailed(name, f"the merge of {of} raised {told(error)}")
    return Measured(state, a.batches + b.batches, a.elements + b.elements, (a.data + b.data) % MODULUS, merge)


def _alike(a: object, b: object) -> bool:
    if not (isinstance(a, RangeState) and isinstance(b, RangeState)):
        return True
    return not (a.observed and b.observed) or a.minimum.shape == b.minimum.shape


def _name(statistic: object) -> str:
    return type(statistic).__name__ if type(statistic).__module__.startswith("qfunc.") else f"{statistic!r:.60}"


def _row(key: Key, entry: Measured) -> tuple[str, ...]:
    found = range_in(entry.state)
    ends = ("-", "-")
    if found is not None and found.observed:
        ends = f"{found.minimum.min():.6g}", f"{found.maximum.max():.6g}"
    return (", ".join(key[0]), _name(key[1]), str(entry.batches), str(entry.elements), *ends)
