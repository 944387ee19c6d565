"""`calibrate` with a checkpoint: killed, interrupted and resumed, it gives what one whole run would have given."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from returns.result import Failure
from torch import Tensor

from qfunc import Calibrated, Histogram, MinMax, QuantSpec, calibrate, load, unwrap
from qfunc.edge.checkpoint import MOST_WARNINGS, resumed, save_checkpoint
from qfunc.edge.container import decode, encode
from qfunc.edge.run import Point
from qfunc.edge.statistics_file import read_statistics, write_statistics
from qfunc.errors import (
    BadBatch,
    BadConfig,
    BadFile,
    ConstantValue,
    Interrupted,
    MoreWarnings,
    NonFinite,
    Unobserved,
    problems,
)
from qfunc.numerics.qparams import UINT8, qparams_of_range
from qfunc.passes.statistics import Statistics
from tests.edge.measuring import OBSERVERS, batches, prepared_for, same_statistics, with_channels

ROOT = Path(__file__).resolve().parents[2]
COUNT = 11

each_observer = pytest.mark.parametrize(
    "name", ["MinMax", "MovingAverageMinMax", "Histogram", "Percentile", "Recording", "Sketching", "plain"]
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint"


def whole(name: str, count: int = COUNT, **options) -> Calibrated:
    return unwrap(calibrate(prepared_for(OBSERVERS[name]), batches(count), **options))


def read_of(path: Path) -> int:
    """How many batches a checkpoint says were read."""
    data = path.read_bytes()
    return unwrap(decode(data))[0].get("extra").get("read")


_KILLED = """
import os, signal, sys
from qfunc import calibrate
from tests.edge.measuring import OBSERVERS, batches, prepared_for
name, path, at, every = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
def data():
    for index, batch in enumerate(batches(11)):
        if index == at:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch
calibrate(prepared_for(OBSERVERS[name]), data(), checkpoint=path, checkpoint_every=every)
"""


@pytest.mark.parametrize(
    ("name", "at", "every"), [("MinMax", 7, 1), ("MovingAverageMinMax", 7, 3), ("Histogram", 8, 2), ("Sketching", 5, 2)]
)
def test_a_killed_run_is_resumed(name: str, at: int, every: int, path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, name, str(path), str(at), str(every)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert read_of(path) == at // every * every
    found = whole(name, checkpoint=path, checkpoint_every=every)
    assert same_statistics(found.statistics, whole(name).statistics)
    assert found.statistics.batches == COUNT
    assert found.warnings == whole(name).warnings
    assert os.listdir(path.parent) == [path.name]


def interrupted_after(count: int, data: list[Tensor]):
    yield from data[:count]
    raise KeyboardInterrupt


@each_observer
@pytest.mark.parametrize("count", [0, 1, 5])
def test_ctrl_c_keeps_what_was_measured(name: str, count: int, path: Path) -> None:
    prepared, data = prepared_for(OBSERVERS[name]), batches(COUNT)
    found = calibrate(prepared, interrupted_after(count, data), checkpoint=path, checkpoint_every=3)
    assert isinstance(found, Failure)
    (error,) = problems(found.failure())
    assert isinstance(error, Interrupted)
    assert (error.batches, error.statistics.batches) == (count, count)
    went_on = unwrap(calibrate(prepared, data[count:], statistics=error.statistics))
    resumed_one = unwrap(calibrate(prepared, data, checkpoint=path))
    expected = whole(name).statistics
    assert same_statistics(went_on.statistics, expected)
    assert same_statistics(resumed_one.statistics, expected)


def raising_after(count: int, data: list[Tensor]):
    yield from data[:count]
    raise OSError("the disk is gone")


def test_an_iterable_that_raises_is_resumed(path: Path) -> None:
    prepared, data = prepared_for(MinMax()), batches(COUNT)
    for count in (2, 2, 6, 9):
        found = calibrate(prepared, raising_after(count, data), checkpoint=path, checkpoint_every=100)
        assert isinstance(found, Failure)
        assert read_of(path) == count
    assert same_statistics(whole("MinMax", checkpoint=path).statistics, whole("MinMax").statistics)


@each_observer
def test_a_finished_checkpoint_changes_nothing(name: str, path: Path) -> None:
    first = whole(name, checkpoint=path, checkpoint_every=4)
    before = path.read_bytes()
    again = whole(name, checkpoint=path, checkpoint_every=4)
    assert path.read_bytes() == before
    assert same_statistics(again.statistics, first.statistics)
    assert again.warnings == first.warnings


@pytest.mark.parametrize("every", [1, 2, 5, 100])
def test_limits_add_up(every: int, path: Path) -> None:
    for limit in (2, 3, 7):
        found = whole("MovingAverageMinMax", limit=limit, checkpoint=path, checkpoint_every=every)
        assert same_statistics(found.statistics, whole("MovingAverageMinMax", limit).statistics)
    # What was read is not given back, whatever the limit says later.
    short = calibrate(prepared_for(OBSERVERS["MovingAverageMinMax"]), batches(COUNT), limit=4, checkpoint=path)
    assert isinstance(short.failure(), BadFile)
    assert read_of(path) == 7


def bad_files(found) -> list[str]:
    assert isinstance(found, Failure), found
    told = problems(found.failure())
    assert all(isinstance(problem, BadFile) and problem.remedy for problem in told)
    return [problem.reason for problem in told]


def test_other_data_are_refused(path: Path) -> None:
    whole("MinMax", 4, checkpoint=path)
    before = path.read_bytes()
    prepared, data = prepared_for(MinMax()), batches(COUNT)
    others = {
        "other values": batches(COUNT, seed=1),
        "too few": data[:3],
        "one left out": data[1:],
        "one changed": [*data[:3], data[3] + 1, *data[4:]],
        "one split": [data[0][:1], data[0][1:], *data[1:]],
    }
    for given in others.values():
        assert "it holds 4 batches" in bad_files(calibrate(prepared, given, checkpoint=path))[0]
    assert path.read_bytes() == before
    assert isinstance(calibrate(prepared, [(1, 2, 3)], checkpoint=path).failure(), BadBatch)


def test_a_run_of_another_model_or_configuration_is_refused(path: Path) -> None:
    whole("MinMax", 4, checkpoint=path)
    before = path.read_bytes()
    assert "other weights" in bad_files(calibrate(prepared_for(MinMax(), 1), batches(5), checkpoint=path))[0]
    histograms = calibrate(prepared_for(Histogram()), batches(5), checkpoint=path)
    assert bad_files(histograms) == ["its run measured for another configuration"]
    unwrap(write_statistics(path, Statistics("g"), extra=read_statistics(path).unwrap()[1]))
    assert "two graphs" in bad_files(calibrate(prepared_for(MinMax()), batches(5), checkpoint=path))[0]
    path.write_bytes(before)
    assert whole("MinMax", checkpoint=path).statistics.batches == COUNT


def test_statistics_and_a_checkpoint_go_together(path: Path) -> None:
    prepared, data = prepared_for(OBSERVERS["MovingAverageMinMax"]), batches(COUNT)
    earlier = unwrap(calibrate(prepared, data[:3])).statistics
    calibrate(prepared, interrupted_after(4, data[3:]), statistics=earlier, checkpoint=path, checkpoint_every=3)
    assert "other statistics" in bad_files(calibrate(prepared, data[3:], checkpoint=path))[0]
    found = unwrap(calibrate(prepared, data[3:], statistics=earlier, checkpoint=path))
    assert same_statistics(found.statistics, whole("MovingAverageMinMax").statistics)


def test_statistics_of_a_checkpoint_can_be_loaded_but_are_none(path: Path) -> None:
    prepared = prepared_for(MinMax())
    found = whole("MinMax", 4, checkpoint=path)
    assert same_statistics(unwrap(load(path)), found.statistics)
    unwrap(write_statistics(path, found.statistics))
    assert "not how far" in bad_files(calibrate(prepared, batches(5), checkpoint=path))[0]


def test_warnings_survive(path: Path) -> None:
    prepared, data = prepared_for(MinMax()), batches(6)
    data[1] = data[1].clone().fill_(float("nan"))
    data[2] = torch.empty(0, 4)
    data[4] = data[4] / 0
    expected = unwrap(calibrate(prepared, data, policy="skip"))
    kinds = {type(warning) for warning in expected.warnings}
    assert {NonFinite, BadBatch} <= kinds
    found = calibrate(prepared, interrupted_after(3, data), policy="skip", checkpoint=path)
    assert isinstance(found, Failure)
    went_on = unwrap(calibrate(prepared, data, policy="skip", checkpoint=path))
    assert went_on.warnings == expected.warnings
    assert same_statistics(went_on.statistics, expected.statistics)
    assert went_on.statistics.batches == 3
    again = unwrap(calibrate(prepared, data, policy="skip", checkpoint=path))
    assert again.warnings == expected.warnings


def test_a_great_many_warnings_do_not_end_a_run(path: Path) -> None:
    prepared = prepared_for(MinMax())
    warnings = tuple(BadBatch(index, "half \ud800", "x" * 200) for index in range(MOST_WARNINGS + 5))
    statistics = whole("MinMax", 1).statistics
    earlier = Statistics(statistics.graph, statistics.weights)
    unwrap(save_checkpoint(path, Point(statistics, MOST_WARNINGS + 6, 1, warnings), earlier, prepared))
    point = unwrap(resumed(path, Point(earlier), prepared))
    *kept, last = point.warnings
    assert [warning.index for warning in kept] == list(range(MOST_WARNINGS))
    assert kept[0].reason == "half ?"
    assert last == MoreWarnings(5)
    before = path.read_bytes()
    unwrap(save_checkpoint(path, point, earlier, prepared))
    assert path.read_bytes() == before
    unwrap(save_checkpoint(path, replace(point, warnings=(*point.warnings, *kept[:3])), earlier, prepared))
    assert unwrap(resumed(path, Point(earlier), prepared)).warnings == (*kept, MoreWarnings(8))


@pytest.mark.parametrize("count", range(1, 8))
def test_resumed_runs_with_more_warnings_than_are_kept_agree(
    count: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qfunc.edge.checkpoint.MOST_WARNINGS", 2)
    prepared, data = prepared_for(OBSERVERS["MovingAverageMinMax"]), batches(8)
    for index in (0, 2, 3, 5, 6):
        data[index] = data[index] / 0
    expected = unwrap(calibrate(prepared, data, policy="skip", checkpoint=path))
    assert len(expected.warnings) >= 5
    assert not any(isinstance(warning, MoreWarnings) for warning in expected.warnings)
    uninterrupted = path.read_bytes()
    path.unlink()
    calibrate(prepared, interrupted_after(count, data), policy="skip", checkpoint=path)
    found = unwrap(calibrate(prepared, data, policy="skip", checkpoint=path))
    assert same_statistics(found.statistics, expected.statistics)
    assert path.read_bytes() == uninterrupted


def test_a_run_from_statistics_that_lack_something_is_resumed(path: Path) -> None:
    prepared, data = prepared_for(MinMax()), batches(6)
    whole_one = unwrap(calibrate(prepared, data[:2])).statistics
    earlier = replace(whole_one, measured=whole_one.measured.remove(prepared.folds[0].key))
    expected = unwrap(calibrate(prepared, data[2:], statistics=earlier))
    assert any(isinstance(warning, Unobserved) for warning in expected.warnings)
    calibrate(prepared, interrupted_after(2, data[2:]), statistics=earlier, checkpoint=path)
    found = unwrap(calibrate(prepared, data[2:], statistics=earlier, checkpoint=path))
    assert found == expected
    assert found.warnings == expected.warnings


@pytest.mark.parametrize("channels", [1, 7])
def test_a_checkpoint_of_other_channels_is_refused(channels: int, path: Path) -> None:
    whole("PerChannelMinMax", 4, checkpoint=path)
    statistics, extra = unwrap(read_statistics(path))
    wrong = with_channels(statistics, channels)
    unwrap(write_statistics(path, wrong, extra=extra))
    for count in (4, COUNT):
        found = calibrate(prepared_for(OBSERVERS["PerChannelMinMax"]), batches(count), checkpoint=path)
        assert f"its statistics are of {channels} channels" in bad_files(found)[0]


def test_all_kinds_of_warnings_are_kept(path: Path) -> None:
    prepared, statistics = prepared_for(MinMax()), whole("MinMax", 1).statistics
    warnings = (
        ConstantValue("v", 1.0, 2, 3),
        NonFinite("v", "r", "m"),
        BadBatch(1, "r"),
        Unobserved("v"),
        MoreWarnings(2),
    )
    earlier = Statistics(statistics.graph, statistics.weights)
    point = Point(statistics, 1, 5, warnings)
    unwrap(save_checkpoint(path, point, earlier, prepared))
    assert unwrap(resumed(path, Point(earlier), prepared)).warnings == warnings


GOOD_WARNING = {"type": "NonFinite", "node": "n", "reason": "r", "remedy": "m"}


@pytest.mark.parametrize(
    "changes",
    [
        {"read": -1},
        {"read": 3},
        {"read": True},
        {"read": "4"},
        {"read": 4.0},
        {"seen": 4},
        {"seen": ""},
        {"seen": "0x4"},
        {"seen": "-4"},
        {"seen": "4 "},
        {"seen": "f" * 65},
        {"base": None},
        {"base": {"batches": 0}},
        {"base": {"batches": 0, "data": 0}},
        {"base": {"batches": False, "data": "0"}},
        {"base": {"batches": -1, "data": "0"}},
        {"base": {"batches": 9, "data": "0"}},
        {"warnings": {}},
        {"warnings": ["NonFinite"]},
        {"warnings": [{**GOOD_WARNING, "type": "QuantException"}]},
        {"warnings": [{**GOOD_WARNING, "type": ["NonFinite"]}]},
        {"warnings": [{**GOOD_WARNING, "type": "Any"}]},
        {"warnings": [{**GOOD_WARNING, "type": "InvalidGraph"}]},
        {"warnings": [{**GOOD_WARNING, "node": 3}]},
        {"warnings": [{**GOOD_WARNING, "more": 3}]},
        {"warnings": [{"type": "NonFinite"}]},
        {"warnings": [{"type": "MoreWarnings", "count": 0, "node": "n", "remedy": "m"}]},
        {"warnings": [GOOD_WARNING, {"type": "BadBatch", "index": True, "reason": "r", "remedy": "m"}]},
        {"more": 1},
    ],
    ids=str,
)
def test_what_a_checkpoint_tells_is_checked(changes: dict, path: Path) -> None:
    whole("MinMax", 4, checkpoint=path)
    statistics, extra = unwrap(read_statistics(path))
    unwrap(write_statistics(path, statistics, extra={**extra, "warnings": [GOOD_WARNING]}))
    assert any(isinstance(warning, NonFinite) for warning in whole("MinMax", checkpoint=path).warnings)
    unwrap(write_statistics(path, statistics, extra={**extra, **changes}))
    assert bad_files(calibrate(prepared_for(MinMax()), batches(COUNT), checkpoint=path))


def test_a_damaged_checkpoint_is_refused_before_any_data(path: Path) -> None:
    whole("MinMax", 4, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-3])

    def never():
        raise AssertionError
        yield

    assert "no safetensors file" in bad_files(calibrate(prepared_for(MinMax()), never(), checkpoint=path))[0]


def test_a_folder_that_is_not_there_is_told_before_any_data(tmp_path: Path) -> None:
    read = []
    data = (read.append(1) or batch for batch in batches(3))
    found = calibrate(prepared_for(MinMax()), data, checkpoint=tmp_path / "none" / "file")
    assert bad_files(found) == ["its folder does not exist"]
    assert not read


def test_a_folder_that_vanishes_keeps_what_was_measured(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()

    def data():
        for index, batch in enumerate(batches(COUNT)):
            if index == 5:
                shutil.rmtree(folder)
            yield batch

    prepared = prepared_for(OBSERVERS["Histogram"])
    found = calibrate(prepared, data(), checkpoint=folder / "file", checkpoint_every=2)
    told = problems(found.failure())
    assert {type(problem) for problem in told} == {BadFile, Interrupted}
    (error,) = (problem for problem in told if isinstance(problem, Interrupted))
    assert error.batches == 6
    went_on = unwrap(calibrate(prepared, batches(COUNT)[6:], statistics=error.statistics))
    assert same_statistics(went_on.statistics, whole("Histogram").statistics)


class Loose:
    """A state that is no value."""

    def __init__(self, most: Tensor) -> None:
        self.most = most


@dataclass(frozen=True)
class Loosely:
    spec: QuantSpec = UINT8
    statistic: object = "loose"

    def init(self) -> Loose:
        return Loose(torch.zeros(()))

    def update(self, state: Loose, tensor: Tensor) -> Loose:
        return Loose(torch.maximum(state.most, tensor.amax()))

    def finish(self, state: Loose):
        return qparams_of_range(-state.most, state.most, self.spec)


def test_a_state_that_has_no_form_in_files_is_told(path: Path) -> None:
    prepared = prepared_for(Loosely())
    assert isinstance(calibrate(prepared, batches(2)).unwrap(), Calibrated)
    found = problems(calibrate(prepared, batches(2), checkpoint=path).failure())
    assert {BadConfig} == {type(problem) for problem in found}
    assert not path.exists()


def test_a_hostile_document_names_nothing_that_is_run(path: Path) -> None:
    whole("MinMax", 4, checkpoint=path)
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    document = json.loads(header["__metadata__"]["qfunc"])
    document["measured"][0]["state"]["type"] = "tests.edge.test_checkpoint.Loose"
    path.write_bytes(unwrap(encode(document, unwrap(decode(data))[1])))
    reason = " ".join(bad_files(calibrate(prepared_for(MinMax()), batches(5), checkpoint=path)))
    assert "there is no class 'tests.edge.test_checkpoint.Loose'" in reason
