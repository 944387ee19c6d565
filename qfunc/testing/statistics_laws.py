"""Law 9 through a model: statistics do not depend on how the data came, where the observers promise it."""

from __future__ import annotations

from functools import reduce

from returns.result import Failure

from qfunc.edge.calibrate import calibrate
from qfunc.edge.checkpoint import types_of
from qfunc.edge.statistics_file import from_bytes, to_bytes
from qfunc.errors import render
from qfunc.passes.stages import Calibrated
from qfunc.passes.statistics import Statistics, merge, merge_of
from qfunc.result import R
from qfunc.testing.walk import Walk


def going_on(given: Walk) -> str:
    """Calibration that goes on from the statistics of the first batch ends where one run over all does."""
    prepared, calibrated = given.prepared, given.calibrated
    if prepared is None or calibrated is None or prepared.swapped or len(given.case.batches) < 2:
        return ""
    first, *rest = given.case.batches
    begun = calibrate(prepared, [first], progress=False).map(_statistics)
    found = begun.bind(lambda earlier: calibrate(prepared, rest, statistics=earlier, progress=False))
    return _differs(found.map(_statistics), calibrated.statistics)


def parts(given: Walk) -> str:
    """Statistics of the batches one by one, merged backwards, are those of all."""
    prepared, calibrated = given.prepared, given.calibrated
    if prepared is None or calibrated is None or prepared.swapped or len(given.case.batches) < 2:
        return ""
    if any(merge_of(fold.observer) is None for fold in prepared.folds):
        return ""
    found = [calibrate(prepared, [batch], progress=False).map(_statistics) for batch in reversed(given.case.batches)]
    return _differs(reduce(_merged, found), calibrated.statistics)


def _statistics(calibrated: Calibrated) -> Statistics:
    return calibrated.statistics


def _merged(a: R[Statistics], b: R[Statistics]) -> R[Statistics]:
    return a.bind(lambda one: b.bind(lambda other: merge(one, other)))


def interpreted(given: Walk) -> str:
    """The interpreter and the generated code give the same statistics."""
    if given.prepared is None or given.calibrated is None or given.prepared.swapped:
        return ""
    found = calibrate(given.prepared, given.case.batches, hook=lambda _id, _value: None, progress=False)
    return _differs(found.map(_statistics), given.calibrated.statistics)


def kept(given: Walk) -> str:
    """Statistics that were written and read are the same, and their bytes are."""
    if given.prepared is None or given.calibrated is None:
        return ""
    statistics, types = given.calibrated.statistics, types_of(given.prepared)
    written = to_bytes(statistics, types=types)
    found = written.bind(lambda data: from_bytes(data, types=types)).map(lambda read: read[0])
    differs = _differs(found, statistics)
    return differs or ("" if found.bind(lambda read: to_bytes(read, types=types)) == written else "other bytes")


def _differs(found: R[Statistics], expected: Statistics) -> str:
    if isinstance(found, Failure):
        return render(found.failure())
    return "" if found.unwrap() == expected else f"{found.unwrap()}\nis not\n{expected}"
