"""torch's quantized tensors: made of floats, turned to floats, padded."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc.numerics.grid import CODE_RANGE, Affine


def pad_quantized(x: Tensor, pad: list[int], mode: str, value: float = 0.0) -> Tensor:
    """Pad a quantized tensor: by a number, rounded to its codes, or by a mode that only repeats codes.

    >>> x = torch.quantize_per_tensor(torch.tensor([[[1.0, 2.0]]]), 0.5, 3, torch.quint8)
    >>> pad_quantized(x, [1, 0], "circular").dequantize(), pad_quantized(x, [1, 0], "constant").dequantize()
    (tensor([[[2., 1., 2.]]]), tensor([[[0., 1., 2.]]]))
    """
    # Of quantized tensors aten has reflection and constants alone, and no constants for five axes.
    if mode == "constant" or mode == "zeros":
        if x.dim() < 5:
            return F.pad(x, pad, "constant", value)
        code = min(max(round(value / x.q_scale()) + x.q_zero_point(), 0), 255)
        return with_codes(F.pad(x.int_repr(), pad, "constant", float(code)), x)
    return with_codes(F.pad(x.int_repr(), pad, mode), x)


def with_codes(codes: Tensor, like: Tensor) -> Tensor:
    """A quantized tensor of other codes."""
    return torch._make_per_tensor_quantized_tensor(codes, like.q_scale(), like.q_zero_point())


class QuantizeTensor(nn.Module):
    """Float to a `quint8` tensor."""

    def __init__(self, output: Affine) -> None:
        super().__init__()
        assert output.dtype == "uint8", "activations are quint8"
        self.scale: float = output.scale
        self.zero_point: int = output.zero_point
        self.low, self.high = _reals(output, output.bounds)
        self.ends: bool = output.bounds != CODE_RANGE["uint8"]

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        codes = torch.quantize_per_tensor(x.to(torch.float32), self.scale, self.zero_point, torch.quint8)
        return torch.clamp(codes, self.low, self.high) if self.ends else codes

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"scale={self.scale:.6g}, zero_point={self.zero_point}"


class DequantizeTensor(nn.Module):
    """A quantized tensor to float32."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        return x.dequantize()


class Ended(nn.Module):
    """A kernel whose codes are clamped to a part of their dtype, from what `low` to what `high` stands for."""

    def __init__(self, kernel: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.kernel = kernel
        self.low, self.high = low, high
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        """The result for one operand."""
        return torch.clamp(self.kernel(x), self.low, self.high)

    @torch.jit.unused
    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.low:.6g}..{self.high:.6g}"


class EndedBinary(Ended):
    """The same for a kernel of two operands."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """The result for two operands."""
        return torch.clamp(self.kernel(x, y), self.low, self.high)


class EndedJoin(Ended):
    """The same for a kernel of any number of operands."""

    def forward(self, tensors: list[Tensor]) -> Tensor:  # type: ignore[override]
        """The result for all operands."""
        return torch.clamp(self.kernel(tensors), self.low, self.high)


def ended(kernel: nn.Module, output: Affine, ends: tuple[int, int], inputs: tuple[object, ...]) -> nn.Module:
    """The kernel with its codes clamped to `ends`, for the operands `inputs`."""
    low, high = _reals(output, ends)
    make = EndedBinary if len(inputs) == 2 else EndedJoin if isinstance(inputs[0], tuple) else Ended
    return make(kernel, low, high)


def _reals(output: Affine, ends: tuple[int, int]) -> tuple[float, float]:
    """What the least and the largest code stand for."""
    low, high = ends
    return (low - output.zero_point) * output.scale, (high - output.zero_point) * output.scale
