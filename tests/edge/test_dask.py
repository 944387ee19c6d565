"""`calibrate_sharded` on a local cluster of Dask, one of whose workers is killed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from qfunc import calibrate, calibrate_sharded, unwrap
from tests.edge.parallel import Block, assert_same_statistics, batches, generated, killed, prepared, prepared_of, told

distributed = pytest.importorskip("distributed")
psutil = pytest.importorskip("psutil")

SECONDS = 120


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """Two processes on this machine, without a dashboard; none is left at the end."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None,
            worker_dashboard_address=None, memory_limit=0,
        ) as cluster,
        distributed.Client(cluster, timeout=SECONDS) as made,
    ):  # fmt: skip
        yield made
    deadline = time.monotonic() + 20
    while left := _workers(before):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _workers(before: set[int]) -> list[str]:
    """The commands of the processes that the cluster has started and that still run."""
    children = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    commands = [" ".join(child.cmdline()) for child in children if child.status() != psutil.STATUS_ZOMBIE]
    return [command for command in commands if "spawn_main" in command]


def over(client: Any) -> Any:
    """What is like map of a cluster, and does not wait for ever."""

    def mapped(function: Any, items: Sequence[Any]) -> Any:
        futures = client.map(function, items, pure=False)
        distributed.wait(futures, timeout=SECONDS)
        return client.gather(futures)

    return mapped


def alone(count: int = 9) -> Any:
    return unwrap(calibrate(prepared(), batches(count))).statistics


def test_workers_find_what_one_process_does(client: Any) -> None:
    shards = [batches(4), partial(generated, 4, 3), partial(batches, 2, 7)]
    assert_same_statistics(unwrap(calibrate_sharded(prepared(), shards, over(client))).statistics, alone())


def test_a_killed_worker_is_replaced_and_its_shard_run_again(client: Any, tmp_path: Path) -> None:
    shards = [batches(2), partial(generated, 2, 2), partial(killed, tmp_path, 1, 4, 3), batches(2, 7)]
    workers = set(client.run(os.getpid).values())
    found = unwrap(calibrate_sharded(prepared(), shards, over(client)))
    assert_same_statistics(found.statistics, alone())
    assert len(list(tmp_path.iterdir())) == 1
    client.wait_for_workers(2, timeout=SECONDS)
    assert workers - set(client.run(os.getpid).values())


def test_what_only_cloudpickle_can_carry(client: Any) -> None:
    class Local(Block):
        """A class that no other process can import."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model: nn.Module = Local().eval()
    model.scaled = lambda x: 2 * x  # type: ignore[assignment]
    shards = [lambda: batches(4), lambda: batches(5, 4)]
    stage = prepared_of(model)
    found = unwrap(calibrate_sharded(stage, shards, over(client)))
    assert_same_statistics(found.statistics, unwrap(calibrate(stage, batches())).statistics)


def test_what_nothing_can_carry_is_named(client: Any) -> None:
    result = calibrate_sharded(prepared(), [batches(1), generated(0, 1)], over(client))
    assert told(result) == [("UserFunctionFailed", "shard 1")]
