"""`calibrate`: run data through a prepared graph and keep the statistics as a value."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import Any

from returns.result import Failure, Success
from torch import fx

from qfunc.config.weights import weights_of
from qfunc.edge.batches import length, not_batches, read
from qfunc.edge.checkpoint import resumed, save
from qfunc.edge.content import weights_digest
from qfunc.edge.custom_modules import calibrated_modules
from qfunc.edge.evaluate import unquantizable
from qfunc.edge.materialize import materialize
from qfunc.edge.progress import tracked
from qfunc.edge.run import POLICIES, Point, Policy, Run, constants
from qfunc.errors import (
    BadConfig,
    BadFile,
    Interrupted,
    NoBatches,
    Problem,
    QuantError,
    UserFunctionFailed,
    WrongStage,
    several,
    told,
)
from qfunc.ir import structure_digest
from qfunc.params import loads
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import MODULUS, Statistics, differences
from qfunc.result import R


@dataclass(frozen=True, slots=True)
class Progress:
    """How far calibration has come: batches read, of how many if that is known, seconds since it began."""

    batches: int
    total: int | None
    seconds: float
    statistics: Statistics
    """What has been measured so far."""


@dataclass(frozen=True, slots=True)
class Options:
    """The keyword arguments of `calibrate`."""

    statistics: Statistics | None = None
    limit: int | None = None
    policy: Policy = "fail"
    checkpoint: str | PathLike[str] | None = None
    checkpoint_every: int = 100
    callback: Callable[[Progress], object] | None = None
    progress: bool | None = None


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
        checkpoint: a file that keeps what was measured, written every `checkpoint_every` batches and at the end,
            whatever ends it. Where it exists already, calibration goes on behind the batches that it holds: `batches`
            must give these again first, and are checked to.
        callback: called with a `Progress` after each batch.
        progress: whether to show a progress bar; by default where standard error is a terminal.

    Returns:
        The calibrated stage, or `NoBatches`, `BadConfig` for wrong arguments, `BadBatch` for a batch whose structure,
        shape, dtype or device does not fit, `NonFinite` for NaN or infinity in a weight to quantize, in a batch or in
        a value computed from it, `UserFunctionFailed` for an iterable, observer or callback that raises,
        `UnsupportedDType` for an observed value that is no floating-point tensor, `BadFile` for a checkpoint that is
        not of this run, `WrongStage`, or what `materialize` reports. An error after the first batch, and Ctrl-C at any
        time, come with an `Interrupted` that holds the statistics so far.

    >>> import torch
    >>> from torch import nn
    >>> from qfunc import prepare, trace
    >>> prepared = trace(nn.Sequential(nn.Linear(2, 2)).eval()).bind(prepare).unwrap()
    >>> calibrate(prepared, [torch.ones(1, 2), torch.zeros(1, 2)]).unwrap().statistics.batches
    2
    """
    options = Options(statistics, limit, policy, checkpoint, checkpoint_every, callback, progress)
    wrong = [WrongStage(type(prepared).__name__, "Prepared")] if not isinstance(prepared, Prepared) else []
    problems = [*wrong, *not_batches(batches), *wrong_options(options)]
    if problems:
        return Failure(several(problems))
    return calibrate_on(prepared, read(batches), options, total=length(batches))


def wrong_options(options: Options) -> Iterator[Problem]:
    """What is impossible about the arguments of `calibrate`."""
    if not (options.statistics is None or isinstance(options.statistics, Statistics)):
        yield WrongStage(type(options.statistics).__name__, "Statistics")
    if options.policy not in POLICIES:
        yield BadConfig("policy", f"there is no policy {options.policy!r:.40}", f"choose one of {', '.join(POLICIES)}")
    for name, value in (("limit", options.limit), ("checkpoint_every", options.checkpoint_every)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            yield BadConfig(name, f"{value!r:.40} is no number of batches", f"give a positive {name}")
    if not isinstance(options.checkpoint, (str, PathLike, type(None))):
        yield BadConfig("checkpoint", f"{options.checkpoint!r:.40} is no path", "give the path of a file")
    if options.callback is not None and not callable(options.callback):
        yield BadConfig("callback", f"{options.callback!r:.40} cannot be called", "give a function of one argument")


def calibrate_on(prepared: Prepared, batches: Iterator[R[Any]], options: Options, *, total: int | None) -> R[Calibrated]:
    """`calibrate` on batches that are read already, or could not be."""
    problems = [*_nonfinite_weights(prepared), *_beyond_statistics(prepared, options)]
    if problems:
        return Failure(several(problems))
    made = materialize(prepared)
    if isinstance(made, Failure):
        return made
    module = made.unwrap()
    fresh = Statistics(structure_digest(prepared.graph), weights_digest(prepared.graph))
    earlier = fresh if options.statistics is None else options.statistics
    problems += differences(fresh, earlier)
    if problems:
        return Failure(several(problems))
    start = Success(Point(earlier)) if options.checkpoint is None else resumed(options.checkpoint, earlier, prepared)
    if isinstance(start, Failure):
        return start
    with ThreadPoolExecutor(max_workers=1) as pool:
        point = start.unwrap()
        run = Run(prepared, module, point, policy=options.policy, pool=pool, execute=lambda inputs: module(*inputs))
        error = _Loop(run, prepared, point, earlier, options).over(batches, total)
    if error is not None:
        return Failure(error)
    return _finished(prepared, module, run)


def _finished(prepared: Prepared, module: fx.GraphModule, run: Run) -> R[Calibrated]:
    point = run.point()
    if not point.statistics.batches and (prepared.measured or prepared.swapped):
        return Failure(several([*point.warnings, NoBatches()]) if point.warnings else NoBatches())
    warnings = (*point.warnings, *constants(prepared, point.statistics))
    return Success(Calibrated(prepared, point.statistics, calibrated_modules(prepared, module), warnings))


class _Loop:
    """One pass over the batches, and what goes on beside the run: resuming, checkpoints, the callback."""

    def __init__(self, run: Run, prepared: Prepared, start: Point, earlier: Statistics, options: Options) -> None:
        self._run, self._prepared, self._start, self._earlier, self._options = run, prepared, start, earlier, options
        self._read, self._seen, self._total, self._began = 0, 0, options.limit, time.monotonic()

    def over(self, batches: Iterator[R[Any]], total: int | None) -> QuantError | None:
        """Fold the batches; why that ended too early, if so."""
        limit = self._options.limit
        self._total = total if limit is None else limit if total is None else min(limit, total)
        errors: list[QuantError] = []
        cause = "it failed"
        try:
            shown = tracked(islice(batches, limit), "calibrating", shown=self._options.progress, total=self._total)
            with closing(shown):
                errors += islice((error for batch in shown if (error := self._step(batch)) is not None), 1)
        except KeyboardInterrupt:
            cause = "Ctrl-C"
        else:
            if not errors and self._read < self._start.read:
                errors.append(self._other_data(f"there are {self._read}"))
        return self._ended(errors, cause)

    def _ended(self, errors: list[QuantError], cause: str) -> QuantError | None:
        """Keep what was measured: in the checkpoint, and in the error if there is one."""
        went_on = self._read >= self._start.read
        failed = self._save() if went_on else None
        errors += [] if failed is None else [failed]
        if cause == "Ctrl-C" or (errors and self._run.batches):
            point = self._run.point()
            errors.append(Interrupted(point.read, point.statistics, cause))
        return several(errors) if errors else None

    def _step(self, batch: R[Any]) -> QuantError | None:
        if isinstance(batch, Failure):
            return batch.failure()
        passes = self._read < self._start.read
        error = self._pass(batch.unwrap()) if passes else self._run.fold(batch.unwrap())
        if error is not None:
            return error
        self._read += 1
        if not passes and self._read % self._options.checkpoint_every == 0 and (failed := self._save()) is not None:
            return failed
        return self._tell()

    def _pass(self, batch: Any) -> QuantError | None:
        """Leave a batch out that the checkpoint holds already."""
        digest = self._run.digest(batch, self._read)
        if isinstance(digest, Failure):
            return digest.failure()
        self._seen = (self._seen + digest.unwrap()) % MODULUS
        last = self._read + 1 == self._start.read
        return self._other_data("these are others") if last and self._seen != self._start.seen else None

    def _other_data(self, reason: str) -> QuantError:
        remedy = "give the same batches as in the run that wrote it, or another path to begin anew"
        return BadFile(str(self._options.checkpoint), f"it holds {self._start.read} batches, {reason}", remedy)

    def _save(self) -> QuantError | None:
        if self._options.checkpoint is None:
            return None
        saved = save(self._options.checkpoint, self._run.point(), self._earlier, self._prepared)
        return saved.failure() if isinstance(saved, Failure) else None

    def _tell(self) -> QuantError | None:
        call = self._options.callback
        if call is None:
            return None
        seconds, statistics = time.monotonic() - self._began, self._run.point().statistics
        try:
            call(Progress(self._read, self._total, seconds, statistics))
        except Exception as error:  # noqa: BLE001 - the user's code: anything may come out of it
            return UserFunctionFailed("callback", told(error))
        return None


def _nonfinite_weights(prepared: Prepared) -> Iterator[Problem]:
    """Weights that are to be quantized and cannot be; told here, before any data runs."""
    graph = prepared.graph
    for id in (id for id in graph.order if id in prepared.weights):
        for weight in weights_of(graph, graph[id]).values():
            for load in loads(weight):
                tensor, _ = graph.sources[load.source].tensors[load.name]
                yield from unquantizable(tensor, load.name, graph[id].place)


def _beyond_statistics(prepared: Prepared, options: Options) -> Iterator[Problem]:
    """Custom modules, which observe in themselves, where statistics are to be all that a run begins and ends with."""
    if options.statistics is None and options.checkpoint is None:
        return
    for id in (id for id in prepared.graph.order if id in prepared.swapped):
        reason = "it is a custom module, which keeps what it observes in itself: no statistics or checkpoint hold that"
        yield BadConfig(prepared.graph[id].place, reason, "calibrate in one run, without statistics and checkpoint")
