"""`calibrate`: run data through a prepared graph and keep the statistics as a value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import Any

from pyrsistent import PMap, pmap
from returns.result import Failure, Success

from qfunc.edge.batches import length, not_batches, read
from qfunc.edge.columns import weight_columns
from qfunc.edge.custom_modules import calibrated_modules
from qfunc.edge.interpret import Hook
from qfunc.edge.measure import Options, Progress, measure, wrong_options
from qfunc.edge.run import Point, Policy, doubts
from qfunc.errors import NoBatches, Unobserved, WrongStage, several
from qfunc.ir import Opaque
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import Statistics
from qfunc.result import R


def calibrate(
    prepared: Prepared,
    batches: Iterable[Any],
    *,
    statistics: Statistics | None = None,
    limit: int | None = None,
    policy: Policy = "fail",
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int = 100,
    callback: Callable[[Progress], object] | None = None,
    hook: Hook | None = None,
    progress: bool | None = None,
) -> R[Calibrated]:
    """The prepared graph together with the statistics of `batches`, a fold over them in order.

    Args:
        prepared: what to observe.
        batches: an iterable of batches, each a tensor or numpy array, a tuple or list of positional inputs, or a dict
            of keyword inputs. It is read once. There may be none where nothing is measured.
        statistics: earlier ones of this graph with these weights, to go on from.
        limit: the most batches to read.
        policy: what to do about NaN and infinity, in a batch or in what is computed from it, and about empty batches:
            `"fail"`; `"skip"`, to leave the batch out; or `"clip"`, to measure infinities as the largest finite values
            of their tensor and NaN as zero (empty batches are left out). What was done is in the `warnings`.
        checkpoint: a file that keeps what was measured, whatever ends the run. Where it exists already, calibration
            goes on behind the batches that it holds: `batches` must give these again first, and are checked to.
        checkpoint_every: after how many batches the checkpoint is written, besides at the end.
        callback: called with a `Progress` after each batch.
        hook: is shown every value of the graph, as in `interpret`: the batches are run operator by operator then, more
            slowly, with the same statistics.
        progress: whether to show a progress bar; by default where standard error is a terminal.

    Returns:
        The calibrated stage, or `NoBatches`, `BadConfig` for wrong arguments, `BadBatch` for a batch whose structure,
        shape, dtype or device does not fit, `NonFinite` for NaN or infinity in a weight or value to quantize,
        `UserFunctionFailed` for an iterable, observer, callback or hook that raises, `UnsupportedDType` for an observed
        value that is no floating-point tensor, `BadFile` for a checkpoint that is not of this run, `WrongStage`, or
        what `materialize` reports. An error after the first batch, and Ctrl-C at any time, come with an `Interrupted`
        that holds the statistics so far: `kept(error)`. (So that Ctrl-C ends this call, not the loop around it.)

    >>> import torch
    >>> from torch import nn
    >>> from qfunc import prepare, trace
    >>> prepared = trace(nn.Sequential(nn.Linear(2, 2)).eval()).bind(prepare).unwrap()
    >>> calibrate(prepared, [torch.ones(1, 2), torch.zeros(1, 2)]).unwrap().statistics.batches
    2
    """
    options = Options(statistics, limit, policy, checkpoint, checkpoint_every, callback, hook, progress)
    stage = () if isinstance(prepared, Prepared) else (WrongStage(type(prepared).__name__, "Prepared"),)
    problems = [*stage, *not_batches(batches), *wrong_options(options)]
    if problems:
        return Failure(several(problems))
    return calibrate_on(prepared, read(batches), options, total=length(batches))


def calibrate_on(
    prepared: Prepared, batches: Iterator[R[Any]], options: Options, *, total: int | None
) -> R[Calibrated]:
    """`calibrate` on batches that are read already, or could not be."""
    return measure(prepared, batches, options, total=total).bind(
        lambda found: completed(prepared, found[0], calibrated_modules(prepared, found[1]))
    )


def completed(prepared: Prepared, point: Point, modules: PMap[str, Opaque] = pmap()) -> R[Calibrated]:
    """The stage with what was measured; `NoBatches` where there is something to measure and that was nothing."""
    if not point.statistics.batches and (prepared.measured or prepared.swapped):
        return Failure(several([*point.warnings, _none_left(point.read)]) if point.read else NoBatches())
    known = {warning.node for warning in point.warnings if isinstance(warning, Unobserved)}
    new = (doubt for doubt in doubts(prepared, point.statistics) if doubt.node not in known)
    warnings = (*point.warnings, *new)
    return Success(Calibrated(prepared, point.statistics, modules, warnings, weight_columns(prepared)))


def _none_left(read: int) -> NoBatches:
    remedy = "clean the data, or choose policy='clip'"
    return NoBatches(reason=f"there are none left: all {read} that were read were left out", remedy=remedy)
