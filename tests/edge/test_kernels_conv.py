"""Convolution and linear kernels on plain codes: exactness, memory, state, threads."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from math import inf

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from hypothesis import given, settings
from hypothesis import strategies as st

from qfunc.edge.host import check_host
from qfunc.edge.kernels.base import PACKS_KEPT
from qfunc.edge.kernels.contract import disagreement, real_values
from qfunc.edge.kernels.conv import ConvCall, OnednnConv, OnednnConvAdd
from qfunc.edge.kernels.linear import LinearCall, OnednnLinear
from qfunc.edge.kernels.post_op import NO_POST_OP, KernelPostOp
from qfunc.edge.kernels.weighted_contracts import apply_post_op
from qfunc.engines.post_op import POST_OPS
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import limit_pair_sums

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
MODES = ("zeros", "reflect", "replicate", "circular")
RELU = KernelPostOp("relu")
EXAMPLES = {
    "relu": (RELU,),
    "hardtanh": tuple(
        KernelPostOp("hardtanh", b)
        for b in ((0.0, 6.0), (-1.5, 2.25), (0.7, 2.0), (-3.0, -3.0), (-2.0, inf), (-inf, 1.0))
    ),
    "hardswish": (KernelPostOp("hardswish"),),
    "silu": (KernelPostOp("silu"),),
    "leaky_relu": (KernelPostOp("leaky_relu", (0.01,)), KernelPostOp("leaky_relu", (-0.5,))),
    "tanh": (KernelPostOp("tanh"),),
    "gelu": (KernelPostOp("gelu", (), "none"), KernelPostOp("gelu", (), "tanh")),
}


def post_ops(*kernels):
    """Each kernel with nothing and with each of its post-ops."""
    return [
        (kernel, post)
        for kernel in kernels
        for post in (NO_POST_OP, *(post for name in POST_OPS[kernel] for post in EXAMPLES[name]))
    ]


def codes(*shape, seed=0, dtype=torch.uint8):
    low = 0 if dtype == torch.uint8 else -128
    return torch.randint(low, low + 256, shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_conv(dims=2, channels=8, outs=8, groups=1, kernel=3, *, bias=True, seed=0, **call):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-63, 64, (outs, channels // groups, *[kernel] * dims), dtype=torch.int8, generator=generator)
    scale = torch.rand(outs, generator=generator) * 0.01 + 0.002
    values = torch.randn(outs, generator=generator) if bias else None
    default = {
        "input_scale": 0.03, "input_zero_point": 7, "output_scale": 0.11, "output_zero_point": 120,
        "output_dtype": "uint8",
        "stride": (1,) * dims, "padding": (1,) * dims, "dilation": (1,) * dims, "groups": groups,
    }  # fmt: skip
    return OnednnConv(weight, scale, values, ConvCall(**{**default, **call}))


def float_conv(module, x):
    """What a float `nn.Conv` of the dequantized codes computes, in float64."""
    call, weight = module.call, module.weight
    dims = weight.dim() - 2
    cls = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)[dims - 1]
    conv = cls(
        weight.shape[1] * call.groups, weight.shape[0], tuple(weight.shape[2:]), call.stride, call.padding,
        call.dilation, call.groups, bias=module.bias is not None, padding_mode=call.padding_mode, dtype=torch.float64,
    )  # fmt: skip
    with torch.no_grad():
        conv.weight.copy_(weight.double() * module.weight_scale.double().reshape(-1, *[1] * (dims + 1)))
        if module.bias is not None:
            conv.bias.copy_(module.bias)
        y = conv(real_values(x, Affine(call.input_scale, call.input_zero_point)))
    return apply_post_op(call.post_op, y)


def output_of(call):
    if call.output_dtype == "float32":
        return None
    return Affine(call.output_scale, call.output_zero_point, call.output_dtype)


def written_as(output):
    """The literals of a call whose result has these qparams; None is float32."""
    scale, zero_point, dtype = (
        (1.0, 0, "float32") if output is None else (output.scale, output.zero_point, output.dtype)
    )
    return {"output_scale": scale, "output_zero_point": zero_point, "output_dtype": dtype}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", [1, "same", "valid"])
@pytest.mark.parametrize("post_op", [NO_POST_OP, RELU], ids=str)
def test_padding_of_every_mode_means_what_nn_conv_means(dims, mode, padding, post_op):
    padding = (padding,) * dims if isinstance(padding, int) else padding
    module = make_conv(dims, padding_mode=mode, padding=padding, post_op=post_op, kernel=4, dilation=(1,) * dims)
    x = codes(2, 8, *(7, 6, 5)[:dims])
    assert disagreement(module(x), float_conv(module, x), output_of(module.call)) == ""


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["uint8", "int8", "float32"])
@pytest.mark.parametrize(("channels", "outs", "groups"), [(3, 5, 1), (8, 8, 8), (4, 8, 4), (12, 8, 4), (1, 1, 1)])
def test_output_dtypes_and_groups(dims, dtype, channels, outs, groups):
    qparams = {
        "uint8": {"output_zero_point": 255},
        "int8": {"output_zero_point": -100},
        "float32": {"output_scale": 1.0, "output_zero_point": 0},
    }[dtype]
    module = make_conv(dims, channels, outs, groups, bias=False, output_dtype=dtype, stride=(2,) * dims, **qparams)
    for batch in (0, 1, 3):
        x = codes(batch, channels, *(7, 6, 5)[:dims])
        y = module(x)
        assert y.dtype == getattr(torch, dtype)
        assert disagreement(y, float_conv(module, x), output_of(module.call)) == ""


@pytest.mark.parametrize(("kernel", "post_op"), post_ops(*(f"onednn.conv{dims}d" for dims in (1, 2, 3))), ids=str)
@pytest.mark.parametrize("output", [Affine(0.04, 90), Affine(0.04, -20, "int8"), None], ids=str)
def test_convolutions_with_every_post_op(kernel, post_op, output):
    dims = int(kernel[-2])
    for groups, padding, input_scale in ((1, 1, 0.004), (8, 0, 0.03), (2, "same", 0.004)):
        module = make_conv(
            dims, 8, 16, groups, input_scale=input_scale, input_zero_point=121, post_op=post_op,
            padding=padding if isinstance(padding, str) else (padding,) * dims, **written_as(output),
        )  # fmt: skip
        for batch in (0, 1, 3):
            x = codes(batch, 8, *(7, 6, 5)[:dims], seed=batch)
            y = module(x)
            assert y.dtype == (torch.float32 if output is None else getattr(torch, output.dtype))
            assert disagreement(y, float_conv(module, x), output) == ""
        assert torch.equal(module(x[0]), module(x)[0])
        assert (str(post_op) in repr(module)) == (post_op != NO_POST_OP)


LACKS = [
    *((dims, name) for dims in (1, 2, 3) for name in ("leaky_relu", "tanh", "gelu")),
    *((3, name) for name in ("hardswish", "silu")),
]


@pytest.mark.parametrize(("dims", "name"), LACKS)
def test_a_convolution_is_not_made_with_a_post_op_that_it_lacks(dims, name):
    with pytest.raises(AssertionError, match="no post-op"):
        make_conv(dims, post_op=EXAMPLES[name][0])


@pytest.mark.parametrize("name", ["hardswish", "silu", "leaky_relu", "tanh", "gelu"])
def test_a_sum_is_not_made_with_a_post_op_that_it_lacks(name):
    module = make_conv()
    call = replace(module.call, post_op=EXAMPLES[name][0])
    with pytest.raises(AssertionError, match="no post-op"):
        OnednnConvAdd(module.weight, module.weight_scale, module.bias, call, Affine(0.2, 99))


@pytest.mark.parametrize(
    "arguments",
    [
        ("bogus",), ("relu", (1.0,)), ("hardtanh",), ("hardtanh", (0.0,)), ("hardtanh", (2.0, 1.0)),
        ("hardtanh", (0.0, float("nan"))), ("leaky_relu",), ("gelu",), ("gelu", (), "bogus"), ("silu", (), "tanh"),
    ],
    ids=str,
)  # fmt: skip
def test_a_post_op_is_one_of_the_table(arguments):
    with pytest.raises(AssertionError):
        KernelPostOp(*arguments)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 8, 1), (8,), (2, 8, 1, 7, 6, 5), ()])
def test_a_convolution_takes_no_input_of_another_rank(dims, shape):
    with pytest.raises(RuntimeError):
        make_conv(dims)(codes(*(shape if len(shape) not in (dims + 1, dims + 2) else (2, 9, *[7] * dims))))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_unbatched_input_gives_an_unbatched_output(dims):
    module = make_conv(dims)
    x = codes(2, 8, *(7, 6, 5)[:dims])
    assert torch.equal(module(x[1]), module(x)[1])


@pytest.mark.parametrize(("dims", "memory"), [(2, torch.channels_last), (3, torch.channels_last_3d)])
def test_outputs_are_channels_last_whatever_the_input_is(dims, memory):
    module = make_conv(dims)
    x = codes(2, 8, *(7, 6, 5)[:dims])
    outputs = [
        module(x),
        module(x.contiguous(memory_format=memory)),
        module(x.transpose(-1, -2).clone().transpose(-1, -2)),
    ]
    assert all(torch.equal(outputs[0], y) for y in outputs)
    assert all(y.is_contiguous(memory_format=memory) for y in outputs)


@pytest.mark.parametrize("bad", [(2, 5, 9, 9), (2, 8, 2, 9), (2, 2, 8, 9, 9), (9, 9)])
def test_an_impossible_input_is_refused_and_not_computed(bad):
    with pytest.raises(RuntimeError):
        make_conv(padding=(0, 0))(codes(*bad))


def test_another_size_and_batch_packs_again_and_only_a_few_packs_are_kept():
    module = make_conv()
    for size in range(3, 3 + 2 * PACKS_KEPT):
        for batch in (1, 2):
            x = codes(batch, 8, size, size + 1)
            assert disagreement(module(x), float_conv(module, x), output_of(module.call)) == ""
    assert len(module._packs) == PACKS_KEPT
    assert list(module.state_dict()) == ["weight", "weight_scale", "bias"]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save", "half", "bfloat16", "double", "load", "assign"])
def test_what_happens_to_a_module_leaves_its_numbers(how):
    module = make_conv()
    x = codes(2, 8, 6, 6)
    expected = module(x)
    match how:
        case "deepcopy":
            other = copy.deepcopy(module)
        case "pickle":
            other = pickle.loads(pickle.dumps(module))
        case "save":
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        case "load" | "assign":
            other = make_conv(seed=5)
            assert not torch.equal(other(x), expected)
            other.load_state_dict(module.state_dict(), assign=how == "assign")
        case _:
            other = getattr(copy.deepcopy(module), how)()
    assert how in ("load", "assign") or not other._packs
    assert torch.equal(other(x), expected)
    assert other.bias.dtype == other.weight_scale.dtype == torch.float32
    assert torch.equal(other.bias, module.bias)


@pytest.mark.parametrize("make", [make_conv, lambda: make_linear(9, 8)])
def test_compiled_kernels_compute_the_same_numbers(make):
    net = torch.nn.Sequential(make())
    x = codes(2, 8, 6, 9)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager")
    assert torch.equal(compiled(x), net(x))
    assert torch.equal(compiled(x[:1]), net(x[:1]))


def test_threads_share_a_module():
    module = make_conv()
    inputs = [codes(2, 8, 4 + i % 12, 5, seed=i) for i in range(60)]
    expected = [make_conv()(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(module, inputs))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


def make_sum(module, **options):
    other = Affine(0.2, 99)
    return OnednnConvAdd(module.weight, module.weight_scale, module.bias, module.call, other, **options)


@pytest.mark.parametrize(("kind", "post_op"), post_ops("onednn.conv1d_add", "onednn.conv2d_add"), ids=str)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_conv_add(kind, post_op, batch):
    dims = int(kind[-6])
    module = make_conv(dims, post_op=post_op)
    kernel = make_sum(module)
    x, other = codes(batch, 8, *(7, 6)[:dims]), codes(batch, 8, *(7, 6)[:dims], seed=1)
    plain = make_conv(dims)
    real = apply_post_op(post_op, float_conv(plain, x) + real_values(other, kernel.other))
    assert disagreement(kernel(x, other), real, output_of(module.call)) == ""
    if batch:
        assert torch.equal(kernel(x[0], other[0]), kernel(x, other)[0])


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_conv_add_writes_into_its_operand_only_with_leave(dims, channels_last):
    def operand():
        fresh = codes(2, 8, *(7, 6)[:dims], seed=1)
        return fresh.contiguous(memory_format=torch.channels_last) if channels_last and dims == 2 else fresh

    module = make_conv(dims)
    x, other = codes(2, 8, *(7, 6)[:dims]), operand()
    expected = make_sum(module)(x, other)
    assert torch.equal(other, operand())
    assert torch.equal(make_sum(module, overwrite=True)(x, operand()), expected)


def test_conv_add_broadcasts_its_operand_and_leaves_it():
    kernel = make_sum(make_conv(), overwrite=True)
    x, other = codes(2, 8, 6, 6), codes(1, 8, 1, 1, seed=1)
    before = other.clone()
    assert torch.equal(kernel(x, other), kernel(x, other.expand(2, 8, 6, 6).clone()))
    assert torch.equal(other, before)
    with pytest.raises(RuntimeError):
        kernel(x, codes(2, 8, 5, 5))


def make_linear(inputs, outs, *, bias=True, **call):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-63, 64, (outs, inputs), dtype=torch.int8, generator=generator)
    scale = torch.rand(outs, generator=generator) * 0.01 + 0.002
    default = {
        "input_scale": 0.03, "input_zero_point": 7, "output_scale": 0.11, "output_zero_point": 120,
        "output_dtype": "uint8",
    }  # fmt: skip
    values = torch.randn(outs, generator=generator) if bias else None
    return OnednnLinear(weight, scale, values, LinearCall(**{**default, **call}))


@pytest.mark.parametrize("shape", [(9,), (1, 9), (4, 9), (2, 3, 9), (2, 3, 4, 9), (0, 9), (2, 0, 9)])
@pytest.mark.parametrize("post_op", [post for _, post in post_ops("onednn.linear")], ids=str)
@pytest.mark.parametrize("input_dtype", ["uint8", "int8"])
@pytest.mark.parametrize("output", [Affine(0.03, 120), Affine(0.03, 9, "int8"), None], ids=str)
def test_linear(shape, post_op, input_dtype, output):
    module = make_linear(9, 6, post_op=post_op, input_dtype=input_dtype, bias=len(shape) > 1, **written_as(output))
    x = codes(*shape, dtype=getattr(torch, input_dtype))
    bias = None if module.bias is None else module.bias.double()
    real = F.linear(
        real_values(x, Affine(0.03, 7, input_dtype)),
        module.weight.double() * module.weight_scale.double()[:, None],
        bias,
    )
    assert disagreement(module(x), apply_post_op(post_op, real), output) == ""


def test_linear_refuses_what_would_end_the_process():
    with pytest.raises(AssertionError):
        make_linear(0, 5)
    with pytest.raises(RuntimeError):
        make_linear(5, 5)(codes(2, 5, dtype=torch.int8))
    with pytest.raises(RuntimeError):
        make_linear(5, 5)(codes(2, 4))


@st.composite
def limited_convs(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4, 8]))
    inputs = groups * draw(st.sampled_from([1, 2, 3, 4, 5, 8, 17, 32]))
    outs = groups * draw(st.sampled_from([1, 2, 5, 8]))
    kernel = draw(st.integers(1, 3 if dims > 1 else 7))
    size = draw(st.integers(kernel, kernel + 5))
    return dims, groups, inputs, outs, kernel, size, draw(st.integers(0, 2**31)), draw(st.integers(1, 2))


def adversary(weight, groups, shape):
    """Activations of 255 wherever the first output channel of a group has a positive weight, at every position."""
    outs, inputs = weight.shape[:2]
    signs = weight.reshape(groups, outs // groups, inputs, -1)[:, 0].sum(-1).ge(0).reshape(-1)
    return (signs.to(torch.uint8) * 255).reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape).contiguous()


@settings(max_examples=60, deadline=None)
@given(limited_convs())
def test_limited_weights_never_saturate_a_convolution(case):
    dims, groups, inputs, outs, kernel, size, seed, stride = case
    generator = torch.Generator().manual_seed(seed)
    real = torch.randn(outs, inputs // groups, *[kernel] * dims, generator=generator).abs_()
    real *= torch.randint(0, 2, (outs, 1, *[1] * dims), generator=generator) * 2 - 1
    layout = check_host().onednn_layouts.of(real.shape, groups)
    scale = limit_pair_sums(real, real.abs().flatten(1).amax(1) / 127, layout)
    weight = (real / scale.reshape(-1, *[1] * (dims + 1))).round().clamp(-128, 127).to(torch.int8)
    call = ConvCall(1.0, 0, 1.0, 0, "float32", (stride,) * dims, (0,) * dims, (1,) * dims, groups)
    module = OnednnConv(weight, torch.ones(outs), None, call)
    shape = (1, inputs, *[size] * dims)
    for x in (torch.full(shape, 255, dtype=torch.uint8), adversary(weight, groups, shape), codes(*shape, seed=seed)):
        exact = CONV[dims](x.double(), weight.double(), None, stride, 0, 1, groups)
        assert torch.equal(module(x).double(), exact)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 70),
    st.integers(1, 33),
    st.sampled_from([1, 2, 7, 64]),
    st.integers(0, 2**31),
)
def test_limited_weights_never_saturate_a_linear_layer(inputs, outs, batch, seed):
    real = torch.randn(outs, inputs, generator=torch.Generator().manual_seed(seed)).abs_()
    real[::2] *= -1
    scale = limit_pair_sums(real, real.abs().amax(1) / 127, check_host().onednn_layouts.dense)
    weight = (real / scale[:, None]).round().clamp(-128, 127).to(torch.int8)
    module = OnednnLinear(weight, torch.ones(outs), None, LinearCall(1.0, 0, 1.0, 0, "float32"))
    for x in (torch.full((batch, inputs), 255, dtype=torch.uint8), codes(batch, inputs, seed=seed)):
        assert torch.equal(module(x).double(), F.linear(x.double(), weight.double()))
