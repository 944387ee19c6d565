"""Engine `"quantized"`: transposed convolutions, and the layers that only torch's onednn engine fuses with more.

The latter run while that engine is active, and no other: each call makes it so, one call after another.
TorchScript cannot, so that a scripted module needs `torch.backends.quantized.engine = "onednn"`, or raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.base import outside_compile
from qfunc.edge.kernels.quantized import Packed, PackedConv, QConvCall, QuantizedLinear, TorchEngine, active_engine
from qfunc.numerics.grid import Affine


@dataclass(frozen=True, slots=True)
class QTransposedCall:
    """The literals of a transposed convolution on quantized tensors, per spatial dimension."""

    output_scale: float
    output_zero_point: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1


_TRANSPOSED_PREPACK = {
    1: torch.ops.quantized.conv_transpose1d_prepack,
    2: torch.ops.quantized.conv_transpose2d_prepack,
    3: torch.ops.quantized.conv_transpose3d_prepack,
}


class PackedTransposed(Packed):
    """A weight `[in_channels, out_channels / groups, *kernel]` of one scale: torch has no kernel for more."""

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, call: QTransposedCall, engine: TorchEngine
    ) -> None:
        super().__init__(weight, weight_scale, bias, engine)
        dims = weight.dim() - 2
        sizes = (call.stride, call.padding, call.output_padding, call.dilation)
        assert all(len(size) == dims for size in sizes), f"{dims} spatial dimensions"
        # torch divides by these, and a division by zero ends the process
        assert call.groups > 0 and min(*call.stride, *call.dilation) > 0, f"{call}"
        assert weight.shape[0] % call.groups == 0, f"{weight.shape[0]} channels in {call.groups} groups"
        assert bias is None or bias.shape == (weight.shape[1] * call.groups,), "one bias a channel"
        self.stride = list(call.stride)
        self.padding = list(call.padding)
        self.output_padding = list(call.output_padding)
        self.dilation = list(call.dilation)
        self.groups: int = call.groups
        self.scale: float = call.output_scale
        self.zero_point: int = call.output_zero_point
        self.repack()

    @torch.jit.unused
    def _check(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        assert weight.dtype == torch.int8 and weight.numel() > 0, f"{weight.dtype} {tuple(weight.shape)}"
        assert weight_scale.dtype == torch.float32 and weight_scale.shape == (1,), "one float32 scale"
        assert bias is None or bias.dtype == torch.float32, "a float32 bias"

    @torch.jit.unused
    def _pack(self) -> Any:
        weight = torch._make_per_tensor_quantized_tensor(self.weight, self.weight_scale.item(), 0)
        geometry = (self.stride, self.padding, self.output_padding, self.dilation, self.groups)
        return _TRANSPOSED_PREPACK[self.weight.dim() - 2](weight, self.bias, *geometry)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"{tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}, "
            f"output_padding={self.output_padding}, dilation={self.dilation}, groups={self.groups}, "
            f"scale={self.scale:.6g}, zero_point={self.zero_point}, engine={self.engine}"
        )


class QuantizedConvTranspose1d(PackedTransposed):
    """`quantized.conv_transpose1d`."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.conv_transpose1d(x, self.packed, self.scale, self.zero_point)
        return out


class QuantizedConvTranspose2d(PackedTransposed):
    """`quantized.conv_transpose2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.conv_transpose2d(x, self.packed, self.scale, self.zero_point)
        return out


class QuantizedConvTranspose3d(PackedTransposed):
    """`quantized.conv_transpose3d`."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.conv_transpose3d(x, self.packed, self.scale, self.zero_point)
        return out


QUANTIZED_CONV_TRANSPOSE = {1: QuantizedConvTranspose1d, 2: QuantizedConvTranspose2d, 3: QuantizedConvTranspose3d}


class UnderOnednn:
    """What only torch's onednn engine runs, which is made active for it, but not by TorchScript."""

    def _run(self, operands: list[Tensor]) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            return self._fused(operands)
        return self._under_onednn(operands)

    @torch.jit.unused
    @outside_compile
    def _under_onednn(self, operands: list[Tensor]) -> Tensor:
        with active_engine("onednn"):
            return self._fused(operands)

    def _fused(self, operands: list[Tensor]) -> Tensor:
        """The result of the engine's kernel."""
        raise NotImplementedError


class QuantizedConvAdd2d(UnderOnednn, PackedConv):
    """`quantized.conv2d_add` (+ ReLU) of torch's onednn engine: `conv(x) + other` in one kernel.

    The kernel writes into its accumulator. `overwrite=True` lets that be `other` itself: only for a caller who knows
    that nobody reads it afterwards. Where `other` has another shape than the convolution's result, or oneDNN may be
    wrong on an input so small, it computes in float.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        call: QConvCall,
        engine: TorchEngine,
        *,
        overwrite: bool = False,
    ) -> None:
        assert weight.dim() == 4 and engine == "onednn", "torch's onednn engine has it in two dimensions"
        super().__init__(weight, weight_scale, bias, call, engine)
        self.overwrite: bool = overwrite

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        """The quantized result."""
        x = self._before(x)
        if list(other.shape) != self._output_shape(x) or self._is_small(x):
            return self._in_float(x, other)
        accumulator = other if self.overwrite else other.clone()
        if self.thin:
            x = x.repeat_interleave(2, 1)
        return self._run([x, accumulator])

    def _fused(self, operands: list[Tensor]) -> Tensor:
        x, accumulator = operands[0], operands[1]
        if self.relu:
            fused: Tensor = torch.ops.quantized.conv2d_add_relu(
                x, accumulator, self.packed, self.scale, self.zero_point
            )
            return fused
        out: Tensor = torch.ops.quantized.conv2d_add(x, accumulator, self.packed, self.scale, self.zero_point)
        return out

    def _output_shape(self, x: Tensor) -> list[int]:
        return [x.size(0), self.weight.size(0)] + self._sizes(x)  # noqa: RUF005 - TorchScript unpacks no lists

    def _is_small(self, x: Tensor) -> bool:
        missing = 0
        for axis, least in enumerate(self.least):
            missing = max(missing, least - x.size(axis + 2))
        return missing > 0

    def _in_float(self, x: Tensor, other: Tensor) -> Tensor:
        weight = self.weight.to(torch.float32) * self.weight_scale.reshape(-1, 1, 1, 1)
        value = F.conv2d(x.dequantize(), weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        value = value + other.dequantize()
        if self.relu:
            value = value.relu()
        return torch.quantize_per_tensor(value, self.scale, self.zero_point, torch.quint8)


class QuantizedLinearLeakyReLU(UnderOnednn, QuantizedLinear):
    """`quantized.linear_leaky_relu` of torch's onednn engine."""

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        output: Affine,
        engine: TorchEngine,
        *,
        negative_slope: float,
    ) -> None:
        super().__init__(weight, weight_scale, bias, output, engine)
        self.negative_slope: float = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        return self._run([x])

    def _fused(self, operands: list[Tensor]) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_leaky_relu(
            operands[0], self.packed, self.scale, self.zero_point, self.negative_slope
        )
        return out


class QuantizedLinearTanh(UnderOnednn, QuantizedLinear):
    """`quantized.linear_tanh` of torch's onednn engine."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        return self._run([x])

    def _fused(self, operands: list[Tensor]) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_tanh(operands[0], self.packed, self.scale, self.zero_point)
        return out
