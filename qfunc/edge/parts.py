"""Calibration of parts of the data, which are shards or ranks: what each gives, and how that goes together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from functools import reduce
from itertools import groupby
from typing import Any, TypeAlias

from returns.result import Failure, Success

from qfunc.edge.batches import length, not_batches, read
from qfunc.edge.calibrate import completed
from qfunc.edge.measure import Options, measure
from qfunc.edge.run import Point
from qfunc.errors import (
    BadBatch,
    BadConfig,
    Interrupted,
    Problem,
    QuantError,
    UserFunctionFailed,
    problems,
    several,
    told,
)
from qfunc.passes.custom_modules import kept_in_modules
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import Statistics, differences, merge, merge_of
from qfunc.result import R

Found: TypeAlias = R[Point]
"""What one part gave."""


def start_of(prepared: Prepared, statistics: Statistics | None) -> R[Point]:
    """Where calibration begins: the earlier statistics or none; or what can be told to be wrong before any data."""
    unmergeable = list(_unmergeable(prepared))
    begun = fold_part(prepared, (), Options(statistics, progress=False))
    unfit = [begun.failure()] if isinstance(begun, Failure) else []
    return Failure(several([*unmergeable, *unfit])) if unmergeable or unfit else begun


def fold_part(prepared: Prepared, part: Any, options: Options) -> Found:
    """Fold one part: an iterable of batches, of which there may be none, or a function that gives it."""
    try:
        batches: Any = part() if callable(part) else part
    except Exception as error:  # noqa: BLE001 - the user's code: anything may come out of it
        return Failure(UserFunctionFailed("the function that gives the batches", told(error)))
    wrong = not_batches(batches)
    if wrong:
        return Failure(several(wrong))
    return measure(prepared, read(batches), options, total=length(batches)).map(lambda made: made[0])


def joined(
    prepared: Prepared,
    start: Point | None,
    found: Mapping[int, Found],
    name: str,
    *,
    of: int,
    wrong: tuple[QuantError, ...] = (),
    cause: str = "",
) -> R[Calibrated]:
    """The stage with what was found in all parts; or all that is wrong, with the statistics of the parts that are done.

    `start` is what was measured before, `wrong` what else there is to tell, `of` how many parts there are, `cause` why
    some were not begun.
    """
    done = {index: found[index].unwrap() for index in sorted(found) if isinstance(found[index], Success)}
    errors = [*_numbered(found, name, of), *wrong]
    whole = _merged(start, done, name)
    if whole is None or isinstance(whole, Failure):
        return Failure(several([*errors, *([] if whole is None else [whole.failure()])]))
    point = whole.unwrap()
    if cause or (errors and any(each.statistics.batches for each in done.values())):
        measured = f"measured: {name} {ranges(list(done))} of {of}" if done else f"no {name} was measured"
        why = f"{cause}; {measured}" if cause else measured
        errors.append(Interrupted(point.read, point.statistics, why))
    return Failure(several(errors)) if errors else completed(prepared, point)


def interrupted(found: Found) -> str:
    """Why a part was ended by who runs it; empty where that was not so."""
    told_of = problems(found.failure()) if isinstance(found, Failure) else ()
    return next((each.cause for each in told_of if isinstance(each, Interrupted) and len(told_of) == 1), "")


def ranges(numbers: list[int]) -> str:
    """Sorted numbers in short.

    >>> ranges([0, 1, 2, 5])
    '0..2, 5'
    """
    runs = [[index for _, index in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _unmergeable(prepared: Prepared) -> Iterator[Problem]:
    """What keeps the data of a stage from being measured in parts."""
    graph = prepared.graph
    for fold in prepared.folds:
        if merge_of(fold.observer) is None:
            reason = f"it is observed with {type(fold.observer).__name__}, whose states cannot be merged"
            remedy = "use MinMax, MeanSquaredError, Entropy or Percentile, give yours a merge, or calibrate in one run"
            yield BadConfig(graph[fold.taps[0]].place, reason, remedy)
    yield from kept_in_modules(prepared, "calibrate in one run")


def _merged(start: Point | None, done: Mapping[int, Point], name: str) -> R[Point] | None:
    """One after another, on what there was before; None where there is nothing at all."""
    points = [*([] if start is None else [start]), *done.values()]
    if not points:
        return None
    reference = next(iter(done.values()), points[0]).statistics
    strange = [
        _of_part(problem, f"{name} {index}")
        for index, point in done.items()
        for problem in differences(reference, point.statistics)
    ]
    if strange:
        return Failure(several(strange))
    first: R[Statistics] = Success(points[0].statistics)
    rest = (point.statistics for point in points[1:])
    whole = reduce(lambda before, part: before.bind(lambda so_far: merge(so_far, part)), rest, first)
    warnings = (_of_part(each, f"{name} {index}") for index, point in done.items() for each in point.warnings)
    return whole.map(lambda merged: Point(merged, sum(point.read for point in points), warnings=tuple(warnings)))


def _numbered(found: Mapping[int, Found], name: str, of: int) -> list[Problem]:
    """What is wrong with the parts, each with its number; what is wrong with all of them, once and without."""
    told_by = {
        index: [each for each in problems(result.failure()) if not isinstance(each, Interrupted)]
        for index, result in sorted(found.items())
        if isinstance(result, Failure)
    }
    everywhere = [each for each in next(iter(told_by.values()), ()) if all(each in own for own in told_by.values())]
    common = everywhere if 1 < of == len(told_by) else []
    own = [_of_part(each, f"{name} {index}") for index, held in told_by.items() for each in held if each not in common]
    return [*common, *own]


def _of_part(problem: Problem, part: str) -> Problem:
    """A problem of one part, which says of which."""
    if isinstance(problem, BadBatch):
        return replace(problem, reason=f"in {part}: {problem.reason}")
    named: Any = problem if any(field.name == "node" for field in fields(problem)) else None
    return problem if named is None else replace(named, node=f"{part}, {problem.node}")
