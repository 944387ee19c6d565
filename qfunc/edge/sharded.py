"""Calibration of parts of the data in other processes, on other machines, with what people run there already."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from returns.result import Failure

from qfunc.edge.batches import not_batches
from qfunc.edge.carry import Carried
from qfunc.edge.measure import Options, wrong_options
from qfunc.edge.parts import Found, fold_part, interrupted, joined, ranges, start_of
from qfunc.edge.run import Policy
from qfunc.edge.ship import pack
from qfunc.errors import (
    BadConfig,
    Problem,
    QuantError,
    UserFunctionFailed,
    WorkerLost,
    WrongStage,
    problems,
    several,
    told,
)
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import Statistics
from qfunc.result import R

Shard: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
"""A part of the batches; or a function that gives it, called where it is run, so that data need not travel."""


class MapLike(Protocol):
    """Anything that is called like `map`: of a pool of processes, threads or machines."""

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any], /) -> Iterable[Any]:
        """The results of `function` on each of the items, in any order."""
        ...


def calibrate_sharded(
    prepared: Prepared,
    shards: Iterable[Shard],
    map: MapLike = map,  # noqa: A002 - what it is like
    *,
    statistics: Statistics | None = None,
    policy: Policy = "fail",
    retries: int = 1,
) -> R[Calibrated]:
    """`calibrate` over parts of the data side by side: bit for bit what one process finds on all of it.

    The prepared graph travels to each shard with its model, and the statistics come back and are merged, exactly. Each
    shard is run with the number of threads that torch has here: the last bits of a model's values depend on that, and
    on the kind of processor.

    Args:
        prepared: what to observe, with observers whose states can be merged.
        shards: the batches in parts: iterables of batches as for `calibrate`, or functions that give one. What travels
            to another process is pickled: generators cannot be, a `functools.partial` of an importable function can.
        map: what runs a function on each of some items and gives the results, such as `pool.map` of an executor of
            `concurrent.futures`, `lambda f, items: client.gather(client.map(f, items, pure=False))` of Dask, or
            `lambda f, items: ray.get([call.remote(f, item) for item in items])` of Ray, where `call` is
            `ray.remote(lambda f, item: f(item))`. Give each worker one thread to run shards on. (`pure=False` spares
            Dask the hash of the model for each shard; its warning about a large graph is about the model, too.)
        statistics: earlier ones, to add to.
        policy: as for `calibrate`.
        retries: how often shards are run again that a lost worker left without a result, but for iterators, which
            might have lost batches by then. It takes a `map` that works again after that: a
            `concurrent.futures.ProcessPoolExecutor` does not, so make one in each call. (A
            `multiprocessing.Pool` waits for a lost worker for ever.)

    Returns:
        The calibrated stage; `BadConfig` for wrong arguments, and for observers that cannot be merged; what can be told
        before any data, as of `calibrate`; the errors of all shards, each with its number, or once where all have the
        same; `UserFunctionFailed` for what cannot be pickled; `WorkerLost` for shards without a result. An error comes
        with an `Interrupted` that holds the statistics of the shards that are done, and names these.

    >>> from torch import nn
    >>> from qfunc import MinMax, PerChannelMinMax, QConfig, QConfigMapping, prepare, trace
    >>> from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
    >>> mapping = QConfigMapping().set_global(QConfig(MinMax(), PerChannelMinMax(INT8_NARROW_PER_CHANNEL)))
    >>> prepared = trace(nn.Sequential(nn.Linear(2, 2)).eval()).unwrap()
    >>> prepared = prepare(prepared, mapping).unwrap()
    >>> shards = [torch.ones(1, 2)], [torch.zeros(1, 2), -torch.ones(1, 2)]
    >>> calibrate_sharded(prepared, shards).unwrap().statistics.batches
    3
    """
    if not isinstance(prepared, Prepared):
        return Failure(WrongStage(type(prepared).__name__, "Prepared"))
    options = Options(statistics, policy=policy)
    wrong: list[Problem] = [*_wrong_arguments(shards, map, retries), *wrong_options(options)]
    if wrong:
        return Failure(several(wrong))
    try:
        parts = tuple(shards)
    except Exception as error:  # noqa: BLE001 - the user's code: anything may come out of it
        return Failure(UserFunctionFailed("shards", told(error)))
    wrong = [problem for index, part in enumerate(parts) for problem in _wrong_shard(index, part)]
    if wrong:
        return Failure(several(wrong))
    work = _Work(prepared, policy, torch.get_num_threads())

    def over(start: Any) -> R[Calibrated]:
        rounds = _Rounds(work, parts, map)
        ended = rounds.run(retries)
        return joined(
            prepared, start, rounds.found, "shard", of=len(parts), wrong=ended.problems, cause=ended.interrupted
        )

    return start_of(prepared, statistics).bind(over)


@dataclass(frozen=True, slots=True)
class _Task:
    """A shard and its number; `Carried` so that no pickler moves the memory of its tensors."""

    index: int
    shard: Any


@dataclass(frozen=True, slots=True)
class _Answer:
    """What the shard of that number gave, however the engine may order them."""

    index: int
    found: Any


@dataclass(frozen=True, slots=True)
class _Work:
    """What is called on each task, wherever that may be: on a copy of the stage if it was pickled on its way."""

    prepared: Prepared
    policy: Policy
    threads: int

    def __call__(self, task: _Task) -> _Answer:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            found = fold_part(self.prepared, _held(task.shard), Options(policy=self.policy, progress=False))
        finally:
            if before != self.threads:
                torch.set_num_threads(before)
        return _Answer(task.index, Carried(found))


def _held(value: Any) -> Any:
    """What was carried, whether it was pickled on its way or not."""
    return value.value if isinstance(value, Carried) else value


@dataclass(frozen=True, slots=True)
class _Ended:
    """Why a round gave too few results, if so; `again`: whether another one may give the others."""

    problems: tuple[QuantError, ...] = ()
    again: bool = False
    interrupted: str = ""


class _Rounds:
    """Calls of `map`, each for the shards that have no result yet."""

    def __init__(self, work: _Work, shards: tuple[Shard, ...], map: MapLike) -> None:  # noqa: A002
        self._work, self._shards, self._map = work, shards, map
        self.found: dict[int, Found] = {}

    def run(self, retries: int) -> _Ended:
        """How the last round ended; those that a lost worker left are asked for again."""
        ended = _Ended()
        for _ in range(retries + 1):
            ended = self._round([index for index in range(len(self._shards)) if index not in self.found])
            if not ended.again:
                break
        return ended

    def _round(self, asked: list[int]) -> _Ended:
        reason = "map gave no result"
        try:
            answers = self._map(self._work, [_Task(index, Carried(self._shards[index])) for index in asked])
            if not isinstance(answers, Iterable):
                return _Ended((_not_like_map(f"gave a {type(answers).__name__}, no iterable of results"),))
            for answer in answers:
                if not isinstance(answer, _Answer):
                    return _Ended((_not_like_map(f"gave a {type(answer).__name__}, no result of its function"),))
                if answer.index in self.found or answer.index not in asked:
                    return _Ended((_not_like_map("gave a result twice"),))
                self.found[answer.index] = _held(answer.found)
                if cause := interrupted(self.found[answer.index]):
                    return _Ended(interrupted=cause)
        except KeyboardInterrupt:
            return _Ended(interrupted="Ctrl-C ended calibration")
        except Exception as error:  # noqa: BLE001 - engines raise anything when they lose a worker
            refused = [*self._refused()] if isinstance(error, _NOT_PICKLED) else []
            if refused:
                return _Ended(tuple(refused))
            reason = told(error)
        missing = [index for index in asked if index not in self.found]
        return self._lost(missing, reason) if missing else _Ended()

    def _lost(self, missing: list[int], reason: str) -> _Ended:
        remedy = (
            "look at what the workers wrote: what travels has to be importable there, and memory to suffice; make the "
            "pool in each call, so that a retry finds a whole one"
        )
        again = not any(isinstance(self._shards[index], Iterator) for index in missing)
        if not again:
            remedy += "; give lists or functions as shards, which can be run again"
        return _Ended((WorkerLost(f"shard {ranges(missing)}", reason, remedy),), again)

    def _refused(self) -> Iterator[Problem]:
        """What of that which travels cannot be pickled."""
        packed = pack(self._work.prepared)
        yield from problems(packed.failure()) if isinstance(packed, Failure) else ()
        for index, shard in enumerate(self._shards):
            try:
                pickle.dumps(Carried(shard))
            except Exception as error:  # noqa: BLE001 - what a user's object raises when it is pickled
                yield UserFunctionFailed(f"shard {index}", f"it cannot be pickled: {told(error)}", _IMPORTABLE)


_NOT_PICKLED = (pickle.PicklingError, TypeError, AttributeError)
"""What pickling raises at things that it cannot pickle; no engine tells so of a lost worker."""

_IMPORTABLE = (
    "give a list of batches, or a function that gives them where it is run: functools.partial(load, path) with a load "
    "at the top level of an importable module"
)


_IN_PARTS = "give lists of batches, or functions that give them: [batches[:100], batches[100:]]"


def _not_like_map(what: str) -> Problem:
    remedy = "pass a function like map, which gives what the function that it is given returns, once for each item"
    return BadConfig("map", f"it {what}", remedy)


def _wrong_arguments(shards: Any, map: Any, retries: Any) -> Iterator[Problem]:  # noqa: A002
    if not_batches(shards):
        yield BadConfig("shards", f"expected an iterable of shards, got a single {type(shards).__name__}", _IN_PARTS)
    if not callable(map):
        yield BadConfig("map", f"{map!r:.40} cannot be called", "pass a function like map, such as pool.map")
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        yield BadConfig("retries", f"{retries!r:.40} is no number of retries", "give 0 or more")


def _wrong_shard(index: int, shard: Any) -> Iterator[Problem]:
    for problem in () if callable(shard) else not_batches(shard):
        yield BadConfig(f"shard {index}", problem.reason, _IN_PARTS)
