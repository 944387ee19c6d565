"""What each process of `test_distributed.py` runs: `torchrun_calibrate.py FOLDER PROGRAM`.

It leaves what its rank was given in FOLDER.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qfunc import calibrate_distributed, unwrap
from tests.edge.parallel import OBSERVERS, batches, failing, prepared, unmergeable

SIZE = 4
TIMEOUT = timedelta(seconds=60)
BAD = torch.zeros(2, 3, 12, 12, dtype=torch.float64)


def own(rank: int) -> list[Tensor]:
    return batches()[rank::SIZE]


def broken_off() -> Iterator[Tensor]:
    yield batches(1)[0]
    raise KeyboardInterrupt


def unread() -> Iterator[Tensor]:
    raise AssertionError("no data is to be read")
    yield


def earlier(rank: int, *, other: bool) -> Any:
    """Statistics of the first four batches; in rank 1 of another number of them, if `other`."""
    from qfunc import calibrate

    count = 3 if other and rank == 1 else 4
    return unwrap(calibrate(prepared(), batches(count))).statistics


def on(rank: int, *, at: int, given: Any) -> Any:
    """Something else in one rank."""
    return given if rank == at else own(rank)


PROGRAMS: dict[str, Callable[[int], Any]] = {
    **{
        name: lambda rank, observer=observer: calibrate_distributed(prepared(observer), own(rank))
        for name, observer in OBSERVERS.items()
    },
    "two have data": lambda rank: calibrate_distributed(prepared(), batches(9)[rank:2:2] if rank < 2 else []),
    "no data": lambda rank: calibrate_distributed(prepared(), []),
    "a limit": lambda rank: calibrate_distributed(prepared(), own(rank), limit=1),
    "a bad batch": lambda rank: calibrate_distributed(prepared(), on(rank, at=2, given=[*own(2), BAD])),
    "all bad": lambda rank: calibrate_distributed(prepared(), [BAD]),
    "a NaN left out": lambda rank: calibrate_distributed(
        prepared(), on(rank, at=1, given=[own(1)[0] * torch.nan, *own(1)]), policy="skip"
    ),
    "raises": lambda rank: calibrate_distributed(prepared(), on(rank, at=0, given=map(failing, [7]))),
    "no iterable": lambda rank: calibrate_distributed(prepared(), on(rank, at=3, given=5)),
    "Ctrl-C": lambda rank: calibrate_distributed(prepared(), on(rank, at=1, given=broken_off())),
    "other weights": lambda rank: calibrate_distributed(prepared(seed=int(rank == 1)), own(rank)),
    "other options": lambda rank: calibrate_distributed(prepared(), own(rank), limit=0 if rank == 3 else None),
    "another stage": lambda rank: calibrate_distributed(prepared() if rank else prepared().graph, own(rank)),  # type: ignore[arg-type]
    "unmergeable": lambda rank: calibrate_distributed(unmergeable(), unread()),
    "one unmergeable": lambda rank: calibrate_distributed(unmergeable() if rank == 2 else prepared(), own(rank)),
    "on earlier ones": lambda rank: calibrate_distributed(
        prepared(), batches(5, 4)[rank::SIZE], statistics=earlier(rank, other=False)
    ),
    "on other earlier ones": lambda rank: calibrate_distributed(
        prepared(), batches(5, 4)[rank::SIZE], statistics=earlier(rank, other=True)
    ),
    "a group of two": lambda rank: calibrate_distributed(
        prepared(), batches()[rank::2], group=dist.new_group([0, 1], timeout=TIMEOUT)
    ),
    "no group": lambda rank: calibrate_distributed(prepared(), own(rank), group=3),
}


def every_program(rank: int) -> dict[str, Any]:
    return {name: program(rank) for name, program in PROGRAMS.items()}


def killed(rank: int) -> dict[str, Any]:
    """The last process is gone before the exchange."""
    if rank == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"killed": calibrate_distributed(prepared(), own(rank))}


def late(rank: int) -> dict[str, Any]:
    """The last process comes later than the group waits, and finds nobody."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    if rank == dist.get_world_size() - 1:
        time.sleep(4)
    return {"late": calibrate_distributed(prepared(), own(rank), group=group)}


def main(folder: Path, program: str) -> None:
    torch.set_num_threads(1)
    found = {"not initialized": calibrate_distributed(prepared(), unread())}
    rank, store = int(os.environ["RANK"]), os.environ.get("STORE")
    if store is None:
        dist.init_process_group("gloo", timeout=TIMEOUT)
    else:  # without torchrun: no port is needed
        size = int(os.environ["WORLD_SIZE"])
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIMEOUT)
    found |= {"every_program": every_program, "killed": killed, "late": late}[program](rank)
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(Path(sys.argv[1]), sys.argv[2])
