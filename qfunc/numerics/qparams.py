"""What a quantized tensor means (`QuantSpec`), its scale and zero point (`QParams`), and how a range gives them.

An integer `q` stands for the real number `(q - zero_point) * scale`. For a range `[minimum, maximum]`, which is first
widened to hold zero, and `n = quant_max - quant_min` steps:

    affine       scale = max((maximum - minimum) / n, eps)
                 zero_point = clamp(quant_min - round(minimum / scale), quant_min, quant_max)
    symmetric    scale = max(max(-minimum, maximum) / (n / 2), eps)
                 zero_point = 0 for signed integers, else the middle of the range

With the scheme `per_channel_affine_float_qparams` the range is not widened and the zero point is a float:

    scale = (maximum - minimum) / n, or 1 where that is at most eps
    zero_point = -minimum / scale
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from qfunc.errors import BadConfig, Problem, UnknownName

DTYPES = MappingProxyType(
    {
        "uint8": torch.uint8,
        "int8": torch.int8,
        "int16": torch.int16,
        "int32": torch.int32,
        "uint16": torch.uint16,
        "uint32": torch.uint32,
        "uint4": torch.uint8,
        "int4": torch.int8,
    }
)
"""The integer types that a quantized tensor can have, by name, with what holds their codes: for 4 bits, 8."""

_NIBBLES = MappingProxyType({"uint4": (0, 15), "int4": (-8, 7)})

FLOAT_QPARAMS = "per_channel_affine_float_qparams"

QSCHEMES = (
    "per_tensor_affine",
    "per_tensor_symmetric",
    "per_channel_affine",
    "per_channel_symmetric",
    FLOAT_QPARAMS,
)
"""The quantization schemes: one scale for the tensor or one per channel; zero point free, in the middle, or no integer.

The last is for tables of vectors: codes from the least value on, zero itself need not be exact.
"""

_LARGEST = torch.finfo(torch.float32).max
_SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class QuantSpec:
    """How a tensor is quantized: integer type, the range of it that is used, scheme, and the least scale.

    `ch_axis` is the channel axis of a per-channel scheme and None otherwise. Plain data: `validate` says whether it
    can be meant.

    >>> QuantSpec().per_channel
    False
    """

    dtype: str = "uint8"
    quant_min: int = 0
    quant_max: int = 255
    qscheme: str = "per_tensor_affine"
    ch_axis: int | None = None
    eps: float = 2.0**-23

    @property
    def torch_dtype(self) -> torch.dtype:
        """The torch type that holds the codes of `dtype`; the name must be one of `DTYPES`."""
        return DTYPES[self.dtype]

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the largest code that `dtype` holds; the name must be one of `DTYPES`.

        >>> QuantSpec("int4", 0, 7).limits
        (-8, 7)
        """
        held = torch.iinfo(self.torch_dtype)
        return _NIBBLES.get(self.dtype, (held.min, held.max))

    @property
    def per_channel(self) -> bool:
        """Whether each channel has a scale of its own."""
        return str(self.qscheme).startswith("per_channel")

    @property
    def symmetric(self) -> bool:
        """Whether the zero point is fixed in the middle."""
        return str(self.qscheme).endswith("symmetric")

    @property
    def reduced(self) -> QuantSpec:
        """The same with one bit less, for kernels that may overflow with all: both limits halved, rounded down.

        >>> spec = INT8.reduced
        >>> spec.quant_min, spec.quant_max, UINT8.reduced == UINT8_REDUCED
        (-64, 63, True)
        """
        return replace(self, quant_min=self.quant_min // 2, quant_max=self.quant_max // 2)


UINT8 = QuantSpec()
"""All 8 bits, zero point free: activations."""

UINT8_REDUCED = QuantSpec(quant_max=127)
"""7 bits of `uint8`, for kernels that may overflow with 8."""

INT8 = QuantSpec("int8", -128, 127)
"""All 8 bits of `int8`, zero point free."""

INT8_SYMMETRIC = QuantSpec("int8", -128, 127, "per_tensor_symmetric")
"""Weights with one scale."""

INT8_SYMMETRIC_PER_CHANNEL = QuantSpec("int8", -128, 127, "per_channel_symmetric", 0)
"""Weights with a scale per output channel."""

INT8_NARROW_PER_CHANNEL = QuantSpec("int8", -127, 127, "per_channel_symmetric", 0)
"""Weights with a scale per output channel, in a range that is its own negative."""

UINT8_FLOAT_QPARAMS = QuantSpec("uint8", 0, 255, FLOAT_QPARAMS, 0)
"""Tables of vectors: each has a range of its own, whose least value is the code 0."""

UINT4_FLOAT_QPARAMS = QuantSpec("uint4", 0, 15, FLOAT_QPARAMS, 0)
"""The same in 4 bits."""


@dataclass(frozen=True, slots=True, eq=False)
class QParams:
    """Scale (float32) and zero point (int64) of one tensor: shape `()`, or `(channels,)` along `spec.ch_axis`.

    With the scheme `per_channel_affine_float_qparams` the zero point is float32 as well.
    Equal, and of equal hash, when all values, shapes and the spec are.

    >>> one = QParams(torch.tensor(0.5), torch.tensor(3), UINT8)
    >>> one == QParams(torch.tensor(0.5), torch.tensor(3), UINT8)
    True
    """

    scale: Tensor
    zero_point: Tensor
    spec: QuantSpec

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QParams):
            return NotImplemented
        return (
            self.spec == other.spec
            and same_values(self.scale, other.scale)
            and same_values(self.zero_point, other.zero_point)
        )

    def __hash__(self) -> int:
        return hash((self.spec, tuple(self.scale.view(-1).tolist()), tuple(self.zero_point.view(-1).tolist())))


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in type, shape, device and every value; NaN agrees with NaN.

    >>> same_values(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
    True
    """
    if a.dtype != b.dtype or a.shape != b.shape or a.device != b.device:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def validate(spec: QuantSpec) -> tuple[Problem, ...]:
    """All that is impossible about a spec; empty when it can be meant.

    `UnknownName` for a dtype or scheme that does not exist, `BadConfig` for a range outside the dtype or without zero,
    a channel axis that does not go with the scheme, or a least scale whose inverse is not a float32.

    >>> validate(UINT8)
    ()
    >>> [problem.reason for problem in validate(QuantSpec("int8", -128, 255))]
    ['-128..255 does not fit int8, which holds -128..127']
    """
    return (*_name_problems(spec), *_range_problems(spec), *_axis_problems(spec), *_eps_problems(spec))


def _name_problems(spec: QuantSpec) -> Iterator[Problem]:
    if spec.dtype not in DTYPES:
        yield UnknownName(str(spec.dtype), "integer dtype", tuple(DTYPES))
    if spec.qscheme not in QSCHEMES:
        yield UnknownName(str(spec.qscheme), "qscheme", QSCHEMES)


def _range_problems(spec: QuantSpec) -> Iterator[Problem]:
    node, low, high = "quant_min, quant_max", spec.quant_min, spec.quant_max
    if not (_is_int(low) and _is_int(high)):
        yield BadConfig(node, f"{low!r} and {high!r} are not both integers", "give two integers")
        return
    if not low <= 0 <= high or low == high:
        remedy = "choose quant_min <= 0 <= quant_max that are not equal, so that zero is exact"
        yield BadConfig(node, f"{low}..{high} is not a range that holds zero", remedy)
    if spec.dtype in DTYPES:
        least, largest = spec.limits
        if low < least or high > largest:
            reason = f"{low}..{high} does not fit {spec.dtype}, which holds {least}..{largest}"
            yield BadConfig(node, reason, "narrow the range or choose a wider dtype")


def _axis_problems(spec: QuantSpec) -> Iterator[Problem]:
    if spec.qscheme not in QSCHEMES:
        return
    axis = spec.ch_axis
    if not spec.per_channel and axis is not None:
        yield BadConfig("ch_axis", f"{spec.qscheme} has no channel axis", "set ch_axis=None or a per_channel qscheme")
    if spec.per_channel and (axis is None or not _is_int(axis) or axis < 0):
        reason = f"{spec.qscheme} needs a channel axis, got {axis!r}"
        yield BadConfig("ch_axis", reason, "set ch_axis to the axis of the channels, counted from 0")


def _eps_problems(spec: QuantSpec) -> Iterator[Problem]:
    # below the least normal float32, 1 / eps overflows and quantizing would give NaN for zero
    if not isinstance(spec.eps, float) or not _SMALLEST <= spec.eps <= _LARGEST:
        yield BadConfig("eps", f"{spec.eps!r} cannot be the least scale", f"choose a float of at least {_SMALLEST}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def qparams_of_range(minimum: Tensor, maximum: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point for values in `[minimum, maximum]`, by the formulas at the head of this module.

    `minimum` and `maximum` have shape `()` or `(channels,)`; a valid `spec` is assumed. The result is always finite
    and, with integer zero points, zero is always exact: where the width of the range overflows float32 it is taken in
    float64, an infinite bound counts as the largest float32 and NaN as zero. Computed in float32, in the order of
    torch.ao, so that both round to the same zero point. The middle of an unsigned range is 2**(bits - 1) for all of the
    dtype and `(quant_min + quant_max) // 2` for a part of it.

    >>> q = qparams_of_range(torch.tensor(-1.0), torch.tensor(1.55), UINT8)
    >>> round(q.scale.item(), 6), q.zero_point.item()
    (0.01, 100)
    """
    low = torch.nan_to_num(minimum.detach().to(torch.float32))
    high = torch.nan_to_num(maximum.detach().to(torch.float32))
    if spec.qscheme == FLOAT_QPARAMS:
        return _float_qparams(low, high, spec)
    low, high = low.clamp(max=0), high.clamp(min=0)
    steps = spec.quant_max - spec.quant_min
    if spec.symmetric:
        scale = (torch.maximum(-low, high) / (steps / 2)).clamp(spec.eps, _LARGEST)
        return QParams(scale, torch.full_like(scale, middle(spec), dtype=torch.int64), spec)
    scale = _step(low, high, steps).clamp(min=spec.eps)
    zero_point = spec.quant_min - torch.round(low / scale).to(torch.int64)
    return QParams(scale, zero_point.clamp(spec.quant_min, spec.quant_max), spec)


def _float_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> QParams:
    scale = _step(low, high, spec.quant_max - spec.quant_min)
    scale = torch.where(scale > spec.eps, scale, torch.ones_like(scale))
    return QParams(scale, torch.nan_to_num(-low / scale), spec)


def _step(low: Tensor, high: Tensor, steps: int) -> Tensor:
    """`(high - low) / steps` in float32, never infinite: in float64 for those channels whose width overflows."""
    step = (high - low) / steps
    wide = ((high.double() - low.double()) / steps).clamp(max=_LARGEST).to(torch.float32)
    return torch.where(torch.isfinite(step), step, wide)


def middle(spec: QuantSpec) -> int:
    """The zero point of a symmetric scheme."""
    least, largest = spec.limits
    if least < 0:
        return 0
    whole = (spec.quant_min, spec.quant_max) == (least, largest)
    return (largest + 1) // 2 if whole else math.floor((spec.quant_min + spec.quant_max) / 2)
