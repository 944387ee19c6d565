"""Calibration in all processes of a `torch.distributed` group, such as `torchrun` starts, each on data of its own."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed as dist
from returns.result import Failure, Success

from qfunc.edge.batches import not_batches
from qfunc.edge.measure import Options, wrong_options
from qfunc.edge.parts import Found, fold_part, interrupted, joined, start_of
from qfunc.edge.run import Point, Policy
from qfunc.errors import (
    BadConfig,
    Interrupted,
    Problem,
    QuantError,
    UserFunctionFailed,
    WorkerLost,
    WrongStage,
    several,
    told,
)
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import Statistics
from qfunc.result import R


def calibrate_distributed(
    prepared: Prepared,
    batches: Iterable[Any],
    *,
    group: Any = None,
    statistics: Statistics | None = None,
    limit: int | None = None,
    policy: Policy = "fail",
    progress: bool | None = None,
) -> R[Calibrated]:
    """`calibrate` in every process of a group on batches of its own; all get the statistics of all the data.

    Call it in every process, of the same prepared model: one all-gather brings the statistics together, whose merge is
    exact, so that the result is bit for bit that of one process at the same batches and number of threads. Errors are
    gathered, too: every process gets those of all.

    Args:
        prepared: what to observe, with observers whose states can be merged.
        batches: the part of this process, such as `itertools.islice(loader, rank, None, world_size)`; it may be empty.
        group: the process group, such as of `gloo`; by default that of all. A process waits for the others as long as
            the `timeout` of the group says.
        statistics: earlier ones, to add to; the same in every process.
        limit: the most batches that each process reads.
        policy: as for `calibrate`.
        progress: whether to show a progress bar; by default in the first process, where standard error is a terminal.

    Returns:
        The calibrated stage; `BadConfig` where there is no group, for observers that cannot be merged, or where the
        processes have different models; the errors of all processes, each with its rank, or once where all have the
        same, with an `Interrupted` that holds the statistics of the other processes; `WorkerLost`, with an
        `Interrupted` that holds what was measured in this process alone, where another one was lost.
    """
    outside = _outside(group)
    if outside is not None:
        return Failure(outside)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    shown = progress if progress is not None or rank == 0 else False
    options = Options(limit=limit, policy=policy, progress=shown)
    start = _start(prepared, batches, statistics, options)
    own = start.bind(lambda _: fold_part(prepared, batches, options))
    gathered: list[Any] = [None] * size
    try:
        dist.all_gather_object(gathered, (_as_bytes(own), _data(statistics)), group=group)
    except Exception as error:  # noqa: BLE001 - each backend raises what it likes when a process is gone
        return Failure(_lost(own, error))
    found = {index: _from_bytes(data) for index, (data, _) in enumerate(gathered)}
    wrong = tuple(_other_start([earlier for _, earlier in gathered]))
    cause = next(filter(None, map(interrupted, found.values())), "")
    if cause:
        return Failure(_own_alone(own, cause))
    earlier = Point(statistics) if isinstance(statistics, Statistics) and not wrong else None
    return joined(prepared, earlier, found, "rank", of=size, wrong=wrong)


def _data(statistics: Any) -> tuple[int, int]:
    """What tells statistics apart by the data that they are of."""
    return (statistics.batches, statistics.data) if isinstance(statistics, Statistics) else (0, 0)


def _other_start(earlier: list[tuple[int, int]]) -> Iterator[Problem]:
    for rank, data in enumerate(earlier):
        if data != earlier[0]:
            reason = "the earlier ones that it was given are of other data than those of rank 0"
            yield BadConfig(f"rank {rank}, statistics", reason, "give the same statistics in every process, or none")


def _outside(group: Any) -> QuantError | None:
    """Why this process cannot exchange anything with others, if so."""
    if not (dist.is_available() and dist.is_initialized()):
        remedy = "start the script with torchrun, and call torch.distributed.init_process_group('gloo') in it first"
        return BadConfig("torch.distributed", "this process is in no group", remedy)
    absent = group == dist.GroupMember.NON_GROUP_MEMBER
    if not (absent or isinstance(group, (dist.ProcessGroup, type(None)))):
        return BadConfig("group", f"{group!r:.40} is no process group", "pass what torch.distributed.new_group gave")
    if absent or dist.get_rank(group) < 0:
        return BadConfig("group", "this process is not in it", "call it in the processes of the group only")
    return None


def _start(prepared: Prepared, batches: Any, statistics: Statistics | None, options: Options) -> R[Point]:
    """Where calibration begins in this process; what is wrong is told to the others, too, which wait for it."""
    if not isinstance(prepared, Prepared):
        return Failure(WrongStage(type(prepared).__name__, "Prepared"))
    wrong: list[Problem] = [*not_batches(batches), *wrong_options(options), *wrong_options(Options(statistics))]
    return Failure(several(wrong)) if wrong else start_of(prepared, statistics)


def _as_bytes(own: Found) -> bytes:
    try:
        return pickle.dumps(own)
    except Exception as error:  # noqa: BLE001 - what a user's statistic raises when it is pickled
        remedy = "define the observer's classes at the top level of an importable module"
        problem = UserFunctionFailed("statistics", f"they cannot be pickled: {told(error)}", remedy)
        return pickle.dumps(Failure(problem))


def _from_bytes(data: bytes) -> Found:
    try:
        found: Found = pickle.loads(data)  # noqa: S301 - of a process of the same group
    except Exception as error:  # noqa: BLE001 - anything may come out of the user's classes
        return Failure(UserFunctionFailed("statistics", f"they cannot be unpickled here: {told(error)}"))
    return found


def _lost(own: Found, error: Exception) -> QuantError:
    """That another process is gone, with what this one has."""
    remedy = "look at what the other processes wrote, and start all of them again"
    lost = WorkerLost("another rank", f"the statistics could not be exchanged: {told(error)}", remedy)
    return several([lost, _own_alone(own, "another rank was lost")])


def _own_alone(own: Found, cause: str) -> QuantError:
    """What this process has, where it gets nothing of the others."""
    if not isinstance(own, Success):
        return own.failure()
    point = own.unwrap()
    return Interrupted(point.read, point.statistics, f"{cause}; measured: the batches of this rank alone")
