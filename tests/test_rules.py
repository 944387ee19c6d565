"""What backends' rules make of each way to quantize: the uses, values, weights and biases that are quantized."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc import (
    CPU,
    QNNPACK,
    X86,
    Cast,
    CustomConfig,
    CustomModule,
    Derived,
    DTypeConfig,
    DTypeWithConstraints,
    Dynamic,
    Edge,
    FixedQParams,
    Histogram,
    KeepFloat,
    MinMax,
    Observation,
    OperatorConfig,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    ReuseInput,
    SharedWith,
    Standalone,
    Unshared,
    annotate,
    calibrate,
    compare,
    convert,
    describe,
    fuse,
    lower,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.backends import qconfigs
from qfunc.config.point import values_in
from qfunc.errors import BadConfig, UnsupportedDType, problems
from qfunc.numerics.qparams import INT8, INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8
from qfunc.testing import sqnr

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[1, 2], [3, 4]])


class Net(nn.Module):
    """Layers of all families that backends quantize, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.out = nn.Conv1d(6, 6, 1), nn.Linear(8, 8), nn.Linear(8, 4)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.scale = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(self.conv(x)).reshape(2, 6, 8)
        x = F.linear(x, self.scale.t())
        return self.out(self.rnn(x)[0])


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.bag, self.fc = nn.Embedding(10, 8), nn.EmbeddingBag(10, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.words(ids).sum(1) + self.bag(ids))


def graph_of(model=Net, inputs=X, backend=X86):
    return unwrap(fuse(unwrap(trace(model().eval(), inputs)), backend=backend))


def annotated(graph, qconfig=None, backend=X86, **options):
    mapping = qconfig if isinstance(qconfig, QConfigMapping) else QConfigMapping().set_global(qconfig)
    return unwrap(annotate(graph, mapping, backend=backend, **options))


def test_dynamic_quantization_is_of_inputs_alone():
    found = annotated(graph_of(), qconfigs.DEFAULT_DYNAMIC)
    edges = (Edge("fc", "input"), Edge("linear", "input"), Edge("out", "input"), Edge("rnn", "0"))
    assert dict(found.inputs) == dict.fromkeys(edges, Dynamic(UINT8))
    assert not found.outputs
    assert set(found.weights) == {"fc", "out", "rnn"}
    assert "not with qparams chosen when the model runs" in found.floats["conv"]
    assert found.refused >= {"conv"}


def test_float16_is_a_cast():
    dynamic = annotated(graph_of(), qconfigs.FLOAT16_DYNAMIC)
    assert dynamic.inputs[Edge("fc", "input")] == Cast("float16", dynamic=True)
    assert not dynamic.outputs
    assert not dynamic.biases
    row = OperatorConfig(
        ("linear", "conv1d"), Observation.OWN, (DTypeConfig("float16", "float16", "float16", "float16"),)
    )
    static = annotated(graph_of(), qconfigs.FLOAT16_STATIC, replace(X86, operators=(row,)))
    assert static.inputs[Edge("fc", "input")] == static.outputs["fc"] == static.biases["fc"] == Cast("float16")
    assert static.weights["conv"] == Cast("float16")


def test_weights_alone():
    mapping = QConfigMapping().set_object_type(nn.Embedding, qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY)
    mapping = mapping.set_object_type(nn.EmbeddingBag, qconfigs.FLOAT_QPARAMS_WEIGHT_ONLY_4BIT)
    found = annotated(graph_of(Words, IDS), mapping)
    assert set(found.weights) == {"words", "bag"}
    assert not found.inputs
    assert not found.outputs


def test_inputs_or_results_alone():
    weight = MinMax(INT8_SYMMETRIC)
    given = (QConfig(KeepFloat(), weight, MinMax()), QConfig(MinMax(), weight, KeepFloat()))
    row = OperatorConfig(("linear",), Observation.OWN, (DTypeConfig(None, None, "int8"),))
    inputs, outputs = (annotated(graph_of(), qconfig, replace(X86, operators=(row,))) for qconfig in given)
    assert set(inputs.inputs) > {Edge("fc", "input")}
    assert not inputs.outputs
    assert set(outputs.outputs) == {"fc", "linear", "out"}
    assert set(outputs.inputs) == {Edge("linear", "weight")}


def test_a_reshape_reuses_the_range_of_its_input():
    found = annotated(graph_of(), X86.qconfig_mapping)
    assert found.outputs["reshape"] == SharedWith("fc")
    assert Edge("reshape", "input") not in found.inputs
    floating = annotated(graph_of(), X86.qconfig_mapping.set_module_name("fc", None))
    assert "reshape" not in floating.outputs
    assert floating.floats["reshape"] == "its input, whose qparams it is to reuse, is not quantized"


class Reshapes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.tanh(x.reshape(2, 8, 6)).reshape(2, 48).reshape(96)


def test_a_reused_range_may_come_from_an_entry_a_border_a_custom_or_a_standalone_module():
    graph, mapping = graph_of(Reshapes), X86.qconfig_mapping
    reason = "its input, whose qparams it is to reuse, is not quantized"
    assert annotated(graph, mapping).floats["reshape"] == reason

    def sharing(given, custom=CustomConfig()):  # noqa: B008 - a frozen value
        found = annotated(graph, given, custom=custom)
        shared = {id: spec.other for id, spec in found.outputs.items() if isinstance(spec, SharedWith)}
        assert {id: why for id, why in found.floats.items() if why == reason}.keys().isdisjoint(shared)
        return shared

    from_tanh = {"reshape_1": "tanh", "reshape_2": "reshape_1"}
    assert sharing(mapping) == from_tanh
    assert sharing(mapping.set_output("x", MinMax())) == {"reshape": "x", **from_tanh}
    edge = Edge("reshape", "input")
    assert sharing(mapping.set_edge(edge, MinMax())) == {"reshape": edge, **from_tanh}
    assert sharing(mapping, CustomConfig(input_quantized_indexes=(0,))) == {"reshape": "x", **from_tanh}
    assert sharing(mapping, CustomConfig(standalone_names={"tanh": Standalone()})) == from_tanh
    module = CustomModule(nn.Tanh, lambda module, qconfig: module, lambda module, qconfig: module)
    assert sharing(mapping, CustomConfig(custom_modules=(module,))) == from_tanh
    kept = mapping.set_output("x", MinMax()).set_edge(edge, None)
    assert annotated(graph, kept).floats["reshape"] == reason
    assert not annotated(graph, mapping.set_edge(Edge("reshape_1", "input"), None)).notes
    own = annotated(graph, mapping.set_output("reshape", MinMax()))
    assert own.outputs["reshape"] == MinMax() and "reshape" not in own.floats


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool, self.last = nn.Conv1d(6, 6, 1), nn.MaxPool1d(2), nn.Conv1d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(self.first(x)))


@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
def test_an_operator_shares_the_range_that_an_entry_gives_its_operand(backend):
    graph, mapping, edge = graph_of(Pools, backend=backend), backend.qconfig_mapping, Edge("pool", "input")
    observer = mapping.global_qconfig.of_inputs
    plain, same = annotated(graph, mapping, backend), annotated(graph, mapping.set_edge(edge, observer), backend)
    assert plain == same
    assert same.outputs["pool"] == SharedWith(edge)
    other = annotated(graph, mapping.set_edge(edge, MinMax(INT8)), backend)
    assert (other.inputs[edge], other.outputs["pool"]) == (MinMax(INT8), SharedWith(edge))
    for kept in (mapping.set_edge(edge, None), mapping.set_output("first", None)):
        found = annotated(graph, kept, backend)
        assert "pool" not in found.outputs
        assert found.floats["pool"] == "its input, whose qparams it is to share, is kept float"


@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
def test_the_operands_of_a_wide_operator_are_looked_through_a_few_times(backend, monkeypatch):
    """Not once for each operand."""

    class Wide(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.width = width

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([torch.tanh(x) for _ in range(self.width)])

    seen = 0

    def counted(node, slot):
        nonlocal seen
        values = values_in(node, slot)
        seen += len(values)
        return values

    for place in ("qfunc.passes.rules", "qfunc.config.resolve", "qfunc.config.point"):
        monkeypatch.setattr(f"{place}.values_in", counted, raising=False)
    work = []
    for width in (20, 40):
        graph = unwrap(fuse(unwrap(trace(Wide(width).eval(), X)), backend=backend))
        mapping = backend.qconfig_mapping
        for index in range(0, width, 2):
            mapping = mapping.set_edge(Edge("cat", "tensors", index), None)
        seen = 0
        annotated(graph, mapping, backend)
        work.append(seen)
    assert 0 < work[1] < 2.5 * work[0]


def test_a_weight_that_the_graph_computes_is_quantized_where_it_is_used():
    found = annotated(graph_of(), X86.qconfig_mapping)
    assert found.inputs[Edge("linear", "weight")] == X86.qconfig_mapping.global_qconfig.weight
    assert "linear" not in found.weights
    assert annotated(graph_of(), CPU.qconfig_mapping, CPU).floats["linear"] == "its weight is computed by the graph"


def test_operators_that_the_vocabulary_does_not_know():
    """A row says which of their arguments are activations, and which is the weight."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tensordot(x, self.table, 1)

    row = OperatorConfig(("torch.functional.tensordot",), Observation.OWN, inputs=("0",), weight="1")
    backend = replace(X86, name="mine", operators=(row,))
    found = annotated(graph_of(Own, backend=backend), X86.qconfig_mapping.global_qconfig, backend)
    qconfig = X86.qconfig_mapping.global_qconfig
    assert dict(found.inputs) == {
        Edge("tensordot", "0"): qconfig.activation,
        Edge("tensordot", "1"): qconfig.weight,
    }
    assert found.outputs["tensordot"] == qconfig.activation
    silent = replace(backend, operators=(replace(row, observation=Observation.NOT_OBSERVED),))
    assert annotated(graph_of(Own), qconfig, silent).floats["tensordot"] == "the mine backend observes nothing of it"


def test_the_number_of_tensors_decides_about_the_range():
    class Sums(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x + 1.0, x + x

    row = OperatorConfig(
        ("add",), Observation.OWN, by_tensor_count=((1, Observation.NOT_OBSERVED), (2, Observation.SHARED))
    )
    found = annotated(graph_of(Sums), X86.qconfig_mapping, X86)
    assert found.outputs["add"] == SharedWith(Edge("add", "input"))
    assert found.outputs["add_1"] == X86.qconfig_mapping.global_qconfig.activation
    other = annotated(graph_of(Sums), X86.qconfig_mapping, replace(X86, operators=(row,)))
    assert "add" not in other.outputs
    assert other.outputs["add_1"] == SharedWith(Edge("add_1", "input"))


MISFITS = (
    (DTypeWithConstraints("uint8"), MinMax(INT8), "int8"),
    (DTypeWithConstraints("uint8", quant_min_lower_bound=1), MinMax(), "codes 0..255, lower than 1"),
    (DTypeWithConstraints("uint8", quant_max_upper_bound=127), MinMax(), "codes 0..255, higher than 127"),
    (
        DTypeWithConstraints("uint8", scale_min_lower_bound=2**-12),
        MinMax(),
        "scales from 1.192e-07, less than 0.0002441",
    ),
    (
        DTypeWithConstraints("uint8", scale_exact_match=1 / 256, zero_point_exact_match=0),
        Histogram(),
        "measured qparams instead of the fixed scale 0.00390625 and zero point 0",
    ),
    (
        DTypeWithConstraints("uint8", scale_exact_match=1 / 256, zero_point_exact_match=0),
        FixedQParams(UINT8, 1 / 256, 128),
        "a scale of 0.003906 and a zero point of 128 instead of the fixed scale 0.00390625 and zero point 0",
    ),
    (
        DTypeWithConstraints("uint8", scale_max_upper_bound=0.1),
        FixedQParams(UINT8, 0.5, 0),
        "a scale of 0.5, more than 0.1",
    ),
    (
        DTypeWithConstraints("uint8", scale_min_lower_bound=0.1),
        FixedQParams(UINT8, 0.05, 0),
        "a scale of 0.05, less than 0.1",
    ),
    (DTypeWithConstraints("float16"), Cast(), ""),
    (DTypeWithConstraints("uint8", 0, 255, 2**-23, 1.0), MinMax(), ""),
)


@pytest.mark.parametrize(("allowed", "given", "reason"), MISFITS, ids=lambda value: repr(value)[:60])
def test_constraints_of_dtypes(allowed, given, reason):
    assert allowed.misfit(given) == reason
    row = OperatorConfig(("linear",), Observation.OWN, (DTypeConfig(allowed, None, None),))
    qconfig = QConfig(given, MinMax(INT8_SYMMETRIC), input_activation=given)
    result = annotate(graph_of(), QConfigMapping().set_global(qconfig), backend=replace(X86, operators=(row,)))
    if not reason:
        assert Edge("fc", "input") in unwrap(result).inputs
    else:
        found = problems(result.failure())
        assert {type(problem) for problem in found} == {UnsupportedDType}
        assert all(f"activations of {reason}" in problem.reason for problem in found)


def test_the_least_scale_of_xnnpack_is_asked_for():
    graph = graph_of(backend=QNNPACK)
    assert annotated(graph, qconfigs.DEFAULT_SYMMETRIC_QNNPACK, QNNPACK).weights
    fine = QConfig(Histogram(INT8), MinMax(QuantSpec("int8", -127, 127, "per_tensor_symmetric")))
    found = problems(annotate(graph, QConfigMapping().set_global(fine), backend=QNNPACK).failure())
    assert {type(problem) for problem in found} == {UnsupportedDType}


def test_a_known_range_is_that_of_the_result_alone():
    """It would clip the operand."""

    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(x * x)

    graph = graph_of(Gate)
    fixed = QConfig(FixedQParams(UINT8, 1 / 256, 0), MinMax(INT8_SYMMETRIC))
    for given, measured in ((X86.qconfig_mapping.global_qconfig, Histogram), (None, MinMax)):
        found = annotated(graph, QConfigMapping().set_global(given).set_object_type(torch.sigmoid, fixed))
        assert isinstance(found.inputs[Edge("sigmoid", "input")], measured)
        assert found.outputs["sigmoid"] == fixed.activation
    own = replace(fixed, input_activation=Histogram())
    found = annotated(graph, QConfigMapping().set_object_type(torch.sigmoid, own))
    assert found.inputs[Edge("sigmoid", "input")] == Histogram()


def test_an_entry_that_suits_nothing_is_an_error_and_one_that_suits_some_is_not():
    entry = QConfigMapping().set_object_type(nn.Conv1d, qconfigs.DEFAULT_DYNAMIC)
    (problem,) = problems(annotate(graph_of(), entry, backend=X86).failure())
    assert (type(problem), problem.node) == (UnsupportedDType, "conv")
    assert "chosen when the model runs" in problem.reason


def test_points_with_qparams_of_their_own_or_of_others():
    graph = graph_of()
    given = annotated(graph, X86.qconfig_mapping)
    alike = unwrap(prepare(graph, given))
    assert Edge("out", "input") in alike.inputs or "getitem" in alike.outputs
    own = MinMax()
    apart = replace(given, inputs=given.inputs.set(Edge("linear", "input"), Unshared(own)))
    prepared = unwrap(prepare(graph, apart))
    assert prepared.inputs[Edge("linear", "input")] != prepared.outputs["reshape"]
    assert prepared.sites[prepared.inputs[Edge("linear", "input")]].observer == own
    derived = Derived((Edge("fc", "input"), Edge("fc", "weight")), max, INT8)
    with_bias = replace(given, biases=given.biases.set("fc", derived))
    told = unwrap(describe(unwrap(prepare(graph, with_bias))))
    assert [(row.node, row.observer) for row in told.biases] == [("fc", "Derived")]
    lost = replace(with_bias, weights=given.weights.discard("fc"))
    assert {type(problem) for problem in problems(prepare(graph, lost).failure())} == {BadConfig}
    assert not given.keep_float("fc").biases


def test_single_values_and_uses():
    graph = graph_of()
    wide, channels = MinMax(QuantSpec("int16", -32768, 32767)), PerChannelMinMax(replace(INT8_SYMMETRIC_PER_CHANNEL))
    mapping = X86.qconfig_mapping.set_output("fc", wide).set_edge(Edge("out", "input"), channels)
    mapping = mapping.set_output("conv", None).set_edge(Edge("conv", "input"), None)
    prepared = unwrap(prepare(graph, mapping, backend=X86))
    assert prepared.sites[prepared.outputs["fc"]].observer == wide
    assert prepared.sites[prepared.inputs[Edge("out", "input")]].observer == channels
    assert "conv" not in prepared.outputs
    assert not {Edge("conv", "input"), Edge("fc", "input")} & set(prepared.inputs)
    text = str(unwrap(describe(prepared)))
    assert "int16 -32768..32767" in text
    assert "per_channel_symmetric" in text


def test_a_reused_range_cannot_be_asked_of_a_single_value():
    found = problems(prepare(graph_of(), QConfigMapping().set_output("fc", ReuseInput()), backend=X86).failure())
    assert [type(problem) for problem in found] == [BadConfig]


@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
def test_codes_at_the_borders(backend):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, object]:
            return {"a": self.fc(x), "b": [y], "c": y.cos()}

    graph = graph_of(Two, (X, X), backend)
    prepared = unwrap(
        prepare(
            graph, backend=backend, custom=CustomConfig(input_quantized_indexes=(0, 1), output_quantized_indexes=(0,))
        )
    )
    assert {"x", "y", "fc"} <= set(prepared.outputs)
    assert prepared.quantized_inputs == {"x", "y"}
    assert prepared.quantized_outputs == {0}
    assert "codes: input x" in str(unwrap(describe(prepared)))
    wrong = CustomConfig(input_quantized_indexes=(2,), output_quantized_indexes=(1, 2, 3, -1))
    found = problems(prepare(graph, backend=backend, custom=wrong).failure())
    assert len(found) == 5
    assert {type(problem) for problem in found} == {BadConfig}
    nothing = problems(
        prepare(graph, QConfigMapping(), backend=backend, custom=CustomConfig(input_quantized_indexes=(0,))).failure()
    )
    assert [problem.node for problem in nothing] == ["input 'x'"]


def test_what_only_a_dynamic_layer_reads_is_not_rounded_before():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    graph = unwrap(trace(model, torch.randn(1, 3, 8, 8)))
    layer = graph.order[-2]
    weight = CPU.qconfig_mapping.global_qconfig.weight
    prepared = unwrap(prepare(graph, CPU.qconfig_mapping.set_node(layer, QConfig(Dynamic(), weight))))
    assert prepared.outputs == {}
    assert {edge.user for edge in prepared.inputs} == {graph.order[1], layer}


@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
def test_one_use_may_be_float_where_others_are_quantized(backend):
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.three = (nn.Conv1d(6, 6, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.one(x))
            return self.three(torch.tanh(self.two(y)) + y)

    graph = graph_of(Residual, backend=backend)
    value = next(id for id in graph["add"].uses() if id != "tanh")
    edge = Edge("add", "other")
    mapping = backend.qconfig_mapping.set_edge(edge, None)
    prepared = unwrap(prepare(graph, mapping, backend=backend))
    assert prepared.unrounded == {edge}
    assert value in prepared.outputs
    assert not [note for note in prepared.notes if "edges" in note.node]
    assert "unrounded: other[0] of add (add)" in str(unwrap(describe(prepared)))
    plain = unwrap(prepare(graph, backend=backend))
    assert ("other[0] of add", "unrounded") in {
        (d.what, d.second) for d in unwrap(compare(plain, prepared)).differences
    }
    calibrated = unwrap(calibrate(prepared, [X], progress=False))
    converted = unwrap(convert(calibrated))
    assert list(converted.graph["add"].uses())[1] == value
    with torch.no_grad():
        reference, lowered = (unwrap(materialize(s))(X) for s in (converted, unwrap(lower(converted))))
        assert sqnr(Residual().eval()(X), reference) > 25
        assert sqnr(reference, lowered) > 25
    annotations = unwrap(annotate(graph, mapping, backend=backend))
    assert unwrap(prepare(graph, annotations, backend=backend)) == prepared
    both = replace(annotations, inputs=annotations.inputs.set(edge, MinMax()))
    assert "both quantized and unrounded" in problems(prepare(graph, both).failure())[0].reason
