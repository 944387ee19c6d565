"""Running a user's code without keeping what it does to the modules, to their tensors and to random numbers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def unchanged(modules: Iterable[nn.Module], tensors: Iterable[Tensor] = ()) -> Iterator[list[Tensor]]:
    """Undo, afterwards, what happens to the modules' attributes and to the states of random number generators.

    `tensors`, and those that are plain attributes of the modules, get their values and versions back. The list that is
    given out holds, afterwards, those of them that were written to.
    """
    attributes = [vars(module) for module in dict.fromkeys(modules)]
    containers = [value for table in attributes for value in table.values() if type(value) in _RESTORE]
    before = [(held, type(held)(held)) for held in (*attributes, *containers)]
    plain = (value for table in attributes for value in table.values() if isinstance(value, Tensor))
    values = {id(t): (t, t.detach().clone(), t._version) for t in (*tensors, *plain) if not t.is_inference()}
    state = random.getstate()
    written: list[Tensor] = []
    try:
        with torch.random.fork_rng(devices=()):
            yield written
    finally:
        random.setstate(state)
        for held, saved in before:
            _RESTORE[type(held)](held, saved)
        for tensor, value, version in values.values():
            if tensor._version != version:
                written.append(tensor)
                with torch.no_grad():
                    tensor.copy_(value)
                torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))  # pyright: ignore[reportAttributeAccessIssue]


def _restore_mapping(held: dict[Any, Any], saved: dict[Any, Any]) -> None:
    if list(held) != list(saved) or any(held[key] is not saved[key] for key in saved):
        held.clear()
        held.update(saved)


def _restore_list(held: list[Any], saved: list[Any]) -> None:
    held[:] = saved


def _restore_set(held: set[Any], saved: set[Any]) -> None:
    held.clear()
    held.update(saved)


_RESTORE: dict[type, Any] = {
    dict: _restore_mapping,
    type(nn.Module()._forward_hooks): _restore_mapping,
    list: _restore_list,
    set: _restore_set,
}
