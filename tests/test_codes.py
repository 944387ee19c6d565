"""Models that take and give codes: inputs and outputs that stay integers at the borders."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pyrsistent import pmap
from torch import Tensor, nn

from qfunc import (
    CPU,
    X86,
    Annotations,
    Cast,
    CustomConfig,
    Dynamic,
    Edge,
    FixedQParams,
    MinMax,
    PerChannelMinMax,
    QConfigMapping,
    SharedWith,
    annotate,
    calibrate,
    convert,
    fuse,
    lower,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.config.point import values_in
from qfunc.errors import BadConfig, UnknownName, problems
from qfunc.numerics.qparams import INT8_SYMMETRIC, UINT8, QuantSpec
from qfunc.numerics.unmeasured import told
from qfunc.passes.numbers import non_tensors
from qfunc.testing import oracle
from tests.test_in_place import model as written

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
CODES = CustomConfig(input_quantized_indexes=(0,), output_quantized_indexes=(0,))

RETURNS = {
    "value": lambda y, z: y,
    "tuple": lambda y, z: (y, z),
    "list": lambda y, z: [y, [z]],
    "dict": lambda y, z: {"p": y, "none": None, "q": z},
    "twice": lambda y, z: (y, z, y),
}


class Net(nn.Module):
    def __init__(self, how: str = "tuple") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.one, self.two = how, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor):
        y = self.one(x).relu()
        return RETURNS[self.how](self.two(y), x.cos())


def converted_of(model, custom=CODES, backend=CPU, mapping=None):
    graph = unwrap(fuse(unwrap(trace(model.eval(), X)), backend=backend))
    prepared = unwrap(prepare(graph, mapping, backend=backend, custom=custom))
    return unwrap(convert(unwrap(calibrate(prepared, [X], progress=False))))


def encoded(x, q):
    return torch.clamp(torch.round(x * (1 / q.scale)) + q.zero_point, *q.bounds).to(torch.uint8)


def decoded(codes, q):
    return (codes.float() - q.zero_point) * q.scale


def first(output):
    match output:
        case Tensor():
            return output
        case dict():
            return next(iter(output.values()))
        case _:
            return output[0]


@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
@pytest.mark.parametrize("how", RETURNS)
def test_codes_stand_for_what_the_float_borders_give(how, backend):
    plain, codes = converted_of(Net(how), CustomConfig(), backend), converted_of(Net(how), CODES, backend)
    (taken,), (given,) = codes.input_qparams.values(), codes.output_qparams.values()
    with torch.no_grad():
        output = unwrap(materialize(codes))(encoded(X, taken))
        expected = Net(how).eval()(X)
        both = unwrap(materialize(plain))(X)
    assert type(output) is type(expected)
    assert first(output).dtype == torch.uint8
    step = given.scale
    assert (decoded(first(output), given) - first(both)).abs().max() <= step
    if how == "tuple":
        assert torch.equal(output[1], decoded(encoded(X, taken), taken).cos())
    if how == "twice":
        assert output[2].dtype == torch.float32


@pytest.mark.parametrize("engine", ["onednn", "quantized", "reference"])
@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
def test_engines_agree_and_leave_the_input_as_it_is(backend, engine):
    stage = converted_of(Net(), CODES, backend)
    (taken,) = stage.input_qparams.values()
    codes = encoded(X, taken)
    lowered = unwrap(lower(stage, engine=engine))
    assert (lowered.input_qparams, lowered.output_qparams) == (stage.input_qparams, stage.output_qparams)
    given = codes
    if engine == "quantized":  # its tensors are quint8
        given = torch._make_per_tensor_quantized_tensor(codes, taken.scale, taken.zero_point)
    before = given.clone()
    with torch.no_grad():
        reference = unwrap(materialize(stage))(codes)[0]
        output = unwrap(materialize(lowered))(given)[0]
    ours = output.int_repr() if output.is_quantized else output
    # Weights are limited on hosts whose kernels add two products in 16 bits.
    assert (ours.int() - reference.int()).abs().max() <= (4 if lowered.certificate.limited else 1)
    assert torch.equal(before, given)


def test_converting_again_gives_the_same():
    graph = unwrap(fuse(unwrap(trace(Net().eval(), X))))
    calibrated = unwrap(calibrate(unwrap(prepare(graph, custom=CODES)), [X], progress=False))
    assert unwrap(convert(calibrated)) == unwrap(convert(calibrated))
    assert graph[graph.order[0]].fact.dtype == "float32"


def test_an_input_may_have_known_qparams():
    fixed = FixedQParams(UINT8, 1 / 64, 128)
    stage = converted_of(Net(), CODES, mapping=CPU.qconfig_mapping.set_output("x", fixed))
    assert (stage.input_qparams["x"].scale, stage.input_qparams["x"].zero_point) == (1 / 64, 128)


def test_annotations_are_checked_too():
    graph = unwrap(fuse(unwrap(trace(Net().eval(), X))))
    found = unwrap(annotate(graph))
    for given, kind in (
        (Annotations(found.inputs, found.outputs, found.weights, quantized_inputs=frozenset({"relu"})), UnknownName),
        (Annotations(found.inputs, found.outputs, found.weights, quantized_inputs=frozenset({"x"})), BadConfig),
        (Annotations(found.inputs, found.outputs, found.weights, quantized_outputs=frozenset({7})), BadConfig),
        (Annotations(found.inputs, found.outputs, found.weights, quantized_outputs=frozenset({1})), BadConfig),
    ):
        assert [type(problem) for problem in problems(prepare(graph, given).failure())] == [kind]
    outputs = found.outputs.set("x", MinMax())
    assert unwrap(prepare(graph, Annotations(found.inputs, outputs, quantized_inputs=frozenset({"x"}))))


def test_what_is_not_quantized_cannot_be_codes():
    graph = unwrap(fuse(unwrap(trace(Net().eval(), X))))
    wrong = prepare(graph, custom=CustomConfig(output_quantized_indexes=(1,))).failure()
    assert "output 1 stays float" in wrong.reason
    nothing = prepare(graph, QConfigMapping(), custom=CODES).failure()
    assert len(problems(nothing)) == 2


INT16 = QuantSpec("int16", -32768, 32767)


def one_problem(result):
    (problem,) = problems(result.failure())
    assert isinstance(problem, BadConfig)
    return problem


@pytest.mark.parametrize("way", [MinMax(INT16), MinMax(INT8_SYMMETRIC), Cast(), Dynamic(), None], ids=told)
@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
@pytest.mark.parametrize(("how", "index", "place"), [("value", 0, 0), ("tuple", 0, 0), ("twice", 2, 2)])
def test_an_output_of_codes_has_no_way_of_its_own(how, index, place, backend, way):
    graph = unwrap(fuse(unwrap(trace(Net(how).eval(), X)), backend=backend))
    mapping = backend.qconfig_mapping.set_edge(Edge("output", "value", place), way)
    custom = CustomConfig(output_quantized_indexes=(index,))
    problem = one_problem(prepare(graph, mapping, backend=backend, custom=custom))
    assert f"output {index} is to be the codes" in problem.reason
    if way is not None:
        found = unwrap(annotate(graph, mapping, backend=backend))
        value = values_in(graph["output"], "value")[place]
        given = replace(found, outputs=found.outputs.set(value, MinMax()), quantized_outputs=frozenset({index}))
        assert one_problem(prepare(graph, given, backend=backend)) == problem


def test_another_use_may_have_a_way_of_its_own():
    mapping = CPU.qconfig_mapping.set_edge(Edge("output", "value", 2), MinMax(INT16))
    stage = converted_of(Net("twice"), CustomConfig(output_quantized_indexes=(0,)), mapping=mapping)
    with torch.no_grad():
        codes, _, floats = unwrap(materialize(stage))(X)
    assert (codes.dtype, floats.dtype) == (torch.uint8, torch.float32)
    (given,) = stage.output_qparams.values()
    assert (decoded(codes, given) - floats).abs().max() <= given.scale


@pytest.mark.parametrize("way", [Dynamic(), Cast()], ids=told)
@pytest.mark.parametrize("through", ["edge", "edge of an edge", "group", "value"])
def test_what_shares_with_what_has_no_qparams_cannot_be_codes(through, way):
    graph = unwrap(fuse(unwrap(trace(Net("value").eval(), X))))
    (value,) = (node.get("value").id for node in graph if node.kind == "output")
    first, second = Edge("relu", "input"), Edge(value, "input")
    inputs, outputs, groups = {
        "edge": ({second: way}, {value: SharedWith(second)}, ()),
        "edge of an edge": ({first: way, second: SharedWith(first)}, {value: SharedWith(second)}, ()),
        "group": ({first: way, second: SharedWith(value)}, {value: SharedWith(second)}, ((first, second),)),
        "value": ({}, {value: SharedWith("relu"), "relu": way}, ()),
    }[through]
    given = Annotations(pmap(inputs), pmap(outputs), groups=frozenset(groups), quantized_outputs=frozenset({0}))
    assert "no qparams beforehand" in one_problem(prepare(graph, given)).reason
    given = replace(given, quantized_outputs=frozenset(), outputs=pmap({**outputs, "x": SharedWith(value)}))
    given = replace(given, quantized_inputs=frozenset({"x"}))
    assert "no qparams beforehand" in one_problem(prepare(graph, given)).reason


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.layer = nn.Embedding(8, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor, x: Tensor, factor: float = 2.0):
        return self.layer(self.table(ids) + x * factor), self.layer(x)


INPUTS = (torch.tensor([1, 2, 3]), torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), 3.0)


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize(("name", "index"), [("ids", 0), ("factor", 2)])
def test_an_input_that_is_no_tensor_of_floats_cannot_be_codes(name, index, example):
    graph = unwrap(trace(Lookup().eval(), INPUTS if example else None))
    problem = one_problem(prepare(graph, custom=CustomConfig(input_quantized_indexes=(index,))))
    assert problem.node == f"input {name!r}"
    given = Annotations(outputs=pmap({name: MinMax()}), quantized_inputs=frozenset({name}))
    assert one_problem(prepare(graph, given)).reason in problem.reason
    assert unwrap(prepare(graph, custom=CustomConfig(input_quantized_indexes=(1,)))).quantized_inputs == {"x"}


@pytest.mark.parametrize("way", [None, Dynamic(), Cast()], ids=told)
def test_an_entry_that_leaves_no_qparams_contradicts_codes(way):
    graph = unwrap(fuse(unwrap(trace(Net("value").eval(), X))))
    (value,) = (node.get("value").id for node in graph if node.kind == "output")
    for name, custom in (
        ("x", CustomConfig(input_quantized_indexes=(0,))),
        (value, CustomConfig(output_quantized_indexes=(0,))),
    ):
        mapping = CPU.qconfig_mapping.set_output(name, way)
        reason = one_problem(prepare(graph, mapping, custom=custom)).reason
        assert (f"set_output({name!r}, None)" if way is None else "no qparams beforehand") in reason


def test_the_axis_of_an_input_of_codes_must_be_one_of_its_axes():
    graph = unwrap(trace(Lookup().eval(), INPUTS))
    far = PerChannelMinMax(QuantSpec("uint8", 0, 255, "per_channel_affine", 5))
    given = Annotations(outputs=pmap({"x": far}), quantized_inputs=frozenset({"x"}))
    assert "ch_axis 5" in one_problem(prepare(graph, given)).reason


@pytest.mark.parametrize("lines", ["y = x\ny += 5.0\nreturn self.a(x)", "x.view(-1).add_(5.0)\nreturn self.a(x)"])
def test_an_input_that_is_written_to_cannot_be_codes(lines):
    graph = unwrap(trace(written(lines), torch.randn(2, 8)))
    given = Annotations(outputs=pmap({"x": MinMax()}), quantized_inputs=frozenset({"x"}))
    for result in (prepare(graph, custom=CustomConfig(input_quantized_indexes=(0,))), prepare(graph, given)):
        assert "changed in place" in one_problem(result).reason


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
def test_the_reference_gives_the_same_codes():
    from torch.ao.quantization.fx.custom_config import PrepareCustomConfig

    stage = converted_of(Net("value"), CODES, X86)
    (taken,) = stage.input_qparams.values()
    codes = encoded(X, taken)
    custom = PrepareCustomConfig().set_input_quantized_indexes([0]).set_output_quantized_indexes([0])
    prepared = oracle.prepare(Net("value").eval(), (X,), "x86", prepare_custom_config=custom)
    theirs = oracle.convert(oracle.calibrate(prepared, [(decoded(codes, taken),)]))
    given = torch._make_per_tensor_quantized_tensor(codes, taken.scale, taken.zero_point)
    with torch.no_grad():
        ours = unwrap(materialize(stage))(codes)
        output = theirs(given)
    assert output.dtype == torch.quint8
    (how,) = stage.output_qparams.values()
    assert (output.dequantize() - decoded(ours, how)).abs().max() <= 2 * how.scale


def test_the_graph_is_looked_over_once_for_all_inputs(monkeypatch):
    class Many(nn.Module):
        def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
            return torch.cat([a, b, c, d])

    calls = []

    def counted(graph):
        calls.append(graph)
        return non_tensors(graph)

    monkeypatch.setattr("qfunc.passes.borders.non_tensors", counted)
    graph = unwrap(trace(Many().eval(), (X,) * 4))
    prepared = unwrap(prepare(graph, backend=X86, custom=CustomConfig(input_quantized_indexes=(0, 1, 2, 3))))
    assert prepared.quantized_inputs == {"a", "b", "c", "d"}
    assert len(calls) == 1
