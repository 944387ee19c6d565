"""`Affine`: per-tensor qparams as plain literals, as graphs and kernels hold them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

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
