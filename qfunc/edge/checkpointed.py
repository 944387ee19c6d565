"""Telling when a checkpointed part of a model is computed once more."""

from __future__ import annotations

from collections.abc import Callable

import torch

_current_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id")  # noqa: B009 - torch's stubs leave it out
_NONE = -1


def computes_again() -> bool:
    """Whether this is within a backward pass, which computes a checkpointed part once more.

    What the part has measured, and what it has moved, was measured and moved on the way there.

    >>> computes_again()
    False
    """
    return not torch.compiler.is_compiling() and _current_graph_task() != _NONE
