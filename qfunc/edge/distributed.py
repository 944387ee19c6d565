"""Calibration in all processes of a `torch.distributed` group, such as `torchrun` starts, each on data of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from returns.result import Failure

from qfunc.edge.measure import Options, wrong_options
from qfunc.edge.run import Policy
from qfunc.edge.sharded import Found, fold_shard, joined, unmergeable
from qfunc.errors import BadConfig, Interrupted, QuantError, WorkerLost, WrongStage, several, told
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
        group: the process group; by default that of all. It must be able to exchange tensors of the CPU, as `gloo` is.
        statistics: earlier ones, to add to; the same in every process.
        limit: the most batches that each process reads.
        policy: as for `calibrate`.
        progress: whether to show a progress bar; by default where standard error is a terminal.

    Returns:
        The calibrated stage; `BadConfig` where there is no group, for observers that cannot be merged, or where the
        processes have different models; the errors of all processes, each with its rank; `WorkerLost`, with an
        `Interrupted` that holds what was measured here, where a process was lost.
    """
    if not isinstance(prepared, Prepared):
        return Failure(WrongStage(type(prepared).__name__, "Prepared"))
    options = Options(limit=limit, policy=policy, progress=progress)
    wrong = [*wrong_options(options), *wrong_options(Options(statistics)), *unmergeable(prepared)]
    if not (dist.is_available() and dist.is_initialized()):
        remedy = "start the script with torchrun, and call torch.distributed.init_process_group('gloo') in it first"
        wrong.append(BadConfig("torch.distributed", "this process is in no group", remedy))
    if wrong:
        return Failure(several(wrong))
    own = fold_shard(prepared, batches, options)
    found: list[Found] = [own] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, own, group=group)
    except (RuntimeError, ValueError) as error:
        return Failure(_lost(own, error))
    return joined(prepared, found, "rank", statistics)


def _lost(own: Found, error: Exception) -> QuantError:
    """That another process is gone, with what this one has."""
    remedy = "look at the logs of the other processes, and start all of them again"
    lost = WorkerLost("another rank", f"the statistics could not be exchanged: {told(error)}", remedy)
    if isinstance(own, Failure):
        return several([own.failure(), lost])
    statistics, _ = own.unwrap()
    return several([lost, Interrupted(statistics.batches, statistics, "only the batches of this rank were measured")])
