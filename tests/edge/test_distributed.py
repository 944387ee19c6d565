"""`calibrate_distributed` in real processes: under torchrun, and in a group whose processes end too early."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from returns.result import Failure

from qfunc import calibrate, calibrate_distributed, convert, render, unwrap
from qfunc.errors import BadBatch, BadConfig, Interrupted, NonFinite, UserFunctionFailed, WorkerLost, problems
from qfunc.ir import to_text
from qfunc.passes.statistics import merge
from tests.edge.parallel import OBSERVERS, assert_same_statistics, batches, bits, prepared, told
from tests.edge.torchrun_calibrate import SIZE, own

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and sys.platform == "linux"), reason="needs gloo on Linux"
)

ROOT = Path(__file__).parents[2]
SCRIPT = "tests.edge.torchrun_calibrate"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval=0.1"]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), **more}


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    """How it ended and what it wrote; all that it started is gone after that, whatever happens."""
    try:
        written, _ = process.communicate(timeout=seconds)
        return process.returncode, written
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def started(command: list[str], **more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=ROOT, env=environment(**more), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def torchrun(folder: Path, program: str, processes: int) -> tuple[int, str]:
    command = [*TORCHRUN, f"--nproc-per-node={processes}", "-m", SCRIPT, str(folder), program]
    return ended(started(command), 120)


def without_torchrun(folder: Path, program: str, processes: int) -> list[tuple[int, str]]:
    """The processes of a group that nobody watches over: they find each other by a file."""
    more = {"STORE": str(folder / "store"), "WORLD_SIZE": str(processes)}
    command = [sys.executable, "-m", SCRIPT, str(folder), program]
    running = [started(command, RANK=str(rank), **more) for rank in range(processes)]
    return [ended(process, 60) for process in running]


def left(folder: Path) -> dict[int, dict[str, Any]]:
    """What the ranks left."""
    return {int(path.stem): pickle.loads(path.read_bytes()) for path in sorted(folder.glob("*.pickle"))}


Ranks = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """What four processes under torchrun found, each warning an error."""
    folder = tmp_path_factory.mktemp("torchrun")
    code, written = torchrun(folder, "every_program", SIZE)
    assert code == 0, written
    assert "Warning" not in written, written
    found = left(folder)
    assert list(found) == list(range(SIZE))
    return found


def of_all(ranks: Ranks, program: str) -> Any:
    """The one result of all ranks."""
    results = [found[program] for found in ranks.values()]
    kinds = [
        bits(r.failure() if isinstance(r, Failure) else (r.unwrap().statistics, r.unwrap().warnings)) for r in results
    ]
    assert all(kind == kinds[0] for kind in kinds[1:]), [told(r) for r in results if isinstance(r, Failure)]
    return results[0]


def kept(result: Any) -> Any:
    """The statistics that an error holds."""
    [held] = [problem for problem in problems(result.failure()) if isinstance(problem, Interrupted)]
    return held.statistics


def of_ranks(numbers: list[int]) -> Any:
    """What one process finds on the data of some ranks."""
    return unwrap(calibrate(prepared(), [batch for rank in numbers for batch in own(rank)])).statistics


@pytest.mark.parametrize("name", OBSERVERS)
def test_all_ranks_have_what_one_process_finds_on_all_the_data(ranks: Ranks, name: str) -> None:
    stage = prepared(OBSERVERS[name])
    alone = unwrap(calibrate(stage, batches()))
    for found in ranks.values():
        together = unwrap(found[name])
        assert_same_statistics(together.statistics, alone.statistics)
        assert to_text(unwrap(convert(together)).graph, full=True) == to_text(unwrap(convert(alone)).graph, full=True)


def test_ranks_without_data_and_of_few_batches(ranks: Ranks) -> None:
    alone = unwrap(calibrate(prepared(), batches(2))).statistics
    assert_same_statistics(unwrap(of_all(ranks, "two have data")).statistics, alone)
    assert told(of_all(ranks, "no data")) == [("NoBatches", "batches")]
    alone = unwrap(calibrate(prepared(), batches(4))).statistics
    assert_same_statistics(unwrap(of_all(ranks, "a limit")).statistics, alone)


def test_earlier_statistics_are_added_to_once(ranks: Ranks) -> None:
    alone = unwrap(calibrate(prepared(), batches())).statistics
    assert_same_statistics(unwrap(of_all(ranks, "on earlier ones")).statistics, alone)
    other = of_all(ranks, "on other earlier ones")
    assert told(other)[:-1] == [("BadConfig", "rank 1, statistics")]
    assert_same_statistics(kept(other), unwrap(calibrate(prepared(), batches(5, 4))).statistics)


# Rank, error, and the ranks whose statistics are kept.
WRONG = [
    ("a bad batch", [("BadBatch", "batch 2")], [0, 1, 3]),
    ("all bad", [("BadBatch", "batch 0")], []),
    ("raises", [("UserFunctionFailed", "rank 0, batch 0")], [1, 2, 3]),
    ("no iterable", [("BadConfig", "rank 3, batches")], [0, 1, 2]),
    ("other weights", [("BadConfig", "rank 1, statistics")], []),
    ("other options", [("BadConfig", "rank 3, limit")], [0, 1, 2]),
    ("another stage", [("WrongStage", "rank 0, stage")], [1, 2, 3]),
    ("unmergeable", [("BadConfig", place) for place in ("second", "mean", "first", "input 'x'")], []),
    (
        "one unmergeable",
        [("BadConfig", f"rank 2, {place}") for place in ("second", "mean", "first", "input 'x'")],
        [0, 1, 3],
    ),
]


@pytest.mark.parametrize(("program", "expected", "measured"), WRONG, ids=[row[0] for row in WRONG])
def test_all_ranks_are_told_what_is_wrong_with_any(
    ranks: Ranks, program: str, expected: list[tuple[str, str]], measured: list[int]
) -> None:
    result = of_all(ranks, program)
    assert told(result)[: len(expected)] == expected
    assert [kind for kind, _ in told(result)[len(expected) :]] == ["Interrupted"] * bool(measured)
    if measured:
        assert_same_statistics(kept(result), of_ranks(measured))


def test_a_bad_batch_is_told_with_its_rank(ranks: Ranks) -> None:
    bad = problems(of_all(ranks, "a bad batch").failure())[0]
    assert isinstance(bad, BadBatch)
    assert bad.reason.startswith("in rank 2: input 'x' is float64")


def test_warnings_say_of_which_rank(ranks: Ranks) -> None:
    [warning] = unwrap(of_all(ranks, "a NaN left out")).warnings
    assert isinstance(warning, NonFinite)
    assert warning.node == "rank 1, batch 0"


def test_ctrl_c_in_one_rank_ends_all_and_each_keeps_its_own(ranks: Ranks) -> None:
    for rank, found in ranks.items():
        [held] = problems(found["Ctrl-C"].failure())
        assert isinstance(held, Interrupted)
        assert held.cause.startswith("Ctrl-C ended calibration")
        alone = batches(1) if rank == 1 else own(rank)
        assert_same_statistics(held.statistics, unwrap(calibrate(prepared(), alone)).statistics)


def test_groups(ranks: Ranks) -> None:
    alone = unwrap(calibrate(prepared(), batches())).statistics
    for rank in (0, 1):
        assert_same_statistics(unwrap(ranks[rank]["a group of two"]).statistics, alone)
    for rank in (2, 3):
        assert told(ranks[rank]["a group of two"]) == [("BadConfig", "group")]
    assert told(of_all(ranks, "no group")) == [("BadConfig", "group")]
    assert told(of_all(ranks, "not initialized")) == [("BadConfig", "torch.distributed")]


def test_outside_of_any_group_it_is_told_how_to_make_one() -> None:
    problem = calibrate_distributed(prepared(), batches()).failure()
    assert isinstance(problem, BadConfig)
    assert "torchrun" in problem.remedy
    assert "init_process_group('gloo')" in problem.remedy


@pytest.mark.parametrize("program", ["killed", "late"])
def test_without_one_process_the_others_keep_what_they_have(tmp_path: Path, program: str) -> None:
    began = time.monotonic()
    outcomes = without_torchrun(tmp_path, program, 3)
    assert time.monotonic() - began < 55
    assert [code for code, _ in outcomes[:2]] == [0, 0], outcomes
    assert outcomes[2][0] == {"killed": -signal.SIGKILL, "late": 0}[program], outcomes[2]
    found = left(tmp_path)
    for rank in (0, 1) if program == "killed" else (0, 1, 2):
        lost, held = problems(found[rank][program].failure())
        assert isinstance(lost, WorkerLost)
        assert isinstance(held, Interrupted)
        assert_same_statistics(held.statistics, of_ranks([rank]))
        assert "another rank" in render(lost)
    if program == "late":
        parts = [kept(found[rank][program]) for rank in range(3)]
        whole = merge(parts[0], parts[1]).bind(lambda two: merge(two, parts[2]))
        assert_same_statistics(unwrap(whole), of_ranks([0, 1, 2]))


def test_torchrun_ends_when_a_process_does(tmp_path: Path) -> None:
    code, written = torchrun(tmp_path, "killed", 2)
    assert code == 1
    assert "Signal 9 (SIGKILL)" in written
    assert set(left(tmp_path)) <= {0}
    for found in left(tmp_path).values():
        assert told(found["killed"])[0] == ("WorkerLost", "another rank")


def _raise_oserror(point: Any) -> Any:
    raise OSError("torn")


def test_what_one_rank_cannot_pickle_all_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a group of one, in this process: what is exchanged goes the same way."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        good = calibrate_distributed(prepared(), batches(3))
        monkeypatch.setattr("qfunc.edge.run.Point.__reduce__", _raise_oserror, raising=False)
        torn = calibrate_distributed(prepared(), batches(3))
    finally:
        dist.destroy_process_group()
    assert_same_statistics(unwrap(good).statistics, unwrap(calibrate(prepared(), batches(3))).statistics)
    problem = torn.failure()
    assert isinstance(problem, UserFunctionFailed)
    assert problem.reason.startswith("they cannot be pickled: OSError: torn")
