"""`R`, the result of every qfunc function, and the few ways in and out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeVar

from returns.result import Failure, Result, Success

from qfunc.errors import QuantError, render, several

T = TypeVar("T")
S = TypeVar("S")

R: TypeAlias = Result[T, QuantError]
"""`Success(value)` or `Failure(error)`; the error is one of `qfunc.errors.QuantError`."""


class QuantException(Exception):  # noqa: N818 - named for what it carries, a `QuantError`
    """What `unwrap` raises; `error` is the typed error."""

    def __init__(self, error: QuantError) -> None:
        super().__init__(render(error))
        self.error = error

    def __reduce__(self) -> tuple[type[QuantException], tuple[QuantError]]:
        return QuantException, (self.error,)


def unwrap(result: R[T]) -> T:
    """The value of a `Success`; a `Failure` raises `QuantException` with its error.

    >>> unwrap(Success(3))
    3
    """
    if isinstance(result, Failure):
        raise QuantException(result.failure())
    return result.unwrap()


def traverse(function: Callable[[S], R[T]], values: Iterable[S]) -> R[tuple[T, ...]]:
    """Apply `function` to all values and keep all results, or else all errors.

    >>> traverse(Success, [1, 2])
    <Success: (1, 2)>
    """
    results = [function(value) for value in values]
    errors = [r.failure() for r in results if isinstance(r, Failure)]
    return Failure(several(errors)) if errors else Success(tuple(r.unwrap() for r in results))
