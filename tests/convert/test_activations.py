"""The reference form of activations: every integer type, scales per channel, qparams of each tensor's own, casts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qfunc import (
    CPU,
    FixedQParams,
    MinMax,
    PerChannelMinMax,
    QuantSpec,
    calibrate,
    fuse,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.config.annotation import Annotations
from qfunc.config.point import Edge
from qfunc.errors import BadConfig, NoBatches, problems
from qfunc.ir import digest
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.passes.convert import convert
from qfunc.testing.metrics import same_bits
from tests.convert.forms import (
    affine,
    annotations,
    converted_of,
    lowered_of,
    on_range,
    per_row,
    reference_of,
    rounded,
    run,
    symmetric,
)


def seeded(seed: int, *shape: int, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


def layer(inputs: int = 4, outputs: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs))


X = seeded(1, 6, 4)
INPUT, WEIGHT = Edge("_0", "input"), "_0"

RANGES = (
    ("int16", -(2**15), 2**15 - 1),
    ("uint16", 0, 2**16 - 1),
    ("int32", -(2**31), 2**31 - 1),
    ("uint8", 0, 255),
    ("int8", -128, 127),
    ("uint8", 0, 15),
    ("uint8", 0, 1),
    ("int8", -7, 100),
    ("int8", 0, 127),
    ("uint4", 0, 15),
    ("int4", -8, 7),
    ("int16", -2000, 5),
)


def middle_of(dtype: str, low: int, high: int) -> int:
    if dtype.startswith("int"):
        return 0
    whole = {"uint8": 255, "uint16": 2**16 - 1, "uint4": 15}[dtype]
    return (high + 1) // 2 if (low, high) == (0, whole) else (low + high) // 2


@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99), spread=st.sampled_from([1e-3, 1.0, 300.0]))
def test_static_activations_of_any_integer_type(dtype, low, high, scheme, seed, spread):
    model, x = layer(), seeded(seed, 6, 4, spread=spread)
    spec = QuantSpec(dtype, low, high, f"per_tensor_{scheme}")
    found = reference_of(model, x, annotations(inputs={INPUT: MinMax(spec)}, outputs={"_0": MinMax(spec)}))
    middle = middle_of(dtype, low, high) if scheme == "symmetric" else None

    def by_hand(value, seen):
        args = (seen.min(), seen.max(), low, high)
        qparams = affine(*args) if middle is None else symmetric(*args, middle)
        return rounded(value, *qparams, low, high)

    beyond = torch.cat([x, 3 * x])
    exact = by_hand(F.linear(by_hand(beyond, x), model[0].weight, model[0].bias), model(x))
    # A sum may fall between two codes either way: most are equal, and none is off by more than a step.
    torch.testing.assert_close(run(found, beyond), exact.detach(), rtol=1e-6, atol=_step(spec, model(x)))


def _step(spec, seen) -> float:
    width = max((seen.max().clamp(min=0) - seen.min().clamp(max=0)).item(), 2 * seen.abs().max().item())
    return 1e-6 + 1.001 * width / (spec.quant_max - spec.quant_min)


@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
def test_codes_of_inputs_are_exact(dtype, low, high):
    """Of an input alone, in the middle of nothing else, to the last bit that float32 holds."""
    spec = QuantSpec(dtype, low, high)
    found = reference_of(layer(), X, annotations(inputs={INPUT: MinMax(spec)}))
    scale, zero_point = affine(X.min(), X.max(), low, high)
    expected = F.linear(rounded(X, scale, zero_point, low, high), layer()[0].weight, layer()[0].bias)
    torch.testing.assert_close(run(found, X), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize(("dtype", "low", "high"), [("uint8", 0, 255), ("int16", -9, 500), ("int8", -128, 127)])
def test_activations_with_a_scale_per_channel(dtype, low, high, scheme, axis):
    x = seeded(3, 2, 5, 4) * torch.tensor([1.0, 10.0, 0.1, 5.0])
    spec = QuantSpec(dtype, low, high, f"per_channel_{scheme}", axis)
    model = layer()
    others = [d for d in range(3) if d != axis]
    ends = (x.amin(others, keepdim=True), x.amax(others, keepdim=True), low, high)
    qparams = affine(*ends) if scheme == "affine" else symmetric(*ends, middle_of(dtype, low, high))
    expected = F.linear(rounded(x, *qparams, low, high), model[0].weight, model[0].bias)
    at_edge = reference_of(model, x, annotations(inputs={INPUT: PerChannelMinMax(spec)}))
    at_value = reference_of(model, x, annotations(outputs={"input_1": PerChannelMinMax(spec)}))
    torch.testing.assert_close(run(at_edge, x), expected.detach(), rtol=1e-6, atol=1e-6)
    assert same_bits(run(at_edge, x), run(at_value, x))


DYNAMIC = (
    (UINT8, None),
    (INT8_SYMMETRIC, 0),
    (QuantSpec("uint8", 0, 127), None),
    (QuantSpec("uint8", 0, 255, "per_tensor_symmetric"), 128),
    (QuantSpec("int16", -(2**15), 2**15 - 1), None),
    (QuantSpec("uint4", 0, 15), None),
)


@pytest.mark.parametrize(("spec", "middle"), DYNAMIC)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 999), rows=st.integers(0, 5), spread=st.sampled_from([0.0, 1e-3, 1.0, 300.0]))
def test_qparams_of_each_tensor_of_its_own(spec, middle, seed, rows, spread):
    model, x = layer(), seeded(seed, rows, 4, spread=spread) + seed % 3
    found = reference_of(
        model, X, annotations(inputs={INPUT: Dynamic(spec)}, weights={WEIGHT: MinMax(INT8_SYMMETRIC)}), []
    )
    weight = on_range(model[0].weight, -128, 127, middle=0)
    expected = F.linear(on_range(x, spec.quant_min, spec.quant_max, middle=middle), weight, model[0].bias)
    torch.testing.assert_close(run(found, x), expected.detach(), rtol=1e-6, atol=1e-6 + 1e-6 * spread)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), spread=st.sampled_from([1e-3, 1.0, 300.0]), shift=st.sampled_from([-5.0, 0.0, 2.0]))
def test_dynamic_qparams_are_within_a_step_of_torch(seed, spread, shift):
    x = seeded(seed, 7, 4, spread=spread) + shift
    theirs = torch.quantize_per_tensor_dynamic(x, torch.quint8, False)
    model = nn.Sequential(nn.Identity())
    found = reference_of(model, x, annotations(outputs={"input_1": Dynamic(UINT8)}), [])
    assert (run(found, x) - theirs.dequantize()).abs().max() <= 1.001 * theirs.q_scale()


def test_dynamic_per_channel_and_results():
    model = layer()
    spec = QuantSpec("int8", -128, 127, "per_channel_symmetric", 1)
    found = reference_of(model, X, annotations(inputs={INPUT: Dynamic(spec)}, outputs={"_0": Dynamic(UINT8)}), [])
    expected = on_range(F.linear(per_row(X, -128, 127, axis=1), model[0].weight, model[0].bias), 0, 255)
    torch.testing.assert_close(run(found, X), expected.detach(), rtol=1e-6, atol=1e-6)
    with pytest.raises(IndexError, match="ch_axis 1"):
        run(found, X[0])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("static", [True, False])
def test_casts(dtype, static):
    small = getattr(torch, dtype)
    model, how = layer(), Cast(dtype, dynamic=not static)
    given = annotations(
        inputs={INPUT: how},
        outputs={"_0": how} if static else {},
        weights={WEIGHT: Cast(dtype)},
        biases={WEIGHT: Cast(dtype)} if static else {},
    )
    found = reference_of(model, X, given, [])

    def cast(x):
        return x.to(small).float()

    bias = cast(model[0].bias) if static else model[0].bias
    expected = F.linear(cast(X), cast(model[0].weight), bias)
    torch.testing.assert_close(run(found, X), (cast(expected) if static else expected).detach(), rtol=0, atol=0)


def test_float16_overflows_to_infinity_as_torch_has_it():
    found = reference_of(nn.Sequential(nn.ReLU()), X, annotations(outputs={"_0": Cast("float16")}), [])
    assert run(found, torch.tensor([[7e4, 1.0]])).tolist() == [[float("inf"), 1.0]]


class Product(nn.Module):
    """A convolution whose weight the graph computes."""

    def forward(self, x, w):
        return F.conv2d(x, w * 2)


def test_weights_that_the_graph_computes():
    x, w = seeded(4, 2, 3, 5, 5), seeded(5, 4, 3, 2, 2) * torch.tensor([1.0, 5.0, 0.1, 9.0]).view(-1, 1, 1, 1)
    edge = Edge("conv2d", "weight")
    given = annotations(inputs={Edge("conv2d", "input"): MinMax(), edge: PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)})
    converted = converted_of(Product(), (x, w), given)
    expected = F.conv2d(on_range(x, 0, 255), per_row(w * 2, -128, 127))
    torch.testing.assert_close(run(unwrap(materialize(converted)), x, w), expected, rtol=1e-5, atol=1e-5)
    lowered = lowered_of(converted, "onednn")
    (entry,) = (entry for entry in lowered.certificate.entries if entry.node == "conv2d")
    assert entry.kernel == ""
    by_default = converted_of(Product(), (x, w), CPU.qconfig_mapping)
    run(unwrap(materialize(by_default)), x, w)


# What holds for all of them ---------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))) + x)


CHANNELS = QuantSpec("int8", -128, 127, "per_channel_symmetric", 1)
MIXED = annotations(
    inputs={
        Edge("relu", "input"): PerChannelMinMax(CHANNELS),
        Edge("relu_1", "input"): Dynamic(),
        Edge("third", "input"): Cast("float16", dynamic=True),
    },
    outputs={"relu": MinMax(QuantSpec("int16", -999, 999))},
    weights={
        "relu": PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL),
        "relu_1": MinMax(INT8_SYMMETRIC),
        "third": Cast("float16"),
    },
)


@pytest.fixture(scope="module")
def mixed():
    return converted_of(Net(), X, MIXED, backend=CPU)


def test_converting_again_gives_the_same():
    graph = unwrap(fuse(unwrap(trace(Net().eval(), X))))
    calibrated = unwrap(calibrate(unwrap(prepare(graph, MIXED)), [X], progress=False))
    first, second = unwrap(convert(calibrated)), unwrap(convert(calibrated))
    assert first == second
    assert digest(first.graph) == digest(second.graph)


@pytest.mark.parametrize("engine", ["reference", "onednn", "quantized"])
def test_engines_compute_the_reference_form(mixed, engine):
    expected = run(unwrap(materialize(mixed)), X)
    lowered = lowered_of(mixed, engine)
    torch.testing.assert_close(run(unwrap(materialize(lowered)), X), expected, rtol=1e-6, atol=1e-6)
    entries = {entry.node: entry for entry in lowered.certificate.entries if entry.node in MIXED.weights}
    assert entries.keys() == {"relu", "relu_1", "third"}
    assert all(entry.kernel or entry.reason for entry in entries.values())
    assert not entries["relu"].kernel


def test_the_module_copies_pickles_saves_and_keeps_its_scales_in_half(mixed):
    module = unwrap(materialize(mixed))
    expected = run(module, X)
    fresh = unwrap(materialize(mixed))
    fresh.load_state_dict(module.state_dict())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh):
        assert same_bits(run(other, X), expected)
    half = copy.deepcopy(module).half()
    for name, buffer in module.named_buffers():
        if name.endswith(("scale", "zero_point")):
            assert same_bits(half.get_buffer(name), buffer)
    assert any(name.endswith("scale") for name, _ in module.named_buffers())


def test_the_module_compiles(mixed):
    module = unwrap(materialize(mixed))
    compiled = torch.compile(module, backend="eager")
    for rows in (6, 3, 0):
        assert same_bits(run(compiled, X[:rows]), run(module, X[:rows]))


def test_nothing_to_measure_needs_no_batches():
    graph = unwrap(fuse(unwrap(trace(layer().eval(), X))))
    prepared = unwrap(prepare(graph, annotations(inputs={INPUT: Dynamic()})))
    assert unwrap(calibrate(prepared, [])).statistics.batches == 0
    assert unwrap(convert(unwrap(calibrate(prepared, [])))) == unwrap(convert(unwrap(calibrate(prepared, [X]))))
    measured = unwrap(prepare(graph, annotations(inputs={INPUT: MinMax()})))
    assert isinstance(calibrate(measured, []).failure(), NoBatches)


def test_an_axis_that_values_do_not_have_is_told():
    graph = unwrap(fuse(unwrap(trace(layer().eval(), X))))
    third = annotations(inputs={INPUT: PerChannelMinMax(QuantSpec("uint8", 0, 255, "per_channel_affine", 2))})
    assert "ch_axis 2 is no axis" in prepare(graph, third).failure().reason
    prepared = unwrap(prepare(unwrap(fuse(unwrap(trace(layer().eval())))), third))
    (problem,) = problems(calibrate(prepared, [X], progress=False).failure())
    assert isinstance(problem, BadConfig)
    assert "ch_axis 2 is no axis" in problem.reason
    batch = QuantSpec("uint8", 0, 255, "per_channel_affine", 0)
    prepared = unwrap(prepare(graph, annotations(inputs={INPUT: PerChannelMinMax(batch)})))
    problem, _ = problems(calibrate(prepared, [X, X[:2]], progress=False).failure())
    assert isinstance(problem, BadConfig)
    assert "6 channels in one batch, 2 in another" in problem.reason


def test_fixed_qparams_of_other_types():
    fixed = FixedQParams(QuantSpec("int16", -(2**15), 2**15 - 1), 1 / 4096, 7)
    found = reference_of(nn.Sequential(nn.Tanh()), X, Annotations(outputs=annotations(outputs={"_0": fixed}).outputs))
    torch.testing.assert_close(run(found, X), rounded(torch.tanh(X), 1 / 4096, 7, -(2**15), 2**15 - 1), rtol=0, atol=0)
