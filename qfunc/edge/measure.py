"""Running batches through a prepared graph: where to begin, what goes on beside, and what is kept when it ends."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from typing import Any

from returns.result import Failure, Success
from torch import fx

from qfunc.config.weights import weights_of
from qfunc.edge.checkpoint import resumed, save_checkpoint
from qfunc.edge.content import statistics_of
from qfunc.edge.evaluate import unquantizable
from qfunc.edge.interpret import Hook, Interpreter
from qfunc.edge.materialize import emitted
from qfunc.edge.progress import tracked
from qfunc.edge.run import POLICIES, Execute, Point, Policy, Run, unmeasured
from qfunc.errors import (
    BadConfig,
    BadFile,
    Interrupted,
    Problem,
    QuantError,
    UserFunctionFailed,
    WrongStage,
    several,
    told,
)
from qfunc.params import loads
from qfunc.passes.channels import wrong_channels
from qfunc.passes.custom_modules import kept_in_modules
from qfunc.passes.observe import with_observers
from qfunc.passes.stages import Prepared
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
    hook: Hook | None = None
    progress: bool | None = None


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
    for name, function, takes in (("callback", options.callback, "a Progress"), ("hook", options.hook, "id and value")):
        if function is not None and not callable(function):
            yield BadConfig(name, f"{function!r:.40} cannot be called", f"give a function of {takes}")


def measure(
    prepared: Prepared, batches: Iterator[R[Any]], options: Options, *, total: int | None
) -> R[tuple[Point, fx.GraphModule]]:
    """Fold all batches; where that ended, and the module that observed them, which holds the custom ones."""
    problems = list(_nonfinite_weights(prepared))
    if options.statistics is not None or options.checkpoint is not None:
        problems += kept_in_modules(prepared, "calibrate in one run, without statistics and checkpoint")
    if problems:
        return Failure(several(problems))
    made = _runner(prepared, options.hook)
    if isinstance(made, Failure):
        return made
    module, execute = made.unwrap()
    fresh = statistics_of(prepared)
    earlier = fresh if options.statistics is None else options.statistics
    problems += [*differences(fresh, earlier), *wrong_channels(prepared, earlier)]
    if problems:
        return Failure(several(problems))
    begun = Point(earlier, warnings=tuple(unmeasured(prepared, earlier)))
    start = Success(begun) if options.checkpoint is None else resumed(options.checkpoint, begun, prepared)
    if isinstance(start, Failure):
        return start
    _close_gaps()
    with ThreadPoolExecutor(max_workers=1) as pool:
        point = start.unwrap()
        run = Run(prepared, module, point, policy=options.policy, pool=pool, execute=execute)
        loop = _Loop(run, prepared, point, earlier, options)
        # What cannot be written, and where, is told before any data.
        error = loop.save() or loop.over(batches, total)
    return Success((run.point(), module)) if error is None else Failure(error)


def _close_gaps() -> None:
    """Give back to the system what making the module has freed.

    Otherwise glibc keeps it in pieces that the model's values do not fit into: some tens of megabytes, by chance.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _runner(prepared: Prepared, hook: Hook | None) -> R[tuple[fx.GraphModule, Execute]]:
    """The module that observes, and what runs it: its code, or, with a hook, the interpreter, which shows it values."""
    graph = with_observers(prepared)
    made = emitted(graph)
    if hook is None:
        return made.map(lambda found: (found.module, lambda inputs: found.module(*inputs)))

    def shown(made: Interpreter) -> Execute:
        guarded = made.guarded(lambda id, value: hook(id, value) if id in prepared.graph.nodes else None)
        return lambda inputs: made.forward(inputs, guarded)

    return made.map(lambda found: Interpreter(graph, found)).map(lambda runs: (runs.module, shown(runs)))


_CTRL_C = "Ctrl-C ended calibration"
_SAME = "make the same call again, which goes on from its checkpoint: with the batch mended, or another policy"
_AGAIN = "calibrate from the beginning: custom modules keep what they observe in themselves"


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
        cause = "calibration ended with an error"
        try:
            shown = tracked(islice(batches, limit), "calibrating", shown=self._options.progress, total=self._total)
            with closing(shown):
                errors += islice((error for batch in shown if (error := self._step(batch)) is not None), 1)
        except KeyboardInterrupt:
            cause = _CTRL_C
        else:
            if not errors and self._read < self._start.read:
                errors.append(self._other_data(f"there are {self._read}"))
        return self._ended(errors, cause)

    def _ended(self, errors: list[QuantError], cause: str) -> QuantError | None:
        """Keep what was measured: in the checkpoint, and in the error if there is one."""
        went_on = self._read >= self._start.read
        failed = self.save() if went_on else None
        errors += [] if failed is None else [failed]
        if cause == _CTRL_C or (errors and self._run.batches):
            point = self._run.point()
            how = (_AGAIN,) if self._prepared.swapped else (_SAME,) if self._options.checkpoint is not None else ()
            errors.append(Interrupted(point.read, point.statistics, cause, *how))
        return several(errors) if errors else None

    def _step(self, batch: R[Any]) -> QuantError | None:
        if isinstance(batch, Failure):
            unread: QuantError = batch.failure()
            return unread
        passes = self._read < self._start.read
        error = self._pass(batch.unwrap()) if passes else self._run.fold(batch.unwrap())
        if error is not None:
            return error
        self._read += 1
        if not passes and self._read % self._options.checkpoint_every == 0 and (failed := self.save()) is not None:
            return failed
        return self._tell()

    def _pass(self, batch: Any) -> QuantError | None:
        """Leave a batch out that the checkpoint holds already."""
        digest = self._run.digest(batch, self._read)
        if not isinstance(digest, int):
            return digest
        self._seen = (self._seen + digest) % MODULUS
        last = self._read + 1 == self._start.read
        return self._other_data("these are others") if last and self._seen != self._start.seen else None

    def _other_data(self, reason: str) -> QuantError:
        remedy = "give the same batches as in the run that wrote it, or another path to begin anew"
        return BadFile(str(self._options.checkpoint), f"it holds {self._start.read} batches, {reason}", remedy)

    def save(self) -> QuantError | None:
        """Write the checkpoint, if there is to be one; why that failed, if so."""
        if self._options.checkpoint is None:
            return None
        saved = save_checkpoint(self._options.checkpoint, self._run.point(), self._earlier, self._prepared)
        failed: QuantError | None = saved.failure() if isinstance(saved, Failure) else None
        return failed

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
