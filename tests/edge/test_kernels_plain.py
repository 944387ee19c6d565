"""Quantize, tables, pools, averages, sums and products on plain codes."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from hypothesis import given, settings
from hypothesis import strategies as st

from qfunc.edge.kernels.affine import Clamp, Dequantize, Quantize, all_codes, clamp_codes, requantize, tabulate
from qfunc.edge.kernels.arithmetic import Add, Cat, Mul
from qfunc.edge.kernels.contract import disagreement, real_values
from qfunc.edge.kernels.pool import AdaptiveAvgPool, AvgPool, MaxPool, Mean
from qfunc.numerics.affine import dequantize, quantize
from qfunc.numerics.grid import Affine

GIVEN, OUT = Affine(0.05, 77), Affine(0.031, 140)
UNARY = {
    "sigmoid": torch.sigmoid, "tanh": torch.tanh, "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish,
    "relu": torch.relu, "relu6": F.relu6, "silu": F.silu, "gelu": F.gelu, "add": lambda x: x + 1.5,
    "mul": lambda x: x * -2,
}  # fmt: skip


def codes(*shape, seed=0, dtype=torch.uint8):
    low = 0 if dtype == torch.uint8 else -128
    return torch.randint(low, low + 256, shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@st.composite
def affines(draw, dtype=None):
    dtype = dtype or draw(st.sampled_from(["uint8", "int8"]))
    low, high = (0, 255) if dtype == "uint8" else (-128, 127)
    return Affine(draw(st.floats(1e-6, 1e3)), draw(st.integers(low, high)), dtype)


@settings(max_examples=100, deadline=None)
@given(affines(), st.integers(0, 2**31))
def test_quantize_and_dequantize_are_the_numerics_bit_for_bit(qparams, seed):
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(2001, generator=generator) * 100
    x = torch.cat([steps, steps.round() + 0.5, torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf])]) * qparams.scale
    scale, zero_point = torch.tensor(qparams.scale), torch.tensor(qparams.zero_point)
    expected = quantize(x, scale, zero_point, *qparams.bounds, getattr(torch, qparams.dtype))
    assert torch.equal(Quantize(qparams)(x), expected)
    assert torch.equal(Dequantize(qparams)(expected), dequantize(expected, scale, zero_point))


def test_quantize_is_torch_quantize_per_tensor_away_from_ties():
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(0)) * 4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.quantize_per_tensor(x, OUT.scale, OUT.zero_point, torch.quint8)
    assert torch.equal(Quantize(OUT)(x), expected.int_repr())
    assert torch.equal(Dequantize(OUT)(expected.int_repr()), expected.dequantize())


def test_quantize_leaves_its_input_and_takes_half_floats_and_limits():
    x = torch.randn(2, 3, 4, 5)
    before = x.clone()
    module = Quantize(OUT)
    assert torch.equal(module(x.half()), module(x.half().float()))
    module(x)
    assert torch.equal(x, before)
    assert Quantize(Affine(0.1, 10, quant_min=5, quant_max=60))(torch.tensor([-99.0, 99.0])).tolist() == [5, 60]
    assert module(torch.tensor([float("inf"), float("-inf")])).tolist() == [255, 0]


def layouts(*shape):
    x = codes(*shape)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    yield x
    if last:
        yield x.contiguous(memory_format=last)
    yield codes(*shape, 2)[..., 1]
    yield x[:0]
    yield x[1:]
    if x.dim() > 1:
        yield x.transpose(0, 1)


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.parametrize("shape", [(300,), (3, 5), (2, 4, 6), (2, 64, 16, 16), (2, 3, 4, 5, 6)])
def test_tables_are_the_reference_on_every_layout(name, shape):
    table = tabulate(UNARY[name], GIVEN, OUT)
    for x in layouts(*shape):
        y = table(x)
        assert torch.equal(y, Quantize(OUT)(UNARY[name](Dequantize(GIVEN)(x))))
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("given_dtype", "output_dtype"), [("uint8", "int8"), ("int8", "uint8"), ("int8", "int8")])
def test_tables_of_signed_codes(given_dtype, output_dtype):
    a, b = Affine(0.05, 7, given_dtype), Affine(0.07, 9, output_dtype)
    x = all_codes(a).repeat(100)
    assert torch.equal(requantize(a, b)(x), Quantize(b)(Dequantize(a)(x)))
    assert torch.equal(tabulate(torch.sigmoid, a, None)(x), torch.sigmoid(Dequantize(a)(x)))


def test_clamps_in_the_integer_domain():
    x = all_codes(GIVEN)
    relu6 = clamp_codes(0.0, 6.0, GIVEN)(x)
    assert disagreement(relu6, real_values(x, GIVEN).clamp(0, 6), GIVEN) == ""
    assert torch.equal(Clamp(GIVEN.zero_point, None)(x), x.clamp(min=GIVEN.zero_point))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "ceil_mode"),
    [(2, 2, 0, 1, False), (3, 2, 1, 1, True), (3, 1, 1, 2, False), (5, 3, 2, 1, True)],
)
def test_max_pool(dims, dtype, kernel, stride, padding, dilation, ceil_mode):
    options = tuple((value,) * dims for value in (kernel, stride, padding, dilation))
    pool = MaxPool(*options, ceil_mode=ceil_mode)
    reference = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[dims]
    for x in layouts(3, 4, *(11, 9, 8)[:dims]):
        if x.shape[0] and x.dtype == torch.uint8:
            x = x.view(dtype) if dtype == torch.int8 and x.is_contiguous() else x
            assert torch.equal(pool(x).int(), reference(x.float(), *options, ceil_mode=ceil_mode).int())
    x = codes(4, *(11, 9, 8)[:dims])
    assert torch.equal(pool(x), pool(x[None])[0])


@pytest.mark.parametrize(("dims", "divisor"), [(1, None), (2, None), (3, None), (2, 3), (3, 3)])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize("zero_point", [0, 128, 255])
def test_avg_pool(dims, divisor, padding, ceil_mode, count_include_pad, zero_point):
    qparams = Affine(0.05, zero_point)
    pool = AvgPool(
        (3,) * dims, qparams, OUT, stride=(2,) * dims, padding=(padding,) * dims, ceil_mode=ceil_mode,
        count_include_pad=count_include_pad, divisor_override=divisor,
    )  # fmt: skip
    reference = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
    more = (divisor,) if dims > 1 else ()
    for x in layouts(2, 4, *(9, 8, 6)[:dims]):
        if x.dim() == dims + 2:
            real = reference(real_values(x, qparams), 3, 2, padding, ceil_mode, count_include_pad, *more)
            assert disagreement(pool(x), real, OUT) == ""


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, None])
def test_adaptive_avg_pool(dims, size):
    pool = AdaptiveAvgPool((size,) * dims, GIVEN, OUT)
    reference = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[dims]
    x = codes(2, 4, *(9, 8, 6)[:dims])
    size = size or x.shape[2:]
    assert disagreement(pool(x), reference(real_values(x, GIVEN), size), OUT) == ""


@pytest.mark.parametrize("dim", [(), (1,), (-1, -2), (0, 1, 2, 3)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_mean(dim, keepdim):
    x = codes(3, 4, 5, 6)
    real = real_values(x, GIVEN).mean(dim or None, keepdim=keepdim)
    assert disagreement(Mean(dim, GIVEN, OUT, keepdim=keepdim)(x), real, OUT) == ""


def test_a_mean_over_65536_codes_is_exact():
    x = torch.full((65536,), 255, dtype=torch.uint8)
    x[::2] = 254
    assert Mean((), Affine(1.0, 0), Affine(0.5, 255, quant_min=0))(x).item() == 255
    assert Mean((), Affine(1.0, 0), Affine(1.0, 0))(x).item() == 254


@settings(max_examples=60, deadline=None)
@given(affines("uint8"), affines("uint8"), st.sampled_from(["none", "relu"]), st.booleans(), st.integers(0, 99))
def test_sums_and_products(left, right, post_op, is_sum, seed):
    function = torch.add if is_sum else torch.mul
    x, y = codes(2, 5, 3, 4, seed=seed), codes(2, 5, 3, 4, seed=seed + 1)
    real = function(real_values(x, left), real_values(y, right))
    output = Affine(max(real.abs().max().item(), 1e-6) / 120, 128)
    kernel = (Add if is_sum else Mul)(left, right, output, post_op)
    for a, b in (
        (x, y),
        (x.contiguous(memory_format=torch.channels_last), y),
        (x, y[:, :, :1, :1]),
        (x[:1, :, 0:1], y),
        (x, y[0, 0, 0, 0]),
    ):
        before = a.clone(), b.clone()
        real = function(real_values(a, left), real_values(b, right))
        assert disagreement(kernel(a, b), real.relu() if post_op == "relu" else real, output) == ""
        assert torch.equal(a, before[0])
        assert torch.equal(b, before[1])


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat_requantizes_what_differs(dim):
    x, y = codes(2, 3, 4), codes(2, 3, 4, seed=1)
    kernel = Cat((GIVEN, OUT), OUT, dim)
    expected = torch.cat([Quantize(OUT)(Dequantize(GIVEN)(x)), y], dim)
    assert torch.equal(kernel([x, y]), expected)
    assert torch.equal(Cat((OUT, OUT), OUT, dim)([x, y]), torch.cat([x, y], dim))


MODULES = {
    "quantize": (Quantize(OUT), torch.randn(2, 4, 8, 8)),
    "dequantize": (Dequantize(GIVEN), codes(2, 4, 8, 8)),
    "table": (tabulate(torch.sigmoid, GIVEN, OUT), codes(2, 32, 32, 32)),
    "clamp": (Clamp(3, 90), codes(2, 4, 8, 8)),
    "max_pool": (MaxPool((2, 2)), codes(2, 4, 8, 8)),
    "avg_pool": (AvgPool((2, 2), GIVEN, OUT), codes(2, 4, 8, 8)),
    "adaptive": (AdaptiveAvgPool((1, 1), GIVEN, OUT), codes(2, 4, 8, 8)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_survive_copies_casts_and_compilation(name):
    module, x = MODULES[name]
    expected = module(x)
    assert not module.state_dict()
    assert "\n" not in module.extra_repr()
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).half()]
    assert all(torch.equal(other(x), expected) for other in others)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(module, backend="eager")(x), expected)
