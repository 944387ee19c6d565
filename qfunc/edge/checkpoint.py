"""Checkpoints of calibration: files of statistics that also say how far the run has come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

from returns.result import Failure, Success

from qfunc import errors
from qfunc.edge.run import Point
from qfunc.edge.statistics_file import read_statistics, write_statistics
from qfunc.errors import BadFile, Problem, several
from qfunc.passes.stages import Prepared
from qfunc.passes.statistics import Statistics, differences
from qfunc.result import R

_PARTS = {"read", "seen", "base", "warnings"}
_ANEW = "give another path, or delete it to begin anew"


def save(path: str | PathLike[str], point: Point, earlier: Statistics, prepared: Prepared) -> R[None]:
    """Write a point of a run that began with the statistics `earlier`; the file is there whole or as it was before."""
    extra = {
        "read": point.read,
        "seen": f"{point.seen:x}",
        "base": _told(earlier),
        "warnings": [{"type": type(w).__name__, **asdict(w)} for w in point.warnings],
    }
    return write_statistics(path, point.statistics, types=types_of(prepared), extra=extra)


def resumed(path: str | PathLike[str], begun: Point, prepared: Prepared) -> R[Point]:
    """The point to go on from: that of the file, if there is one, else where the run began."""
    if not Path(path).exists():
        return Success(begun)
    earlier = begun.statistics
    return read_statistics(path, types=types_of(prepared)).bind(lambda found: _point(str(path), *found, earlier))


def _point(path: str, statistics: Statistics, extra: Mapping[str, Any], earlier: Statistics) -> R[Point]:
    if extra.keys() != _PARTS:
        reason = "it holds statistics, but not how far a run of calibration had come"
        return Failure(
            BadFile(path, reason, "give statistics as statistics=load(path).unwrap(), and another checkpoint")
        )
    problems: list[Problem] = [
        BadFile(path, problem.reason.replace("they were", "its statistics were"), _ANEW)
        for problem in differences(earlier, statistics)
    ]
    if extra["base"] != _told(earlier):
        problems.append(BadFile(path, "its run began with other statistics", f"give those as statistics=, or {_ANEW}"))
    if problems:
        return Failure(several(problems))
    warnings = tuple(
        getattr(errors, w["type"])(**{k: v for k, v in w.items() if k != "type"}) for w in extra["warnings"]
    )
    return Success(Point(statistics, extra["read"], int(extra["seen"], 16), warnings))


def _told(statistics: Statistics) -> dict[str, Any]:
    return {"batches": statistics.batches, "data": f"{statistics.data:x}"}


def types_of(prepared: Prepared) -> dict[str, type]:
    """The classes of the user's statistics and of their states, by the names that they have in files."""
    found = (type(value) for fold in prepared.folds for value in (fold.observer.statistic, fold.observer.init()))
    return {
        f"{kind.__module__}.{kind.__qualname__}": kind for kind in found if not kind.__module__.startswith("qfunc.")
    }
