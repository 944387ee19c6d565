"""Calibration of parts of the data in other processes, on other machines, with what people run there already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, Protocol, TypeAlias

import torch
from returns.result import Failure, Success

from qfunc.edge.batches import length, not_batches, read
from qfunc.edge.calibrate import finished
from qfunc.edge.measure import Options, measure, wrong_options
from qfunc.edge.run import Point, Policy
from qfunc.edge.ship import pack, unpack
from qfunc.errors import (
    BadBatch,
    BadConfig,
    Interrupted,
    NoBatches,
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
from qfunc.passes.statistics import Statistics, merge, merge_of
from qfunc.result import R

Shard: TypeAlias = Iterable[Any] | Callable[[], Iterable[Any]]
"""A part of the batches; or a function that gives it, called where it is run, so that data need not travel."""

Found: TypeAlias = R[tuple[Statistics, tuple[Problem, ...]]]


class MapLike(Protocol):
    """Anything that is called like `map`: of a pool of processes, threads or machines."""

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any], /) -> Iterable[Any]:
        """The results of `function` on each of the items, in their order."""
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

    The prepared graph travels to each shard with its model, the statistics come back and are merged. Each shard is run
    with the number of threads that torch has here, on which the last bits of a model's values depend.

    Args:
        prepared: what to observe, with observers whose states can be merged.
        shards: the batches in parts: iterables of batches as for `calibrate`, or functions that give one.
        map: what runs a function on each of some items and gives the results in order, such as `pool.map` of a
            `concurrent.futures.ProcessPoolExecutor`, `lambda f, items: client.gather(client.map(f, items))` of Dask, or
            `lambda f, items: ray.get([ray.remote(f).remote(item) for item in items])` of Ray.
        statistics: earlier ones, to add to.
        policy: as for `calibrate`.
        retries: how often shards are run again whose worker was lost.

    Returns:
        The calibrated stage; `BadConfig` for observers that cannot be merged; `UserFunctionFailed` for parts of the
        model that cannot be pickled; the errors of all shards, each with its number; `WorkerLost` for a shard whose
        worker ended too early, with an `Interrupted` that holds the statistics of the shards before it.

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
    wrong = [*_wrong_shards(shards, map, retries), *wrong_options(Options(statistics, policy=policy))]
    wrong += unmergeable(prepared)
    if wrong:
        return Failure(several(wrong))
    try:
        parts = tuple(shards)
    except Exception as error:  # noqa: BLE001 - the user's code: anything may come out of it
        return Failure(UserFunctionFailed("shards", told(error)))
    return (
        pack(prepared)
        .bind(lambda shipped: _over(_Work(shipped, policy, torch.get_num_threads()), parts, map, retries))
        .bind(lambda found: joined(prepared, found, "shard", statistics))
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """What is called on each shard, wherever that may be."""

    shipped: bytes
    policy: Policy
    threads: int

    def __call__(self, shard: Shard) -> Found:
        before = torch.get_num_threads()
        if before != self.threads:
            torch.set_num_threads(self.threads)
        try:
            return unpack(self.shipped).bind(lambda prepared: fold_shard(prepared, shard, Options(policy=self.policy)))
        finally:
            if before != self.threads:
                torch.set_num_threads(before)


def fold_shard(prepared: Any, shard: Shard, options: Options) -> Found:
    """The statistics of one part of the data, which may be none, and the warnings."""
    try:
        batches = shard() if callable(shard) else shard
    except Exception as error:  # noqa: BLE001 - the user's code: anything may come out of it
        return Failure(UserFunctionFailed("the function that gives it", told(error)))
    wrong = not_batches(batches)
    if wrong:
        return Failure(several(wrong))
    found = measure(prepared, read(batches), options, total=length(batches))
    return found.map(lambda made: (made[0].statistics, made[0].warnings))


def unmergeable(prepared: Prepared) -> Iterator[Problem]:
    """What keeps the data of a stage from being measured in parts."""
    graph = prepared.graph
    for fold in prepared.folds:
        if merge_of(fold.observer) is None:
            reason = f"it is observed with {type(fold.observer).__name__}, whose states cannot be merged"
            remedy = "use MinMax, PerChannelMinMax, MeanSquaredError, Entropy or Percentile, or calibrate in one run"
            yield BadConfig(graph[fold.taps[0]].place, reason, remedy)
    for id in (id for id in graph.order if id in prepared.swapped):
        reason = "it is a custom module, which keeps what it observes in itself"
        yield BadConfig(graph[id].place, reason, "calibrate in one run")


def joined(prepared: Prepared, found: Sequence[Found], part: str, earlier: Statistics | None) -> R[Calibrated]:
    """The stage with the statistics of all parts; or what is wrong with any of them, each with its number."""
    errors = [
        _numbered(problem, f"{part} {index}")
        for index, result in enumerate(found)
        if isinstance(result, Failure)
        for problem in problems(result.failure())
    ]
    if errors:
        return Failure(several(errors))
    parts = [result.unwrap() for result in found]
    warnings = tuple(
        _numbered(problem, f"{part} {index}") for index, (_, borne) in enumerate(parts) for problem in borne
    )
    return merged([statistics for statistics, _ in parts], earlier).bind(
        lambda statistics: finished(prepared, Point(statistics, warnings=warnings))
    )


def merged(parts: Sequence[Statistics], earlier: Statistics | None = None) -> R[Statistics]:
    """One after another; `NoBatches` where there are none."""
    given = [*([] if earlier is None else [earlier]), *parts]
    if not given:
        return Failure(NoBatches())
    first: R[Statistics] = Success(given[0])
    return reduce(lambda before, part: before.bind(lambda whole: merge(whole, part)), given[1:], first)


def _over(work: _Work, shards: tuple[Shard, ...], map: MapLike, retries: int) -> R[list[Found]]:  # noqa: A002
    """The results of all shards, in order; those that a lost worker left are asked for again."""
    found: list[Found] = []
    lost: QuantError | None = None
    for _ in range(retries + 1):
        lost = _ask(work, shards, map, found)
        if lost is None:
            return Success(found)
    assert lost is not None
    done = [result.unwrap()[0] for result in found if isinstance(result, Success)]
    kept = merged(done)
    if isinstance(kept, Failure):
        return Failure(lost)
    statistics = kept.unwrap()
    cause = f"only the shards before shard {len(found)} were measured"
    return Failure(several([lost, Interrupted(statistics.batches, statistics, cause)]))


def _ask(work: _Work, shards: tuple[Shard, ...], map: MapLike, found: list[Found]) -> QuantError | None:  # noqa: A002
    """Run the shards that have no result yet, and add the results; why that ended too early, if so."""
    reason = "its worker gave no result"
    try:
        for result in map(work, shards[len(found) :]):
            if not isinstance(result, (Success, Failure)):
                reason = f"map gave a {type(result).__name__}, not the result of the function it was given"
                break
            found.append(result)
    except Exception as error:  # noqa: BLE001 - engines raise anything when they lose a worker
        reason = told(error)
    if len(found) == len(shards):
        return None
    remedy = "run it again: more memory per worker, fewer workers, or a map that makes its pool anew for each call"
    return WorkerLost(f"shard {len(found)}", reason, remedy)


def _numbered(problem: Problem, part: str) -> Problem:
    """A problem of one part, which says of which."""
    if isinstance(problem, BadBatch):
        return replace(problem, reason=f"in {part}: {problem.reason}")
    named: Any = problem if any(field.name == "node" for field in fields(problem)) else None
    return problem if named is None else replace(named, node=f"{part}, {problem.node}")


def _wrong_shards(shards: Any, map: Any, retries: Any) -> Iterator[Problem]:  # noqa: A002
    yield from not_batches(shards)
    if not callable(map):
        yield BadConfig("map", f"{map!r:.40} cannot be called", "pass a function like map, such as pool.map")
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        yield BadConfig("retries", f"{retries!r:.40} is no number of retries", "give 0 or more")
