"""The contracts of the kernels of engine `"onednn"`: plain codes in, plain codes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.affine import Clamp, Dequantize, Quantize, tabulate
from qfunc.edge.kernels.arithmetic import Add, Cat, Mul
from qfunc.edge.kernels.base import operator
from qfunc.edge.kernels.contract import Contract, Sample, adversarial_codes, output_for, real_values
from qfunc.edge.kernels.conv import ConvCall, OnednnConv, OnednnConvAdd
from qfunc.edge.kernels.linear import LinearCall, LinearPostOp, OnednnLinear
from qfunc.edge.kernels.pool import AdaptiveAvgPool, AvgPool, MaxPool, Mean
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import PairLayout, limit_pair_sums

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}
_ZERO_POINTS = (0, 128, 255)
_INPUT = Affine(0.04, 7)
_OTHER = Affine(0.7, 131)


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


CONV_SHAPES = (
    ConvShape(3, 16, 3, padding=1),
    ConvShape(16, 24, 1),
    ConvShape(16, 16, 3, groups=16, padding=1),
    ConvShape(12, 8, 3, groups=4, stride=2, padding=2, dilation=2),
    ConvShape(5, 7, 2, stride=2),
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
    """Float64 convolution of the dequantized codes (+ the second operand) (+ ReLU)."""
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
    return result.relu() if call.post_op == "relu" else result


def conv_kernel(sample: Sample) -> Tensor:
    """The convolution kernel on a sample."""
    setup: ConvSetup = sample.setup
    parts = (setup.weight, setup.scale, setup.bias, setup.call)
    if len(sample.tensors) > 1:
        return OnednnConvAdd(*parts, _OTHER)(*sample.tensors)  # type: ignore[no-any-return]
    return OnednnConv(*parts)(*sample.tensors)  # type: ignore[no-any-return]


def conv_samples(dims: int, layout: PairLayout, *, add: bool) -> Iterator[Sample]:
    """Each shape with each awkward input; zero points, bias and post-op take turns."""
    generator = torch.Generator().manual_seed(dims)
    turn = 0
    for shape in CONV_SHAPES:
        kernel = (shape.kernel,) * dims
        weight, scale = weights((shape.out_channels, shape.in_channels // shape.groups, *kernel), layout, generator)
        bias = torch.randn(shape.out_channels, generator=generator)
        full = (2, shape.in_channels, *(shape.size - axis for axis in range(dims)))
        for label, codes in adversarial_codes(full, generator):
            turn += 1
            call = ConvCall(
                _INPUT.scale, _ZERO_POINTS[turn % 3], 1.0, 0, "float32",
                (shape.stride,) * dims, (shape.padding,) * dims, (shape.dilation,) * dims, shape.groups,
                post_op=("none", "relu")[turn % 2],
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


_POST: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def linear_reference(sample: Sample) -> Tensor:
    """Float64 linear map of the dequantized codes."""
    setup: LinearSetup = sample.setup
    call = setup.call
    real = real_values(sample.tensors[0], Affine(call.input_scale, call.input_zero_point, call.input_dtype))
    scaled = setup.weight.double() * setup.scale.double()[:, None]
    return _POST[call.post_op](F.linear(real, scaled, None if setup.bias is None else setup.bias.double()))


def linear_kernel(sample: Sample) -> Tensor:
    """The linear kernel on a sample."""
    setup: LinearSetup = sample.setup
    layer = OnednnLinear(setup.weight, setup.scale, setup.bias, setup.call)
    return layer(*sample.tensors)  # type: ignore[no-any-return]


def linear_samples(layout: PairLayout, post_ops: tuple[LinearPostOp, ...]) -> Iterator[Sample]:
    """Several ranks and sizes, `uint8` and `int8` activations, code and float32 output."""
    generator = torch.Generator().manual_seed(4)
    turn = 0
    for shape, outs in (((3, 8), 5), ((1, 64), 32), ((2, 5, 33), 7), ((16, 3), 16)):
        weight, scale = weights((outs, shape[-1]), layout, generator)
        bias = torch.randn(outs, generator=generator)
        for label, codes in adversarial_codes(shape, generator):
            turn += 1
            signed = turn % 3 == 0
            x = codes.to(torch.int16).sub_(128).to(torch.int8) if signed else codes
            zero_point = _ZERO_POINTS[turn % 3] if not signed else (0, -128, 127)[turn % 3]
            call = LinearCall(
                0.01, zero_point, 1.0, 0, "float32", "int8" if signed else "uint8", post_ops[turn % len(post_ops)]
            )
            setup = LinearSetup(weight, scale, bias if turn % 4 else None, call)
            sample = Sample(f"{shape} -> {outs}, {label}", (x,), setup, None)
            if turn % 5 == 0:
                yield sample
                continue
            output = output_for(linear_reference(sample))
            call = replace(call, output_scale=output.scale, output_zero_point=output.zero_point, output_dtype="uint8")
            yield replace(sample, setup=replace(setup, call=call), output=output)


def every_code(label: str, *shape: int) -> Iterator[tuple[str, Tensor]]:
    """All 256 codes, in all memory formats a kernel may meet."""
    generator = torch.Generator().manual_seed(9)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    yield f"{label}, all codes", codes
    yield f"{label}, no codes", codes[:0]
    yield f"{label}, scalar", codes[200]
    for name, x in adversarial_codes(shape, generator):
        yield f"{label}, {name}", x


def _unary(
    name: str,
    make: Callable[[Affine, Affine], torch.nn.Module],
    reference: Callable[[Tensor], Tensor],
    shapes: tuple[tuple[int, ...], ...],
    *,
    same: bool = False,
    all_codes: bool = True,
) -> Contract:
    """The contract of a module that maps codes to codes, over zero points 0, 128 and 255 on both sides."""

    def samples() -> Iterator[Sample]:
        for turn, zero_point in enumerate(_ZERO_POINTS):
            given = Affine(0.05, zero_point)
            output = given if same else Affine(0.031, _ZERO_POINTS[turn - 1])
            for shape in shapes:
                generator = torch.Generator().manual_seed(turn)
                inputs = every_code if all_codes else lambda label, *s: adversarial_codes(s, generator)  # noqa: ARG005, B023
                for label, x in inputs(f"{given} {shape}", *shape):
                    yield Sample(label, (x,), (given, output), output)

    def kernel(sample: Sample) -> Tensor:
        return make(*sample.setup)(sample.tensors[0])  # type: ignore[no-any-return]

    def meaning(sample: Sample) -> Tensor:
        return reference(real_values(sample.tensors[0], sample.setup[0]))

    return Contract(name, kernel, meaning, samples)


def _binary(
    name: str,
    make: Callable[[Affine, Affine, Affine], torch.nn.Module],
    reference: Callable[[Tensor, Tensor], Tensor],
    *,
    same_shape: bool = False,
) -> Contract:
    def samples() -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(6)
        grid = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        pairs = [(grid.repeat(256), grid.repeat_interleave(256))]
        first, second = (list(adversarial_codes((2, 5, 3, 4), generator)) for _ in range(2))
        # Each with the next, so that memory formats differ; the empty batches last, with each other.
        pairs += [(x, y) for (_, x), (_, y) in zip(first, [*second[1:-1], second[0], second[-1]], strict=True)]
        if not same_shape:
            x = torch.randint(0, 256, (2, 5, 3, 4), dtype=torch.uint8, generator=generator)
            pairs += [(x, x[:, :, :1, :1]), (x[:, :, :1, :1], x), (x, x[0, 0, 0]), (x, x[0, 0, 0, 0])]
        for turn, (x, y) in enumerate(pairs):
            left, right = Affine(0.05, _ZERO_POINTS[turn % 3]), Affine(0.037, _ZERO_POINTS[(turn + 1) % 3])
            output = output_for(reference(real_values(x, left), real_values(y, right)))
            yield Sample(f"{tuple(x.shape)}, {tuple(y.shape)}", (x, y), (left, right, output), output)

    def kernel(sample: Sample) -> Tensor:
        return make(*sample.setup)(*sample.tensors)  # type: ignore[no-any-return]

    def meaning(sample: Sample) -> Tensor:
        left, right, _ = sample.setup
        return reference(real_values(sample.tensors[0], left), real_values(sample.tensors[1], right))

    return Contract(name, kernel, meaning, samples)


class _OnednnBinary(torch.nn.Module):
    """`onednn.qadd.tensor` and its like: no kernel of qfunc's, measured so that the report can say why."""

    def __init__(self, name: str, left: Affine, right: Affine, output: Affine) -> None:
        super().__init__()
        self._operator = operator("onednn", name, "tensor")
        self._left, self._right = (left.scale, left.zero_point), (right.scale, right.zero_point)
        self._output = (output.scale, output.zero_point, torch.uint8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self._operator is None:
            raise RuntimeError("this torch has no such operator")
        return self._operator(x, *self._left, y, *self._right, *self._output)  # type: ignore[no-any-return]


def _shapes(dims: int) -> tuple[tuple[int, ...], ...]:
    return ((2, 5, *(7, 6, 5)[:dims]), (1, 16, *(8, 5, 4)[:dims]))


def _pools(dims: int) -> Iterator[Contract]:
    suffix = f"pool{dims}d"

    def window(value: int) -> tuple[int, ...]:
        return (value,) * dims

    max_options = (window(3), window(2), window(1), window(1))
    yield _unary(
        f"max_{suffix}",
        lambda _a, _b: MaxPool(*max_options, ceil_mode=True),
        lambda x: _MAX_POOL[dims](x, *max_options, ceil_mode=True),
        _shapes(dims), same=True, all_codes=False,
    )  # fmt: skip
    yield _unary(
        f"avg_{suffix}",
        lambda a, b: AvgPool(window(3), a, b, stride=window(2), padding=window(1), ceil_mode=True),
        lambda x: _AVG_POOL[dims](x, window(3), window(2), window(1), ceil_mode=True),
        _shapes(dims), all_codes=False,
    )  # fmt: skip
    yield _unary(
        f"adaptive_avg_{suffix}",
        lambda a, b: AdaptiveAvgPool(window(2), a, b),
        lambda x: _ADAPTIVE[dims](x, window(2)),
        _shapes(dims), all_codes=False,
    )  # fmt: skip


def onednn_contracts(layout: PairLayout) -> tuple[Contract, ...]:
    """The contracts of engine `"onednn"`, with weights that a host with this pair layout bears."""
    convs = [
        Contract(f"onednn.conv{dims}d", conv_kernel, conv_reference, partial(conv_samples, dims, layout, add=False))
        for dims in (1, 2, 3)
    ]
    sums = [
        Contract(f"onednn.conv{dims}d_add", conv_kernel, conv_reference, partial(conv_samples, dims, layout, add=True))
        for dims in (1, 2)
    ]
    return (
        *convs,
        *sums,
        Contract("onednn.linear", linear_kernel, linear_reference, partial(linear_samples, layout, ("none", "relu"))),
        Contract(
            "onednn.linear_gelu",
            linear_kernel,
            linear_reference,
            partial(linear_samples, layout, ("gelu", "gelu_tanh")),
        ),
        *plain_contracts(),
        _binary("onednn.qadd.tensor", partial(_OnednnBinary, "qadd"), torch.add, same_shape=True),
        _binary("onednn.qmul.tensor", partial(_OnednnBinary, "qmul"), torch.mul, same_shape=True),
    )


def plain_contracts() -> tuple[Contract, ...]:
    """The kernels that are aten operators on plain codes."""
    shapes = ((2, 5, 7, 6), (3, 16), (1, 3, 4, 5, 2))
    return (
        _unary("table", lambda a, b: tabulate(torch.sigmoid, a, b), torch.sigmoid, (*shapes, (2, 64, 16, 16))),
        _unary("quantize", lambda a, b: torch.nn.Sequential(Dequantize(a), Quantize(b)), lambda x: x, shapes),
        _unary(
            "clamp",
            lambda a, _: Clamp(a.zero_point, None),
            torch.relu,
            shapes,
            same=True,
        ),
        *(contract for dims in (1, 2, 3) for contract in _pools(dims)),
        _unary("mean", lambda a, b: Mean((-1,), a, b), lambda x: x.mean(-1), shapes, all_codes=False),
        _binary("add", Add, torch.add),
        _binary("add_relu", partial(Add, post_op="relu"), lambda x, y: torch.relu(x + y)),
        _binary("mul", Mul, torch.mul),
        _binary(
            "cat",
            lambda a, b, o: _Call(Cat((a, b), o, -1)),
            lambda x, y: torch.cat([x, y], -1),
            same_shape=True,
        ),
    )


class _Call(torch.nn.Module):
    def __init__(self, cat: Cat) -> None:
        super().__init__()
        self.cat = cat

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.cat(tensors)  # type: ignore[no-any-return]
