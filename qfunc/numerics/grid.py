"""Qparams as plain literals, as graphs hold them: `Affine` is what kernels take, `Grid` is for all others."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from qfunc.numerics.qparams import FLOAT_QPARAMS, QParams, QuantSpec

CodeDType: TypeAlias = Literal["uint8", "int8"]
CODE_RANGE: dict[str, tuple[int, int]] = {"uint8": (0, 255), "int8": (-128, 127)}


@dataclass(frozen=True, slots=True)
class Affine:
    """Per-tensor qparams of plain codes: `real = (code - zero_point) * scale`.

    Codes are clamped to `[quant_min, quant_max]`, by default the range of the dtype. With `headroom`, that is only the
    range that the scale was made for: codes of what lies beyond it are kept as far as the dtype goes.

    >>> Affine(0.5, 3).bounds
    (0, 255)
    >>> Affine(0.5, 0, "int8", quant_min=-127).bounds
    (-127, 127)
    >>> Affine(0.5, 0, "uint8", 0, 127, headroom=True).bounds, Affine(0.5, 0, "uint8", 0, 127).bounds
    ((0, 255), (0, 127))
    """

    scale: float
    zero_point: int
    dtype: CodeDType = "uint8"
    quant_min: int | None = None
    quant_max: int | None = None
    headroom: bool = False

    def __post_init__(self) -> None:
        assert math.isfinite(self.scale) and self.scale > 0, f"scale {self.scale}"
        lowest, highest = CODE_RANGE[self.dtype]
        low, high = self.bounds
        assert lowest <= low <= self.zero_point <= high <= highest, f"{self}"

    @property
    def expected(self) -> tuple[int, int]:
        """Smallest and largest code of the range that the scale was made for."""
        lowest, highest = CODE_RANGE[self.dtype]
        return (
            lowest if self.quant_min is None else self.quant_min,
            highest if self.quant_max is None else self.quant_max,
        )

    @property
    def bounds(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return CODE_RANGE[self.dtype] if self.headroom else self.expected

    def __repr__(self) -> str:
        low, high = self.expected
        expected = "" if (low, high) == CODE_RANGE[self.dtype] else f", {low}..{high}"
        headroom = ", headroom" if self.headroom else ""
        return f"{self.dtype}(scale={self.scale!r}, zero_point={self.zero_point}{expected}{headroom})"

    def __str__(self) -> str:
        return f"{self.dtype}(scale={self.scale:.6g}, zero_point={self.zero_point})"


@dataclass(frozen=True, slots=True)
class Grid:
    """The qparams of any spec: one scale and zero point, or one of each per channel along `spec.ch_axis`.

    >>> Grid((0.5, 0.25), (0, 3), QuantSpec("int16", -9, 9, "per_channel_affine", 1)).qparams().scale
    tensor([0.5000, 0.2500])
    """

    scale: tuple[float, ...]
    zero_point: tuple[float, ...]
    spec: QuantSpec

    @staticmethod
    def of(qparams: QParams) -> Grid:
        """The literals of qparams; exact."""
        return Grid(tuple(qparams.scale.view(-1).tolist()), tuple(qparams.zero_point.view(-1).tolist()), qparams.spec)

    def qparams(self) -> QParams:
        """New tensors of these literals."""
        dtype = torch.float32 if self.spec.qscheme == FLOAT_QPARAMS else torch.int64
        scale = torch.tensor(self.scale, dtype=torch.float32)
        zero_point = torch.tensor(self.zero_point, dtype=dtype)
        if not self.spec.per_channel:
            scale, zero_point = scale.view(()), zero_point.view(())
        return QParams(scale, zero_point, self.spec)

    def __str__(self) -> str:
        spec, count = self.spec, len(self.scale)
        codes = f"{spec.dtype} {spec.quant_min}..{spec.quant_max}"
        if spec.per_channel:
            return f"{codes}, {count} channels along axis {spec.ch_axis}"
        return f"{codes}, scale={self.scale[0]:.6g}, zero_point={self.zero_point[0]}"


_HEADROOM = frozenset({("uint8", 0, 127), ("int8", -64, 63)})


def bounds_of(spec: QuantSpec) -> tuple[int, int]:
    """The smallest and the largest code that `literals` lets qparams for a spec give.

    >>> bounds_of(QuantSpec(quant_max=127)), bounds_of(QuantSpec(quant_max=100))
    ((0, 255), (0, 100))
    """
    has_headroom = not spec.per_channel and (spec.dtype, spec.quant_min, spec.quant_max) in _HEADROOM
    return CODE_RANGE[spec.dtype] if has_headroom else (spec.quant_min, spec.quant_max)


def literals(qparams: QParams, *, headroom: bool = True) -> Affine | Grid:
    """Qparams as literals: an `Affine` for one scale and codes of 8 bits, else a `Grid`.

    Seven bits of eight leave headroom, they do not clip: what lies beyond the observed range is kept as far as the
    dtype goes, as in the reference and as kernels do. Any other range is the range of the codes, and so is that of
    seven bits without `headroom`.

    >>> literals(QParams(torch.tensor(0.5), torch.tensor(3), QuantSpec(quant_max=127)))
    uint8(scale=0.5, zero_point=3, 0..127, headroom)
    """
    spec = qparams.spec
    dtype = str(spec.torch_dtype).removeprefix("torch.")
    if spec.per_channel or dtype not in CODE_RANGE:
        return Grid.of(qparams)
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    leaves = headroom and bounds_of(spec) != (spec.quant_min, spec.quant_max)
    return Affine(scale, zero_point, dtype, spec.quant_min, spec.quant_max, leaves)  # type: ignore[arg-type]
