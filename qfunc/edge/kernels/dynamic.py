"""Linear layers that quantize their input as the model runs, on the grid of its own least and largest value."""

from __future__ import annotations

from ctypes import c_float
from dataclasses import dataclass
from math import inf, isinf, isnan
from typing import Any

import torch
from torch import Tensor

from qfunc.edge.kernels.base import TORCH_DTYPE, Kernel, clamped_codes, operator, outside_compile
from qfunc.edge.kernels.post_op import NO_POST_OP, KernelPostOp
from qfunc.numerics.grid import Affine
from qfunc.numerics.qparams import QuantSpec, middle

_prepack = operator("onednn", "qlinear_prepack")
_pointwise = operator("onednn", "qlinear_pointwise")

_LARGEST = torch.finfo(torch.float32).max

Packed = tuple[Any, ...]
"""What `qlinear_pointwise` is called with behind the codes and their qparams."""


def _float32(value: float) -> float:
    """The float32 next to a float64; sums, differences, products and quotients of two rounded so are float32's own."""
    return c_float(value).value


def qparams_of_bounds(minimum: float, maximum: float, spec: QuantSpec) -> tuple[float, int]:
    """Scale and zero point of one range: `qfunc.numerics.qparams.qparams_of_range`, bit for bit, without tensors.

    It costs a microsecond or two, where the same on tensors costs dozens. `spec` has one scale and an integer zero
    point; NaN counts as zero, an infinite bound as the largest float32.

    >>> qparams_of_bounds(-1.0, 1.55, QuantSpec())
    (0.009999999776482582, 100)
    """
    low, high = min(_finite(minimum), 0.0), max(_finite(maximum), 0.0)
    steps = spec.quant_max - spec.quant_min
    eps = _float32(spec.eps)
    if spec.symmetric:
        return min(max(_float32(max(-low, high) / (steps / 2)), eps), _LARGEST), middle(spec)
    width = _float32(high - low)
    step = _float32((high - low) / steps) if isinf(width) else _float32(width / steps)
    scale = max(min(step, _LARGEST), eps)
    zero_point = spec.quant_min - round(_float32(low / scale))
    return scale, min(max(zero_point, spec.quant_min), spec.quant_max)


def _finite(value: float) -> float:
    return 0.0 if isnan(value) else min(max(value, -_LARGEST), _LARGEST)


@dataclass(frozen=True, slots=True, eq=False)
class OwnCodes:
    """The codes of a tensor on its own grid; `broken` marks the rows along the last axis that hold NaN, if any do."""

    values: Tensor
    scale: float
    zero_point: int
    broken: Tensor | None


def own_codes(x: Tensor, spec: QuantSpec) -> OwnCodes:
    """Codes of `x` as `QuantizeDynamically` rounds it: of its own range, saturating at `spec`'s ends.

    `x` has a value at least. Where it holds NaN its range is that of zero alone, as in the reference form.

    >>> own_codes(torch.tensor([0.0, 1.2, 255.0]), QuantSpec()).values
    tensor([  0,   1, 255], dtype=torch.uint8)
    """
    x = x if x.dtype is torch.float32 else x.to(torch.float32)
    low, high = (bound.item() for bound in torch.aminmax(x))
    scale, zero_point = qparams_of_bounds(low, high, spec)
    codes = clamped_codes(x.mul(_float32(1.0 / scale)), zero_point, spec.quant_min, spec.quant_max, spec.torch_dtype)
    return OwnCodes(codes, scale, zero_point, x.isnan().any(-1, keepdim=True) if isnan(low) else None)


def pack(
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    output: Affine | None = None,
    post_op: KernelPostOp = NO_POST_OP,
) -> Packed:
    """A weight `int8 [out_features, in_features]` with all that `product` needs besides the codes."""
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    result = (1.0, 0, torch.float32)
    if output is not None:
        result = (output.scale, output.zero_point, TORCH_DTYPE[output.dtype])
    return (_prepack(weight, None), weight_scale, zeros, bias, *result, *post_op.operator)


def product(codes: OwnCodes, packed: Packed) -> Tensor:
    """The linear map of codes over their last axis; float32 rows of what holds NaN are NaN."""
    result: Tensor = _pointwise(codes.values, codes.scale, codes.zero_point, *packed)
    if codes.broken is not None and result.is_floating_point():
        result.masked_fill_(codes.broken, inf - inf)
    return result


def check_features(x: Tensor, features: int) -> None:
    """Raise where the last axis has another length; oneDNN's own words for that do not say so."""
    if x.shape[-1] != features:
        raise RuntimeError(f"linear layer of {features} features is given {x.shape[-1]}: {tuple(x.shape)}")


class OnednnLinearDynamic(Kernel):
    """`linear` over the last axis of floats of any rank of at least 1, multiplied as 8-bit codes.

    Each call finds the qparams of its input, all of it, as `QuantizeDynamically` does. `weight` is
    `int8 [out_features, in_features]`, symmetric per row with `weight_scale` (`float32 [out_features]`). The result is
    float32, or codes of `output`.

    >>> layer = OnednnLinearDynamic(torch.ones(1, 2, dtype=torch.int8), torch.ones(1), None, QuantSpec())
    >>> layer(torch.tensor([[0.0, 255.0], [1.0, 2.0]]))
    tensor([[255.],
            [  3.]])
    """

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
        output: Affine | None = None,
        post_op: KernelPostOp = NO_POST_OP,
    ) -> None:
        super().__init__()
        self._constants(weight, weight_scale, bias)
        assert weight.dim() == 2, f"weight {tuple(weight.shape)}"
        self.spec, self.output, self.post_op = spec, output, post_op

    def forward(self, x: Tensor) -> Tensor:
        """The linear map of `x` on its own grid."""
        if torch.compiler.is_compiling():
            return self._uncompiled(x)
        packed = self._packs.get(0)
        if packed is None:
            packed = self._packed(0, self._pack)
        check_features(x, self.weight.shape[1])
        if not x.numel():
            dtype = torch.float32 if self.output is None else TORCH_DTYPE[self.output.dtype]
            return torch.empty((*x.shape[:-1], self.weight.shape[0]), dtype=dtype)
        return product(own_codes(x, self.spec), packed)

    @outside_compile
    def _uncompiled(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def _pack(self) -> Packed:
        return pack(self.weight, self.weight_scale, self.bias, self.output, self.post_op)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        spec = self.spec
        post_op = "" if self.post_op == NO_POST_OP else f", {self.post_op}"
        of = f"{spec.dtype} {spec.quant_min}..{spec.quant_max} {spec.qscheme}"
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}{post_op}, {of}"
