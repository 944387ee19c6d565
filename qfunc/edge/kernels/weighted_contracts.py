"""The contracts of oneDNN's convolutions and linear layers, one for each post-op that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from math import inf
from types import MappingProxyType
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.contract import Contract, Sample, adversarial_codes, output_for, real_values
from qfunc.edge.kernels.conv import ConvCall, OnednnConv, OnednnConvAdd
from qfunc.edge.kernels.linear import LinearCall, OnednnLinear
from qfunc.edge.kernels.post_op import NO_POST_OP, KernelPostOp, PostOpName
from qfunc.engines.post_op import POST_OPS, contract_name
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import PairLayout, PairLayouts, limit_pair_sums

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_ZERO_POINTS = (0, 128, 255)
_INPUT = Affine(0.04, 7)
_OTHER = Affine(0.7, 131)

PostOps: TypeAlias = tuple[KernelPostOp, ...]
RELU: PostOps = (NO_POST_OP, KernelPostOp("relu"))
"""What the contract of a kernel itself covers."""

# The post-ops with a contract of their own, with the numbers and algorithms to check them with.
_POST_OPS: Mapping[str, PostOps] = MappingProxyType(
    {
        "hardtanh": tuple(KernelPostOp("hardtanh", bounds) for bounds in ((0.0, 1.1), (-0.7, inf), (-inf, 0.6))),
        "hardswish": (KernelPostOp("hardswish"),),
        "silu": (KernelPostOp("silu"),),
        "leaky_relu": tuple(KernelPostOp("leaky_relu", (slope,)) for slope in (0.01, 0.3, -0.5)),
        "tanh": (KernelPostOp("tanh"),),
        "gelu": (KernelPostOp("gelu", (), "none"), KernelPostOp("gelu", (), "tanh")),
    }
)
_MEANING: Mapping[PostOpName, Callable[..., Tensor]] = MappingProxyType(
    {
        "none": lambda x: x,
        "relu": torch.relu,
        "hardtanh": torch.clamp,
        "hardswish": F.hardswish,
        "silu": F.silu,
        "leaky_relu": F.leaky_relu,
        "tanh": torch.tanh,
        "gelu": F.gelu,
    }
)


def apply_post_op(post_op: KernelPostOp, x: Tensor) -> Tensor:
    """The float meaning of a post-op.

    >>> apply_post_op(KernelPostOp("hardtanh", (0.0, 6.0)), torch.tensor([-1.0, 2.0, 9.0]))
    tensor([0., 2., 6.])
    """
    options = {"approximate": post_op.algorithm} if post_op.algorithm else {}
    return _MEANING[post_op.name](x, *post_op.scalars, **options)


@dataclass(frozen=True, slots=True)
class ConvShape:
    """A convolution worth checking; `weight` is `[out_channels, in_channels / groups]`."""

    in_channels: int
    out_channels: int
    kernel: int
    groups: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    size: int = 6
    thorough: bool = True
    """Whether to try more than random codes and all 255."""

    def codes(self, shape: tuple[int, ...], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """The codes to check it with."""
        return islice(adversarial_codes(shape, generator), None if self.thorough else 2)


CONV_SHAPES = (
    ConvShape(3, 16, 3, padding=1),
    ConvShape(16, 24, 1),
    ConvShape(16, 16, 3, groups=16, padding=1),
    ConvShape(12, 8, 3, groups=4, stride=2, padding=2, dilation=2),
    ConvShape(5, 7, 2, stride=2),
    # torch's x86 engine hands convolutions of more than 100 groups to fbgemm, even on a CPU with VNNI.
    ConvShape(104, 104, 3, groups=104, padding=1, size=4, thorough=False),
)


def weights(shape: tuple[int, ...], layout: PairLayout, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random `int8` weights with their scales, as large as the host's kernels bear; one channel is all maximal."""
    real = torch.randn(shape, generator=generator)
    real[0] = 1.0
    peak = real.abs().flatten(1).amax(1)
    scale = limit_pair_sums(real, peak / 127, layout)
    codes = (real / scale.reshape(-1, *[1] * (len(shape) - 1))).round().clamp(-128, 127)
    return codes.to(torch.int8), scale


@dataclass(frozen=True, slots=True)
class ConvSetup:
    """Everything of a convolution but its input."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    call: ConvCall


def conv_reference(sample: Sample) -> Tensor:
    """Float64 convolution of the dequantized codes (+ the second operand), then the post-op."""
    setup: ConvSetup = sample.setup
    call, weight = setup.call, setup.weight
    dims = weight.dim() - 2
    real = real_values(sample.tensors[0], Affine(call.input_scale, call.input_zero_point))
    scaled = weight.double() * setup.scale.double().reshape(-1, *[1] * (dims + 1))
    bias = None if setup.bias is None else setup.bias.double()
    assert not isinstance(call.padding, str)
    result = _CONV[dims](real, scaled, bias, call.stride, call.padding, call.dilation, call.groups)
    if len(sample.tensors) > 1:
        result = result + real_values(sample.tensors[1], _OTHER)
    return apply_post_op(call.post_op, result)


def conv_kernel(sample: Sample) -> Tensor:
    """The convolution kernel on a sample."""
    setup: ConvSetup = sample.setup
    parts = (setup.weight, setup.scale, setup.bias, setup.call)
    if len(sample.tensors) > 1:
        return OnednnConvAdd(*parts, _OTHER)(*sample.tensors)  # type: ignore[no-any-return]
    return OnednnConv(*parts)(*sample.tensors)  # type: ignore[no-any-return]


def conv_samples(dims: int, layouts: PairLayouts, posts: PostOps = RELU, *, add: bool) -> Iterator[Sample]:
    """Each shape with each awkward input; zero points, bias and post-op take turns."""
    generator = torch.Generator().manual_seed(dims)
    turn = 0
    # Activation functions bend near zero, so that small results tell more of them.
    given, shapes = (_INPUT.scale, CONV_SHAPES) if posts is RELU else (_INPUT.scale / 10, CONV_SHAPES[::2])
    for shape in shapes:
        filters = (shape.out_channels, shape.in_channels // shape.groups, *(shape.kernel,) * dims)
        weight, scale = weights(filters, layouts.of(filters, shape.groups), generator)
        bias = torch.randn(shape.out_channels, generator=generator)
        full = (2, shape.in_channels, *(shape.size - axis for axis in range(dims)))
        for label, codes in shape.codes(full, generator):
            turn += 1
            call = ConvCall(
                given, _ZERO_POINTS[turn % 3], 1.0, 0, "float32",
                (shape.stride,) * dims, (shape.padding,) * dims, (shape.dilation,) * dims, shape.groups,
                post_op=posts[turn % len(posts)],
            )  # fmt: skip
            setup = ConvSetup(weight, scale, bias if turn % 4 else None, call)
            sample = Sample(f"{shape}, {label}", (codes,), setup, None)
            size = conv_reference(sample).shape
            if add:
                other = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
                sample = replace(sample, tensors=(codes, other))
            elif turn % 5 == 0:
                yield sample
                continue
            output = output_for(conv_reference(sample))
            call = replace(call, output_scale=output.scale, output_zero_point=output.zero_point, output_dtype="uint8")
            yield replace(sample, setup=replace(setup, call=call), output=output)


@dataclass(frozen=True, slots=True)
class LinearSetup:
    """Everything of a linear layer but its input."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    call: LinearCall


def linear_reference(sample: Sample) -> Tensor:
    """Float64 linear map of the dequantized codes."""
    setup: LinearSetup = sample.setup
    call = setup.call
    real = real_values(sample.tensors[0], Affine(call.input_scale, call.input_zero_point, call.input_dtype))
    scaled = setup.weight.double() * setup.scale.double()[:, None]
    bias = None if setup.bias is None else setup.bias.double()
    return apply_post_op(call.post_op, F.linear(real, scaled, bias))


def linear_kernel(sample: Sample) -> Tensor:
    """The linear kernel on a sample."""
    setup: LinearSetup = sample.setup
    layer = OnednnLinear(setup.weight, setup.scale, setup.bias, setup.call)
    return layer(*sample.tensors)  # type: ignore[no-any-return]


def linear_samples(layouts: PairLayouts, posts: PostOps = RELU) -> Iterator[Sample]:
    """Several ranks and sizes, `uint8` and `int8` activations, code and float32 output."""
    generator = torch.Generator().manual_seed(4)
    turn = 0
    for shape, outs in (((3, 8), 5), ((1, 64), 32), ((2, 5, 33), 7), ((16, 3), 16)):
        weight, scale = weights((outs, shape[-1]), layouts.dense, generator)
        bias = torch.randn(outs, generator=generator)
        for label, codes in adversarial_codes(shape, generator):
            turn += 1
            signed = turn % 3 == 0
            x = codes.to(torch.int16).sub_(128).to(torch.int8) if signed else codes
            zero_point = _ZERO_POINTS[turn % 3] if not signed else (0, -128, 127)[turn % 3]
            call = LinearCall(
                0.01, zero_point, 1.0, 0, "float32", "int8" if signed else "uint8", posts[turn % len(posts)]
            )
            setup = LinearSetup(weight, scale, bias if turn % 4 else None, call)
            sample = Sample(f"{shape} -> {outs}, {label}", (x,), setup, None)
            if turn % 5 == 0:
                yield sample
                continue
            output = output_for(linear_reference(sample))
            call = replace(call, output_scale=output.scale, output_zero_point=output.zero_point, output_dtype="uint8")
            yield replace(sample, setup=replace(setup, call=call), output=output)


def weighted_contracts(layouts: PairLayouts) -> Iterator[Contract]:
    """The contracts of each kernel, itself and with each of its post-ops, with weights that these layouts bear."""
    for kernel, posts in POST_OPS.items():
        engine, _, kind = kernel.partition(".")
        if engine != "onednn":
            continue
        for post in ("relu", *(name for name in posts if name != "relu")):
            cases = RELU if post == "relu" else _POST_OPS[post]
            name = contract_name(kernel, post)
            if kind == "linear":
                yield Contract(name, linear_kernel, linear_reference, partial(linear_samples, layouts, cases))
                continue
            samples = partial(conv_samples, int(kind[4]), layouts, cases, add=kind.endswith("_add"))
            yield Contract(name, conv_kernel, conv_reference, samples)
