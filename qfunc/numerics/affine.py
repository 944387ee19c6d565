"""Quantize and dequantize, the meaning that every int8 kernel is held to.

    quantize      q = clamp(round(x * (1 / scale)) + zero_point, quant_min, quant_max)
    dequantize    x = (q - zero_point) * scale

`round` takes halves to the even neighbour. x is multiplied by the float32 inverse of the scale, not divided by the
scale, and the zero point is added after rounding: so do `torch.fake_quantize_*` and the decomposed operators, and the
results equal theirs bit for bit. `torch.quantize_per_tensor` and `quantize_per_channel` add the zero point before
rounding, which moves values within rounding error of a half by one step; everything else is equal there too.

A zero point that is a float is added before rounding, since its fraction counts; zero is then not exact.

For finite x between `(quant_min - zero_point) * scale` and `(quant_max - zero_point) * scale`, if these two are finite
in float32 and the range has at most 16 bits,

    |x - dequantize(quantize(x))| <= scale / 2 + 2**-21 * |x|

where the second term is what three float32 roundings (of 1 / scale, of x times it, of the product) can add; and zero
is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXACT = 2**22
"""Integers up to here, and sums of two, are exact in float32."""


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    ch_axis: int | None = None,
) -> Tensor:
    """The integers, of plain type `dtype`, that stand for x; same shape and memory format.

    `scale` and `zero_point` have shape `()`, or `(x.shape[ch_axis],)`; zero points are integers or floats. x is
    floating point and has no NaN; any type but float32 is converted to it first. Values out of range, infinite ones
    too, saturate.

    >>> quantize(torch.tensor([-1.0, 0.0, 0.25, 0.75, 9.0]), torch.tensor(0.5), torch.tensor(2), 0, 8, torch.uint8)
    tensor([0, 2, 2, 4, 8], dtype=torch.uint8)
    """
    return _rounded(x, scale, zero_point, quant_min, quant_max, ch_axis).to(dtype)


def dequantize(
    q: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    ch_axis: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The numbers that the integers `q` stand for, computed in float32, as floating point type `dtype`.

    >>> dequantize(torch.tensor([0, 2, 8], dtype=torch.uint8), torch.tensor(0.5), torch.tensor(2))
    tensor([-1.,  0.,  3.])
    """
    scale, zero_point = along(scale, q, ch_axis), along(zero_point, q, ch_axis)
    narrow = torch.iinfo(q.dtype).bits <= 16
    steps = q.to(torch.float32) - zero_point if narrow else (q.to(torch.int64) - zero_point).to(torch.float32)
    return (steps * scale).to(dtype)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
) -> Tensor:
    """`dequantize(quantize(x))`, of x's type, without integers in between; rounding has no gradient here.

    >>> fake_quantize(torch.tensor([-1.0, 0.3, 9.0]), torch.tensor(0.5), torch.tensor(2), 0, 8)
    tensor([-1.0000,  0.5000,  3.0000])
    """
    steps = _rounded(x, scale, zero_point, quant_min, quant_max, ch_axis) - along(zero_point, x, ch_axis)
    return (steps.to(torch.float32) * along(scale, x, ch_axis)).to(x.dtype)


def _rounded(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, ch_axis: int | None
) -> Tensor:
    """The integers that stand for x, as floating point numbers that hold them exactly."""
    scale, zero_point = along(scale, x, ch_axis), along(zero_point, x, ch_axis)
    scaled = x.to(torch.float32) * (1.0 / scale)
    if zero_point.is_floating_point():
        return torch.clamp(torch.round(scaled + zero_point), quant_min, quant_max)
    steps = torch.round(scaled)
    if max(-quant_min, quant_max) > _EXACT:
        steps = steps.to(torch.float64)
    return torch.clamp(steps + zero_point, quant_min, quant_max)


def along(values: Tensor, x: Tensor, ch_axis: int | None) -> Tensor:
    """Per-channel values, or one for all, in a shape that broadcasts along `ch_axis` of x."""
    if ch_axis is None or values.dim() == 0:
        return values
    return values.view([-1 if axis == ch_axis else 1 for axis in range(x.dim())])
