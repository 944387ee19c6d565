"""`onednn.qlinear_pointwise` on plain `uint8` or `int8` activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qfunc.edge.kernels.base import TORCH_DTYPE, Kernel, OutputDType, operator, outside_compile
from qfunc.edge.kernels.conv import output_affine
from qfunc.edge.kernels.post_op import NO_POST_OP, KernelPostOp
from qfunc.numerics.grid import Affine, CodeDType

_prepack = operator("onednn", "qlinear_prepack")
_pointwise = operator("onednn", "qlinear_pointwise")


@dataclass(frozen=True, slots=True)
class LinearCall:
    """The literals of one quantized linear layer; float32 output has qparams 1.0 and 0."""

    input_scale: float
    input_zero_point: int
    output_scale: float
    output_zero_point: int
    output_dtype: OutputDType
    input_dtype: CodeDType = "uint8"
    post_op: KernelPostOp = NO_POST_OP

    def __post_init__(self) -> None:
        Affine(self.input_scale, self.input_zero_point, self.input_dtype)
        output_affine(self.output_scale, self.output_zero_point, self.output_dtype)


class OnednnLinear(Kernel):
    """`linear` over the last dimension of plain codes of any rank of at least 1.

    `weight` is `int8 [out_features, in_features]`, symmetric per row with `weight_scale` (`float32 [out_features]`).
    Packed once: its speed does not depend on the batch it is packed for. Exactness as for `OnednnConv`. It
    takes every post-op there is.
    """

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, call: LinearCall) -> None:
        super().__init__()
        self._constants(weight, weight_scale, bias)
        assert weight.dim() == 2, f"weight {tuple(weight.shape)}"
        self.call = call
        self._dtype = TORCH_DTYPE[call.input_dtype]

    def forward(self, x: Tensor) -> Tensor:
        """The linear map of the codes `x`."""
        if torch.compiler.is_compiling():
            return self._uncompiled(x)
        entry = self._packs.get(0)
        if entry is None:
            entry = self._packed(0, self._pack)
        if x.dtype is not self._dtype:
            raise RuntimeError(f"quantized linear was built for {self._dtype} codes, not {x.dtype}")
        if not x.numel():
            # The operator flattens an empty batch of rank 3 and more.
            return torch.empty((*x.shape[:-1], self.weight.shape[0]), dtype=TORCH_DTYPE[self.call.output_dtype])
        return _pointwise(x, *entry)  # type: ignore[no-any-return]

    @outside_compile
    def _uncompiled(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def _pack(self) -> tuple[Any, ...]:
        call = self.call
        packed = _prepack(self.weight, None)
        zeros = torch.zeros(self.weight.shape[0], dtype=torch.int64)
        given = (call.input_scale, call.input_zero_point, packed, self.weight_scale, zeros, self.bias)
        output = (call.output_scale, call.output_zero_point, TORCH_DTYPE[call.output_dtype])
        return (*given, *output, *call.post_op.operator)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        call = self.call
        post_op = "" if call.post_op == NO_POST_OP else f", {call.post_op}"
        return (
            f"{self.weight.shape[1]}, {self.weight.shape[0]}{post_op}, scale={call.output_scale:.6g}, "
            f"zero_point={call.output_zero_point}, dtype={call.output_dtype}"
        )
