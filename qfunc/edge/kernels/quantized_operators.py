"""Engine `"quantized"`: products, norms, activations and joins with qparams of their own, on quantized tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qfunc.edge.kernels.base import keeping_dtype
from qfunc.edge.kernels.quantized_tensors import pad_quantized
from qfunc.numerics.grid import Affine


class Quantized(nn.Module):
    """A kernel that writes `quint8` tensors of the scale and the zero point that it is made with."""

    def __init__(self, output: Affine) -> None:
        super().__init__()
        assert output.dtype == "uint8", "activations are quint8"
        self.training = False
        self.scale: float = output.scale
        self.zero_point: int = output.zero_point

    @torch.jit.unused
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """The factors of norms stay float32, as their kernels take them."""
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"scale={self.scale:.6g}, zero_point={self.zero_point}"


class QuantizedMatmul(Quantized):
    """`quantized.matmul`."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.matmul(x, y, self.scale, self.zero_point)
        return out


class QuantizedNumber(Quantized):
    """`quantized.add` or `quantized.mul` with a number, which is a code of a scale of its own."""

    def __init__(self, output: Affine, number: float, *, product: bool, relu: bool = False) -> None:
        super().__init__(output)
        self.number: float = float(number)
        self.product: bool = product
        self.relu: bool = relu

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        # 255 steps: torch's qnnpack engine refuses sums of very different scales.
        step = abs(self.number) / 255.0 if self.number != 0.0 else self.scale
        codes = torch.full([1] * x.dim(), 255 if self.number > 0.0 else 0, dtype=torch.uint8)
        number = torch._make_per_tensor_quantized_tensor(codes, step, 255 if self.number < 0.0 else 0)
        if self.product:
            if self.relu:
                fused: Tensor = torch.ops.quantized.mul_relu(x, number, self.scale, self.zero_point)
                return fused
            scaled: Tensor = torch.ops.quantized.mul(x, number, self.scale, self.zero_point)
            return scaled
        if self.relu:
            shifted: Tensor = torch.ops.quantized.add_relu(x, number, self.scale, self.zero_point)
            return shifted
        out: Tensor = torch.ops.quantized.add(x, number, self.scale, self.zero_point)
        return out

    def extra_repr(self) -> str:
        """What `repr` shows."""
        name = "mul" if self.product else "add"
        return f"{name} {self.number:g}, relu={self.relu}, {super().extra_repr()}"


class QuantizedStack(Quantized):
    """`torch.stack` by `quantized.cat`: inputs are requantized to the output's qparams."""

    def __init__(self, output: Affine, dim: int = 0) -> None:
        super().__init__(output)
        self.dim: int = dim

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """The quantized result."""
        rows = [tensor.unsqueeze(self.dim) for tensor in tensors]
        out: Tensor = torch.ops.quantized.cat(rows, self.dim, self.scale, self.zero_point)
        return out


class QuantizedPad(nn.Module):
    """`F.pad` of a quantized tensor; its qparams stay."""

    def __init__(self, pad: tuple[int, ...], mode: str, value: float = 0.0) -> None:
        super().__init__()
        self.pad = list(pad)
        self.mode: str = mode
        self.value: float = value

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        return pad_quantized(x, self.pad, self.mode, self.value)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"pad={self.pad}, mode={self.mode!r}, value={self.value:g}"


class QuantizedELU(Quantized):
    """`quantized.elu`."""

    def __init__(self, output: Affine, alpha: float = 1.0) -> None:
        super().__init__(output)
        self.alpha: float = alpha

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.elu(x, self.scale, self.zero_point, self.alpha)
        return out


class QuantizedLeakyReLU(Quantized):
    """`quantized.leaky_relu`."""

    def __init__(self, output: Affine, negative_slope: float = 0.01) -> None:
        super().__init__(output)
        self.negative_slope: float = negative_slope

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.leaky_relu(x, self.negative_slope, False, self.scale, self.zero_point)
        return out


class QuantizedHardswish(Quantized):
    """`quantized.hardswish`."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        if x.numel() == 0:  # while torch's qnnpack engine is active, the operator divides by it and ends the process
            return torch.quantize_per_tensor(x.dequantize(), self.scale, self.zero_point, torch.quint8)
        out: Tensor = torch.ops.quantized.hardswish(x, self.scale, self.zero_point)
        return out


class QuantizedHardsigmoid(nn.Module):
    """Aten's operator on quantized tensors, which gives codes of 1/256."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        if x.numel() == 0:  # as above
            return torch.quantize_per_tensor(x.dequantize(), 0.00390625, 0, torch.quint8)
        out: Tensor = torch.ops.aten.hardsigmoid(x)
        return out


class QuantizedSigmoid(Quantized):
    """`quantized.sigmoid`, with any qparams."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.sigmoid(x, self.scale, self.zero_point)
        return out


class QuantizedSoftmax(Quantized):
    """`quantized.softmax`."""

    def __init__(self, output: Affine, dim: int) -> None:
        super().__init__(output)
        self.dim: int = dim

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.softmax(x, self.dim, self.scale, self.zero_point)
        return out


class QuantizedMean(nn.Module):
    """Aten's mean of quantized tensors over some dimensions, over all where none are named."""

    def __init__(self, dims: tuple[int, ...], *, keepdim: bool = False) -> None:
        super().__init__()
        self.dims = list(dims)
        self.keepdim: bool = keepdim

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        if x.dim() == 4 and x.size(2) * x.size(3) == 1:
            # with the strides of channels-last memory, which one position leaves open, aten refuses it
            x = x.clone(memory_format=torch.contiguous_format)
        dims = self.dims if len(self.dims) > 0 else list(range(x.dim()))
        return x.mean(dims, self.keepdim)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"dims={self.dims}, keepdim={self.keepdim}"


class QuantizedBatchNorm(Quantized):
    """`quantized.batch_norm` (+ ReLU), of inputs `[batch, channels, ...]`."""

    def __init__(
        self,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        output: Affine,
        *,
        eps: float = 1e-5,
        relu: bool = False,
    ) -> None:
        super().__init__(output)
        self.register_buffer("running_mean", mean)
        self.register_buffer("running_var", var)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eps: float = eps
        self.relu: bool = relu

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        if x.numel() == 0:  # the operator would give it the qparams of its input
            return torch.quantize_per_tensor(x.dequantize(), self.scale, self.zero_point, torch.quint8)
        if self.relu:
            fused: Tensor = torch.ops.quantized.batch_norm_relu(
                x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.scale, self.zero_point
            )
            return fused
        out: Tensor = torch.ops.quantized.batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.scale, self.zero_point
        )
        return out


class _Normed(Quantized):
    def __init__(self, weight: Tensor | None, bias: Tensor | None, output: Affine, eps: float) -> None:
        super().__init__(output)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.eps: float = eps


class QuantizedLayerNorm(_Normed):
    """`quantized.layer_norm`."""

    def __init__(
        self,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        output: Affine,
        *,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(weight, bias, output, eps)
        self.normalized_shape = list(normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.layer_norm(
            x, self.normalized_shape, self.weight, self.bias, self.eps, self.scale, self.zero_point
        )
        return out


class QuantizedGroupNorm(_Normed):
    """`quantized.group_norm`."""

    def __init__(
        self, num_groups: int, weight: Tensor | None, bias: Tensor | None, output: Affine, *, eps: float = 1e-5
    ) -> None:
        assert num_groups > 0, f"{num_groups} groups"
        super().__init__(weight, bias, output, eps)
        self.num_groups: int = num_groups

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.group_norm(
            x, self.num_groups, self.weight, self.bias, self.eps, self.scale, self.zero_point
        )
        return out


class QuantizedInstanceNorm(_Normed):
    """`quantized.instance_norm`, by the statistics of the input; one of less than `batched_rank` axes is no batch."""

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None, output: Affine, eps: float, *, batched_rank: int | None = None
    ) -> None:
        super().__init__(weight, bias, output, eps)
        self.batched_rank: int = batched_rank or 0

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        if x.dim() < self.batched_rank:
            return self._normed(x.unsqueeze(0)).squeeze(0)
        return self._normed(x)

    def _normed(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.instance_norm(
            x, self.weight, self.bias, self.eps, self.scale, self.zero_point
        )
        return out
