"""Transposed convolutions on plain `uint8`, as one ordinary convolution of oneDNN's.

With stride `s` an output at `q` (before `padding` is cut off) is a sum over those taps `k` alone for which
`k * dilation = q (mod s)`: each of the `s` phases `q mod s` is an ordinary convolution with some of the taps. One
convolution computes all phases, as further output channels over the union of their taps, and its result is interleaved
and cropped. With more dimensions there is a phase for each combination. Stride 1 is an ordinary convolution with
flipped taps.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from qfunc.edge.kernels.base import OutputDType
from qfunc.edge.kernels.conv import ConvCall, OnednnConv
from qfunc.edge.kernels.post_op import NO_POST_OP, KernelPostOp


@dataclass(frozen=True, slots=True)
class ConvTransposeCall:
    """The literals of one quantized transposed convolution.

    `stride`, `padding`, `output_padding`, `dilation` have one entry per spatial dimension. With
    `output_dtype="float32"` the output qparams are 1.0 and 0.
    """

    input_scale: float
    input_zero_point: int
    output_scale: float
    output_zero_point: int
    output_dtype: OutputDType
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    post_op: KernelPostOp = NO_POST_OP

    def __post_init__(self) -> None:
        lengths = {len(self.stride), len(self.padding), len(self.output_padding), len(self.dilation)}
        assert len(lengths) == 1, f"one entry for each spatial dimension: {self}"
        assert min(*self.stride, *self.dilation, self.groups) >= 1, f"{self}"
        assert min(*self.padding, *self.output_padding) >= 0, f"{self}"
        spans = zip(self.output_padding, self.stride, self.dilation, strict=True)
        assert all(extra < max(s, d) for extra, s, d in spans), "output_padding is below stride or dilation"


@dataclass(frozen=True, slots=True)
class _Axis:
    """One spatial dimension of a transposed convolution with `taps` taps."""

    taps: int
    stride: int
    padding: int
    output_padding: int
    dilation: int

    @property
    def span(self) -> int:
        """From the first tap to the last, in outputs."""
        return self.dilation * (self.taps - 1)

    @property
    def reach(self) -> int:
        """From the first tap to the last of the ordinary convolution, in inputs."""
        return self.span // self.stride

    @property
    def conv_dilation(self) -> int:
        """The dilation of the ordinary convolution, whose taps are put where they belong for other strides than 1."""
        return self.dilation if self.stride == 1 else 1

    @property
    def conv_padding(self) -> int:
        """What the ordinary convolution pads on both sides, so that nothing of the result is missing."""
        before = self.reach - self.padding // self.stride
        behind = (self.span + self.output_padding - self.padding) // self.stride
        return max(before, behind, 0)

    @property
    def start(self) -> int:
        """Where the result begins among the interleaved phases."""
        return self.padding - (self.reach - self.conv_padding) * self.stride

    def size(self, given: int) -> int:
        """The size of the result."""
        return (given - 1) * self.stride - 2 * self.padding + self.span + self.output_padding + 1

    def places(self) -> list[int]:
        """Where each tap goes, in a row of the taps of all phases."""
        if self.stride == 1:
            return list(reversed(range(self.taps)))
        at = [divmod(tap * self.dilation, self.stride) for tap in range(self.taps)]
        return [phase * (self.reach + 1) + self.reach - offset for offset, phase in at]

    @property
    def row(self) -> tuple[int, int]:
        """Phases, and the taps of each."""
        return self.stride, (self.taps if self.stride == 1 else self.reach + 1)


class OnednnConvTranspose(OnednnConv):
    """A 1d, 2d or 3d transposed convolution, any groups, on `uint8` codes; the result is channels-last.

    `weight` is `int8 [in_channels, out_channels / groups, *kernel]`, symmetric per output channel with `weight_scale`
    (`float32 [out_channels]`); `bias` is `float32 [out_channels]` or None. The buffers hold them arranged by phases:
    `int8 [groups * phases * out_channels / groups, in_channels / groups, *taps]`. Input is plain `uint8` in any memory
    format, batched or not; output is plain codes or float32. Post-ops: as `OnednnConv`'s.
    """

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, call: ConvTransposeCall) -> None:
        dims = len(call.stride)
        assert weight.dim() == dims + 2, f"{dims} spatial dimensions"
        assert weight.shape[0] % call.groups == 0, "in_channels is a multiple of groups"
        assert weight.numel() > 0, f"weight is empty: {tuple(weight.shape)}"
        assert weight_scale.shape == (weight.shape[1] * call.groups,), f"weight_scale {tuple(weight_scale.shape)}"
        assert bias is None or bias.shape == weight_scale.shape, "one bias a channel"
        geometry = zip(weight.shape[2:], call.stride, call.padding, call.output_padding, call.dilation, strict=True)
        axes = tuple(_Axis(*axis) for axis in geometry)
        # Kernels that pad by more than they reach are rare, and so is what asks for it.
        by_hand = any(axis.conv_padding > axis.row[1] * axis.conv_dilation - axis.conv_dilation for axis in axes)
        padding = tuple(axis.conv_padding for axis in axes)
        ordinary = ConvCall(
            call.input_scale, call.input_zero_point, call.output_scale, call.output_zero_point, call.output_dtype,
            (1,) * dims, (0,) * dims if by_hand else padding, tuple(axis.conv_dilation for axis in axes), call.groups,
            post_op=call.post_op,
        )  # fmt: skip
        arranged = _arranged(weight, axes, call.groups)
        offset = None if bias is None else _per_phase(bias, call)
        super().__init__(arranged, _per_phase(weight_scale, call), offset, ordinary)
        self.transposed, self._axes, self._kernel = call, axes, tuple(weight.shape)
        if by_hand:
            self._pad = [width for pad in reversed(padding) for width in (pad, pad)]

    def forward(self, x: Tensor) -> Tensor:
        """The transposed convolution of the codes `x`."""
        if torch.compiler.is_compiling():
            return self._uncompiled(x)
        if x.dim() == self._dims + 1:
            return self.forward(x.unsqueeze(0)).squeeze(0)
        sizes = self._sizes(x)
        return self._interleaved(self._run(x), sizes)

    def _sizes(self, x: Tensor) -> list[int]:
        """The sizes of the result; an input that has none is refused."""
        fits = x.dim() == self._dims + 2 and x.shape[1] == self._kernel[0] and min(x.shape[2:]) > 0
        sizes = [axis.size(given) for axis, given in zip(self._axes, x.shape[2:], strict=True)] if fits else []
        if not sizes or min(sizes) < 1:
            raise RuntimeError(
                f"quantized transposed convolution with weight {self._kernel}, groups {self.transposed.groups} and "
                f"padding {self.transposed.padding} cannot take an input of shape {tuple(x.shape)}"
            )
        return sizes

    def _interleaved(self, phases: Tensor, sizes: list[int]) -> Tensor:
        """The phases, which are channels, at their places in space."""
        strides, groups, dims = self.transposed.stride, self.transposed.groups, self._dims
        last = phases.movedim(1, -1)
        steps = last.shape[1:-1]
        outs = self._kernel[1] * groups
        if prod(strides) > 1:
            # [batch, *steps, groups, *strides, channels of a group] -> each stride behind its steps
            apart = last.reshape(last.shape[0], *steps, groups, *strides, self._kernel[1])
            order = [axis for d in range(dims) for axis in (1 + d, 2 + dims + d)]
            together = apart.permute(0, *order, 1 + dims, 2 + 2 * dims)
            grown = [step * stride for step, stride in zip(steps, strides, strict=True)]
            last = together.reshape(last.shape[0], *grown, outs)
        whole = last.shape[1:-1]
        for d, (axis, size) in enumerate(zip(self._axes, sizes, strict=True)):
            last = last.narrow(1 + d, axis.start, size)
        return (last if list(whole) == sizes else last.contiguous()).movedim(-1, 1)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        call, kernel = self.transposed, self._kernel
        post_op = "" if call.post_op == NO_POST_OP else f", {call.post_op}"
        return (
            f"{kernel[0]}, {kernel[1] * call.groups}, kernel={kernel[2:]}, stride={call.stride}, "
            f"padding={call.padding}, output_padding={call.output_padding}, dilation={call.dilation}, "
            f"groups={call.groups}{post_op}, scale={call.output_scale:.6g}, zero_point={call.output_zero_point}, "
            f"dtype={call.output_dtype}"
        )


def _arranged(weight: Tensor, axes: tuple[_Axis, ...], groups: int) -> Tensor:
    """The weight of the ordinary convolution whose output channels are all phases."""
    ins, outs = weight.shape[0] // groups, weight.shape[1]
    arranged = weight.reshape(groups, ins, outs, *weight.shape[2:])
    for d, axis in enumerate(axes):
        at = 3 + 2 * d
        shape = list(arranged.shape)
        shape[at] = prod(axis.row)
        spread = arranged.new_zeros(shape).index_copy(at, torch.tensor(axis.places()), arranged)
        arranged = spread.reshape(*shape[:at], *axis.row, *shape[at + 1 :])
    phases, taps = [3 + 2 * d for d in range(len(axes))], [4 + 2 * d for d in range(len(axes))]
    ordered = arranged.permute(0, *phases, 2, 1, *taps)
    count = groups * prod(axis.stride for axis in axes) * outs
    return ordered.reshape(count, ins, *(axis.row[1] for axis in axes)).contiguous()


def _per_phase(channels: Tensor, call: ConvTransposeCall) -> Tensor:
    """What each output channel has, for all phases of it."""
    grouped = channels.reshape(call.groups, 1, -1)
    return grouped.expand(-1, prod(call.stride), -1).reshape(-1).contiguous()
