"""Bad inputs, one row each: a typed `Failure` with the place, the reason and a remedy, and nothing changed by it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
import torch
from returns.result import Failure, Success
from torch import nn

import qfunc
from qfunc import (
    CPU,
    CustomConfig,
    MinMax,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    calibrate,
    check_host,
    convert,
    errors,
    fuse,
    fuse_modules,
    lower,
    materialize,
    prepare,
    quantize,
    render,
    trace,
    unwrap,
)
from qfunc.config.host_report import HostReport
from qfunc.ir import Graph, digest, verify
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL, UINT8
from qfunc.testing import same_bits

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    return nn.Sequential(*layers).eval()


class Stages(NamedTuple):
    model: nn.Module
    graph: Any
    prepared: Any
    calibrated: Any
    converted: Any
    lowered: Any


@pytest.fixture(scope="module")
def made() -> Stages:
    model = network()
    graph = unwrap(trace(model, X))
    prepared = unwrap(fuse(graph).bind(prepare))
    calibrated = unwrap(calibrate(prepared, [X]))
    converted = unwrap(convert(calibrated))
    return Stages(model, graph, prepared, calibrated, converted, unwrap(lower(converted)))


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Raises(nn.Module):
    def forward(self, x):
        return x + 1 // 0


class Logarithm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(torch.log(x))


class TwoDevices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4, device="meta")

    def forward(self, x):
        return self.b(self.a(x))


class Custom(nn.Module):
    """A leaf of the user's that fails on some data."""

    def forward(self, x):
        if x.amax() > 50:
            raise KeyError("too large")
        return x


class Nothing(nn.Module):
    """Computes on no elements, whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.conv(x.new_zeros(0, 3, 8, 8))


def training() -> nn.Module:
    return network().train()


def partly_training() -> nn.Module:
    model = network()
    model[1].train()
    return model


def poisoned(value: float) -> nn.Module:
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = value
    return model


def changed_after_tracing() -> Graph:
    model = network()
    graph = unwrap(trace(model, X))
    with torch.no_grad():
        model[0].weight.mul_(2)
    return graph


def activations(**spec: Any) -> QConfigMapping:
    return QConfigMapping().set_global(QConfig(MinMax(QuantSpec(**spec)), PerChannelMinMax(INT8_NARROW_PER_CHANNEL)))


def weights(observer: Any) -> QConfigMapping:
    return QConfigMapping().set_global(QConfig(MinMax(), observer))


@dataclass(frozen=True, slots=True)
class UserObserver:
    """An observer of the user's own, whose parts can be made to fail."""

    spec: Any = UINT8
    statistic: Any = "user"
    failing: str = ""
    result: Any = None

    def init(self) -> Any:
        return self._part("init")

    def update(self, state: Any, tensor: Any) -> Any:
        return self._part("update")

    def finish(self, state: Any) -> Any:
        return self._part("finish")

    def _part(self, name: str) -> Any:
        if name == self.failing:
            raise KeyError("oops")
        return self.result


def observing(**parts: Any) -> QConfigMapping:
    return QConfigMapping().set_global(QConfig(UserObserver(**parts), PerChannelMinMax(INT8_NARROW_PER_CHANNEL)))


def host(**changes: Any) -> HostReport:
    return replace(check_host(), **changes)


def broken_kernels() -> HostReport:
    verdicts = tuple(replace(verdict, ok=False, reason="wrong by 3 steps") for verdict in check_host().verdicts)
    return host(verdicts=verdicts)


def loader() -> Iterator[torch.Tensor]:
    yield X
    raise KeyError("label")


@dataclass(frozen=True)
class Row:
    """A call, and of each error that it must report the class, the node and a part of the reason."""

    name: str
    call: Callable[[Stages], Any]
    expected: tuple[tuple[str, str, str], ...]


def row(name: str, call: Callable[[Stages], Any], *expected: tuple[str, str, str]) -> Row:
    return Row(name, call, expected)


MODELS = (
    row("no module", lambda _: trace(len), ("NotAModule", "model", "builtin_function")),
    row("a class", lambda _: quantize(nn.Linear, [X]), ("NotAModule", "model", "got type")),
    row("training, fuse", lambda _: fuse(unwrap(trace(training(), X))), ("InTrainingMode", "model", "training mode")),
    row("training, quantize", lambda _: quantize(training(), [X]), ("InTrainingMode", "model", "training mode")),
    row("training in part", lambda _: quantize(partly_training(), [X]), ("InTrainingMode", "1", "training mode")),
    row("untraceable", lambda _: trace(Branches()), ("Untraceable", "test_errors.py:", "depends on a tensor's values")),
    row("forward raises", lambda _: quantize(Raises().eval(), [X]), ("Untraceable", "test_errors.py:", "ZeroDivision")),
    row("two devices", lambda _: trace(TwoDevices()), ("SeveralDevices", "model", "cpu, meta")),
    row("weight NaN", lambda _: quantize(poisoned(math.nan), [X]), ("NonFinite", "3", "3.weight holds NaN")),
    row("weight infinite", lambda _: quantize(poisoned(math.inf), [X]), ("NonFinite", "3", "3.weight holds NaN")),
    row("stale", lambda _: materialize(changed_after_tracing()), ("StaleSource", "0.weight", "after the model was")),
)

EXAMPLES = (
    row("example shape", lambda m: trace(m.model, X[:, :2]), ("BadExampleInputs", "0", "3 channels, but got 2")),
    row("example count", lambda m: trace(m.model, (X, X)), ("BadExampleInputs", "example_inputs", "2 inputs were")),
    row("example name", lambda m: trace(m.model, {"y": X}), ("BadExampleInputs", "example_inputs", "no input 'y'")),
    row("example type", lambda m: trace(m.model, "abc"), ("BadExampleInputs", "0", "invalid combination")),
)

KEPT = ("Interrupted", "batch 1", "what was measured until then")

BATCHES = (
    row("none", lambda m: calibrate(m.prepared, []), ("NoBatches", "batches", "empty")),
    row("no file", lambda _: qfunc.load("none/file"), ("BadFile", "none/file", "cannot be read: FileNotFoundError")),
    row("none, quantize", lambda m: quantize(m.model, iter(())), ("NoBatches", "batches", "empty")),
    row("one tensor", lambda m: calibrate(m.prepared, X), ("BadConfig", "batches", "single Tensor")),
    row("one array", lambda m: calibrate(m.prepared, X.numpy()), ("BadConfig", "batches", "single ndarray")),
    row("one dict", lambda m: quantize(m.model, {"input": X}), ("BadConfig", "batches", "single dict")),
    row("number", lambda m: quantize(m.model, 5), ("BadConfig", "batches", "single int")),
    row("nothing", lambda m: calibrate(m.prepared, None), ("BadConfig", "batches", "got a NoneType")),
    row(
        "structure", lambda m: calibrate(m.prepared, [X, (X, X)]), ("BadBatch", "batch 1", "2 inputs were given"), KEPT
    ),
    row("name", lambda m: calibrate(m.prepared, [{"x": X}]), ("BadBatch", "batch 0", "no input 'x'")),
    row("rank", lambda m: calibrate(m.prepared, [X, X[0]]), ("BadBatch", "batch 1", "of shape (3, 8, 8)"), KEPT),
    row(
        "shape", lambda m: calibrate(m.prepared, [X, X[:, :2]]), ("BadBatch", "batch 1", "3 channels, but got 2"), KEPT
    ),
    row("dtype", lambda m: calibrate(m.prepared, [X.double()]), ("BadBatch", "batch 0", "is float64, the example was")),
    row("device", lambda m: calibrate(m.prepared, [X.to("meta")]), ("BadBatch", "batch 0", "meta")),
    row(
        "array", lambda m: calibrate(m.prepared, [[np.array(["a"])]]), ("BadBatch", "batch 0", "can't convert np.ndar")
    ),
    row("first, quantize", lambda m: quantize(m.model, [X[:, :2]]), ("BadBatch", "batch 0", "3 channels, but got 2")),
    row("NaN", lambda m: calibrate(m.prepared, [X, X * math.nan]), ("NonFinite", "batch 1", "'input' holds NaN"), KEPT),
    row("infinity", lambda m: calibrate(m.prepared, [X / 0]), ("NonFinite", "batch 0", "'input' holds NaN")),
    row("value", lambda _: quantize(Logarithm().eval(), [torch.zeros(1, 4)]), ("NonFinite", "log", "from batch 0")),
    row(
        "raises",
        lambda m: calibrate(m.prepared, loader()),
        ("UserFunctionFailed", "batch 1", "KeyError: 'label' (te"),
        KEPT,
    ),
    row("raises, quantize", lambda m: quantize(m.model, loader()), ("UserFunctionFailed", "batch 1", "KeyError"), KEPT),
    row(
        "leaf raises",
        lambda _: quantize(
            nn.Sequential(nn.Linear(4, 4), Custom()).eval(),
            [torch.ones(1, 4), torch.full((1, 4), 1e4)],
            custom=CustomConfig(non_traceable_types=(Custom,)),
        ),
        ("BadBatch", "batch 1", "KeyError: 'too large' (test_errors.py:"),
        KEPT,
    ),
    row("empty", lambda m: calibrate(m.prepared, [X[:0]]), ("BadBatch", "batch 0", "has no elements")),
    row(
        "nothing but empty tensors",
        lambda m: calibrate(m.prepared, [X[:0]], policy="skip"),
        ("BadBatch", "batch 0", "has no elements"),
        ("NoBatches", "batches", "all 1 that were read were left out"),
    ),
    row("policy", lambda m: calibrate(m.prepared, [X], policy="ignore"), ("BadConfig", "policy", "no policy 'ignore'")),
    row("limit", lambda m: quantize(m.model, [X], limit=0), ("BadConfig", "limit", "0 is no number of batches")),
    row("callback", lambda m: calibrate(m.prepared, [X], callback=1), ("BadConfig", "callback", "1 cannot be called")),
    row(
        "callback raises",
        lambda m: calibrate(m.prepared, [X], callback=lambda _: {}["x"]),
        ("UserFunctionFailed", "callback", "KeyError: 'x' (test_errors.py:"),
        KEPT,
    ),
    row("earlier", lambda m: calibrate(m.prepared, [X], statistics=3), ("WrongStage", "stage", "expected Statistics")),
    row(
        "statistics of other weights",
        lambda m: calibrate(
            m.prepared, [X], statistics=replace(m.calibrated.statistics, weights=m.calibrated.statistics.weights[::-1])
        ),
        ("BadConfig", "statistics", "measured with other weights"),
    ),
    row(
        "empty values",
        lambda _: quantize(Nothing().eval(), [X]),
        ("Unobserved", "new_zeros", "no data"),
    ),
    row(
        "statistics of another graph",
        lambda m: convert(
            replace(m.calibrated, statistics=unwrap(calibrate(unwrap(prepare(m.graph)), [X])).statistics)
        ),
        ("Unobserved", "input 'input'", "another graph"),
        ("Unobserved", "0", "another graph"),
        ("Unobserved", "3", "another graph"),
    ),
    row(
        "integers at an observer",
        lambda _: (
            trace(nn.Sequential(nn.Linear(2, 2)).eval())
            .bind(prepare)
            .bind(lambda prepared: calibrate(prepared, [torch.ones(1, 2, dtype=torch.int64)]))
        ),
        ("UnsupportedDType", "input 'input'", "a tensor of int64"),
    ),
)

CONFIGURATIONS = (
    row(
        "unknown layer",
        lambda m: prepare(m.graph, CPU.qconfig_mapping.set_module_name("3x", None)),
        ("UnknownName", "3x", "no module '3x'"),
    ),
    row(
        "unknown leaf",
        lambda m: trace(m.model, custom=CustomConfig(non_traceable_names=("head",))),
        ("UnknownName", "head", "no module 'head'"),
    ),
    row(
        "unknown input",
        lambda m: trace(m.model, custom=CustomConfig(concrete_args={"mask": None})),
        ("UnknownName", "mask", "no input 'mask'"),
    ),
    row("unknown dtype", lambda m: prepare(m.graph, activations(dtype="uint9")), ("UnknownName", "uint9", "no int")),
    row("range", lambda m: prepare(m.graph, activations(quant_max=300)), ("BadConfig", "quant_min", "0..300 does not")),
    row("range without zero", lambda m: prepare(m.graph, activations(quant_min=3)), ("BadConfig", "quant_min", "3..")),
    row("regex", lambda m: prepare(m.graph, QConfigMapping().set_module_name_regex("(", None)), ("BadConfig", "(", "")),
    row(
        "axis",
        lambda m: prepare(
            m.graph, weights(PerChannelMinMax(QuantSpec("int8", -127, 127, "per_channel_symmetric", 2)))
        ),
        ("BadConfig", "5", "ch_axis 2 is no axis of its weight of shape (5, 64)"),
    ),
    row(
        "activations per channel",
        lambda m: prepare(
            m.graph,
            QConfigMapping().set_global(
                QConfig(PerChannelMinMax(QuantSpec(qscheme="per_channel_affine", ch_axis=1)), MinMax())
            ),
        ),
        ("BadConfig", "PerChannelMinMax", "one scale for the whole tensor"),
    ),
    row(
        "activation dtype",
        lambda m: prepare(
            unwrap(fuse(m.graph)),
            activations(dtype="int16", quant_min=-99, quant_max=99).set_object_type(nn.Flatten, None),
        ),
        *(("UnsupportedDType", place, "not with activations of int16") for place in ("0", "3", "5")),
    ),
    row(
        "weight dtype",
        lambda m: prepare(
            m.graph, weights(PerChannelMinMax(QuantSpec("int16", -99, 99, "per_channel_symmetric", 0)))
        ),
        *(("UnsupportedDType", place, "not with weights of int16") for place in ("0", "3", "5")),
    ),
    row("observer raises", lambda m: quantize(m.model, [X], qconfig_mapping=observing(failing="update")),
        ("UserFunctionFailed", "input 'input'", "UserObserver raised KeyError: 'oops'")),
    row("observer cannot start", lambda m: quantize(m.model, [X], qconfig_mapping=observing(failing="init")),
        ("UserFunctionFailed", "", "UserObserver raised KeyError: 'oops'")),
    row("observer cannot finish", lambda m: quantize(m.model, [X], qconfig_mapping=observing(failing="finish")),
        *(("UserFunctionFailed", place, "finish raised KeyError") for place in ("input 'input'", "0", "3"))),
    row("observer gives no qparams", lambda m: quantize(m.model, [X], qconfig_mapping=observing(result=3)),
        *(("UserFunctionFailed", place, "gave a int, not QParams") for place in ("input 'input'", "0", "3"))),
    row("weight observer raises", lambda m: quantize(m.model, [X], qconfig_mapping=weights(
        UserObserver(spec=INT8_NARROW_PER_CHANNEL, failing="update"))).bind(materialize),
        ("UserFunctionFailed", "0.weight", "UserObserver raised KeyError: 'oops'")),
    row("unhashable observer", lambda m: prepare(m.graph, observing(statistic=[])),
        ("BadConfig", "UserObserver", "not hashable")),
    row("observer without spec", lambda m: prepare(m.graph, observing(spec=None)),
        ("BadConfig", "UserObserver", "no QuantSpec")),
    row(
        "several at once, before any data",
        lambda m: quantize(
            m.model,
            iter_untouched(),
            engine="tpu",
            qconfig_mapping=activations(quant_max=300).set_module_name("a", None).set_module_name("b", None),
        ),
        ("UnknownName", "a", "no module"),
        ("UnknownName", "b", "no module"),
        ("BadConfig", "quant_min", "0..300"),
        ("UnknownName", "tpu", "no engine"),
    ),
    row(
        "training and unsupported at once",
        lambda _: quantize(
            partly_training(), [X], qconfig_mapping=weights(MinMax(QuantSpec("uint8"))).set_module_name("3", None)
        ),
        ("InTrainingMode", "1", ""),
        ("UnsupportedDType", "0", "not with weights of uint8"),
        ("UnsupportedDType", "5", "not with weights of uint8"),
    ),
    row(
        "several of the model",
        lambda _: trace(TwoDevices(), custom=CustomConfig(non_traceable_names=("head",))),
        ("UnknownName", "head", ""),
        ("SeveralDevices", "model", ""),
    ),
)  # fmt: skip


def iter_untouched() -> Iterator[Any]:
    raise AssertionError("a batch was asked for")
    yield


ENGINES = (
    row("unknown", lambda m: lower(m.converted, engine="tpu"), ("UnknownName", "tpu", "no engine 'tpu'")),
    row(
        "lacking",
        lambda m: lower(m.converted, host=host(engines=("quantized",))),
        ("EngineMissing", "onednn", "torch cannot run"),
    ),
    row(
        "lacking, quantize",
        lambda m: quantize(m.model, [X], engine="quantized", host=host(engines=("onednn",), quantized_engines=())),
        ("EngineMissing", "quantized", "torch cannot run"),
    ),
    row(
        "broken kernels, strict",
        lambda m: lower(m.converted, host=broken_kernels(), strict=True),
        *(("NotLowered", place, "fails its contract: wrong by 3 steps") for place in ("0", "3", "5")),
    ),
    row(
        "no kernel, strict",
        lambda m: quantize(m.model, [X], strict=True, qconfig_mapping=weights(MinMax(QuantSpec("int8", -128, 127)))),
        *(("NotLowered", place, "symmetric int8 weights") for place in ("0", "3", "5")),
    ),
)

EAGER = (
    row("order", lambda m: fuse_modules(m.model, ["1", "0"]), ("CannotFuse", "1 + 0", "do not follow each other")),
    row("training", lambda _: fuse_modules(training(), ["0", "1"]), ("InTrainingMode", "0 + 1", "training mode")),
    row("in part", lambda _: fuse_modules(partly_training(), ["0", "1"]), ("CannotFuse", "0 + 1", "different modes")),
)

MAPPING = QConfigMapping()
ARGUMENTS = (
    row("mapping text", lambda m: quantize(m.model, [X], qconfig_mapping="x"), ("BadConfig", "qconfig_mapping", "'x'")),
    row(
        "mapping QConfig", lambda m: prepare(m.graph, QConfig(MinMax(), MinMax())), ("BadConfig", "qconf", "a QConfig")
    ),
    row("entry text", lambda m: prepare(m.graph, MAPPING.set_global("x")), ("BadConfig", "global_qconfig", "a str")),
    row(
        "entry observer",
        lambda m: prepare(m.graph, MAPPING.set_global(MinMax())),
        ("BadConfig", "global_qconfig", "MinM"),
    ),
    row(
        "observer class", lambda m: prepare(m.graph, weights(MinMax)), ("BadConfig", "MinMax", "class, not an observer")
    ),
    row("observer text", lambda m: prepare(m.graph, weights("x")), ("BadConfig", "str", "no observer")),
    row("name", lambda m: prepare(m.graph, MAPPING.set_module_name(3, None)), ("BadConfig", "3", "must be a str")),
    row(
        "regex", lambda m: prepare(m.graph, MAPPING.set_module_name_regex(3, None)), ("BadConfig", "3", "not a regular")
    ),
    row("type", lambda m: prepare(m.graph, MAPPING.set_object_type(3, None)), ("BadConfig", "object_type", "3 is no")),
    row("backend None", lambda m: fuse(m.graph, backend=None), ("BadConfig", "backend", "got None")),
    row("backend number", lambda m: prepare(m.graph, backend=3), ("BadConfig", "backend", "got 3")),
    row("backend, quantize", lambda m: quantize(m.model, [X], backend="x86"), ("BadConfig", "backend", "got 'x86'")),
    row("host", lambda m: lower(m.converted, host=3), ("BadConfig", "host", "got 3")),
    row("host, quantize", lambda m: quantize(m.model, [X], host=3), ("BadConfig", "host", "got 3")),
    row("engine None", lambda m: quantize(m.model, [X], engine=None), ("BadConfig", "engine", "got None")),
    row("engines", lambda m: lower(m.converted, engine=["onednn"]), ("BadConfig", "engine", "['onednn']")),
    row("kernels", lambda m: lower(m.converted, kernels=(3,)), ("BadConfig", "kernels", "KernelRow")),
    row("custom", lambda m: trace(m.model, X, custom=3), ("BadConfig", "custom", "got 3")),
    row("leaf names", lambda m: trace(m.model, custom=CustomConfig("0")), ("BadConfig", "non_traceable_names", "'0'")),
    row(
        "leaf types", lambda m: trace(m.model, custom=CustomConfig((), [Custom])), ("BadConfig", "non_traceable_t", "[")
    ),
    row("fixed", lambda m: trace(m.model, custom=CustomConfig((), (), 3)), ("BadConfig", "concrete_args", "got 3")),
)

ROWS = (*MODELS, *EXAMPLES, *BATCHES, *CONFIGURATIONS, *ENGINES, *EAGER, *ARGUMENTS)


def snapshot(made: Stages) -> Any:
    state = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    flags = [module.training for module in made.model.modules()]
    digests = [digest(stage.graph) for stage in made[2:]] + [digest(made.graph)]
    return state, flags, digests, list(vars(made.model))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_bad_input_is_a_typed_failure(row: Row, made: Stages) -> None:
    before = snapshot(made)
    result = row.call(made)
    assert isinstance(result, Failure), result
    found = errors.problems(result.failure())
    assert [type(p).__name__ for p in found] == [name for name, _, _ in row.expected], render(result.failure())
    for problem, (_, node, reason) in zip(found, row.expected, strict=True):
        assert problem.node.startswith(node)
        assert reason in problem.reason
        assert problem.remedy
    after = snapshot(made)
    assert before[1:] == after[1:]
    assert same_bits(before[0], after[0])


FUNCTIONS: tuple[tuple[str, Callable[[Any], Any], tuple[str, ...]], ...] = (
    ("trace", trace, ("model",)),
    ("fuse", fuse, ("graph",)),
    ("prepare", prepare, ("graph",)),
    ("calibrate", lambda stage: calibrate(stage, [X]), ("prepared",)),
    ("convert", convert, ("calibrated",)),
    ("lower", lower, ("converted",)),
    ("materialize", materialize, ("graph", "prepared", "calibrated", "converted", "lowered")),
    ("quantize", lambda model: quantize(model, [X]), ("model",)),
    ("fuse_modules", lambda model: fuse_modules(model, ["0", "1"]), ("model",)),
)


@pytest.mark.parametrize(("name", "function", "takes"), FUNCTIONS, ids=[name for name, _, _ in FUNCTIONS])
def test_every_function_takes_its_own_stage_only(name: str, function: Any, takes: Any, made: Stages) -> None:
    given = {**made._asdict(), "number": 3, "None": None, "result": Success(made.prepared)}
    for stage, value in given.items():
        result = function(value)
        if stage in takes:
            assert isinstance(result, Success)
        else:
            assert type(result.failure()).__name__ == ("NotAModule" if "model" in takes else "WrongStage"), stage
            assert type(value).__name__ in result.failure().reason
    if "model" not in takes:
        assert "unwrap(result)" in function(Success(made.prepared)).failure().remedy


def test_trace_and_prepare_take_a_model_in_training_mode() -> None:
    assert trace(training(), X).unwrap().training


def test_a_kernel_that_fails_its_contract_is_replaced_and_the_certificate_says_so(made: Stages) -> None:
    lowered = unwrap(lower(made.converted, host=broken_kernels()))
    assert [entry.reason for entry in lowered.certificate.fallbacks] == [
        "onednn.conv2d: fails its contract: wrong by 3 steps",
        "onednn.conv2d: fails its contract: wrong by 3 steps",
        "onednn.linear: fails its contract: wrong by 3 steps",
    ]
    reference = unwrap(materialize(made.converted))
    assert same_bits(unwrap(materialize(lowered))(X), reference(X))


def test_an_invalid_graph_is_told_by_verify(made: Stages) -> None:
    order = made.graph.order
    broken = replace(made.graph, order=(order[1], order[0], *order[2:]))
    problem = verify(broken).failure()
    assert isinstance(problem, errors.InvalidGraph)
    assert "before its definition" in problem.reason


def test_every_error_is_reached_by_a_row() -> None:
    reached = {name for row in ROWS for name, _, _ in row.expected} | {"WrongStage", "InvalidGraph"}
    reached |= {"ConstantValue"}  # a warning, see edge/test_calibrate.py
    reached |= {"MoreWarnings"}  # a warning, see edge/test_checkpoint.py
    reached |= {"WorkerLost"}  # takes processes to lose, see edge/test_sharded.py
    assert reached == {case.__name__ for case in get_args(errors.Problem)}


def test_remedies_name_what_exists(made: Stages) -> None:
    """Words of a remedy that look like calls or arguments are names of the public API, of torch, or of Python."""
    names = {*dir(qfunc)} | {*dir(QConfigMapping()), *dir(nn.Module()), *dir(torch)}
    names |= {field.name for field in fields(CustomConfig)} | {"model", "bind"}
    for row in ROWS:
        failure = row.call(made).failure()
        for problem in errors.problems(failure):
            for word in re.findall(r"(\w+)\(", problem.remedy):
                assert word in names, (row.name, problem.remedy)


def test_render_tells_alike_problems_together() -> None:
    many = errors.several(errors.InTrainingMode(f"block{index}") for index in range(9))
    assert render(many).splitlines()[0] == (
        "InTrainingMode at block0, block1, block2, block3, block4, block5 and 3 more"
    )
    assert len(render(many).splitlines()) == 3


def test_unwrap_raises_what_render_prints() -> None:
    with pytest.raises(qfunc.QuantException, match="NotAModule at model\n  why: expected") as caught:
        unwrap(trace(3))
    assert isinstance(caught.value.error, errors.NotAModule)


def test_names_are_suggested() -> None:
    remedy = errors.UnknownName("layer1.convx", "module", ("", "layer1.conv1", "layer2", "head")).remedy
    assert remedy == "did you mean 'layer1.conv1'?"
    assert errors.UnknownName("zz", "module", ("", "a", "b")).remedy == "there are 'a', 'b'"
    assert errors.UnknownName("zz", "module", ("",)).remedy == "remove it: there is none at all"
