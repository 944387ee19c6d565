"""Custom modules: calls of modules that the user quantizes, from the configuration to the module that is run."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qfunc import (
    CPU,
    X86,
    Calibrated,
    CustomConfig,
    CustomModule,
    Dynamic,
    MinMax,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    Standalone,
    annotate,
    calibrate,
    convert,
    describe,
    explain_fusion,
    fuse,
    lower,
    materialize,
    prepare,
    quantize,
    trace,
    unwrap,
)
from qfunc.errors import BadConfig, NotLowered, StaleSource, Unobserved, UserFunctionFailed, problems
from qfunc.numerics.qparams import INT8_SYMMETRIC_PER_CHANNEL
from qfunc.testing import ModelCase, models, relative_error, same_bits, sqnr
from qfunc.testing.walk import fingerprint
from tests.fusion.models import run

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Gain(nn.Module):
    """The module of the user's, in float: a gain for each feature."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, features))

    def forward(self, x: Tensor, *, offset: float = 0.0) -> Tensor:
        return x * self.gain + offset


class ObservedGain(nn.Module):
    def __init__(self, gain: Gain, qconfig: QConfig) -> None:
        super().__init__()
        self.gain, self.qconfig = gain, qconfig
        self.register_buffer("largest", torch.zeros(()))
        self.calls = 0

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        self.largest = torch.maximum(self.largest, x.abs().max())
        self.calls += 1
        return self.gain(x, **options)


class QuantizedGain(nn.Module):
    def __init__(self, observed: ObservedGain) -> None:
        super().__init__()
        self.calls = observed.calls
        self.register_buffer("scale", observed.largest / 127)
        self.register_buffer("codes", (observed.gain.gain.detach() * 64).round().to(torch.int8))

    def forward(self, x: Tensor, offset: float = 0.0) -> Tensor:
        x = (x / self.scale).round().clamp(-127, 127) * self.scale
        return x * (self.codes / 64) + offset


class Other(Gain):
    """Another type: no custom module."""


GAIN = CustomModule(Gain, ObservedGain, QuantizedGain)
CUSTOM = CustomConfig(custom_modules=(GAIN,))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.gain, self.other = Gain(), Other()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gain(self.other(self.first(x)), offset=0.25))


def graph_of(model: nn.Module, custom: CustomConfig = CUSTOM):
    return unwrap(fuse(unwrap(trace(model, X, custom=custom)), custom=custom))


def prepared(model: nn.Module | None = None, mapping: QConfigMapping | None = None, custom: CustomConfig = CUSTOM):
    return unwrap(prepare(graph_of(model or Net().eval(), custom), mapping, custom=custom))


def calibrated(stage: Any) -> Calibrated:
    return unwrap(calibrate(stage, [X, 2 * X], progress=False))


# The way through the stages


def test_the_module_observes_while_it_is_calibrated_and_is_quantized_at_last() -> None:
    model = Net().eval()
    before = fingerprint(model)
    stage = prepared(model)
    observing = unwrap(materialize(stage))
    assert type(observing.gain) is ObservedGain and observing.gain.qconfig == CPU.qconfig_mapping.global_qconfig
    assert same_bits(run(observing, (X,)), run(unwrap(materialize(graph_of(model))), (X,)))
    done = calibrated(stage)
    assert unwrap(materialize(done)).gain.calls == 2
    assert unwrap(materialize(stage)).gain.calls == 0
    made = unwrap(materialize(unwrap(convert(done))))
    assert type(made.gain) is QuantizedGain and made.gain.calls == 2
    assert {"gain.scale", "gain.codes"} <= set(made.state_dict())
    assert sqnr(run(model, (X,)), run(made, (X,))) > 25
    assert fingerprint(model) == before


def test_every_stage_can_be_used_again() -> None:
    done = calibrated(prepared())
    first, second = (unwrap(materialize(unwrap(convert(done)))) for _ in range(2))
    assert same_bits(run(first, (X,)), run(second, (X,)))
    assert same_bits(calibrated(prepared()).modules["gain"].value.largest, done.modules["gain"].value.largest)
    observing = unwrap(materialize(done))
    run(observing, (100 * X,))
    first.gain.codes.zero_()
    third = unwrap(materialize(unwrap(convert(done))))
    assert same_bits(run(third, (X,)), run(second, (X,)))
    for copied in (copy.deepcopy(third), pickle.loads(pickle.dumps(third))):
        assert same_bits(run(copied, (X,)), run(third, (X,)))


def test_only_modules_of_exactly_the_type_are_leaves_and_swapped() -> None:
    graph = graph_of(Net().eval())
    assert [node.kind for node in graph if "Gain" in node.kind or node.kind == "mul"] == ["mul", f"{__name__}.Gain"]
    stage = unwrap(prepare(graph, custom=CUSTOM))
    assert {id: swap.module for id, swap in stage.swapped.items()} == {"gain": GAIN}
    row = next(row for row in unwrap(describe(stage)).floats if row.node == "gain")
    assert row.reason == "its custom module quantizes inside itself"


def test_a_module_of_torch_may_be_a_custom_module() -> None:
    custom = CustomConfig(
        custom_modules=(CustomModule(nn.Linear, lambda linear, _: nn.Sequential(linear), lambda made: made[0]),)
    )
    model = Net().eval()
    stage = prepared(model, custom=custom)
    assert not stage.weights and {stage.graph[id].place for id in stage.swapped} == {"first", "last"}
    made = unwrap(materialize(unwrap(convert(calibrated(stage)))))
    assert relative_error(run(model, (X,)), run(made, (X,))) < 0.05  # what is between is quantized
    assert type(made.last) is nn.Linear


def test_the_whole_way_in_one_call() -> None:
    model = Net().eval()
    lowered = unwrap(quantize(model, [X, 2 * X], custom=CUSTOM, strict=True, progress=False))
    assert not lowered.certificate.fallbacks
    made = unwrap(materialize(lowered))
    assert type(made.gain) is QuantizedGain
    assert sqnr(run(model, (X,)), run(made, (X,))) > 25


# Which, and with what


def test_none_and_dynamic_leave_the_module_float() -> None:
    dynamic = QConfig(Dynamic(QuantSpec("int8", -128, 127)), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL))
    for choice in (None, dynamic):
        stage = prepared(mapping=CPU.qconfig_mapping.set_object_type(Gain, choice))
        assert not stage.swapped
        assert type(unwrap(materialize(stage)).gain) is Gain
    annotations = unwrap(annotate(graph_of(Net().eval()), custom=CUSTOM))
    assert unwrap(prepare(graph_of(Net().eval()), annotations.keep_float("gain"))).swapped == {}


def test_only_calls_of_modules_can_be_swapped() -> None:
    graph = graph_of(Net().eval())
    annotations = unwrap(annotate(graph, custom=CUSTOM))
    swap = annotations.swapped["gain"]
    wrong = replace(annotations, swapped=annotations.swapped.update({"x": swap, "nowhere": swap}))
    found = problems(prepare(graph, wrong).failure())
    assert {(type(problem), problem.node) for problem in found} == {(BadConfig, "x"), (BadConfig, "nowhere")}


def test_a_standalone_module_configures_the_custom_modules_inside() -> None:
    model = nn.Sequential(Gain(), nn.Sequential(nn.Linear(8, 8), Gain())).eval()
    inside = QConfigMapping().set_global(QConfig(MinMax(), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)))
    for mapping, expected in ((inside, inside.global_qconfig), (inside.set_module_name("1", None), None)):
        custom = CustomConfig(custom_modules=(GAIN,), standalone_names={"1": Standalone(mapping)})
        stage = prepared(model, custom=custom)
        found = {stage.graph[id].place: swap.qconfig for id, swap in stage.swapped.items()}
        assert found["0"] == CPU.qconfig_mapping.global_qconfig and found.get("1.1") == expected


def test_a_module_that_does_more_than_its_class_stays_float_and_is_told_of() -> None:
    model = Net().eval()
    model.gain.register_forward_hook(lambda *_: None)
    stage = prepared(model)
    assert not stage.swapped and stage.floats["gain"].startswith("its module has forward hooks")
    result = quantize(model, [X], custom=CUSTOM, strict=True, progress=False)
    assert [(type(problem), problem.node) for problem in problems(result.failure())] == [(NotLowered, "gain")]


def test_fusion_tells_of_custom_modules() -> None:
    custom = CustomConfig(custom_modules=(CustomModule(nn.Linear, lambda linear, _: linear, lambda linear: linear),))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    report = unwrap(explain_fusion(unwrap(trace(model, X, custom=custom)), custom=custom))
    assert [(row.place, row.reason) for row in report.unfused] == [("0", "it is a custom module")]


def test_the_nearest_configuration_is_handed_over() -> None:
    mine = QConfig(MinMax(QuantSpec("uint8", 0, 200)), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL))
    stage = prepared(mapping=CPU.qconfig_mapping.set_module_name("gain", mine))
    assert stage.swapped["gain"].qconfig == mine
    assert unwrap(materialize(stage)).gain.qconfig == mine


@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
def test_its_result_is_observed_and_what_it_is_given_is_not(backend: Any) -> None:
    model = nn.Sequential(Gain(), nn.Linear(8, 4), Gain(4)).eval()
    graph = unwrap(fuse(unwrap(trace(model, X, custom=CUSTOM)), backend=backend, custom=CUSTOM))
    stage = unwrap(prepare(graph, backend=backend, custom=CUSTOM))
    assert not [edge for edge in stage.inputs if edge.user in stage.swapped]
    assert graph.order[0] not in stage.outputs
    # Of the last one's result nobody reads, which the lazy backend leaves float.
    assert ("_0" in stage.outputs, "_2" in stage.outputs) == (True, backend is X86)


def test_a_result_of_several_tensors_is_left_to_its_readers() -> None:
    class Split(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, -x

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.split, self.last = Split(), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.split(x)
            return self.last(a) + b[:, :4]

    for tensor_output, example in ((False, None), (True, X)):
        split = CustomModule(Split, lambda module, _: module, lambda module: module, tensor_output=tensor_output)
        custom = CustomConfig(custom_modules=(split,))
        graph = unwrap(trace(Pair().eval(), example, custom=custom))
        stage = unwrap(prepare(graph, backend=X86, custom=custom))
        assert "split" in stage.swapped and "split" not in stage.outputs
        made = unwrap(materialize(unwrap(lower(unwrap(convert(calibrated(stage)))))))
        assert run(made, (X,)).shape == (4, 4)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.last = Gain(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.gain(self.gain(x)))


def test_a_module_called_twice_is_one_module() -> None:
    stage = prepared(Twice().eval())
    assert len(stage.swapped) == 2
    done = calibrated(stage)
    assert list(done.modules) == ["gain"] and done.modules["gain"].value.calls == 4
    made = unwrap(materialize(unwrap(convert(done))))
    assert [type(module) for module in made.modules()].count(QuantizedGain) == 1


def test_a_module_called_with_two_configurations_is_told_of() -> None:
    mapping = CPU.qconfig_mapping.set_module_name_object_type_order("", Gain, 1, X86.qconfig_mapping.global_qconfig)
    found = prepare(graph_of(Twice().eval()), mapping, custom=CUSTOM).failure()
    assert isinstance(found, BadConfig) and found.node == "gain"
    half = CPU.qconfig_mapping.set_module_name_object_type_order("", Gain, 1, None)
    done = calibrated(prepared(Twice().eval(), half))
    assert done.modules["gain"].value.calls == 2
    made = unwrap(materialize(unwrap(convert(done))))
    assert {type(made.get_submodule(str(node.target))) for node in made.graph.nodes if node.op == "call_module"} >= {
        Gain,
        QuantizedGain,
    }


# What goes wrong


def broken(*_: Any) -> nn.Module:
    raise RuntimeError("it is broken")


def given_back(*_: Any) -> Any:
    return 3


class Uncopyable(nn.Module):
    def __init__(self, *_: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x

    def __deepcopy__(self, memo: Any) -> nn.Module:
        raise TypeError("no copies")


@pytest.mark.parametrize(
    ("function", "reason"), [(broken, "it is broken"), (given_back, "returned a int"), (Uncopyable, "no copies")]
)
@pytest.mark.parametrize("which", ["observed", "quantized"])
def test_a_function_that_fails_is_told_of_with_the_path(function: Callable[..., Any], reason: str, which: str) -> None:
    functions = {"observed": ObservedGain, "quantized": QuantizedGain, which: function}
    custom = CustomConfig(custom_modules=(CustomModule(Gain, functions["observed"], functions["quantized"]),))
    stage = prepared(custom=custom)
    result = calibrate(stage, [X], progress=False).bind(convert).bind(materialize)
    failure = result.failure()
    assert isinstance(failure, UserFunctionFailed) and failure.node == "gain"
    assert reason in failure.reason and which in failure.reason


def test_functions_may_change_what_they_are_given() -> None:
    def observed(gain: Gain, _: QConfig) -> nn.Module:
        nn.init.zeros_(gain.gain)
        return gain

    def quantized(gain: Gain) -> nn.Module:
        nn.init.ones_(gain.gain)
        return gain

    model = Net().eval()
    before = fingerprint(model)
    done = calibrated(prepared(model, custom=CustomConfig(custom_modules=(CustomModule(Gain, observed, quantized),))))
    unwrap(materialize(unwrap(convert(done))))
    assert done.modules["gain"].value.gain.abs().max() == 0
    assert fingerprint(model) == before


def test_a_change_of_the_source_is_noticed_until_the_module_is_calibrated() -> None:
    model = Net().eval()
    stage = prepared(model)
    done = calibrated(stage)
    with torch.no_grad():
        model.gain.gain.add_(1)
    assert calibrate(stage, [X], progress=False).failure() == StaleSource("gain.gain")
    assert type(unwrap(materialize(unwrap(convert(done)))).gain) is QuantizedGain


def test_statistics_of_another_run_do_not_hold_a_custom_module() -> None:
    stage = prepared()
    failure = convert(Calibrated(stage, calibrated(stage).statistics)).failure()
    assert isinstance(failure, Unobserved) and failure.node == "gain"


def test_a_graph_traced_without_them_has_a_note() -> None:
    stage = unwrap(prepare(graph_of(Net().eval(), CustomConfig()), custom=CUSTOM))
    assert not stage.swapped
    assert [note.node for note in stage.notes] == [f"custom_modules[{__name__}.Gain]"]


@pytest.mark.parametrize(
    "modules",
    [GAIN, (Gain,), (CustomModule(Gain, 3, QuantizedGain),), (CustomModule("Gain", broken, broken),), (GAIN, GAIN)],
)
def test_a_configuration_that_cannot_be_meant_is_told_of(modules: Any) -> None:
    found = problems(trace(Net(), custom=CustomConfig(custom_modules=modules)).failure())
    assert {(type(problem), problem.node) for problem in found} == {(BadConfig, "custom_modules")}


# Any model, any types in it


class Passing(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), made=models(max_nodes=8))
def test_types_of_any_model_may_be_custom_modules(data: st.DataObject, made: ModelCase) -> None:
    types = sorted({type(module) for _, module in made.module.named_modules() if module is not made.module}, key=str)
    chosen = data.draw(st.lists(st.sampled_from(types), unique=True, max_size=2)) if types else []
    seen: list[str] = []

    def observed(module: nn.Module, _: QConfig) -> nn.Module:
        seen.append(type(module).__name__)
        return Passing(module)

    custom = CustomConfig(custom_modules=tuple(CustomModule(t, observed, lambda made: made.module) for t in chosen))
    before = fingerprint(made.module)
    graph = unwrap(fuse(unwrap(trace(made.module, made.example_inputs, custom=custom)), custom=custom))
    stage = unwrap(prepare(graph, custom=custom))
    done = unwrap(calibrate(stage, [made.example_inputs], progress=False))
    assert len(seen) == len(done.modules) == len({graph[id].place for id in stage.swapped})
    observing, plain = unwrap(materialize(stage)), unwrap(materialize(graph))
    assert same_bits(run(observing, made.example_inputs), run(plain, made.example_inputs))
    run(unwrap(materialize(unwrap(convert(done)))), made.example_inputs)
    assert fingerprint(made.module) == before
