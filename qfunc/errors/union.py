"""The closed union of all errors, and several of them as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from qfunc.errors.data import (
    BadBatch,
    BadFile,
    ConstantValue,
    Interrupted,
    MoreWarnings,
    NoBatches,
    NonFinite,
    Unobserved,
    UserFunctionFailed,
    WorkerLost,
)
from qfunc.errors.model import (
    BadConfig,
    BadExampleInputs,
    CannotFuse,
    EngineMissing,
    InTrainingMode,
    InvalidGraph,
    NotAModule,
    NotLowered,
    SeveralDevices,
    StaleSource,
    UnknownName,
    UnsupportedDType,
    Untraceable,
    WrongStage,
)


@dataclass(frozen=True, slots=True)
class Several:
    """Two or more errors found by one call, in graph order."""

    errors: tuple[Problem, ...]
    node: str = ""

    @property
    def reason(self) -> str:
        return f"{len(self.errors)} errors: " + "; ".join(f"{e.node}: {e.reason}" for e in self.errors)

    @property
    def remedy(self) -> str:
        return "; ".join(dict.fromkeys(remedies(self.errors)))


Problem: TypeAlias = (
    NotAModule
    | InTrainingMode
    | Untraceable
    | BadExampleInputs
    | NoBatches
    | BadBatch
    | Interrupted
    | ConstantValue
    | BadFile
    | MoreWarnings
    | WorkerLost
    | NonFinite
    | Unobserved
    | UnknownName
    | BadConfig
    | UnsupportedDType
    | SeveralDevices
    | WrongStage
    | EngineMissing
    | NotLowered
    | StaleSource
    | InvalidGraph
    | CannotFuse
    | UserFunctionFailed
)
"""One thing that is wrong."""

QuantError: TypeAlias = Problem | Several
"""What a `Failure` of qfunc carries."""


def problems(error: QuantError) -> tuple[Problem, ...]:
    """The single problems of an error, in order.

    >>> len(problems(NoBatches()))
    1
    """
    return error.errors if isinstance(error, Several) else (error,)


def kept(error: QuantError) -> Any:
    """The `Statistics` that an error of calibration keeps: what was measured before it; None where nothing was.

    >>> kept(NoBatches()) is None
    True
    """
    return next((problem.statistics for problem in problems(error) if isinstance(problem, Interrupted)), None)


def several(errors: Iterable[QuantError]) -> QuantError:
    """Join errors into one, without repetition; at least one must be given.

    >>> several([NoBatches(), NoBatches()]) == NoBatches()
    True
    """
    flat = tuple(dict.fromkeys(p for error in errors for p in problems(error)))
    assert flat, "no error to report"
    return flat[0] if len(flat) == 1 else Several(flat)


MOST_GUESSES = 20
"""To guess which name was meant is slow: of many unknown names it is done for the first."""


def remedies(found: Iterable[Problem]) -> Iterator[str]:
    """What to do about each of some problems."""
    unknown = 0
    for p in found:
        unknown += isinstance(p, UnknownName)
        yield p.choice if isinstance(p, UnknownName) and unknown > MOST_GUESSES else p.remedy
