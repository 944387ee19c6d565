"""Whether statistics of channels suit the values that they are of: those of files and of other runs may not."""

from __future__ import annotations

from collections.abc import Iterator

from qfunc.errors import BadConfig
from qfunc.ir import TensorFact
from qfunc.numerics.statistic import RangeState
from qfunc.passes.stages import Prepared
from qfunc.passes.statistics import Answers, Fold, Statistics


def wrong_channels(prepared: Prepared, statistics: Statistics) -> Iterator[BadConfig]:
    """The values whose states are of other channels than the example showed; their scales would fit no tensor.

    Nothing is said of axis 0, which is that of the batch, nor of values of which the example showed no shape.
    """
    answers = Answers(statistics)
    for fold, axis in ((fold, axis) for fold in prepared.folds if (axis := fold.observer.spec.ch_axis)):
        entry = answers.entry(fold)
        if entry is not None and isinstance(entry.state, RangeState) and entry.state.observed:
            yield from _misfits(prepared, fold, axis, tuple(entry.state.minimum.shape))


def _misfits(prepared: Prepared, fold: Fold, axis: int, found: tuple[int, ...]) -> Iterator[BadConfig]:
    for tap in fold.taps:
        fact = prepared.graph[tap].fact
        if not isinstance(fact, TensorFact):
            continue
        wanted = fact.shape[axis : axis + 1]
        if found != wanted:
            has = f"{wanted[0]} channels" if wanted else "no such axis"
            held = f"{found[0]} channels" if found else "no channels"
            reason = f"along ch_axis {axis} the example had {has}, its statistics are of {held}"
            remedy = "calibrate this model anew, and trace it with an example that has the channels of the data"
            yield BadConfig(prepared.graph[tap].place, reason, remedy)
