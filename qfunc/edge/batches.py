"""The user's iterable of batches: told apart from other things, and read without letting its exceptions through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from operator import length_hint
from typing import Any

import torch
from returns.result import Failure, Result, Success
from torch import Tensor, nn

from qfunc.errors import BadBatch, BadConfig, Problem, UserFunctionFailed, told
from qfunc.result import R


def not_batches(batches: object) -> list[Problem]:
    """What is wrong with something that cannot be an iterable of batches, such as a single one.

    >>> not_batches(3)[0].reason
    'expected an iterable of batches, got a single int'
    """
    single = isinstance(batches, (Tensor, Mapping, str, bytes, nn.Module)) or hasattr(batches, "__array__")
    if not single and not isinstance(batches, Iterable) and (batches is None or callable(batches)):
        remedy = "pass the batches themselves: a list, a DataLoader, or what a generator function returns when called"
        return [BadConfig("batches", f"expected an iterable of batches, got a {type(batches).__name__}", remedy)]
    if single or not isinstance(batches, Iterable):
        reason = f"expected an iterable of batches, got a single {type(batches).__name__}"
        return [BadConfig("batches", reason, "wrap a single batch in a list: [batch]")]
    return []


_ARRAYS = "give arrays of numbers, in the byte order of the machine"


def read(batches: Iterable[Any]) -> Iterator[R[Any]]:
    """The batches, one after another; an exception of the iterable itself becomes a last `Failure`.

    >>> [batch.unwrap() for batch in read([1, 2])]
    [1, 2]
    """
    index = 0
    try:
        for batch in batches:
            yield as_tensors(batch).alt(partial(BadBatch, index, remedy=_ARRAYS))
            index += 1
    except Exception as error:  # noqa: BLE001 - the user's code: anything may come out of it
        remedy = "mend the iterable of batches, which raised this when it was asked for its next one"
        yield Failure(UserFunctionFailed(f"batch {index}", told(error), remedy))


def as_tensors(batch: Any) -> Result[Any, str]:
    """A batch with tensors for its numpy arrays, which share their memory unless that is read-only; or why not.

    >>> as_tensors({"x": [torch.ones(2), 3]}).unwrap()
    {'x': [tensor([1., 1.]), 3]}
    """
    try:
        return Success(_converted(batch))
    except (TypeError, ValueError) as error:
        return Failure(f"a numpy array is no tensor: {told(error)}")


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
