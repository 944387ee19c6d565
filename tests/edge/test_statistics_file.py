"""Statistics as files: round trips, the same bytes for equal ones, and files that need not be trusted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyrsistent import pmap
from returns.result import Failure, Success
from safetensors import deserialize

from qfunc import MinMax, Statistics, calibrate, convert, load, merge, save, unwrap
from qfunc.edge.container import decode, encode
from qfunc.edge.statistics_file import from_bytes, read_statistics, to_bytes, write_statistics
from qfunc.errors import BadConfig, BadFile, WrongStage, problems
from qfunc.numerics.exact_histogram import ExactHistogramStatistic
from qfunc.numerics.recording import RecordingStatistic
from qfunc.numerics.statistic import (
    HistogramState,
    HistogramStatistic,
    MinMaxStatistic,
    MovingAverageStatistic,
    RangeState,
)
from qfunc.passes.statistics import Measured
from tests.edge.measuring import OBSERVERS, TYPES, Sketching, batches, prepared_for, same_statistics

ROOT = Path(__file__).resolve().parents[2]
EXTRA = {"read": 3, "nested": {"b": [1, 2.5, None, True, "é\n\"'"], "a": {}}}

each_observer = pytest.mark.parametrize("name", OBSERVERS)


def measured(name: str, count: int = 3) -> Statistics:
    return unwrap(calibrate(prepared_for(OBSERVERS[name]), batches(count))).statistics


def parts(data: bytes):
    """The document of a file as plain JSON, and its tensors."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    _, tensors = unwrap(decode(data))
    return json.loads(header["__metadata__"]["qfunc"]), dict(tensors)


def edited(data: bytes, change) -> bytes:
    """The file with its document and tensors changed in place."""
    document, tensors = parts(data)
    change(document, tensors)
    return unwrap(encode(document, tensors))


def reasons(result) -> list[str]:
    assert isinstance(result, Failure), result
    found = problems(result.failure())
    assert all(isinstance(problem, BadFile) and problem.remedy for problem in found)
    return [problem.reason for problem in found]


@each_observer
def test_files_keep_everything(name: str, tmp_path: Path) -> None:
    statistics = measured(name)
    path = tmp_path / "measured.safetensors"
    assert unwrap(write_statistics(path, statistics, types=TYPES, extra=EXTRA)) is None
    again, extra = unwrap(read_statistics(path, types=TYPES))
    assert same_statistics(again, statistics)
    assert extra == EXTRA
    assert unwrap(save(again, path, types=TYPES)) == path
    assert same_statistics(unwrap(load(path, types=TYPES)), statistics)
    assert os.listdir(tmp_path) == [path.name]


@each_observer
def test_loaded_statistics_calibrate(name: str) -> None:
    prepared, data = prepared_for(OBSERVERS[name]), batches(4)
    loaded, _ = unwrap(from_bytes(unwrap(to_bytes(measured(name, 2), types=TYPES)), types=TYPES))
    went_on = unwrap(calibrate(prepared, data[2:], statistics=loaded))
    assert same_statistics(went_on.statistics, measured(name, 4))
    assert isinstance(convert(went_on), Success)


@pytest.mark.parametrize("name", ["MinMax", "PerChannelMinMax", "Percentile", "MeanSquaredError", "Sketching", "plain"])
@pytest.mark.parametrize("loads", [(True, False), (False, True), (True, True)], ids=str)
def test_what_could_be_merged_still_can_be(name: str, loads: tuple[bool, bool]) -> None:
    prepared, data = prepared_for(OBSERVERS[name]), batches(4)
    halves = [unwrap(calibrate(prepared, half)).statistics for half in (data[:2], data[2:])]
    for index, is_loaded in enumerate(loads):
        if is_loaded:
            found, _ = unwrap(from_bytes(unwrap(to_bytes(halves[index], types=TYPES)), types=TYPES))
            # The observer brings its merge back.
            halves[index] = unwrap(calibrate(prepared, (), statistics=found)).statistics if all(loads) else found
    assert same_statistics(unwrap(merge(*halves)), measured(name, 4))


def test_states_before_any_data_and_floats_that_json_has_no_number_for() -> None:
    observer = Sketching()
    entries = {
        (("a",), MinMaxStatistic()): Measured(RangeState.unobserved()),
        (("a", "b"), HistogramStatistic(8, 2)): Measured(HistogramStatistic(8, 2).init()),
        (("b",), observer.statistic): Measured(replace(observer.init(), bound=float("-inf"))),
        (("c",), "nan"): Measured((float("nan"), 1e-320, -0.0, 0.1, float("inf"))),
    }
    statistics = Statistics("g", "w", pmap(entries))
    again, _ = unwrap(from_bytes(unwrap(to_bytes(statistics, types=TYPES)), types=TYPES))
    state = again.measured[(("c",), "nan")].state
    assert repr(state) == repr((float("nan"), 1e-320, 0.0, 0.1, float("inf")))
    without_nan = replace(again, measured=again.measured.remove((("c",), "nan")))
    assert same_statistics(without_nan, replace(statistics, measured=statistics.measured.remove((("c",), "nan"))))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16", "int64", "int8", "uint8", "bool", "uint16"])
@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3)], ids=str)
def test_tensors_of_any_plain_dtype(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)).t()
    state = (torch.zeros(shape, dtype=getattr(torch, dtype)), tensor)
    statistics = Statistics("g", measured=pmap({(("a",), "mine"): Measured(state)}))
    again, _ = unwrap(from_bytes(unwrap(to_bytes(statistics))))
    found = again.measured[(("a",), "mine")].state
    assert [(t.dtype, t.shape) for t in found] == [(t.dtype, t.shape) for t in state]
    assert all(map(torch.equal, found, state))


_BYTES = """
import hashlib, sys
from qfunc import calibrate, unwrap
from qfunc.edge.statistics_file import to_bytes
from tests.edge.measuring import OBSERVERS, TYPES, batches, prepared_for
for observer in OBSERVERS.values():
    statistics = unwrap(calibrate(prepared_for(observer), batches(3))).statistics
    print(hashlib.sha256(unwrap(to_bytes(statistics, types=TYPES, extra={"a": 1, "b": {"y": 2, "x": 3}}))).hexdigest())
"""


def test_equal_statistics_give_equal_bytes_in_any_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", _BYTES],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            cwd=ROOT,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


@given(st.permutations(range(6)))
def test_the_order_of_insertion_changes_no_byte(order: list[int]) -> None:
    keys = [((f"v{index}",), MinMaxStatistic(index % 2 or None)) for index in range(6)]
    made = pmap()
    for index in order:
        made = made.set(keys[index], Measured(RangeState.unobserved(), batches=index))
    assert to_bytes(Statistics("g", measured=made)) == to_bytes(
        Statistics("g", measured=pmap({key: made[key] for key in keys}))
    )


@given(st.lists(st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0]), min_size=2, max_size=2), min_size=1, max_size=4))
def test_the_sign_of_zeros_changes_no_byte(rows: list[list[float]]) -> None:
    """Equal data give equal states, and these equal bytes."""
    kinds = (MinMaxStatistic(), MinMaxStatistic(0), MovingAverageStatistic(0.5), HistogramStatistic(4, 2))
    found = []
    for sign in (1.0, -1.0):
        tensors = [torch.tensor([sign * 0.0 if value == 0 else value for value in row]) for row in rows]
        given = {(("v",), of): Measured(reduce(of.update, tensors, of.init())) for of in (*kinds, EXACT, RECORDS)}
        given |= {(("w",), "mine"): Measured((tensors[0][0], sign * 0.0)), (("x",), sign * 0.0): Measured(None)}
        found.append(Statistics("g", measured=pmap(given)))
    assert found[0] == found[1]
    assert unwrap(to_bytes(found[0])) == unwrap(to_bytes(found[1]))


def test_equal_parameters_of_other_types_change_no_byte() -> None:
    one, other = (
        Statistics("g", measured=pmap({(("v",), MovingAverageStatistic(c)): Measured(RangeState.unobserved())}))
        for c in (1, 1.0)
    )
    assert one == other
    assert unwrap(to_bytes(one)) == unwrap(to_bytes(other))


def test_other_programs_can_read_the_tensors() -> None:
    data = unwrap(to_bytes(measured("MinMax")))
    assert {entry["dtype"] for _, entry in deserialize(data)} == {"F32"}


@dataclass
class Thawed:
    value: int = 0


@dataclass(frozen=True)
class Holder:
    value: object


def single(state: object, statistic: object = "mine") -> Statistics:
    return Statistics("g", measured=pmap({(("layer",), statistic): Measured(state)}))


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        (single(Holder(1)), "Holder has no name"),
        (single((1, Holder(1)), Holder(2)), "Holder has no name"),
        (single([1]), "has no form in files"),
        (single(torch.ones(1, dtype=torch.complex64)), "have no form in files"),
        (single(torch.ones(1, device="meta")), "have no form in files"),
        (single(torch.ones(2, 2).to_sparse()), "have no form in files"),
        (single(2**70), "is no int"),
        (single("\ud800"), "is no str"),
        (single(1, frozenset()), "has no form in files"),
        (single(RangeState(torch.tensor(2.0), torch.tensor(1.0))), "minimum is above"),
        (single(RangeState(torch.ones(1), torch.ones(1)), MinMaxStatistic()), "of channels"),
        (single(None, MinMaxStatistic()), "has a RangeState"),
        (Statistics("g", batches=-1), "-1 is no number"),
        (Statistics("g", data=2**256), "no digest"),
    ],
)
def test_what_files_cannot_hold_is_told(statistics: Statistics, reason: str) -> None:
    found = to_bytes(statistics)
    assert isinstance(found, Failure)
    told = problems(found.failure())
    assert all(isinstance(problem, BadConfig) and problem.remedy for problem in told)
    assert any(reason in problem.reason for problem in told)


def test_all_that_has_no_name_is_told_at_once() -> None:
    entries = {(("a",), "x"): Measured(Holder(1)), (("b",), Holder(1)): Measured(None)}
    found = problems(to_bytes(Statistics("g", measured=pmap(entries))).failure())
    assert [problem.node.partition(".")[0] for problem in found] == ["b", "a"]


@pytest.mark.parametrize("extra", [{"a": float("nan")}, {"a": {1: 2}}, {"a": object()}, {"a": 2**64}, {"\udfff": 1}])
def test_extra_is_plain_json(extra: dict) -> None:
    assert isinstance(to_bytes(Statistics("g"), extra=extra).failure(), BadConfig)


@pytest.mark.parametrize("types", [3, {"": Holder}, {"x": Thawed}, {"x": dict}, {"RangeState": Holder}, {1: Holder}])
def test_wrong_types_are_told(types: object, tmp_path: Path) -> None:
    data = unwrap(to_bytes(Statistics("g")))
    assert isinstance(to_bytes(Statistics("g"), types=types).failure(), BadConfig)
    assert isinstance(from_bytes(data, types=types).failure(), BadConfig)


def entry_of(document: dict, name: str) -> dict:
    """The entry whose statistic or state is of a class."""
    return next(row for row in document["measured"] if name in (row["statistic"]["type"], row["state"]["type"]))


EXACT, RECORDS = ExactHistogramStatistic(8), RecordingStatistic()
GOOD = Statistics(
    "g",
    "w",
    pmap(
        {
            (("a",), MinMaxStatistic()): Measured(RangeState(torch.tensor(-1.0), torch.tensor(2.0)), 2, 8, 5),
            (("a",), MinMaxStatistic(0)): Measured(RangeState(-torch.ones(3), torch.ones(3)), 2, 8, 5),
            (("b", "c"), HistogramStatistic(4, 2)): Measured(
                HistogramState(torch.tensor([1.0, 0, 0, 2]), RangeState(torch.tensor(-1.0), torch.tensor(1.0))), 2, 3
            ),
            (("e",), EXACT): Measured(EXACT.update(EXACT.init(), torch.tensor([-1.0, 0.5, 2.5]))),
            (("f",), RECORDS): Measured(RECORDS.update(RECORDS.init(), torch.tensor([[-1.0], [0.5]]))),
            (("d",), Sketching().statistic): Measured(Sketching().init()),
        }
    ),
    2,
    5,
)
BYTES = unwrap(to_bytes(GOOD, types=TYPES, extra=EXTRA))


def with_state_tensor(kind: str, field: str, tensor: torch.Tensor):
    """A tensor of the last state whose class begins with `kind`."""

    def change(document, tensors):
        row = [row for row in document["measured"] if row["state"]["type"].startswith(kind)][-1]
        found = row["state"]["fields"][field.partition("[")[0]]
        tensors[(found[0] if isinstance(found, list) else found)["tensor"]] = tensor

    return change


def with_fields(kind: str, part: str, **fields):
    return lambda document, tensors: entry_of(document, kind)[part]["fields"].update(fields)


def with_document(**fields):
    return lambda document, tensors: document.update(fields)


def without_tensor(document, tensors):
    del tensors[next(iter(tensors))]


def more_tensors(document, tensors):
    tensors["more"] = torch.ones(1)


def twice(document, tensors):
    document["measured"].append(document["measured"][-1])


def shared_tensor(document, tensors):
    fields = entry_of(document, "HistogramStatistic")["state"]["fields"]["range"]["fields"]
    fields["minimum"] = fields["maximum"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_document(qfunc="Recipe"), "'Recipe', not statistics"),
        (with_document(version=2), "only 1 can be read"),
        (with_document(version=True), "only 1 can be read"),
        (with_document(graph=3), "graph: expected a string"),
        (with_document(batches=-1), "-1 is no number of batches"),
        (with_document(batches=1.0), "expected an integer"),
        (with_document(batches=10**30), "not finite or too large"),
        (with_document(data="5"), "no SHA-256 digest"),
        (with_document(measured={}), "expected an array"),
        (with_document(more=1), "there is no field 'more'"),
        (with_document(extra=[]), "extra: it is no object"),
        (lambda document, _: document.pop("weights"), "weights: it is missing"),
        (twice, "it is used twice"),
        (shared_tensor, "it is used twice"),
        (without_tensor, "there is no tensor"),
        (more_tensors, "tensor 'more'"),
        (with_fields("MinMaxStatistic", "statistic", ch_axis="0"), "not of the type"),
        (with_fields("MinMaxStatistic", "statistic", ch_axis=True), "not of the type"),
        (with_fields("MinMaxStatistic", "statistic", ch_axis=-1), "no ch_axis"),
        (with_fields("HistogramStatistic", "statistic", bins=5), "4 counts for 5 bins"),
        (with_fields("HistogramStatistic", "statistic", bins=1), "it has 1 bins"),
        (with_fields("HistogramStatistic", "statistic", upsample_rate=0), "upsample_rate 0"),
        (with_fields("HistogramStatistic", "statistic", more=0), "there is no field 'more'"),
        (with_fields("HistogramStatistic", "statistic", bins={"tensor": "x"}), "type: it is missing"),
        (with_fields("HistogramStatistic", "state", counts=None), "not of the type"),
        (with_fields("ExactHistogramStatistic", "statistic", bins=4), "not those of its range"),
        (with_fields("ExactHistogramStatistic", "statistic", bins=2**40), f"it has {2**40} bins"),
        (with_fields("ExactHistogramStatistic", "statistic", stride=0), "stride 0"),
        (with_fields("ExactHistogramStatistic", "state", exponent=9), "not those of its range"),
        (with_fields("ExactHistogramStatistic", "state", exponent=1.0), "not of the type"),
        (with_state_tensor("Exact", "counts", torch.tensor([-1])), "negative"),
        (with_state_tensor("Exact", "counts", torch.full((8,), 2**60)), "too large"),
        (with_state_tensor("Exact", "counts", torch.ones(4)), "not int64"),
        (with_state_tensor("Exact", "counts", torch.ones(3, dtype=torch.int64)), "not those of its range"),
        (with_state_tensor("Recording", "tensors[0]", torch.ones(2)), "range is not that"),
        (with_state_tensor("Recording", "tensors[0]", torch.ones(0)), "empty"),
        (with_state_tensor("Recording", "tensors[0]", torch.tensor(float("nan"))), "not finite"),
        (with_state_tensor("Recording", "tensors[0]", torch.ones(2, dtype=torch.int64)), "no floating-point"),
        (with_fields("mine.SketchStatistic", "statistic", words=["a", 1]), "not of the type"),
        (with_fields("mine.Sketch", "state", flag=1), "not of the type"),
        (with_fields("mine.Sketch", "state", bound={"float": "1"}), "expected inf or -inf or nan"),
        (with_state_tensor("HistogramState", "counts", torch.tensor([1.0, -1, 0, 2])), "negative"),
        (with_state_tensor("HistogramState", "counts", torch.tensor([1.0, float("nan"), 0, 2])), "not finite"),
        (with_state_tensor("HistogramState", "counts", torch.zeros(4)), "a range without counts"),
        (with_state_tensor("HistogramState", "counts", torch.ones(4, dtype=torch.int64)), "not float32"),
        (with_state_tensor("HistogramState", "counts", torch.ones(2, 2)), "not float32 of shape (bins,)"),
        (with_state_tensor("HistogramState", "counts", torch.ones(5)), "5 counts for 4 bins"),
        (with_state_tensor("RangeState", "maximum", torch.tensor(-9.0)), "minimum is above"),
        (with_state_tensor("RangeState", "maximum", torch.tensor(float("inf"))), "not finite"),
        (with_state_tensor("RangeState", "maximum", torch.ones(2, 2)), "of one shape"),
        (with_state_tensor("RangeState", "maximum", torch.tensor(3.0).double()), "two float32"),
    ],
)
def test_what_is_wrong_with_a_document_is_told(change, reason: str) -> None:
    data = edited(BYTES, change)
    assert any(reason in told for told in reasons(from_bytes(data, types=TYPES, place="x")))


def test_all_that_is_wrong_is_told_at_once() -> None:
    def change(document, tensors):
        document.update(batches=-1, graph=None)
        entry_of(document, "HistogramStatistic")["state"]["type"] = "Unknown"

    found = reasons(from_bytes(edited(BYTES, change), types=TYPES))
    assert len(found) >= 2
    assert any("there is no class 'Unknown'" in reason for reason in found)


def test_unknown_classes_are_not_looked_for() -> None:
    found = from_bytes(BYTES)
    assert any("there is no class 'mine.Sketch'" in reason for reason in reasons(found))

    def change(document, tensors):
        entry_of(document, "HistogramStatistic")["state"]["type"] = "os.system"

    assert any("there is no class 'os.system'" in reason for reason in reasons(from_bytes(edited(BYTES, change))))


def raw(header: str, tensors: bytes = b"") -> bytes:
    data = header.encode()
    return len(data).to_bytes(8, "little") + data + tensors


_INNER = json.dumps(json.dumps({"qfunc": "Statistics", "version": 1}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        BYTES[:7],
        BYTES[:100],
        BYTES[:-1],
        BYTES + b"\0",
        (2**63).to_bytes(8, "little") + b"{}",
        raw("{}"),
        raw('{"__metadata__": {}}'),
        raw('{"__metadata__": {"format": "pt"}}'),
        raw('{"__metadata__": {"qfunc": "NaN"}}'),
        raw('{"__metadata__": {"qfunc": "[]"}}'),
        raw('{"__metadata__": {"qfunc": "\\ud83d"}}'),
        raw(f'{{"__metadata__": {{"qfunc": {_INNER}, "qfunc": {_INNER}}}}}'),
        raw(f'{{"__metadata__": {{"qfunc": {_INNER}}}, "__metadata__": {{"qfunc": {_INNER}}}}}'),
        raw('{"__metadata__": {"qfunc": "' + "[" * 200 + "]" * 200 + '"}}'),
        raw('{"__metadata__": {"qfunc": "{\\"qfunc\\": 1, \\"qfunc\\": 1}"}}'),
        raw('{"__metadata__": {"qfunc": "' + "[" * (1 << 23) + '"}}'),
        raw('{"a": {"dtype": "BOOL", "shape": [1], "data_offsets": [0, 1]}, "__metadata__": {"qfunc": "{}"}}', b"\2"),
        raw(
            '{"a": {"dtype": "F32", "shape": [0, 9223372036854775807], "data_offsets": [0, 0]},'
            ' "__metadata__": {"qfunc": "{}"}}'
        ),
        raw('{"a": {"dtype": "C64", "shape": [0], "data_offsets": [0, 0]}, "__metadata__": {"qfunc": "{}"}}'),
    ],
    ids=lambda data: repr(data[8:40]),
)
def test_no_file_of_statistics_is_a_bad_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    for found in (from_bytes(data, types=TYPES), read_statistics(path, types=TYPES), load(path, types=TYPES)):
        assert reasons(found)
    assert problems(load(path).failure())[0].node == str(path)


def assert_valid(result) -> None:
    """A file is refused with typed errors, or what it gives can be used as any statistics."""
    if isinstance(result, Failure):
        assert reasons(result)
        return
    statistics, extra = unwrap(result)
    assert isinstance(str(statistics), str)
    again, more = unwrap(from_bytes(unwrap(to_bytes(statistics, types=TYPES, extra=extra)), types=TYPES))
    assert repr(more) == repr(extra)
    assert {*again.measured} == {*statistics.measured}
    merge(statistics, again)


@given(st.lists(st.tuples(st.integers(0, len(BYTES) - 1), st.integers(0, 255)), max_size=4), st.integers(0, 40))
def test_any_change_of_bytes(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(BYTES)
    for index, byte in changes:
        data[index] = byte
    assert_valid(from_bytes(bytes(data[: len(data) - cut]), types=TYPES))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "a", "RangeState", "NoState", "mine.Sketch", "mine.Moment", "type", "\ud800"])
    | st.sampled_from([{"float": "nan"}, {"type": "NoState", "fields": {}}, {"tensor": "[0].state.minimum"}]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "fields", "x"]), inner),
    max_leaves=4,
)


def places(value, at=()):
    """The paths to all parts of a JSON value."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


PLACES = [at for at in places(parts(BYTES)[0]) if at]


@given(st.data())
def test_any_change_of_the_document(data: st.DataObject) -> None:
    document, tensors = parts(BYTES)
    at = data.draw(st.sampled_from(PLACES))
    holder = document
    for step in at[:-1]:
        holder = holder[step]
    if data.draw(st.booleans()):
        holder[at[-1]] = data.draw(JSON)
    else:
        del holder[at[-1]]
    assert_valid(from_bytes(unwrap(encode(document, tensors)), types=TYPES))


@given(st.data())
def test_any_change_of_a_tensor(data: st.DataObject) -> None:
    document, tensors = parts(BYTES)
    name = data.draw(st.sampled_from(sorted(tensors)))
    shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool]))
    value = data.draw(st.floats(width=32))
    tensors[name] = torch.full(shape, value).to(dtype)
    assert_valid(from_bytes(unwrap(encode(document, tensors)), types=TYPES))


@dataclass(frozen=True)
class Raising:
    value: int

    def __post_init__(self) -> None:
        if self.value:
            raise RuntimeError("no")


def test_a_class_of_the_users_that_raises_is_told() -> None:
    types = {"mine.Raising": Raising}

    def change(document, tensors):
        document["measured"][0]["state"]["fields"]["value"] = 1

    data = edited(unwrap(to_bytes(single(Raising(0)), types=types)), change)
    assert reasons(from_bytes(data, types=types)) == ["measured[0].state: Raising raised RuntimeError: no " + PLACE]


PLACE = f"(test_statistics_file.py:{Raising.__post_init__.__code__.co_firstlineno + 2}, in __post_init__)"


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measured"
    unwrap(save(Statistics("old"), path))

    def fail(*_):
        raise OSError(28, "No space left on device")

    if stage == "write":
        real = open

        def opened(file, mode="r", *args, **kwargs):
            found = real(file, mode, *args, **kwargs)
            return found if "x" not in mode else Full(found)

        class Full:
            def __init__(self, file):
                self.file = file

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def fileno(self):
                return self.file.fileno()

            def write(self, data):
                self.file.write(data[:10])
                fail()

        monkeypatch.setattr("builtins.open", opened)
    else:
        monkeypatch.setattr(os, stage, fail)
    found = save(Statistics("new"), path)
    monkeypatch.undo()
    assert "No space left" in reasons(found)[0]
    assert unwrap(load(path)).graph == "old"
    assert os.listdir(tmp_path) == ["measured"]


def test_ctrl_c_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "measured"
    unwrap(save(Statistics("old"), path))

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(Statistics("new"), path)
    monkeypatch.undo()
    assert unwrap(load(path)).graph == "old"
    assert os.listdir(tmp_path) == ["measured"]


def test_a_link_stays_one_and_long_names_are_written(tmp_path: Path) -> None:
    target, link = tmp_path / ("n" * 255), tmp_path / "link"
    link.symlink_to(target)
    unwrap(save(Statistics("g"), link))
    assert link.is_symlink()
    assert unwrap(load(target)).graph == "g"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes anywhere")
def test_an_unwritable_folder_is_told(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    found = save(Statistics("g"), tmp_path / "file")
    tmp_path.chmod(0o700)
    assert "cannot be written" in reasons(found)[0]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no folder that root too cannot write to")
def test_a_folder_that_takes_no_files_is_told() -> None:
    assert "cannot be written" in reasons(save(Statistics("g"), "/proc/self/file"))[0]


def test_places_that_are_no_files_are_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none" / "file", tmp_path / ("n" * 300), str(tmp_path / "a\0b")):
        assert "cannot be written" in reasons(save(Statistics("g"), path))[0]
    for path in (tmp_path, tmp_path / "none", str(tmp_path / "a\0b")):
        assert reasons(load(path))
    assert os.listdir(tmp_path) == []
    if os.name == "posix":
        os.mkfifo(tmp_path / "pipe")
        assert reasons(load(tmp_path / "pipe")) == ["it is no plain file"]


def test_only_statistics_are_saved(tmp_path: Path) -> None:
    calibrated = unwrap(calibrate(prepared_for(MinMax()), batches(1)))
    path = tmp_path / "file"
    problem = save(calibrated, path).failure()
    assert isinstance(problem, BadConfig)
    assert "calibrated.statistics" in problem.remedy
    assert isinstance(save(calibrated.prepared, path).failure(), WrongStage)
    assert isinstance(save(Statistics("g"), 3).failure(), BadConfig)
    assert isinstance(load(3).failure(), BadConfig)
    assert isinstance(from_bytes("x").failure(), BadConfig)
    assert not path.exists()


def test_a_file_of_another_kind_is_told(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(unwrap(encode({"qfunc": "Recipe", "version": 1}, {})))
    assert reasons(load(path)) == ["it holds 'Recipe', and only Statistics can be read"]


def test_neither_numpy_nor_pickle_is_used(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "from pyrsistent import pmap\nimport torch, pickle\n"
        "from qfunc import Statistics, load, save, unwrap\n"
        "from qfunc.passes.statistics import Measured\n"
        "pickle.loads = pickle.load = pickle.Unpickler = pickle.dumps = pickle.dump = pickle.Pickler = None\n"
        "one = Statistics('g', measured=pmap({(('a',), 'x'): Measured((torch.ones(2), 1.5))}))\n"
        f"unwrap(load(unwrap(save(one, {str(tmp_path / 'file')!r}))))\n"
    )
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
