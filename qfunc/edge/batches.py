"""The user's iterable of batches: told apart from other things, and read without letting its exceptions through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import length_hint
from typing import Any

import torch
from returns.result import Failure, Success
from torch import Tensor, nn

from qfunc.errors import BadBatch, BadConfig, Problem, UserFunctionFailed, told
from qfunc.result import R


def not_batches(batches: object) -> list[Problem]:
    """What is wrong with something that cannot be an iterable of batches, such as a single one.

    >>> not_batches(3)[0].reason
    'expected an iterable of batches, got a single int'
    """
    single = isinstance(batches, (Tensor, Mapping, str, bytes, nn.Module)) or hasattr(batches, "__array__")
    if single or not isinstance(batches, Iterable):
        reason = f"expected an iterable of batches, got a single {type(batches).__name__}"
        return [BadConfig("batches", reason, "wrap a single batch in a list: [batch]")]
    return []


def read(batches: Iterable[Any]) -> Iterator[R[Any]]:
    """The batches, one after another; an exception of the iterable itself becomes a last `Failure`.

    >>> [batch.unwrap() for batch in read([1, 2])]
    [1, 2]
    """
    index = 0
    try:
        for batch in batches:
            yield as_tensors(batch, index)
            index += 1
    except Exception as error:  # noqa: BLE001 - the user's code: anything may come out of it
        remedy = "mend the iterable of batches, which raised this when it was asked for its next one"
        yield Failure(UserFunctionFailed(f"batch {index}", told(error), remedy))


def as_tensors(batch: Any, index: int) -> R[Any]:
    """A batch with tensors for its numpy arrays, in new memory where theirs may not be written to."""
    try:
        return Success(_converted(batch))
    except (TypeError, ValueError) as error:
        return Failure(BadBatch(index, told(error), "give arrays of numbers, in the machine's byte order"))


def _converted(value: Any) -> Any:
    match value:
        case Tensor():
            return value
        case dict():
            return {key: _converted(item) for key, item in value.items()}
        case list():
            return [_converted(item) for item in value]
        case tuple() if type(value) is tuple:
            return tuple(_converted(item) for item in value)
        case _ if hasattr(value, "__array_interface__"):
            import numpy as np  # whose arrays these are

            return torch.from_numpy(np.require(value, requirements=["C", "W"]))
        case _:
            return value


def length(batches: Iterable[Any]) -> int | None:
    """How many batches there will be, where the iterable knows."""
    try:
        return length_hint(batches, 0) or None
    except Exception:  # noqa: BLE001 - the user's code; only a progress bar wants to know
        return None
