"""Engine `"quantized"`: linear layers that quantize or cast their input as the model runs, and tables of vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfunc.edge.kernels.quantized import Packed, TorchEngine


class QuantizedLinearDynamic(Packed):
    """`quantized.linear_dynamic` (+ ReLU): the input gets qparams of its own range; floats in and out.

    `reduce_range` gives it seven bits, for CPUs that add products in int16.
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        engine: TorchEngine,
        *,
        reduce_range: bool = False,
        relu: bool = False,
    ) -> None:
        super().__init__(weight, weight_scale, bias, engine)
        self.reduce_range: bool = reduce_range
        self.relu: bool = relu
        self.repack()

    @torch.jit.unused
    def _pack(self) -> Any:
        return torch.ops.quantized.linear_prepack(self._quantized_weight(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The float result."""
        if x.numel() == 0:  # torch's onednn engine gives another shape
            return torch.zeros(x.shape[:-1] + self.weight.shape[:1])
        if self.relu:
            fused: Tensor = torch.ops.quantized.linear_relu_dynamic(x, self.packed, self.reduce_range)
            return fused
        out: Tensor = torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)
        return out

    def extra_repr(self) -> str:
        """What `repr` shows."""
        shape = f"{self.weight.shape[1]}, {self.weight.shape[0]}"
        return f"{shape}, relu={self.relu}, reduce_range={self.reduce_range}, engine={self.engine}"


class QuantizedLinearFloat16(Packed):
    """`quantized.linear_dynamic_fp16` (+ ReLU) of the input rounded to float16; the weight is a float16 buffer."""

    def __init__(self, weight: Tensor, bias: Tensor | None, engine: TorchEngine, *, relu: bool = False) -> None:
        super().__init__(weight, torch.ones(1), bias, engine)
        self.register_buffer("weight_scale", self.weight_scale, persistent=False)
        self.relu: bool = relu
        self.repack()

    @torch.jit.unused
    def _check(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        assert weight_scale.numel() == 1, "a float weight has no scales"
        assert weight.dtype == torch.float16 and weight.dim() == 2 and weight.numel() > 0, f"{weight.dtype}"
        assert bias is None or bias.shape == weight.shape[:1], "one bias a channel"

    @torch.jit.unused
    def _pack(self) -> Any:
        return torch.ops.quantized.linear_prepack_fp16(self.weight.to(torch.float32), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The float result."""
        x = x.to(torch.float16).to(torch.float32)
        if self.relu:
            fused: Tensor = torch.ops.quantized.linear_relu_dynamic_fp16(x, self.packed)
            return fused
        out: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return out

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, relu={self.relu}, engine={self.engine}"


class PackedTable(Packed):
    """Rows of `uint8` codes, each with a scale and a zero point that is a float."""

    def __init__(self, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor) -> None:
        super().__init__(weight, weight_scale, None, "x86")
        assert weight_zero_point.dtype == torch.float32 and weight_zero_point.shape == weight.shape[:1]
        self.register_buffer("weight_zero_point", weight_zero_point)
        self.repack()

    @torch.jit.unused
    def repack(self) -> None:
        """Pack the present buffers anew: alike for all engines."""
        self.packed = self._pack()

    @torch.jit.unused
    def _check(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        assert bias is None, "a table has none"
        assert weight.dtype == torch.uint8 and weight.dim() == 2 and weight.numel() > 0, f"{weight.dtype}"
        assert weight_scale.dtype == torch.float32 and weight_scale.shape == weight.shape[:1], "one scale a row"

    @torch.jit.unused
    def _pack(self) -> Any:
        zero_point = self.get_buffer("weight_zero_point")
        rows = torch._make_per_channel_quantized_tensor(self.weight, self.weight_scale, zero_point, 0)
        return torch.ops.quantized.embedding_bag_prepack(rows)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.weight.shape[0]}, {self.weight.shape[1]}"


class QuantizedEmbedding(PackedTable):
    """`quantized.embedding_byte`, of indices of any shape."""

    def forward(self, indices: Tensor) -> Tensor:
        """The float rows."""
        rows: Tensor = torch.ops.quantized.embedding_byte(self.packed, indices.reshape(-1).contiguous())
        return rows.reshape(indices.shape + self.weight.shape[1:])


class QuantizedEmbeddingBag(PackedTable):
    """`quantized.embedding_bag_byte`: sums of rows, of two-dimensional indices or of bags that begin at offsets."""

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, weight_zero_point: Tensor, *, include_last_offset: bool = False
    ) -> None:
        super().__init__(weight, weight_scale, weight_zero_point)
        self.include_last_offset: bool = include_last_offset

    def forward(
        self, indices: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """The float sums."""
        starts = None if offsets is None else offsets.contiguous()
        factors = None if per_sample_weights is None else per_sample_weights.contiguous()
        out: Tensor = torch.ops.quantized.embedding_bag_byte(
            self.packed, indices.contiguous(), starts, False, 0, False, factors, None, self.include_last_offset
        )
        return out
