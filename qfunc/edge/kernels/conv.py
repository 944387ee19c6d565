"""Convolutions of oneDNN on plain `uint8`: `onednn.qconv_pointwise` and its `sum` form.

The weight is packed for the exact spatial size it runs at, because oneDNN otherwise reorders it at every call (10 to
40 times slower for some layers); the batch size does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.affine import Dequantize, Quantize, clamp_codes
from qfunc.edge.kernels.base import TORCH_DTYPE, Kernel, OutputDType, operator, outside_compile
from qfunc.edge.kernels.post_op import NO_POST_OP, KernelPostOp, PostOpName
from qfunc.numerics.grid import Affine

PaddingMode: TypeAlias = Literal["zeros", "reflect", "replicate", "circular"]

_prepack = operator("onednn", "qconv_prepack")
_pointwise = operator("onednn", "qconv_pointwise")
_binary = operator("onednn", "qconv2d_pointwise", "binary")
_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}

# What the operators compute, by dimensions: in 1d they run with height 1, since the 1d operator has ReLU only.
_PLAIN_POST_OPS: tuple[PostOpName, ...] = ("none", "relu", "hardtanh", "hardswish", "silu")
_HAS: Mapping[int, tuple[PostOpName, ...]] = MappingProxyType({1: _PLAIN_POST_OPS, 2: _PLAIN_POST_OPS, 3: ("none",)})
_SUM_HAS: Mapping[int, tuple[PostOpName, ...]] = MappingProxyType({1: ("none", "relu"), 2: ("none", "relu")})


@dataclass(frozen=True, slots=True)
class ConvCall:
    """The literals of one quantized convolution.

    `stride`, `padding`, `dilation` have one entry per spatial dimension; `padding` may be `"same"` or `"valid"`. With
    `output_dtype="float32"` the output qparams are 1.0 and 0.
    """

    input_scale: float
    input_zero_point: int
    output_scale: float
    output_zero_point: int
    output_dtype: OutputDType
    stride: tuple[int, ...]
    padding: tuple[int, ...] | Literal["same", "valid"]
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: PaddingMode = "zeros"
    post_op: KernelPostOp = NO_POST_OP

    def __post_init__(self) -> None:
        Affine(self.input_scale, self.input_zero_point)
        output_affine(self.output_scale, self.output_zero_point, self.output_dtype)


def output_affine(scale: float, zero_point: int, dtype: OutputDType) -> Affine | None:
    """The qparams of codes, or None for float32, which must come with scale 1.0 and zero point 0."""
    if dtype == "float32":
        assert (scale, zero_point) == (1.0, 0), "float32 output has no qparams"
        return None
    return Affine(scale, zero_point, dtype)


MOST_OF_ONE = 16
"""How many outputs of each of several groups of one channel oneDNN 3.12 is known to compute right on AVX-512."""


def is_thin(weight: Tensor, groups: int) -> bool:
    """Whether oneDNN may be wrong on a convolution of this weight, whose groups have one channel and many outputs."""
    return groups > 1 and weight.shape[1] == 1 and weight.shape[0] > MOST_OF_ONE * groups


def thickened(weight: Tensor) -> Tensor:
    """The weight for twice the channels, of which every second counts nothing."""
    return torch.cat([weight, torch.zeros_like(weight)], 1)


class OnednnConv(Kernel):
    """A 1d, 2d or 3d convolution, any groups, on `uint8` codes; the result is channels-last.

    `weight` is `int8 [out_channels, in_channels / groups, *kernel]`, symmetric per output channel with `weight_scale`
    (`float32 [out_channels]`); `bias` is `float32 [out_channels]` or None. Input is plain `uint8` in any memory
    format, batched or not; output is plain codes or float32. Within one step of the float convolution of the
    dequantized codes, as long as no pair of products saturates int16 (`qfunc.numerics.saturation`).

    Post-ops: relu, hardtanh, hardswish and silu; in 3d relu and hardtanh.
    """

    _operator_has = _HAS

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, call: ConvCall) -> None:
        super().__init__()
        self._constants(weight, weight_scale, bias)
        self.call = call
        dims = self._dims = weight.dim() - 2
        assert weight.shape[0] % call.groups == 0, "out_channels is a multiple of groups"
        assert len(call.stride) == len(call.dilation) == dims, f"{dims} spatial dimensions"
        self._pad, self._padding = _padding(call, tuple(weight.shape[2:]))
        fused = call.post_op.name in self._operator_has[dims]
        self._clamp = None if fused else _clamp_behind(call)
        self._post_op = call.post_op if fused else NO_POST_OP
        self._thin = is_thin(weight, call.groups)
        self._plain = self._pad is None and self._clamp is None and dims == 2 and not self._thin

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of the codes `x`."""
        if torch.compiler.is_compiling():
            return self._uncompiled(x)
        if self._plain:
            entry = self._packs.get(x.shape[2:])
            if entry is not None:
                return _pointwise(x, *entry)  # type: ignore[no-any-return]
        return self._run(x)

    @outside_compile
    def _uncompiled(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def _run(self, x: Tensor) -> Tensor:
        if x.dim() == self._dims + 1:
            return self._run(x.unsqueeze(0)).squeeze(0)
        if self._pad is not None:
            x = pad_codes(x, self._pad, self.call)
        if x.shape[:1] == (0,):
            return self._empty(x)
        if self._is_misread(x):
            return self._within(x.shape[2:])(self._cut(x))  # type: ignore[no-any-return]
        if self._dims != 1:
            return self._convolve(x)
        if x.dim() != 3:
            self._check(x)
        return self._convolve(x.unsqueeze(2)).squeeze(2)

    def _convolve(self, x: Tensor) -> Tensor:
        entry = self._packs.get(x.shape[2:])
        if entry is None:
            entry = self._packed(x.shape[2:], lambda: self._pack(x))
        out: Tensor = _pointwise(self._thickened(x), *entry)
        return out if self._clamp is None else out.clamp_(*self._clamp)

    def _thickened(self, x: Tensor) -> Tensor:
        """What the operator is called with: of a thin convolution each channel twice, the second times zero."""
        return x.repeat_interleave(2, 1) if self._thin else x

    def _is_misread(self, x: Tensor) -> bool:
        """Whether oneDNN's kernels may be wrong on an input of this size.

        Those of oneDNN 3.12 for AVX-512 are, on some shapes, where the window is larger than the input and padding
        makes up for it, or where a single window fits in spite of a stride. Where padding holds a whole window, they
        read what is not theirs, and may end the process.
        """
        if x.dim() != self._dims + 2:
            return False
        call = self.call
        geometry = zip(x.shape[2:], self._extents(), self._padding, self._output_size(x), call.stride, strict=True)
        return any(
            (pad and extent > size) or pad >= extent or (count == 1 and s > 1)
            for size, extent, pad, count, s in geometry
        )

    def _extents(self) -> list[int]:
        """The sizes of the window."""
        return [d * (k - 1) + 1 for d, k in zip(self.call.dilation, self.weight.shape[2:], strict=True)]

    def _cut(self, x: Tensor) -> Tensor:
        """The input padded by hand, and where a single window fits cut to that."""
        self._check(x)
        counts = self._output_size(x)
        if any(self._padding):
            widths = [pad for pad in reversed(self._padding) for _ in range(2)]
            x = F.pad(x, widths, value=self.call.input_zero_point)
        for axis, (extent, count) in enumerate(zip(self._extents(), counts, strict=True)):
            x = x.narrow(2 + axis, 0, extent) if count == 1 else x
        return x

    def _within(self, size: torch.Size) -> OnednnConv:
        """This convolution without padding, and without a stride where a single window fits, for what `_cut` gives."""
        counts = self._output_size(self.weight.new_empty(0, 1, *size))
        strides = tuple(1 if count == 1 else s for count, s in zip(counts, self.call.stride, strict=True))
        call = replace(self.call, padding=(0,) * self._dims, padding_mode="zeros", stride=strides)
        found: OnednnConv = self._packed(("within", *strides), lambda: self._like(call))
        return found

    def _like(self, call: ConvCall) -> OnednnConv:
        return OnednnConv(self.weight, self.weight_scale, self.bias, call)

    def _output_size(self, x: Tensor) -> tuple[int, ...]:
        call, kernel = self.call, self.weight.shape[2:]
        return tuple(
            (size + 2 * pad - dilation * (k - 1) - 1) // stride + 1
            for size, pad, dilation, k, stride in zip(
                x.shape[2:], self._padding, call.dilation, kernel, call.stride, strict=True
            )
        )

    def _check(self, x: Tensor) -> None:
        """Refuse other ranks, and what the primitives answer with garbage: they check less than `F.conv2d`."""
        channels = self.weight.shape[1] * self.call.groups
        if x.dim() != self._dims + 2 or x.shape[1] != channels or min(self._output_size(x)) < 1:
            raise RuntimeError(
                f"quantized convolution with weight {tuple(self.weight.shape)}, groups {self.call.groups} and "
                f"padding {self._padding} cannot take an input of shape {tuple(x.shape)}"
            )

    def _operands(self, x: Tensor) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The operator's arguments about input and weight, packed for `x` as the operator takes it; then the rest's."""
        self._check(x.squeeze(2) if self._dims == 1 else x)
        call, weight = self.call, self.weight
        stride, padding, dilation = list(call.stride), list(self._padding), list(call.dilation)
        if self._dims == 1:
            weight, stride, padding, dilation = weight.unsqueeze(2), [1, *stride], [0, *padding], [1, *dilation]
        geometry = (stride, padding, dilation, call.groups)
        scale, zero_point, shape = call.input_scale, call.input_zero_point, list(x.shape)
        if self._thin:
            weight, shape[1] = thickened(weight), 2 * shape[1]
        packed = _prepack(weight, self.weight_scale, scale, zero_point, *geometry, shape)
        zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
        output = (call.output_scale, call.output_zero_point, TORCH_DTYPE[call.output_dtype])
        return (scale, zero_point, packed, self.weight_scale, zeros), (self.bias, *geometry, *output)

    def _pack(self, x: Tensor) -> tuple[Any, ...]:
        """All arguments of the operator after `x`, so that a call is one look-up and one dispatch."""
        head, tail = self._operands(x)
        return (*head, *tail, *self._post_op.operator)

    def _empty(self, x: Tensor) -> Tensor:
        """The result of an empty batch, without asking the operator."""
        self._check(x)
        shape = (0, self.weight.shape[0], *self._output_size(x))
        return torch.empty(shape, dtype=TORCH_DTYPE[self.call.output_dtype])

    def extra_repr(self) -> str:
        """What `repr` shows."""
        call, shape = self.call, tuple(self.weight.shape)
        post_op = "" if call.post_op == NO_POST_OP else f", {call.post_op}"
        mode = "" if call.padding_mode == "zeros" else f" ({call.padding_mode})"
        return (
            f"{shape[1] * call.groups}, {shape[0]}, kernel={shape[2:]}, stride={call.stride}, "
            f"padding={call.padding}{mode}, dilation={call.dilation}, groups={call.groups}{post_op}, "
            f"scale={call.output_scale:.6g}, zero_point={call.output_zero_point}, dtype={call.output_dtype}"
        )


class OnednnConvAdd(OnednnConv):
    """`conv(x) + other`, then a post-op, in one kernel: 1d and 2d, `uint8` output and `uint8` accumulator.

    The kernel writes into its accumulator. `overwrite=True` lets it write into `other` itself: only for a caller who
    knows that nobody reads `other` afterwards; else a copy is made. `other` has the shape of the output, or broadcasts
    to it; where the output broadcasts to `other`, the sum is taken in float. In 3d the operator does not exist: use
    `OnednnConv` and `Add`. Post-ops: relu and hardtanh.
    """

    _operator_has = _SUM_HAS

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        call: ConvCall,
        other: Affine,
        *,
        overwrite: bool = False,
    ) -> None:
        assert weight.dim() - 2 in (1, 2), "1d and 2d only"
        super().__init__(weight, weight_scale, bias, call)
        assert call.output_dtype == other.dtype == "uint8", "the accumulator is read as uint8"
        self.other = other
        self.overwrite = overwrite

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        """The codes of `conv(x) + other`."""
        if torch.compiler.is_compiling():
            return self._uncompiled_add(x, other)
        if x.dim() == self._dims + 1:
            return self.forward(x.unsqueeze(0), other.unsqueeze(0)).squeeze(0)
        if self._pad is not None:
            x = pad_codes(x, self._pad, self.call)
        if self._is_misread(x):
            return self._within(x.shape[2:])(self._cut(x), other)  # type: ignore[no-any-return]
        if self._dims == 1:
            return self._sum(x.unsqueeze(2), other.unsqueeze(2)).squeeze(2)
        return self._sum(x, other)

    def _like(self, call: ConvCall) -> OnednnConv:
        parts = (self.weight, self.weight_scale, self.bias)
        return OnednnConvAdd(*parts, call, self.other, overwrite=self.overwrite)

    @outside_compile
    def _uncompiled_add(self, x: Tensor, other: Tensor) -> Tensor:
        return self.forward(x, other)

    def _sum(self, x: Tensor, other: Tensor) -> Tensor:
        key = x.shape[2:]
        entry = self._packs.get(key)
        if entry is None:
            entry = self._packed(key, lambda: self._pack(x))
        head, tail, size = entry
        if x.shape[0] == 1 < other.shape[0]:
            x = x.expand(other.shape[0], *x.shape[1:]).contiguous(memory_format=torch.channels_last)
        shape = (x.shape[0], *size)
        if other.shape != shape:
            if torch.broadcast_shapes(other.shape, shape) != shape:  # type: ignore[no-untyped-call]
                return self._in_float(x, other)
            other = other.expand(shape)
        accumulator = other.contiguous(memory_format=torch.channels_last)
        if accumulator is other and not self.overwrite:
            accumulator = other.clone()
        if not x.shape[0]:
            return accumulator
        out: Tensor = _binary(self._thickened(x), *head, accumulator, *tail)
        return out if self._clamp is None else out.clamp_(*self._clamp)

    def _in_float(self, x: Tensor, other: Tensor) -> Tensor:
        """The sum where it is larger than the convolution's result, which the operator would have to spread."""
        head, (bias, *geometry) = self._operands(x)
        value = _pointwise(self._thickened(x), *head, bias, *geometry[:-3], 1.0, 0, torch.float32, "none", [], "")
        value = value + Dequantize(self.other)(other)
        low, high = {"none": (None, None), "relu": (0.0, None)}.get(self.call.post_op.name, self.call.post_op.scalars)
        if (low, high) != (None, None):
            value = value.clamp(low, high)
        codes: Tensor = Quantize(Affine(self.call.output_scale, self.call.output_zero_point))(value)
        return codes

    def _pack(self, x: Tensor) -> tuple[Any, ...]:
        head, tail = self._operands(x)
        name, scalars, _ = self._post_op.operator
        unary = None if self._post_op == NO_POST_OP else name
        added = (self.other.scale, self.other.zero_point, "sum", 1.0, unary, scalars, None)
        size = self._output_size(x.squeeze(2) if self._dims == 1 else x)
        return head, (*tail, *added), (self.weight.shape[0], *((1, *size) if self._dims == 1 else size))

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{super().extra_repr()}, other={self.other}, overwrite={self.overwrite}"


def _clamp_behind(call: ConvCall) -> tuple[float | None, float | None]:
    """The bounds, in units of the output, of a clamp that does the post-op after rounding: rounding keeps order."""
    assert call.post_op.name in ("relu", "hardtanh"), f"the kernel has no post-op {call.post_op}"
    low, high = (0.0, None) if call.post_op.name == "relu" else call.post_op.scalars
    output = output_affine(call.output_scale, call.output_zero_point, call.output_dtype)
    if output is None:
        return low, high
    codes = clamp_codes(low, high, output)
    return codes.low, codes.high


def _padding(call: ConvCall, kernel: tuple[int, ...]) -> tuple[list[int] | None, tuple[int, ...]]:
    """What to pad by hand (as `F.pad` takes it, last dimension first; None for nothing), and what the kernel pads."""
    none = (0,) * len(kernel)
    match call.padding:
        case "valid":
            return None, none
        case "same":
            assert set(call.stride) == {1}, "padding='same' needs stride 1"
            totals = [d * (k - 1) for d, k in zip(call.dilation, kernel, strict=True)]
            sides = [(total // 2, total - total // 2) for total in totals]
        case padding:
            assert len(padding) == len(kernel), f"{len(kernel)} spatial dimensions"
            sides = [(pad, pad) for pad in padding]
    if all(pair == (0, 0) for pair in sides):
        return None, none
    if call.padding_mode == "zeros" and all(left == right for left, right in sides):
        return None, tuple(left for left, _ in sides)
    return [pad for pair in reversed(sides) for pad in pair], none


def pad_codes(x: Tensor, pad: list[int], call: ConvCall) -> Tensor:
    """Pad codes: with the code of zero, or by a mode that only repeats codes; exact either way."""
    if call.padding_mode == "zeros":
        return F.pad(x, pad, value=call.input_zero_point)
    padded = F.pad(x, pad, mode=call.padding_mode)
    memory_format = _CHANNELS_LAST.get(x.dim() - 2)
    return padded if memory_format is None else padded.contiguous(memory_format=memory_format)
