"""torch.ao's search over a histogram, told so that it neither overflows nor rounds to half precision.

Where our histogram differs from torch.ao's, it is torch.ao that judges: on the same numbers as float32, in a unit in
which their cubes are float32 numbers, with as many cells as the dtype has codes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.parity.generated_tensors import LARGEST
from tests.parity.observer_sides import Found, Setting

SOUND = (1e-9, 1e12)
"""The widths of ranges between which torch.ao's search compares finite errors that are not 0."""


class Told(NamedTuple):
    """The range that is found, float64 of shape `(1,)`, and torch.ao's qparams of it."""

    low: Tensor
    high: Tensor
    found: Found


def width_of(tensors: tuple[Tensor, ...]) -> float:
    """The width of the range of all numbers as float32 holds them."""
    parts = [x.to(torch.float32).double() for x in tensors if x.numel()]
    return max(x.max().item() for x in parts) - min(x.min().item() for x in parts)


HALF = (torch.float16, torch.bfloat16)


def can_count(setting: Setting, tensors: tuple[Tensor, ...]) -> bool:
    """Whether `torch.histc` finds the bins of all numbers: where not, it writes outside of its memory.

    It takes `place` in the dtype of the numbers: in float32 that overflows for the widest ranges, in half precision it
    also does for narrow ones, or rounds to a bin behind the last.
    """
    bins: int = setting.given.get("bins", 2048)
    return not any(x.dtype in HALF for x in tensors) and width_of(tensors) * bins < LARGEST / 2


def place(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The bin of each number, as `torch.histc` computes it."""
    return (x - low) * bins / (high - low)


def well_told(setting: Setting, tensors: tuple[Tensor, ...]) -> Told:
    """torch.ao's observer in that unit."""
    width = width_of(tensors)
    unit = 1.0 if width == 0 or SOUND[0] <= width <= SOUND[1] else 2.0 ** -math.frexp(width)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer = setting.constructor()
        if setting.given["dtype"] == torch.quint4x2:
            observer.dst_nbins = 16
        for x in tensors:
            observer((x.to(torch.float32).double() * unit).to(torch.float32))
        bounds = (observer.min_val, observer.max_val) if width == 0 else observer._non_linear_param_search()
        low, high = (bound.double().reshape(1) / unit for bound in bounds)
        scale, zero_point = setting.constructor()._calculate_qparams(low.float()[0], high.float()[0])
    return Told(low, high, Found(scale.reshape(-1), zero_point.reshape(-1)))


class Difference(NamedTuple):
    """Why a histogram of torch.ao's is not what it is meant to be, for what, and an example."""

    reason: str
    applies: Callable[[Setting, tuple[Tensor, ...]], bool]
    setting: Setting
    tensors: tuple[Tensor, ...]


def _cubes(_: Setting, tensors: tuple[Tensor, ...]) -> bool:
    return not SOUND[0] <= width_of(tensors) <= SOUND[1]


def _four_bits(setting: Setting, _: tuple[Tensor, ...]) -> bool:
    return setting.given["dtype"] == torch.quint4x2


def _bell(scale: float) -> tuple[Tensor, ...]:
    """Many small numbers and few large ones: a part of the range is best."""
    return (torch.randn(3000, generator=torch.Generator().manual_seed(0)) ** 3 * scale,)


def _setting(dtype: torch.dtype = torch.quint8, **more: object) -> Setting:
    return Setting("HistogramObserver", (("dtype", dtype), *more.items()))


DIFFERENCES: dict[str, Difference] = {
    "cubes overflow": Difference(
        "The cubes of numbers above about 1e12 overflow: NaN is compared, and a bin around the median is left.",
        _cubes,
        _setting(),
        _bell(1e15),
    ),
    "cubes vanish": Difference(
        "The cubes of numbers below about 1e-12 are 0: no part of the range is worse than another.",
        _cubes,
        _setting(eps=1e-38),
        _bell(1e-25),
    ),
    "four bits": Difference(
        "Cells are counted for the 8 bits of the byte that holds two codes, so that the search keeps too much.",
        _four_bits,
        _setting(torch.quint4x2),
        _bell(1.0),
    ),
}
"""By what differs. Where `can_count` is false, torch.ao's observer cannot be run at all."""
