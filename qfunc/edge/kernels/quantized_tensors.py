"""torch's quantized tensors: made of floats, turned to floats, padded."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc.numerics.grid import Affine


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

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        return torch.quantize_per_tensor(x.to(torch.float32), self.scale, self.zero_point, torch.quint8)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"scale={self.scale:.6g}, zero_point={self.zero_point}"


class DequantizeTensor(nn.Module):
    """A quantized tensor to float32."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        return x.dequantize()
