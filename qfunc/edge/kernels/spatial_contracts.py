"""The contracts of transposed convolutions, of norms that stand alone, and of what works on spatial dimensions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.contract import Contract, Sample, adversarial_codes, output_for, real_values
from qfunc.edge.kernels.contract_forms import unary
from qfunc.edge.kernels.conv_transpose import ConvTransposeCall, OnednnConvTranspose
from qfunc.edge.kernels.norm import BatchNorm, PReLU
from qfunc.edge.kernels.post_op import NO_POST_OP, KernelPostOp
from qfunc.edge.kernels.spatial import AdaptiveMaxPool, Interpolate, Pad
from qfunc.edge.kernels.weighted_contracts import apply_post_op, weights
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import PairLayouts

_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_ADAPTIVE: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}
_SIZES = (5, 4, 3)
_CHANNELS = 5
_POSTS = (NO_POST_OP, KernelPostOp("relu"), KernelPostOp("hardtanh", (-0.7, 0.9)))


@dataclass(frozen=True, slots=True)
class TransposedSetup:
    """Everything of a transposed convolution but its input."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    call: ConvTransposeCall


@dataclass(frozen=True, slots=True)
class _Shape:
    """A transposed convolution worth checking."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    padding: int = 0
    output_padding: int = 0
    dilation: int = 1
    groups: int = 1


_SHAPES = (
    _Shape(8, 6, 4, 2, padding=1),
    _Shape(3, 16, 2, 2),
    _Shape(16, 4, 3, 1, padding=1, dilation=2),
    _Shape(4, 8, 3, 2, padding=1, output_padding=1, groups=4),
    _Shape(6, 4, 3, 3, padding=2, output_padding=2, dilation=2, groups=2),
)


def transposed_reference(sample: Sample) -> Tensor:
    """Float64 transposed convolution of the dequantized codes, then the post-op."""
    setup: TransposedSetup = sample.setup
    call, weight = setup.call, setup.weight
    real = real_values(sample.tensors[0], Affine(call.input_scale, call.input_zero_point))
    of_group = setup.scale.double().reshape(call.groups, 1, -1).expand(-1, weight.shape[0] // call.groups, -1)
    scaled = weight.double() * of_group.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    bias = None if setup.bias is None else setup.bias.double()
    geometry = (call.stride, call.padding, call.output_padding, call.groups, call.dilation)
    return apply_post_op(call.post_op, _TRANSPOSED[len(call.stride)](real, scaled, bias, *geometry))


def _transposed_kernel(sample: Sample) -> Tensor:
    setup: TransposedSetup = sample.setup
    kernel = OnednnConvTranspose(setup.weight, setup.scale, setup.bias, setup.call)
    return kernel(*sample.tensors)  # type: ignore[no-any-return]


def _transposed_samples(dims: int, layouts: PairLayouts) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(dims)
    turn = 0
    for shape in _SHAPES:
        outs, ins = shape.out_channels // shape.groups, shape.in_channels // shape.groups
        spatial = (shape.kernel,) * dims
        filters = (shape.out_channels, ins, *spatial)
        weight, scale = weights(filters, "any" if layouts.saturates else "none", generator)
        weight = weight.reshape(shape.groups, outs, ins, *spatial).transpose(1, 2).reshape(-1, outs, *spatial)
        bias = torch.randn(shape.out_channels, generator=generator)
        full = (2, shape.in_channels, *_SIZES[:dims])
        for label, codes in islice(adversarial_codes(full, generator), 6 if dims == 2 else 3):
            turn += 1
            call = ConvTransposeCall(
                0.04, (0, 128, 255)[turn % 3], 1.0, 0, "float32", (shape.stride,) * dims, (shape.padding,) * dims,
                (shape.output_padding,) * dims, (shape.dilation,) * dims, shape.groups, _POSTS[turn % 3],
            )  # fmt: skip
            setup = TransposedSetup(weight, scale, bias if turn % 4 else None, call)
            sample = Sample(f"{shape}, {label}", (codes,), setup, None)
            if turn % 5 == 0:
                yield sample
                continue
            output = output_for(transposed_reference(sample))
            call = replace(call, output_scale=output.scale, output_zero_point=output.zero_point, output_dtype="uint8")
            yield replace(sample, setup=replace(setup, call=call), output=output)


def transposed_contracts(layouts: PairLayouts) -> Iterator[Contract]:
    """The contracts of transposed convolutions, with weights that these layouts bear."""
    for dims in (1, 2, 3):
        samples = partial(_transposed_samples, dims, layouts)
        yield Contract(f"onednn.conv_transpose{dims}d", _transposed_kernel, transposed_reference, samples)


def _codes(dims: int) -> tuple[tuple[int, ...], ...]:
    return ((2, _CHANNELS, *_SIZES[:dims]),)


def _norm_parameters() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    mean, weight, bias = (torch.randn(_CHANNELS, generator=generator) for _ in range(3))
    return mean, torch.rand(_CHANNELS, generator=generator) + 0.1, weight, bias


def spatial_contracts() -> Iterator[Contract]:
    """The kernels of this family that are aten operators on plain codes."""
    mean, var, weight, bias = _norm_parameters()
    shapes = tuple(shape for dims in (0, 1, 2, 3) for shape in _codes(dims))
    yield unary(
        "batch_norm",
        lambda a, b: BatchNorm.of(mean, var, weight, bias, 1e-5, a, b),
        lambda x: F.batch_norm(x, mean.double(), var.double(), weight.double(), bias.double()),
        shapes, all_codes=False,
    )  # fmt: skip
    slopes = torch.tensor([0.25, -1.5, 0.0, 1.0, 3.0])
    yield unary(
        "prelu",
        lambda a, b: PReLU(slopes, a, b),
        lambda x: F.prelu(x, slopes.double()),
        shapes, all_codes=False,
    )  # fmt: skip
    for dims in (1, 2, 3):
        yield unary(
            f"adaptive_max_pool{dims}d",
            partial(_adaptive, dims),
            lambda x, dims=dims: _ADAPTIVE[dims](x, (2,) * dims),  # type: ignore[misc]
            _codes(dims), same=True, all_codes=False,
        )  # fmt: skip
    yield _over_ranks("pad", _pad, _padded)
    yield _over_ranks("interpolate", _resize, _resized)


def _adaptive(dims: int, _given: Affine, _output: Affine) -> AdaptiveMaxPool:
    return AdaptiveMaxPool((2,) * dims)


_Make = Callable[[int, str, Affine], torch.nn.Module]
_Meaning = Callable[[int, str, Tensor], Tensor]
_MODES = {"pad": ("constant", "reflect", "replicate", "circular"), "interpolate": ("nearest", "linear", "area")}


def _over_ranks(name: str, make: _Make, meaning: _Meaning) -> Contract:
    """The contract of a module with modes, in one to three dimensions, of codes of both dtypes."""

    def samples() -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(3)
        turn = 0
        for dims in (1, 2, 3):
            for mode in _MODES[name]:
                for label, codes in islice(adversarial_codes((2, _CHANNELS, *_SIZES[:dims]), generator), 6):
                    turn += 1
                    signed = turn % 4 == 0
                    x = codes.to(torch.int16).sub_(128).to(torch.int8) if signed else codes
                    given = Affine(0.05, (-128, 3, 127)[turn % 3], "int8") if signed else Affine(0.05, turn % 256)
                    yield Sample(f"{mode} {dims}d, {label}", (x,), (dims, mode, given), given)

    def kernel(sample: Sample) -> Tensor:
        return make(*sample.setup)(sample.tensors[0])  # type: ignore[no-any-return]

    def reference(sample: Sample) -> Tensor:
        dims, mode, given = sample.setup
        return meaning(dims, mode, real_values(sample.tensors[0], given))

    return Contract(name, kernel, reference, samples)


def _pad(dims: int, mode: str, given: Affine) -> Pad:
    return Pad((1, 2) * dims, mode, None, given)


def _padded(dims: int, mode: str, real: Tensor) -> Tensor:
    return F.pad(real, (1, 2) * dims, mode=mode)


def _options(dims: int, mode: str) -> dict[str, object]:
    return {"size": (7, 3, 6)[:dims], "align_corners": True if mode == "linear" else None}


def _mode(dims: int, mode: str) -> str:
    return _LINEAR[dims] if mode == "linear" else mode


def _resize(dims: int, mode: str, given: Affine) -> Interpolate:
    return Interpolate(given, _mode(dims, mode), _options(dims, mode))


def _resized(dims: int, mode: str, real: Tensor) -> Tensor:
    return F.interpolate(real, mode=_mode(dims, mode), **_options(dims, mode))  # type: ignore[arg-type]
