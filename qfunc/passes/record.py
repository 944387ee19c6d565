"""Provenance: what a pure step did, appended to the history of what it returns."""

from __future__ import annotations

from qfunc.ir import Graph, Step, digest
from qfunc.ir.text import with_history


def recorded(before: Graph, after: Graph, name: str, config: str) -> Graph:
    """`after` with the step in its history; the same object when the step changed nothing."""
    if after is before or (after.nodes is before.nodes and after.order is before.order):
        return after
    step = Step(name, config, digest(before), digest(after))
    return with_history(after, (*before.history, step))
