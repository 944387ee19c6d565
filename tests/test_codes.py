"""Models that take and give codes: inputs and outputs that stay integers at the borders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qfunc import (
    CPU,
    X86,
    Annotations,
    CustomConfig,
    FixedQParams,
    MinMax,
    QConfigMapping,
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
from qfunc.errors import BadConfig, UnknownName, problems
from qfunc.numerics.qparams import UINT8
from qfunc.testing import oracle

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
    assert (ours.int() - reference.int()).abs().max() <= 1
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
