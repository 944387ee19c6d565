"""Linear layers over floats that are quantized or cast as the model runs, or over weights of fewer bits."""

import copy
import math
import pickle
import struct

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from qfunc.edge.kernels.dynamic import OnednnLinearDynamic, own_codes, qparams_of_bounds
from qfunc.edge.kernels.grid import QuantizeDynamically
from qfunc.edge.kernels.post_op import KernelPostOp
from qfunc.edge.kernels.weight_only import CastWeight, Int8WeightLinear, OnednnLinearFloat16, WeightOnly
from qfunc.engines.dynamic import FloatCall
from qfunc.ir import Ref
from qfunc.numerics.grid import Affine
from qfunc.numerics.qparams import (
    INT8,
    INT8_SYMMETRIC,
    UINT8,
    UINT8_REDUCED,
    QParams,
    QuantSpec,
    qparams_of_range,
)
from qfunc.testing.metrics import same_bits

SPECS = (UINT8, UINT8_REDUCED, INT8, INT8_SYMMETRIC, QuantSpec("uint8", 0, 255, "per_tensor_symmetric"))
SPECS += (QuantSpec("uint8", 0, 15), INT8.reduced, QuantSpec("int8", -127, 127, "per_tensor_symmetric", eps=2.0**-12))
PLAIN = FloatCall("linear", (("input", Ref("0")),), (), ("",), None)
each_spec = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.dtype} {s.quant_min}..{s.quant_max} {s.qscheme}")

float32 = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-45, 3.4028235e38, -3.4028235e38, 1e-38])


@given(float32, float32, st.sampled_from(SPECS))
def test_qparams_of_one_range_are_those_of_tensors_bit_for_bit(a, b, spec):
    low, high = (math.nan, math.nan) if math.isnan(a) or math.isnan(b) else (min(a, b), max(a, b))
    expected = qparams_of_range(torch.tensor(low), torch.tensor(high), spec)
    scale, zero_point = qparams_of_bounds(low, high, spec)
    assert struct.pack("f", scale) == struct.pack("f", expected.scale.item())
    assert zero_point == expected.zero_point.item()
    assert scale == expected.scale.item()


def layer(spec, shape=(5, 8), *, bias=True, output=None, post=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-63, 64, shape, dtype=torch.int8, generator=generator)
    scale = torch.rand(shape[0], generator=generator) * 0.01 + 0.001
    offset = torch.randn(shape[0], generator=generator) if bias else None
    options = (output,) if post is None else (output, post)
    return OnednnLinearDynamic(weight, scale, offset, spec, *options)


def reference(kernel, x):
    bias = None if kernel.bias is None else kernel.bias.double()
    return F.linear(
        QuantizeDynamically(kernel.spec)(x).double(), kernel.weight * kernel.weight_scale.double()[:, None], bias
    )


def near(got, expected):
    assert got.shape == expected.shape
    if got.numel():
        assert (got.double() - expected).abs().max() <= 1e-5 * max(1e-6, expected.abs().max().item())


SHAPES = ((8,), (3, 8), (0, 8), (2, 0, 8), (2, 3, 8), (2, 3, 4, 8), (1, 8))


@each_spec
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_dynamic_linear_layer_is_the_reference_form(spec, shape):
    for seed, draw in enumerate((torch.randn, torch.rand, torch.zeros)):
        kernel = layer(spec, bias=seed != 1, seed=seed)
        x = draw(shape)
        near(kernel(x), reference(kernel, x))
        near(kernel(x.half()), reference(kernel, x.half()))


@each_spec
def test_codes_saturate_at_the_ends_of_their_spec(spec):
    x = torch.tensor([-math.inf, -1.0, 0.0, 2.0, math.inf])
    codes = own_codes(x, spec)
    assert codes.values.min() >= spec.quant_min
    assert codes.values.max() <= spec.quant_max
    found = (codes.values.float() - codes.zero_point) * codes.scale
    assert same_bits(found, QuantizeDynamically(spec)(x))


def test_nan_stays_where_it_is_as_in_the_reference_form():
    kernel = layer(UINT8)
    x = torch.randn(4, 8)
    x[1, 3] = math.nan
    got, expected = kernel(x), reference(kernel, x)
    assert got.isnan().tolist() == expected.isnan().tolist()
    assert got.isnan().any(1).tolist() == [False, True, False, False]
    near(got[[0, 2, 3]], expected[[0, 2, 3]])


def test_awkward_memory_is_taken():
    kernel = layer(UINT8)
    wide = torch.randn(8, 6, 2)
    for x in (wide[..., 0].t(), wide[..., 1].t().expand(2, 6, 8), torch.randn(1, 8).expand(7, 8)):
        near(kernel(x), reference(kernel, x))


def test_post_ops_and_codes_as_a_result():
    output = Affine(0.01, 7)
    kernel = layer(UINT8, output=output, post=KernelPostOp("relu"))
    x = torch.randn(6, 8)
    expected = (reference(kernel, x).relu() / output.scale + output.zero_point).clamp(0, 255)
    got = kernel(x)
    assert got.dtype is torch.uint8
    assert (got.double() - expected).abs().max() <= 0.51
    assert kernel(x[:0]).dtype is torch.uint8


def test_a_wrong_number_of_features_is_told():
    float16 = OnednnLinearFloat16(torch.ones(3, 8).half(), None, PLAIN)
    int8 = Int8WeightLinear(torch.ones(3, 8, dtype=torch.int8), torch.ones(3), None, PLAIN)
    for kernel in (layer(UINT8), float16, int8):
        with pytest.raises(RuntimeError, match="8 features is given 7"):
            kernel(torch.randn(2, 7))


def test_kernels_copy_pickle_and_stay_as_they_are_in_half():
    x = torch.randn(3, 8)
    float16 = OnednnLinearFloat16(torch.randn(5, 8).half(), torch.randn(5), PLAIN)
    for kernel in (layer(UINT8), float16):
        expected = kernel(x)
        for other in (copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel)), copy.deepcopy(kernel).double()):
            assert same_bits(other(x), expected)
        compiled = torch.compile(kernel, backend="eager")
        assert same_bits(compiled(x), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float16_and_int8_weights_are_multiplied_as_they_are(shape):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(5, 8), torch.randn(5)
    wide = PLAIN.__class__("linear", PLAIN.args, (), ("float16",), None)
    near(
        OnednnLinearFloat16(weight.half(), bias, wide)(x),
        F.linear(x.half().double(), weight.half().double(), bias.double()),
    )
    scale = weight.abs().amax(1) / 127
    codes = (weight / scale[:, None]).round().to(torch.int8)
    real = codes * scale.double()[:, None]
    near(Int8WeightLinear(codes, scale, bias, PLAIN)(x), F.linear(x.double(), real, bias.double()))
    near(Int8WeightLinear(codes, scale, None, PLAIN)(x), F.linear(x.double(), real))
    qparams = QParams(
        scale, torch.zeros(5, dtype=torch.int64), QuantSpec("int8", -128, 127, "per_channel_symmetric", 0)
    )
    assert same_bits(WeightOnly(codes, qparams, PLAIN, {"bias": bias})(x), F.linear(x, codes * scale[:, None], bias))
    assert same_bits(CastWeight(weight.half(), PLAIN, {"bias": bias})(x), F.linear(x, weight.half().float(), bias))


def test_weights_that_overflow_float16_are_infinite_as_in_the_reference_form():
    weight = torch.tensor([[1e6, 1.0], [1.0, 2.0]]).half()
    assert OnednnLinearFloat16(weight, None, PLAIN)(torch.ones(1, 2)).tolist() == [[math.inf, 3.0]]
