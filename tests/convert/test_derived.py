"""Qparams that functions of the user's make of those of other points: known, or when the weights are read."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from qfunc import (
    MinMax,
    PerChannelMinMax,
    QuantSpec,
    calibrate,
    convert,
    fuse,
    lower,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.config.annotation import Derived, SharedWith, Unshared
from qfunc.config.point import Edge
from qfunc.errors import BadConfig, UserFunctionFailed, problems
from qfunc.ir import digest
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8, QParams
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.params import DeriveQParams
from qfunc.testing.metrics import same_bits
from tests.convert.forms import (
    affine,
    annotations,
    converted_of,
    on_range,
    per_row,
    reference_of,
    rounded,
    run,
    symmetric,
)

INT32 = QuantSpec("int32", -(2**31), 2**31 - 1, "per_tensor_symmetric")
INT32_CHANNELS = QuantSpec("int32", -(2**31), 2**31 - 1, "per_channel_symmetric", 0)
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
INPUT, WEIGHT = Edge("_0", "input"), Edge("_0", "weight")


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


def product(of):
    scale = of[0].scale * of[1].scale
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int64), INT32_CHANNELS if scale.dim() else INT32)


def doubled(of):
    return QParams(of[0].scale * 2, of[0].zero_point // 2, of[0].spec)


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_bias_on_the_grid_of_the_sums(per_channel):
    model = model_of()
    observer = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL) if per_channel else MinMax(INT8_SYMMETRIC)
    spec = INT32_CHANNELS if per_channel else INT32
    given = annotations(
        inputs={INPUT: MinMax()}, weights={"_0": observer}, biases={"_0": Derived((INPUT, WEIGHT), product, spec)}
    )
    converted = converted_of(model, X, given)
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    ends = (weight.amin(1), weight.amax(1)) if per_channel else (weight.min(), weight.max())
    scale = affine(X.min(), X.max(), 0, 255)[0] * symmetric(*ends, -128, 127)[0]
    expected = F.linear(
        on_range(X, 0, 255),
        per_row(weight, -128, 127) if per_channel else on_range(weight, -128, 127, middle=0),
        rounded(bias, scale, 0, -(2**31), 2**31 - 1),
    )
    module = unwrap(materialize(converted))
    torch.testing.assert_close(run(module, X), expected, rtol=1e-6, atol=1e-6)
    assert same_bits(run(pickle.loads(pickle.dumps(module)), X), run(module, X))
    for engine in ("reference", "onednn", "quantized"):
        lowered = unwrap(lower(converted, engine=engine))
        near = 1e-2 if lowered.certificate.limited else 1e-4  # on hosts whose kernels add two products in 16 bits
        torch.testing.assert_close(run(unwrap(materialize(lowered)), X), expected, rtol=1e-4, atol=near)
    assert unwrap(lower(converted)).certificate.in_int8 == 1


def test_values_derive_from_values():
    """Known in `convert`: the first engine to take codes of 8 bits takes these."""
    model = nn.Sequential(nn.ReLU(), nn.Tanh())
    given = annotations(outputs={"_0": MinMax(), "_1": Derived(("_0",), doubled, UINT8)})
    converted = converted_of(model, X, given)
    scale, zero_point = affine(*torch.relu(X).aminmax(), 0, 255)
    relu = rounded(torch.relu(X), scale, zero_point, 0, 255)
    expected = rounded(torch.tanh(relu), scale * 2, zero_point // 2, 0, 255)
    torch.testing.assert_close(run(unwrap(materialize(converted)), X), expected, rtol=0, atol=1e-6)
    assert not any(isinstance(value, DeriveQParams) for node in converted.graph for _, value in node.args)


def test_values_derive_from_weights_when_these_are_read():
    """And others from those, in any order."""
    model = model_of()

    def of_weight(of):
        return QParams(of[0].scale * 3, of[0].zero_point, of[0].spec)

    def of_both(of):
        return QParams(of[0].scale + of[1].scale, of[0].zero_point, INT8_SYMMETRIC)

    given = annotations(
        inputs={INPUT: Derived(("_0", WEIGHT), of_both, INT8_SYMMETRIC)},
        outputs={"_0": Derived((WEIGHT,), of_weight, INT8_SYMMETRIC)},
        weights={"_0": MinMax(INT8_SYMMETRIC)},
    )
    converted = converted_of(model, X, given, [])
    weight = model[0].weight.detach()
    scale, _ = symmetric(*weight.aminmax(), -128, 127)
    x = rounded(X, scale * 3 + scale, 0, -128, 127)
    sums = F.linear(x, on_range(weight, -128, 127, middle=0), model[0].bias.detach())
    expected = rounded(sums, scale * 3, 0, -128, 127)
    module = unwrap(materialize(converted))
    torch.testing.assert_close(run(module, X), expected, rtol=1e-6, atol=1e-6)
    assert same_bits(run(copy.deepcopy(module), X), run(module, X))
    lowered = unwrap(lower(converted))
    assert same_bits(run(unwrap(materialize(lowered)), X), run(module, X))
    (entry,) = lowered.certificate.entries
    assert entry.kernel == "int8_weight.linear"  # codes whose qparams are known with the weights are read as floats
    again = converted_of(model, X, given, [])
    assert digest(again.graph) == digest(converted.graph)


def test_weights_derive_from_activations():
    model = model_of()

    def narrow(of):
        return QParams(of[0].scale / 4, torch.tensor(0), INT8_SYMMETRIC)

    given = annotations(inputs={INPUT: MinMax()}, weights={"_0": Derived((INPUT,), narrow, INT8_SYMMETRIC)})
    found = reference_of(model, X, given)
    weight = rounded(model[0].weight.detach(), affine(*X.aminmax(), 0, 255)[0] / 4, 0, -128, 127)
    expected = F.linear(on_range(X, 0, 255), weight, model[0].bias.detach())
    torch.testing.assert_close(run(found, X), expected, rtol=1e-6, atol=1e-6)


def test_points_that_share_with_a_derived_one():
    model = nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid())
    outputs = {"_0": MinMax(), "_1": Derived(("_0",), doubled, UINT8), "_2": SharedWith("_1")}
    prepared = unwrap(prepare(unwrap(trace(model.eval(), X)), annotations(outputs=outputs)))
    assert prepared.outputs["_1"] == prepared.outputs["_2"]
    inputs = {Edge("_1", "input"): Unshared(MinMax(QuantSpec(quant_max=15)))}
    outputs = {"_0": MinMax(), "_1": Derived((Edge("_1", "input"),), lambda of: doubled(of), QuantSpec(quant_max=15))}
    found = reference_of(model, X, annotations(inputs=inputs, outputs=outputs))
    relu = on_range(torch.relu(X), 0, 255)  # the second grid is of the float value, as the first is
    scale, zero_point = affine(*torch.relu(X).aminmax(), 0, 15)
    tanh = torch.tanh(rounded(torch.relu(X), scale, zero_point, 0, 15))
    expected = torch.sigmoid(rounded(tanh, scale * 2, zero_point // 2, 0, 15))
    assert not torch.equal(relu, rounded(torch.relu(X), scale, zero_point, 0, 15))
    torch.testing.assert_close(run(found, X), expected, rtol=1e-6, atol=1e-6)


def raising(of):
    raise ValueError("no such thing")


def spoiling(of):
    of[0].scale.mul_(0)
    return QParams(torch.tensor(1.0), torch.tensor(0), UINT8)


WRONG = {
    "raises": (raising, "raised ValueError: no such thing"),
    "number": (lambda of: 3, "gave a int, not QParams"),
    "spec": (lambda of: QParams(of[0].scale, of[0].zero_point, INT32), "gave qparams for"),
    "zero": (lambda of: QParams(of[0].scale * 0, of[0].zero_point, UINT8), "no positive, normal number"),
    "range": (lambda of: QParams(of[0].scale, of[0].zero_point + 999, UINT8), "not in 0..255"),
    "scales": (lambda of: QParams(torch.ones(2), torch.zeros(2).long(), UINT8), "2 scales"),
}


@pytest.mark.parametrize("case", WRONG)
def test_functions_that_fail_are_told(case):
    function, reason = WRONG[case]
    graph = unwrap(trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), X))
    known = annotations(outputs={"_0": MinMax(), "_1": Derived(("_0",), function, UINT8)})
    (problem,) = problems(convert(unwrap(calibrate(unwrap(prepare(graph, known)), [X]))).failure())
    assert (type(problem), problem.node) == (UserFunctionFailed, "1")
    assert reason in problem.reason
    late = annotations(
        outputs={"_1": Derived((WEIGHT,), function, UINT8)}, weights={"_0": MinMax(QuantSpec("uint8", 0, 255))}
    )
    converted = unwrap(convert(unwrap(calibrate(unwrap(prepare(graph, late)), []))))
    (problem,) = problems(materialize(converted).failure())
    assert (type(problem), problem.node) == (UserFunctionFailed, "1")
    assert reason in problem.reason


def test_functions_get_copies():
    given = annotations(outputs={"_0": MinMax(), "_1": Derived(("_0",), spoiling, UINT8)})
    found = reference_of(nn.Sequential(nn.ReLU(), nn.ReLU()), X, given)
    torch.testing.assert_close(run(found, X), torch.round(on_range(torch.relu(X), 0, 255)))


def test_scales_for_another_number_of_channels_are_told():
    def two(of):
        return QParams(torch.ones(2), torch.zeros(2).long(), INT32_CHANNELS)

    given = annotations(inputs={INPUT: MinMax()}, biases={"_0": Derived((INPUT,), two, INT32_CHANNELS)})
    (problem,) = problems(materialize(converted_of(model_of(), X, given)).failure())
    assert (type(problem), problem.node) == (UserFunctionFailed, "0.bias")
    assert "2 scales for the 3 channels" in problem.reason


def test_what_derives_from_itself_is_told():
    graph = unwrap(trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh()).eval(), X))
    given = annotations(
        outputs={
            "_0": Derived((WEIGHT,), doubled, INT8_SYMMETRIC),
            "_1": Derived(("_0",), doubled, UINT8),
            "_2": Derived(("_1",), doubled, UINT8),
        },
        weights={"_0": Derived(("_1",), doubled, INT8_SYMMETRIC)},
    )
    found = problems(prepare(graph, given).failure())
    assert {(type(problem), problem.node) for problem in found} == {(BadConfig, "0"), (BadConfig, "1")}
    assert all("from itself" in problem.reason for problem in found)


@pytest.mark.parametrize("other", [Dynamic(), Cast()], ids=str)
def test_what_derives_from_a_point_without_qparams_is_told(other):
    graph = unwrap(trace(nn.Sequential(nn.ReLU(), nn.Tanh()).eval(), X))
    given = annotations(outputs={"_0": other, "_1": Derived(("_0",), doubled, UINT8)})
    (problem,) = problems(prepare(graph, given).failure())
    assert (type(problem), problem.node) == (BadConfig, "1")
    assert "has none" in problem.reason


@pytest.mark.parametrize(
    "other", [Dynamic(), Cast(), Derived(("_0",), doubled, UINT8)], ids=["dynamic", "cast", "derived"]
)
def test_points_that_are_quantized_in_other_ways_cannot_share(other):
    graph = unwrap(trace(nn.Sequential(nn.ReLU(), nn.Tanh(), nn.Sigmoid()).eval(), X))
    given = annotations(outputs={"_0": MinMax(), "_1": MinMax(), "_2": other})
    given = replace(given, groups=frozenset({("_1", "_2")}))
    (problem,) = problems(prepare(graph, given).failure())
    assert isinstance(problem, BadConfig)
    assert "other ways" in problem.reason
    alike = replace(given, outputs=given.outputs.set("_1", other))
    prepared = unwrap(prepare(graph, alike))
    assert prepared.outputs["_1"] == prepared.outputs["_2"]


def test_fused_biases_derive_as_well():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).eval()
    model[1].running_mean.normal_()
    x = torch.randn(2, 2, 4, 4)
    graph = unwrap(fuse(unwrap(trace(model, x))))
    (node,) = (node.id for node in graph if node.kind == "conv2d")
    edge, weight = Edge(node, "input"), Edge(node, "weight")
    given = annotations(
        inputs={edge: MinMax()},
        weights={node: PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)},
        biases={node: Derived((edge, weight), product, INT32_CHANNELS)},
    )
    found = reference_of(model, x, given)
    torch.testing.assert_close(run(found, x), run(model, x), rtol=0, atol=0.1)
    assert not torch.equal(run(found, x), run(model, x))


@dataclass(frozen=True)
class Stuck:
    """An observer of the user's, which always gives the same."""

    spec: QuantSpec
    scale: float
    zero_point: float
    statistic = MinMax().statistic

    def init(self):
        return MinMax().init()

    def update(self, state, tensor):
        return state

    def finish(self, state):
        return QParams(torch.tensor([self.scale]), torch.tensor([self.zero_point]), self.spec)


@pytest.mark.parametrize(("scale", "zero_point", "reason"), [(0.0, 3.0, "normal number"), (1.0, 0.5, "no integer")])
def test_observers_of_the_users_that_give_nonsense_are_told(scale, zero_point, reason):
    graph = unwrap(trace(model_of().eval(), X))
    at_input = annotations(inputs={INPUT: Stuck(UINT8, scale, zero_point)})
    (problem,) = problems(convert(unwrap(calibrate(unwrap(prepare(graph, at_input)), [X]))).failure())
    assert isinstance(problem, UserFunctionFailed)
    assert reason in problem.reason
    at_weight = annotations(weights={"_0": Stuck(UINT8, scale, zero_point)})
    (problem,) = problems(materialize(converted_of(model_of(), X, at_weight, [])).failure())
    assert (type(problem), problem.node) == (UserFunctionFailed, "0.weight")
    assert reason in problem.reason


def test_whole_zero_points_may_be_floats():
    whole = Stuck(UINT8, 0.25, 7.0)
    found = reference_of(model_of(), X, annotations(inputs={INPUT: whole}, weights={"_0": whole}))
    weight, bias = model_of()[0].weight.detach(), model_of()[0].bias.detach()
    expected = F.linear(rounded(X, 0.25, 7, 0, 255), rounded(weight, 0.25, 7, 0, 255), bias)
    torch.testing.assert_close(run(found, X), expected, rtol=1e-6, atol=1e-6)
