"""Checkpoints of calibration: files of statistics that also say how far the run has come."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from os import PathLike
from types import MappingProxyType
from typing import Any, get_type_hints

from returns.result import Failure, Success

from qfunc.edge.container import ANOTHER
from qfunc.edge.run import Point
from qfunc.edge.statistic_types import types_of_observers
from qfunc.edge.statistics_file import read_statistics, write_statistics
from qfunc.errors import (
    BadBatch,
    BadFile,
    ConstantValue,
    MoreWarnings,
    NonFinite,
    Problem,
    Unobserved,
    UserFunctionFailed,
    several,
)
from qfunc.passes.channels import wrong_channels
from qfunc.passes.stages import Prepared
from qfunc.passes.statistics import MODULUS, Statistics, differences
from qfunc.result import R

_PARTS = {"read", "seen", "base", "warnings"}
_ANEW = "give another path, or delete it to begin anew"

_WARNINGS: Mapping[str, type] = MappingProxyType(
    {cls.__name__: cls for cls in (BadBatch, ConstantValue, MoreWarnings, NonFinite, Unobserved, UserFunctionFailed)}
)
"""What can be warned of."""

MOST_WARNINGS = 10_000
"""How many warnings a checkpoint keeps: the first, so that no amount of bad data ends a run by its size.

A last one says how many more there were.
"""


def save_checkpoint(path: str | PathLike[str], point: Point, earlier: Statistics, prepared: Prepared) -> R[None]:
    """Write a point of a run that began with the statistics `earlier`; the file is there whole or as it was before."""
    extra = {
        "read": point.read,
        "seen": f"{point.seen:x}",
        "base": _told(earlier),
        "warnings": [_written(warning) for warning in _kept(point.warnings)],
    }
    return write_statistics(path, point.statistics, types=types_of(prepared), extra=extra)


def _kept(warnings: tuple[Problem, ...]) -> Iterator[Problem]:
    """The first warnings, and how many more there were, in runs before this one too."""
    each = [warning for warning in warnings if not isinstance(warning, MoreWarnings)]
    more = sum(warning.count for warning in warnings if isinstance(warning, MoreWarnings))
    more += len(each[MOST_WARNINGS:])
    yield from each[:MOST_WARNINGS]
    if more:
        yield MoreWarnings(more)


def _written(warning: Problem) -> dict[str, Any]:
    fields = {field.name: getattr(warning, field.name) for field in dataclasses.fields(warning)}
    # Messages quote the user's code and data, where half characters can stand.
    as_text = {k: v.encode(errors="replace").decode() if isinstance(v, str) else v for k, v in fields.items()}
    return {"type": type(warning).__name__, **as_text}


def resumed(path: str | PathLike[str], begun: Point, prepared: Prepared) -> R[Point]:
    """The point to go on from: that of the file, if there is one, else where the run began."""
    place, earlier = os.fspath(path), begun.statistics
    if os.path.exists(place):
        return read_statistics(place, types=types_of(prepared)).bind(lambda f: _point(place, *f, earlier, prepared))
    if not os.path.isdir(os.path.dirname(os.path.realpath(place))):
        return Failure(BadFile(place, "its folder does not exist", "make the folder, or give another path"))
    return Success(begun)


def _point(
    path: str, statistics: Statistics, extra: Mapping[str, Any], earlier: Statistics, prepared: Prepared
) -> R[Point]:
    if extra.keys() != _PARTS:
        reason = "it holds statistics, but not how far a run of calibration had come"
        remedy = "give statistics as statistics=load(path).unwrap(), and another checkpoint"
        return Failure(BadFile(path, reason, remedy))
    problems: list[Problem] = [
        BadFile(path, problem.reason.replace("they were", "its statistics were"), _ANEW)
        for problem in differences(earlier, statistics)
    ]
    problems += (BadFile(path, reason, ANOTHER) for reason in _wrong(extra, statistics))
    if not problems:
        misfits = wrong_channels(prepared, statistics)
        problems += (BadFile(path, f"{misfit.node}: {misfit.reason}", _ANEW) for misfit in misfits)
    if not problems and any(fold.key not in statistics.measured for fold in prepared.folds):
        # Going on would leave the batches out that the file holds of other observers.
        problems.append(BadFile(path, "its run measured for another configuration", _ANEW))
    if not problems and extra["base"] != _told(earlier):
        problems.append(BadFile(path, "its run began with other statistics", f"give those as statistics=, or {_ANEW}"))
    if problems:
        return Failure(several(problems))
    warnings = tuple(
        _WARNINGS[row["type"]](**{name: value for name, value in row.items() if name != "type"})
        for row in extra["warnings"]
    )
    return Success(Point(statistics, extra["read"], int(extra["seen"], 16), warnings))


def _wrong(extra: Mapping[str, Any], statistics: Statistics) -> Iterator[str]:
    """What of a checkpoint's own part cannot be meant."""
    read, base, warnings = extra["read"], extra["base"], extra["warnings"]
    if type(read) is not int or read < 0:
        yield "read: it is no number of batches"
    if not _is_digest(extra["seen"]):
        yield "seen: it is no digest"
    if not isinstance(base, dict) or base.keys() != {"batches", "data"}:
        yield "base: it does not tell the statistics that its run began with"
    elif type(base["batches"]) is not int or base["batches"] < 0 or not _is_digest(base["data"]):
        yield "base: it is no number and digest of batches"
    elif type(read) is int and not base["batches"] <= statistics.batches <= base["batches"] + read:
        yield f"read: {read} batches did not make {statistics.batches} of {base['batches']}"
    if not isinstance(warnings, list) or not all(map(_is_warning, warnings)):
        yield "warnings: they are none that calibration gives"


def _is_digest(value: object) -> bool:
    digits = isinstance(value, str) and 0 < len(value) <= 64 and set(value) <= set("0123456789abcdef")
    return digits and int(str(value), 16) < MODULUS


def _is_warning(row: object) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("type"), str) or row["type"] not in _WARNINGS:
        return False
    hints = get_type_hints(_WARNINGS[row["type"]])
    fields = {field.name: hints[field.name] for field in dataclasses.fields(_WARNINGS[row["type"]])}
    typed = row.keys() == {"type", *fields} and all(type(row[name]) is kind for name, kind in fields.items())
    return typed and row.get("count", 1) > 0


def _told(statistics: Statistics) -> dict[str, Any]:
    return {"batches": statistics.batches, "data": f"{statistics.data:x}"}


def types_of(prepared: Prepared) -> dict[str, type]:
    """The classes of the user's statistics and of their states, by the names that they have in files."""
    return types_of_observers(fold.observer for fold in prepared.folds)
