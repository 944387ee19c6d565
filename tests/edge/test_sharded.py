"""`calibrate_sharded` over pools of threads and processes: what one process finds, whatever happens to workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from qfunc import QConfigMapping, calibrate, calibrate_sharded, convert, prepare, trace, unwrap
from qfunc.errors import BadBatch, BadConfig, Interrupted, UserFunctionFailed, WorkerLost, problems, render
from qfunc.ir import to_text
from qfunc.passes.statistics import Statistics
from tests.edge.parallel import (
    OBSERVERS,
    Block,
    assert_same_statistics,
    batches,
    failing,
    generated,
    killed,
    loader,
    prepared,
    prepared_of,
    threads_told,
    told,
    unmergeable,
)

SECONDS = 120
"""The longest that a test waits for a pool."""

# Its processes are copies of one that has imported everything already.
SERVER = get_context("forkserver")
SERVER.set_forkserver_preload(["tests.edge.parallel"])


def pool_of(workers: int, context: Any = SERVER, threads: int = 1) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,))


def limited(pool: ProcessPoolExecutor) -> Any:
    """The pool's map, which does not wait for ever."""
    return partial(pool.map, timeout=SECONDS)


@pytest.fixture(scope="module")
def spawned() -> Iterator[Any]:
    """The map of two processes that know nothing of this one."""
    with pool_of(2, get_context("spawn")) as pool:
        yield limited(pool)


def anew(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """A map that makes its pool in each call."""
    with pool_of(2) as pool:
        yield from pool.map(function, items, timeout=SECONDS)


class Counted:
    """A map that knows how often it was called, and with which shards."""

    def __init__(self, map_like: Any = map) -> None:
        self.map_like, self.calls = map_like, []

    def __call__(self, function: Any, items: Sequence[Any]) -> Any:
        self.calls.append([item.index for item in items])
        return self.map_like(function, items)


def alone(count: int = 9, start: int = 0, observer: Any = OBSERVERS["range"]) -> Statistics:
    """What one process finds."""
    return unwrap(calibrate(prepared(observer), batches(count, start))).statistics


def kept(result: Any) -> Interrupted:
    [held] = [problem for problem in problems(result.failure()) if isinstance(problem, Interrupted)]
    return held


def nan_first() -> list[Tensor]:
    return [batches(1)[0] * torch.nan, *batches(2, 4)]


THREE = [batches(4), batches(3, 4), batches(2, 7)]
BAD = torch.zeros(2, 3, 12, 12, dtype=torch.float64)


# The same as in one process


@pytest.mark.parametrize("name", OBSERVERS)
def test_processes_find_what_one_does(spawned: Any, name: str) -> None:
    stage = prepared(OBSERVERS[name])
    together, one = unwrap(calibrate_sharded(stage, THREE, spawned)), unwrap(calibrate(stage, batches()))
    assert_same_statistics(together.statistics, one.statistics)
    assert together.warnings == one.warnings
    assert to_text(unwrap(convert(together)).graph, full=True) == to_text(unwrap(convert(one)).graph, full=True)


FORMS = {
    "lists": THREE,
    "many, some empty": [[], *([batch] for batch in batches()), []],
    "functions": [partial(batches, 4), partial(batches, 3, 4), partial(batches, 2, 7)],
    "functions of generators": [partial(generated, 0, 4), partial(generated, 4, 5)],
    "functions of data loaders": [partial(loader, 0, 5), partial(loader, 5, 4)],
    "data loaders": [loader(0, 5), loader(5, 4)],
    "a generator of shards": (shard for shard in THREE),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_shards(spawned: Any, form: str) -> None:
    assert_same_statistics(unwrap(calibrate_sharded(prepared(), FORMS[form], spawned)).statistics, alone())


def test_no_memory_is_moved_for_other_processes(spawned: Any) -> None:
    """The pickler of `multiprocessing` would have both sides write to one memory, and keep a file open for each."""
    model, shards = Block().eval(), [batches(2), batches(2, 2)]
    stage = prepared_of(model)
    answers: list[Any] = []

    def watched(function: Any, items: Sequence[Any]) -> list[Any]:
        answers.extend(spawned(function, items))
        return answers

    unwrap(calibrate_sharded(stage, shards, watched))
    tensors = [*model.state_dict().values(), *(batch for shard in shards for batch in shard)]
    for answer in answers:
        measured = unwrap(answer.found).statistics.measured
        tensors += [tensor for entry in measured.values() for tensor in (entry.state.minimum, entry.state.maximum)]
    assert len(tensors) == 6 + 4 + 2 * 4 * 2
    assert not any(tensor.is_shared() for tensor in tensors)


@pytest.mark.parametrize("make", [Block, lambda: fx.symbolic_trace(Block())], ids=["module", "fx module"])
def test_threads_find_what_one_does(make: Callable[[], nn.Module]) -> None:
    stage = prepared_of(make().eval())
    shards = [[batch] for batch in batches(24)]
    with ThreadPoolExecutor(4) as pool:
        found = unwrap(calibrate_sharded(stage, shards, partial(pool.map, timeout=SECONDS)))
    assert_same_statistics(found.statistics, unwrap(calibrate(stage, batches(24))).statistics)
    assert torch.get_num_threads() == 1


def test_results_may_come_in_any_order() -> None:
    def backwards(function: Any, items: Sequence[Any]) -> Iterable[Any]:
        return map(function, reversed(items))

    shards = [batches(2), [BAD[:0].float(), *nan_first()], [*nan_first()[:1], *batches(1)]]
    one, other = (unwrap(calibrate_sharded(prepared(), shards, each, policy="skip")) for each in (map, backwards))
    assert_same_statistics(one.statistics, other.statistics)
    assert one.warnings == other.warnings
    assert [type(each).__name__ for each in one.warnings] == ["BadBatch", "NonFinite", "NonFinite"]
    assert [each.node for each in one.warnings[1:]] == ["shard 1, batch 1", "shard 2, batch 0"]
    assert one.warnings[0].reason.startswith("in shard 1: ")


def test_shards_that_can_be_read_once() -> None:
    shards = [iter(batches(4)), generated(4, 5)]
    assert_same_statistics(unwrap(calibrate_sharded(prepared(), shards)).statistics, alone())


def test_earlier_statistics_are_added_to_once(spawned: Any) -> None:
    found = unwrap(calibrate_sharded(prepared(), [batches(3, 4), batches(2, 7)], spawned, statistics=alone(4)))
    assert_same_statistics(found.statistics, alone())


def test_what_plain_pickle_refuses_is_no_matter_in_this_process() -> None:
    model = Block().eval()
    model.scaled = lambda x: 2 * x  # type: ignore[assignment]
    stage = prepared_of(model)
    assert calibrate_sharded(stage, [lambda: batches(2)]).unwrap().statistics.batches == 2


# Threads


@pytest.mark.parametrize(("here", "there"), [(1, 2), (2, 1)])
def test_workers_run_with_the_threads_of_the_caller(tmp_path: Path, here: int, there: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(here)
    try:
        with pool_of(1, threads=there) as pool:
            shards = [partial(threads_told, tmp_path / "first", 0, 4), partial(threads_told, tmp_path / "second", 4, 5)]
            found = unwrap(calibrate_sharded(prepared(), shards, limited(pool))).statistics
            after, process = pool.submit(torch.get_num_threads).result(SECONDS), pool.submit(os.getpid).result(SECONDS)
        assert_same_statistics(found, alone())
    finally:
        torch.set_num_threads(before)
    assert process != os.getpid()
    assert [(tmp_path / name).read_text() for name in ("first", "second")] == [f"{process} {here}"] * 2
    assert after == there


# Errors


def test_all_shards_say_what_is_wrong_and_the_others_are_kept(spawned: Any) -> None:
    shards = [[*batches(2), BAD], batches(4), partial(failing, 3), partial(len, "no iterable"), nan_first()]
    result = calibrate_sharded(prepared(), shards, spawned)
    assert told(result) == [
        ("BadBatch", "batch 2"),
        ("UserFunctionFailed", "shard 2, the function that gives the batches"),
        ("BadConfig", "shard 3, batches"),
        ("NonFinite", "shard 4, batch 0"),
        ("Interrupted", "batch 4"),
    ]
    bad, failed, *_ = problems(result.failure())
    assert isinstance(bad, BadBatch) and bad.reason.startswith("in shard 0: input 'x' is float64")
    assert isinstance(failed, UserFunctionFailed) and failed.reason.startswith("OSError: no data from 3 (parallel.py:")
    assert_same_statistics(kept(result).statistics, alone(4))
    assert kept(result).cause == "measured: shard 1 of 5"


def test_what_is_wrong_with_all_shards_is_told_once() -> None:
    result = calibrate_sharded(prepared(), [[BAD], [BAD]])
    assert told(result) == [("BadBatch", "batch 0")]
    assert "shard" not in render(result.failure())


def untouched(function: Any, items: Any) -> Any:
    raise AssertionError("nothing is to be run")


def test_what_can_be_told_before_any_data() -> None:
    other = unwrap(calibrate(prepared(seed=1), batches(1))).statistics
    weights = prepared()
    places = ["second", "mean", "first", "input 'x'"]
    rows = [
        (calibrate_sharded(unmergeable(), THREE, untouched), [("BadConfig", each) for each in places]),
        (calibrate_sharded(weights, THREE, untouched, statistics=other), [("BadConfig", "statistics")]),
        (calibrate_sharded(weights, batches(2), untouched), [("BadConfig", "shard 0"), ("BadConfig", "shard 1")]),
        (calibrate_sharded(weights, batches(1)[0], untouched), [("BadConfig", "shards")]),
        (calibrate_sharded(weights, map(failing, [1]), untouched), [("UserFunctionFailed", "shards")]),
        (calibrate_sharded(weights.graph, THREE, untouched), [("WrongStage", "stage")]),  # type: ignore[arg-type]
        (
            calibrate_sharded(weights, 3, 4, policy="hope", retries=-1),  # type: ignore[arg-type]
            [("BadConfig", each) for each in ("shards", "map", "retries", "policy")],
        ),
    ]  # fmt: skip
    assert [told(result) for result, _ in rows] == [expected for _, expected in rows]


def test_no_shards() -> None:
    assert told(calibrate_sharded(prepared(), [])) == [("NoBatches", "batches")]
    assert told(calibrate_sharded(prepared(), [[], []])) == [("NoBatches", "batches")]
    nothing = unwrap(trace(Block().eval()).bind(partial(prepare, qconfig_mapping=QConfigMapping())))
    assert calibrate_sharded(nothing, []) == calibrate(nothing, [])


def test_what_cannot_be_pickled_is_named_and_not_tried_again(spawned: Any) -> None:
    model = Block().eval()
    model.scaled = lambda x: 2 * x  # type: ignore[assignment]
    stage = prepared_of(model)
    counted = Counted(spawned)
    assert told(calibrate_sharded(stage, THREE, counted)) == [("UserFunctionFailed", "scaled")]
    result = calibrate_sharded(prepared(), [batches(1), generated(1, 1), lambda: batches(1)], counted)
    assert [each for each in told(result) if each[0] != "Interrupted"] == [
        ("UserFunctionFailed", "shard 1"),
        ("UserFunctionFailed", "shard 2"),
    ]
    assert "functools.partial" in problems(result.failure())[0].remedy
    assert counted.calls == [[0, 1, 2]] * 2
    assert_same_statistics(unwrap(calibrate_sharded(prepared(), THREE, counted)).statistics, alone())


NOT_MAPS: dict[str, Any] = {
    "none": lambda function, items: None,
    "other things": lambda function, items: [3 for item in items],
    "the items": lambda function, items: items,
    "twice": lambda function, items: [function(items[0])] * 2,
    "too many": lambda function, items: [*map(function, items), function(items[0])],
}


@pytest.mark.parametrize("name", NOT_MAPS)
def test_what_is_not_like_map_is_told(name: str) -> None:
    counted = Counted(NOT_MAPS[name])
    problem = problems(calibrate_sharded(prepared(), THREE, counted).failure())[0]
    assert isinstance(problem, BadConfig)
    assert problem.node == "map"
    assert len(counted.calls) == 1


# Lost workers


def test_a_killed_worker_is_replaced_and_its_shard_run_again(tmp_path: Path) -> None:
    counted = Counted(anew)
    shards = [batches(2), partial(generated, 2, 2), partial(killed, tmp_path, 1, 4, 3), batches(2, 7)]
    found = unwrap(calibrate_sharded(prepared(), shards, counted))
    assert_same_statistics(found.statistics, alone())
    assert len(list(tmp_path.iterdir())) == 1
    assert len(counted.calls) == 2
    assert 2 in counted.calls[1]


def test_a_broken_pool_is_told_and_the_finished_shards_are_kept(tmp_path: Path) -> None:
    shards = [batches(3, 2), partial(killed, tmp_path, 1, 5, 3), batches(1, 8)]
    with pool_of(1) as pool:
        result = calibrate_sharded(prepared(), shards, limited(pool), statistics=alone(2))
    lost, held = problems(result.failure())
    assert isinstance(lost, WorkerLost)
    assert lost.node == "shard 1..2"
    assert lost.reason.startswith("BrokenProcessPool")
    assert isinstance(held, Interrupted)
    assert held.cause == "measured: shard 0 of 3"
    assert_same_statistics(held.statistics, alone(5))
    found = unwrap(calibrate_sharded(prepared(), shards[1:], anew, statistics=held.statistics))
    assert_same_statistics(found.statistics, alone())


def test_a_shard_that_kills_each_of_its_workers_is_given_up(tmp_path: Path) -> None:
    counted = Counted(anew)
    result = calibrate_sharded(prepared(), [partial(killed, tmp_path, 9, 0, 2)], counted, retries=2)
    assert told(result) == [("WorkerLost", "shard 0")]
    assert len(list(tmp_path.iterdir())) == 3
    assert counted.calls == [[0]] * 3


class Losing:
    """A map in this process that loses its worker at one shard, in the first of its calls."""

    def __init__(self, at: int, *, quietly: bool) -> None:
        self.at, self.quietly, self.calls = at, quietly, 0

    def __call__(self, function: Any, items: Sequence[Any]) -> Iterator[Any]:
        self.calls += 1
        for item in items:
            if self.calls == 1 and item.index == self.at:
                if not self.quietly:
                    function(item)
                    raise OSError("gone")
                continue
            yield function(item)


@pytest.mark.parametrize("quietly", [True, False])
def test_only_what_is_missing_is_asked_for_again(quietly: bool) -> None:
    counted = Counted(Losing(1, quietly=quietly))
    assert_same_statistics(unwrap(calibrate_sharded(prepared(), THREE, counted)).statistics, alone())
    assert counted.calls == [[0, 1, 2], [1] if quietly else [1, 2]]


def test_iterators_are_not_run_again_since_they_might_be_empty_by_then() -> None:
    counted = Counted(Losing(1, quietly=False))
    result = calibrate_sharded(prepared(), [iter(each) for each in THREE], counted)
    lost, held = problems(result.failure())
    assert isinstance(lost, WorkerLost) and "lists or functions" in lost.remedy
    assert held.reason.startswith("measured: shard 0 of 3")
    assert len(counted.calls) == 1


def test_errors_of_shards_are_told_beside_a_lost_worker() -> None:
    def lost(function: Any, items: Sequence[Any]) -> Iterator[Any]:
        yield from map(function, [item for item in items if item.index < 2])
        raise OSError("gone")

    result = calibrate_sharded(prepared(), [[BAD], *THREE], lost)
    assert told(result) == [("BadBatch", "batch 0"), ("WorkerLost", "shard 2..3"), ("Interrupted", "batch 4")]
    assert_same_statistics(kept(result).statistics, alone(4))


# Ctrl-C


def interrupting() -> Iterator[Tensor]:
    yield batches(1)[0]
    raise KeyboardInterrupt


def test_ctrl_c_ends_all_shards_and_keeps_those_that_are_done() -> None:
    begun: list[int] = []
    result = calibrate_sharded(prepared(), [THREE[0], interrupting, lambda: begun.append(2) or []])
    assert told(result) == [("Interrupted", "batch 4")]
    assert kept(result).cause == "Ctrl-C ended calibration; measured: shard 0 of 3"
    assert_same_statistics(kept(result).statistics, alone(4))
    assert not begun


def test_ctrl_c_while_waiting_for_workers() -> None:
    def waiting(function: Any, items: Sequence[Any]) -> Iterator[Any]:
        yield function(items[0])
        raise KeyboardInterrupt

    result = calibrate_sharded(prepared(), THREE, waiting)
    assert kept(result).cause == "Ctrl-C ended calibration; measured: shard 0 of 3"
    assert_same_statistics(kept(result).statistics, alone(4))
