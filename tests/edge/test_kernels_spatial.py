"""Transposed convolutions, and what else works on channels and spatial dimensions of plain codes."""

import copy
import pickle
import subprocess
import sys
from math import prod

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from qfunc.edge.host import check_host
from qfunc.edge.kernels.affine import Dequantize, Quantize
from qfunc.edge.kernels.arithmetic import Add, Stack
from qfunc.edge.kernels.contract import disagreement, real_values
from qfunc.edge.kernels.conv import ConvCall, OnednnConv, OnednnConvAdd
from qfunc.edge.kernels.conv_transpose import ConvTransposeCall, OnednnConvTranspose
from qfunc.edge.kernels.norm import BatchNorm, PReLU
from qfunc.edge.kernels.pool import Sum
from qfunc.edge.kernels.post_op import NO_POST_OP, KernelPostOp
from qfunc.edge.kernels.spatial import AdaptiveMaxPool, Interpolate, Pad
from qfunc.edge.kernels.weighted_contracts import apply_post_op
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import limit_pair_sums

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
ADAPTIVE = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
GIVEN, OUT = Affine(0.05, 77), Affine(0.031, 140)
POSTS = (NO_POST_OP, KernelPostOp("relu"), KernelPostOp("hardtanh", (-0.5, 0.75)))


def codes(*shape, seed=0, dtype=torch.uint8):
    low = 0 if dtype == torch.uint8 else -128
    return torch.randint(low, low + 256, shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def layouts(*shape, dtype=torch.uint8):
    x = codes(*shape, dtype=dtype)
    yield x
    memory = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if memory:
        yield x.contiguous(memory_format=memory)
    yield codes(*shape, 2, dtype=dtype)[..., 1]
    yield x[:0]


def make_transposed(dims=2, ins=4, outs=6, kernel=3, groups=1, *, seed=0, bias=True, **call):
    generator = torch.Generator().manual_seed(seed)
    kernel = kernel if isinstance(kernel, tuple) else (kernel,) * dims
    weight = torch.randint(-60, 61, (ins, outs // groups, *kernel), dtype=torch.int8, generator=generator)
    scale = torch.rand(outs, generator=generator) * 0.01 + 0.002
    default = {
        "input_scale": 0.03, "input_zero_point": 7, "output_scale": 0.05, "output_zero_point": 120,
        "output_dtype": "uint8", "stride": (2,) * dims, "padding": (1,) * dims, "output_padding": (0,) * dims,
        "dilation": (1,) * dims, "groups": groups,
    }  # fmt: skip
    values = torch.randn(outs, generator=generator) if bias else None
    return (weight, scale, values), ConvTransposeCall(**{**default, **call})


def float_transposed(parts, call, x):
    """What a float transposed convolution of the dequantized codes computes, in float64."""
    weight, scale, bias = parts
    of_group = scale.double().reshape(call.groups, 1, -1).expand(-1, weight.shape[0] // call.groups, -1)
    real = weight.double() * of_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    value = TRANSPOSED[len(call.stride)](
        real_values(x, Affine(call.input_scale, call.input_zero_point)), real,
        None if bias is None else bias.double(), call.stride, call.padding, call.output_padding, call.groups,
        call.dilation,
    )  # fmt: skip
    return apply_post_op(call.post_op, value)


def output_of(call):
    float32 = call.output_dtype == "float32"
    return None if float32 else Affine(call.output_scale, call.output_zero_point, call.output_dtype)


@st.composite
def transposed(draw):
    dims = draw(st.sampled_from([2, 1, 3]))

    def each(*options):
        return tuple(draw(st.sampled_from(options)) for _ in range(dims))

    groups = draw(st.sampled_from([1, 2, 4]))
    ins, outs = groups * draw(st.sampled_from([1, 2, 3])), groups * draw(st.sampled_from([1, 2, 3]))
    kernel, stride, dilation, size = each(2, 3, 1, 4), each(2, 1, 3), each(1, 2, 3), each(4, 1, 2, 3)
    padding = each(0, 1, 2, 3)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    sizes = zip(size, stride, padding, dilation, kernel, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e >= 0 for n, s, p, d, k, e in sizes))
    parts, call = make_transposed(
        dims, ins, outs, kernel, groups, seed=draw(st.integers(0, 99)), bias=draw(st.booleans()), stride=stride,
        padding=padding, output_padding=extra, dilation=dilation, post_op=draw(st.sampled_from(POSTS)),
        input_zero_point=draw(st.sampled_from([0, 7, 255])),
        **draw(st.sampled_from([{}, {"output_dtype": "int8", "output_zero_point": -9},
                                {"output_dtype": "float32", "output_scale": 1.0, "output_zero_point": 0}])),
    )  # fmt: skip
    return parts, call, size


@settings(max_examples=150, deadline=None)
@given(transposed())
def test_transposed_convolutions(case):
    parts, call, size = case
    kernel = OnednnConvTranspose(*parts, call)
    x = codes(2, parts[0].shape[0], *size)
    y = kernel(x)
    assert disagreement(y, float_transposed(parts, call, x), output_of(call)) == ""
    assert torch.equal(kernel(x[0]), y[0])
    assert kernel(x[:0]).shape == (0, *y.shape[1:])


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_in_any_memory_at_any_size(dims, padding, groups):
    parts, call = make_transposed(dims, groups=groups, padding=(padding,) * dims)
    kernel = OnednnConvTranspose(*parts, call)
    memory = {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims)
    for sizes in ((5, 4, 3), (2, 7, 5)):
        for x in layouts(3, 4, *sizes[:dims]):
            y = kernel(x)
            assert disagreement(y, float_transposed(parts, call, x), output_of(call)) == ""
            assert memory is None or not len(x) or y.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("shape", [(2, 5, 4, 4), (2, 4, 4), (2, 4, 4, 4, 4), (4,), (2, 4, 0, 4), (2, 4, 1, 1)])
def test_a_transposed_convolution_refuses_what_it_cannot_take(shape):
    parts, call = make_transposed(padding=(2, 2))
    kernel = OnednnConvTranspose(*parts, call)
    if shape != (2, 4, 4):  # an unbatched input of two channels is refused as well
        with pytest.raises(RuntimeError, match="cannot take"):
            kernel(codes(*shape))
    with pytest.raises(RuntimeError):
        kernel(codes(2, 4, 4))


@pytest.mark.parametrize(
    "change",
    [
        {"output_padding": (2, 0)}, {"stride": (0, 1)}, {"padding": (-1, 0)}, {"groups": 3}, {"stride": (2,)},
        {"dilation": (0, 1)}, {"post_op": KernelPostOp("tanh")},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_geometry_is_refused(change):
    parts, _ = make_transposed()
    with pytest.raises(AssertionError):
        OnednnConvTranspose(*parts, make_transposed(**change)[1])


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "half", "load", "compile"])
def test_what_happens_to_a_transposed_convolution_leaves_its_numbers(how):
    parts, call = make_transposed()
    module, x = OnednnConvTranspose(*parts, call), codes(2, 4, 5, 5)
    expected = module(x)
    match how:
        case "deepcopy":
            other = copy.deepcopy(module)
        case "pickle":
            other = pickle.loads(pickle.dumps(module))
        case "half":
            other = copy.deepcopy(module).half()
        case "load":
            other = OnednnConvTranspose(*make_transposed(seed=5)[0], call)
            assert not torch.equal(other(x), expected)
            other.load_state_dict(module.state_dict())
        case _:
            torch._dynamo.reset()
            other = torch.compile(torch.nn.Sequential(module), backend="eager")
    assert torch.equal(other(x), expected)
    assert "\n" not in module.extra_repr()


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_limited_weights_never_saturate_a_transposed_convolution(dims, groups):
    layouts = check_host().onednn_layouts
    real = torch.randn(8, 8 // groups, *[4] * dims, generator=torch.Generator().manual_seed(dims)).abs_()
    scale = real.transpose(0, 1).flatten(1).amax(1) / 127
    if layouts.saturates:
        scale = limit_pair_sums(real, scale, "any of axis 1")
    assert scale.shape == (8 // groups,)
    weight = (real / scale.reshape(1, -1, *[1] * dims)).round().clamp(-127, 127).to(torch.int8)
    _, call = make_transposed(
        dims, groups=groups, input_scale=1.0, input_zero_point=0, output_scale=1.0, output_zero_point=0,
        output_dtype="float32",
    )  # fmt: skip
    x = torch.full((1, 8, *[4] * dims), 255, dtype=torch.uint8)
    exact = TRANSPOSED[dims](x.double(), weight.double(), None, 2, 1, 0, groups)
    assert torch.equal(OnednnConvTranspose(weight, torch.ones(8), None, call)(x).double(), exact)


@st.composite
def small_convolutions(draw):
    """Convolutions whose windows are about as large as their inputs."""
    dims = draw(st.sampled_from([2, 3, 1]))

    def each(*options):
        return tuple(draw(st.sampled_from(options)) for _ in range(dims))

    groups, ins, outs = (
        draw(st.sampled_from([1, 2, 3])),
        draw(st.sampled_from([1, 2, 4])),
        draw(st.sampled_from([16, 4])),
    )
    kernel, stride, dilation, size = each(2, 3, 1, 4), each(1, 2), each(1, 2), each(1, 2, 3, 5)
    padding = tuple(draw(st.integers(0, d * (k - 1))) for d, k in zip(dilation, kernel, strict=True))
    sizes = zip(size, padding, dilation, kernel, strict=True)
    assume(all(n + 2 * p > d * (k - 1) for n, p, d, k in sizes))
    zero_point = draw(st.sampled_from([0, 255]))
    call = ConvCall(1.0, zero_point, 1.0, 0, "float32", stride, padding, dilation, groups)
    return (groups * outs, ins, *kernel), (2, groups * ins, *size), call


def check_small(weight_shape, shape, call):
    dims = len(shape) - 2
    weight = codes(*weight_shape, dtype=torch.int8).div(2, rounding_mode="trunc").to(torch.int8)
    kernel = OnednnConv(weight, torch.ones(weight_shape[0]), None, call)
    geometry = (call.stride, call.padding, call.dilation, call.groups)
    for batch in (2, 1, 0):
        x = codes(*shape)[:batch]
        exact = CONV[dims](x.double() - call.input_zero_point, weight.double(), None, *geometry)
        assert torch.equal(kernel(x).double(), exact)
        assert torch.equal(kernel(x).double(), exact)


@settings(max_examples=150, deadline=None)
@given(small_convolutions())
def test_convolutions_of_small_inputs(case):
    check_small(*case)


# What oneDNN computed wrongly: window over both ends, one position in front, a single window in spite of a stride.
@pytest.mark.parametrize(
    ("weight", "shape", "geometry"),
    [
        ((16, 1, 2, 4), (2, 1, 3, 2), ((1, 2), (1, 1), (1, 1), 1)),
        ((54, 1, 2, 1, 2), (2, 1, 1, 3, 3), ((1, 1, 1), (1, 0, 1), (1, 1, 1), 1)),
        ((54, 1, 1, 3), (2, 2, 3, 3), ((1, 2), (0, 0), (2, 1), 2)),
        ((16, 1, 3, 3), (2, 1, 2, 3), ((1, 2), (2, 0), (1, 1), 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("zero_point", [0, 255])
def test_shapes_that_onednn_misreads(weight, shape, geometry, zero_point):
    check_small(weight, shape, ConvCall(1.0, zero_point, 1.0, 0, "float32", *geometry))


def test_a_sum_behind_a_convolution_of_a_small_input():
    weight = codes(16, 1, 2, 4, dtype=torch.int8).div(2, rounding_mode="trunc").to(torch.int8)
    call = ConvCall(0.03, 255, 2.0, 128, "uint8", (1, 2), (1, 1), (1, 1))
    kernel = OnednnConvAdd(weight, torch.full((16,), 0.1), None, call, Affine(0.5, 9))
    x = codes(2, 1, 3, 2)
    value = F.conv2d(real_values(x, Affine(0.03, 255)), weight.double() * 0.1, None, (1, 2), 1)
    other = codes(*value.shape, seed=1)
    real = value + real_values(other, Affine(0.5, 9))
    assert disagreement(kernel(x, other), real, Affine(2.0, 128)) == ""


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 2, -3.5, 0])
@pytest.mark.parametrize("post_op", ["none", "relu"])
def test_scaled_sums_and_differences(alpha, post_op):
    x, y = codes(2, 5, 3, 4), codes(2, 5, 3, 4, seed=1)
    for a, b in ((x, y), (x, y[:, :, :1, :1]), (x[:1, :, :1], y), (x, y[0, 0, 0, 0])):
        real = torch.add(real_values(a, GIVEN), real_values(b, OUT), alpha=alpha)
        output = Affine(real.abs().max().item() / 120, 128)
        kernel = Add(GIVEN, OUT, output, post_op, alpha=alpha)
        assert disagreement(kernel(a, b), real.relu() if post_op == "relu" else real, output) == ""


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("dim", [(), (1,), (-1, -2), (0, 1, 2, 3)])
@pytest.mark.parametrize("keepdim", [False, True])
def test_sums(dtype, dim, keepdim):
    given = Affine(0.05, 7, dtype)
    for x in layouts(3, 4, 5, 6, dtype=getattr(torch, dtype)):
        real = real_values(x, given).sum(dim or None, keepdim=keepdim)
        output = Affine(max(real.abs().max().item() if real.numel() else 0.0, 1.0) / 120, 128)
        assert disagreement(Sum(dim, given, output, keepdim=keepdim)(x), real, output) == ""


@pytest.mark.parametrize("count", [65793, 65794, 300_001])
def test_a_sum_of_many_codes_is_exact(count):
    x = torch.full((count,), 255, dtype=torch.uint8)
    x[::3] = 254
    exact = int(x.sum(dtype=torch.int64))
    near = Affine(1.0, 0), Affine(1.0, 0, quant_max=255)
    assert Sum((), Affine(1.0, 255), near[1])(x.clone().fill_(255)).item() == 0
    step = Affine(exact / 200, 0)
    assert Sum((), near[0], step)(x).item() == 200


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8])
@pytest.mark.parametrize("size", [1, 2, 3, 5, None])
def test_adaptive_max_pool(dims, dtype, size):
    pool = AdaptiveMaxPool((size,) * dims)
    for shape in ((2, 4, *(9, 8, 6)[:dims]), (2, 4, *[4] * dims)):
        for x in layouts(*shape, dtype=dtype):
            y = pool(x)
            expected = ADAPTIVE[dims](x.double(), shape[2:] if size is None else size)
            assert y.dtype == dtype
            assert torch.equal(y.double(), expected)
        x = codes(*shape, dtype=dtype)
        assert torch.equal(pool(x)[0], pool(x[0]))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate", "circular"])
def test_pad(dims, dtype, mode):
    given = Affine(0.05, 7, dtype)
    for value in (None, 0.0, 1.5, -99.0) if mode == "constant" else (None,):
        kernel = Pad((1, 2) * dims, mode, value, given)
        for x in layouts(2, 4, *(5, 4, 3)[:dims], dtype=getattr(torch, dtype)):
            if mode == "constant" or len(x):  # torch pads no empty batch by these modes in every rank
                real = F.pad(Dequantize(given)(x), (1, 2) * dims, mode=mode, value=value)
                assert torch.equal(kernel(x), Quantize(given)(real))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "linear", "aligned", "area"])
@pytest.mark.parametrize("given", [(3, None, None), (100, 20, 110)], ids=str)
def test_interpolate(dims, dtype, mode, given):
    given = Affine(0.05, given[0], dtype, *given[1:])
    name = {"linear": ("linear", "bilinear", "trilinear"), "aligned": ("linear", "bilinear", "trilinear")}
    options = {"align_corners": True} if mode == "aligned" else {}
    mode = name[mode][dims - 1] if mode in name else mode
    for sizes in ({"scale_factor": 2.0}, {"size": (7, 3, 6)[:dims]}, {"scale_factor": 0.5}):
        kernel = Interpolate(given, mode, {**sizes, **options})
        for x in layouts(2, 4, *(5, 4, 6)[:dims], dtype=getattr(torch, dtype)):
            if len(x):
                x = x.clamp(*given.bounds)
                real = F.interpolate(real_values(x, given), mode=mode, **sizes, **options)
                assert disagreement(kernel(x), real, given) == ""
    late = Interpolate(given, mode, {"size": None, **options})
    x = codes(2, 4, *(5, 4, 6)[:dims], dtype=getattr(torch, dtype)).clamp(*given.bounds)
    assert torch.equal(late(x, (7, 3, 6)[:dims]), Interpolate(given, mode, {"size": (7, 3, 6)[:dims], **options})(x))


def test_no_bicubic_interpolation():
    with pytest.raises(AssertionError, match="bicubic"):
        Interpolate(GIVEN, "bicubic", {"scale_factor": 2})


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("post_op", ["none", "relu"])
@pytest.mark.parametrize("sides", [(), (6,), (5, 4), (3, 4, 5)], ids=str)
def test_batch_norm(affine, dtype, post_op, sides):
    generator = torch.Generator().manual_seed(0)
    mean, weight, bias = (torch.randn(8, generator=generator) for _ in range(3))
    parameters = [mean, torch.rand(8, generator=generator) + 0.01, *((weight, bias) if affine else (None, None))]
    given = Affine(0.05, 7, dtype)
    for x in layouts(3, 8, *sides, dtype=getattr(torch, dtype)):
        doubled = [None if p is None else p.double() for p in parameters]
        real = F.batch_norm(real_values(x, given), *doubled, eps=1e-3)
        output = Affine(max(real.abs().max().item() if len(x) else 1.0, 1e-3) / 110, 120)
        kernel = BatchNorm.of(*parameters, 1e-3, given, output, post_op)
        assert disagreement(kernel(x), real.relu() if post_op == "relu" else real, output) == ""
        assert kernel(x).stride() == x.float().stride()
    with pytest.raises(RuntimeError, match="8 channels"):
        kernel(codes(2, 7, *sides))


@pytest.mark.parametrize("slopes", [1, 8])
@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("sides", [(), (6,), (5, 4), (3, 4, 5)], ids=str)
def test_prelu(slopes, dtype, sides):
    slope = torch.randn(slopes, generator=torch.Generator().manual_seed(0))
    given = Affine(0.05, 7, dtype)
    for x in layouts(3, 8, *sides, dtype=getattr(torch, dtype)):
        real = F.prelu(real_values(x, given), slope.double())
        assert disagreement(PReLU(slope, given, OUT)(x), real, OUT) == ""


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_stack_requantizes_what_differs(dim):
    x, y = codes(2, 3, 4), codes(2, 3, 4, seed=1)
    expected = torch.stack([Quantize(OUT)(Dequantize(GIVEN)(x)), y], dim)
    assert torch.equal(Stack((GIVEN, OUT), OUT, dim)([x, y]), expected)
    assert torch.equal(Stack((OUT, OUT), OUT, dim)([x, y]), torch.stack([x, y], dim))


GUARDED = {
    "a float input": "kernel(torch.zeros(2, 4, 5, 5))",
    "signed codes": "kernel(torch.zeros(2, 4, 5, 5, dtype=torch.int8))",
    "other channels": "kernel(torch.zeros(2, 3, 5, 5, dtype=torch.uint8))",
    "no spatial size": "kernel(torch.zeros(2, 4, 0, 5, dtype=torch.uint8))",
    "another rank": "kernel(torch.zeros(2, 4, 5, dtype=torch.uint8))",
    "an empty weight": "make(weight=torch.zeros(0, 6, 3, 3, dtype=torch.int8))",
    "a float weight": "make(weight=torch.zeros(4, 6, 3, 3))",
    "too few scales": "make(scale=torch.ones(5))",
    "scales of another dtype": "make(scale=torch.ones(6, dtype=torch.float64))",
    "too few offsets": "make(bias=torch.ones(5))",
    "offsets of another dtype": "make(bias=torch.ones(6, dtype=torch.float64))",
    "groups that do not divide": "make(groups=3)",
    "an infinite scale": "make(input_scale=float('inf'))",
    "a zero point beyond the codes": "make(input_zero_point=256)",
    "norm of other channels": "BatchNorm(torch.ones(3), torch.ones(3), Affine(1.0, 0))(torch.zeros(2, 4).byte())",
    "norm of a vector": "BatchNorm(torch.ones(3), torch.ones(3), Affine(1.0, 0))(torch.zeros(3).byte())",
    "slopes of other channels": "PReLU(torch.ones(3), Affine(1.0, 0), Affine(1.0, 0))(torch.zeros(2, 4).byte())",
    "a pool of nothing": "AdaptiveMaxPool((2, 2))(torch.zeros(2, 4, 0, 5).byte())",
    "a pool of another rank": "AdaptiveMaxPool((2, 2))(torch.zeros(5, 5).byte())",
    "too wide a reflection": "Pad((9, 9), 'reflect', None, Affine(1.0, 0))(torch.zeros(1, 2, 3).byte())",
    "too large a cut": "Pad((-9, 0), 'constant', None, Affine(1.0, 0))(torch.zeros(1, 2, 3).byte())",
}
SCRIPT = """
import torch
from qfunc.edge.kernels.conv_transpose import ConvTransposeCall, OnednnConvTranspose
from qfunc.edge.kernels.norm import BatchNorm, PReLU
from qfunc.edge.kernels.spatial import AdaptiveMaxPool, Pad
from qfunc.numerics.grid import Affine
def make(weight=None, scale=None, bias=None, groups=1, input_scale=1.0, input_zero_point=0):
    weight = torch.ones(4, 6, 3, 3, dtype=torch.int8) if weight is None else weight
    scale = torch.ones(6) if scale is None else scale
    geometry = ((2, 2), (1, 1), (0, 0), (1, 1), groups)
    call = ConvTransposeCall(input_scale, input_zero_point, 1.0, 0, "uint8", *geometry)
    return OnednnConvTranspose(weight, scale, bias, call)
kernel = make()
for name, text in {cases!r}.items():
    try:
        eval(text)
        print(name, "passes", flush=True)
    except (RuntimeError, AssertionError, ValueError, IndexError):
        print(name, "is refused", flush=True)
"""


def test_what_could_end_the_process_is_refused():
    script = SCRIPT.replace("{cases!r}", repr(GUARDED))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{name} is refused" for name in GUARDED]), done.stderr


def test_the_phases_hold_every_tap_once():
    weight = torch.arange(1, 1 + prod((2, 3, 4, 3)), dtype=torch.int8).reshape(2, 3, 4, 3)
    _, call = make_transposed(2, 2, 3, (4, 3), stride=(2, 3), padding=(0, 0))
    arranged = OnednnConvTranspose(weight, torch.ones(3), None, call).weight
    assert arranged.shape == (2 * 3 * 3, 2, 2, 1)
    assert sorted(arranged[arranged != 0].tolist()) == sorted(weight.flatten().tolist())
