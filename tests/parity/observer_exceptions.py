"""Where our qparams are meant to differ from torch.ao's, and why: each row with data on which they do."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tests.parity.generated_tensors import LARGEST
from tests.parity.observer_sides import Ours, Setting, Theirs, qscheme_of

INT32 = (torch.int32, torch.qint32)


class Seen(NamedTuple):
    """What an exception may look at: the range in float64, shape `(channels,)`, and how far float32 may round it."""

    setting: Setting
    ours: Ours
    theirs: Theirs
    dims: int
    low: Tensor
    high: Tensor
    rounding: float = 0.0


class Cause(NamedTuple):
    """Why qparams may differ, in which channels (bool, shape `(channels,)`), and tensors on which they do.

    `fails` says that torch.ao's qparams do not mean the range: there is none, or a number in it is more than half a
    step from what it becomes.
    """

    reason: str
    applies: Callable[[Seen], Tensor]
    setting: Setting
    tensors: tuple[Tensor, ...]
    fails: bool = True


def setting(name: str, **arguments: object) -> Setting:
    """An observer by its class and arguments."""
    return Setting(name, tuple(arguments.items()))


def _everywhere(seen: Seen, condition: bool) -> Tensor:
    return torch.full_like(seen.low, condition, dtype=torch.bool)


def _width_overflows(seen: Seen) -> Tensor:
    width = seen.high.clamp(min=0) - seen.low.clamp(max=0)
    return (width > LARGEST * (1 - 2.0**-20)) & _everywhere(seen, "symmetric" not in qscheme_of(seen.setting))


def _average_is_lost(seen: Seen) -> Tensor:
    lost = seen.theirs.overflowed | seen.theirs.crossed
    # where it raises, there are no qparams of the other channels either
    return lost | _everywhere(seen, bool(lost.any()) and seen.theirs.found is None)


def _zero_point_wraps(seen: Seen) -> Tensor:
    given = seen.setting.given
    affine = given.get("dtype") in INT32 and qscheme_of(seen.setting).endswith("affine")
    assert seen.ours.found is not None
    steps = -seen.low.clamp(max=0) / seen.ours.found.scale.double()
    return (steps >= 2**31 - 256) & _everywhere(seen, affine)


def _symmetric(seen: Seen, dtype: torch.dtype) -> bool:
    return seen.setting.given.get("dtype", torch.quint8) == dtype and "symmetric" in qscheme_of(seen.setting)


def _named_range(seen: Seen) -> Tensor:
    given = seen.setting.given
    whole = (given.get("quant_min"), given.get("quant_max")) == (0, 255)
    return _everywhere(seen, whole and (_symmetric(seen, torch.quint8) or _symmetric(seen, torch.uint8)))


def _part_of_uint16(seen: Seen) -> Tensor:
    return _everywhere(seen, _symmetric(seen, torch.uint16) and "quant_max" in seen.setting.given)


def _four_bits(seen: Seen) -> Tensor:
    return _everywhere(seen, _symmetric(seen, torch.quint4x2))


def _reduced_middle(seen: Seen) -> Tensor:
    reduced = bool(seen.setting.given.get("reduce_range"))
    return _everywhere(seen, reduced and seen.setting.name == "HistogramObserver" and _symmetric(seen, torch.quint8))


def _one_axis(seen: Seen) -> Tensor:
    return _everywhere(seen, "PerChannel" in seen.setting.name and seen.dims == 1)


_SYMMETRIC = {"qscheme": torch.per_tensor_symmetric}
_BOTH_SIDES = (torch.tensor([-3.0, 2.0]),)

EXCEPTIONS: dict[str, Cause] = {
    "the width overflows": Cause(
        "The width of the range is more than the largest float32, so that the scale is infinite.",
        _width_overflows,
        setting("MinMaxObserver"),
        (torch.tensor([-LARGEST, LARGEST]),),
    ),
    "the average is lost": Cause(
        "A moving average is taken by a difference of large numbers, which overflows to infinity and NaN, or cancels "
        "so that the minimum is above the maximum: an error in the end, or whatever the next tensors make of it.",
        _average_is_lost,
        setting("MovingAverageMinMaxObserver", averaging_constant=1.0),
        (torch.tensor([-1e8, 0.5]), torch.tensor([4.4, 4.4])),
    ),
    "the average overflows": Cause(
        "The same for each channel, where an infinite bound gives the scale 1.",
        _average_is_lost,
        setting(
            "MovingAveragePerChannelMinMaxObserver",
            dtype=torch.quint8,
            qscheme=torch.per_channel_affine_float_qparams,
        ),
        (torch.tensor([[LARGEST, LARGEST / 2]]), torch.tensor([[-LARGEST, -LARGEST / 2]])),
    ),
    "the zero point wraps": Cause(
        "With 32 bits, the number of steps below zero is cast to an int32, which cannot hold all of them.",
        _zero_point_wraps,
        setting("MinMaxObserver", dtype=torch.qint32),
        (torch.tensor([-3000.0, 1.0]),),
    ),
    "the whole range by name": Cause(
        "The middle of 0..255 is 128, but 127 where the range is told: a spec does not say who chose it. Both mean it.",
        _named_range,
        setting("MinMaxObserver", quant_min=0, quant_max=255, **_SYMMETRIC),
        _BOTH_SIDES,
        fails=False,
    ),
    "the middle of a part of uint16": Cause(
        "It is 2**15 for every part of the range, also for one that ends below.",
        _part_of_uint16,
        setting("MinMaxObserver", dtype=torch.uint16, quant_min=0, quant_max=4095, **_SYMMETRIC),
        _BOTH_SIDES,
    ),
    "the middle of four bits": Cause(
        "It is 0, the least code, so that no number below zero has one.",
        _four_bits,
        setting("MinMaxObserver", dtype=torch.quint4x2, **_SYMMETRIC),
        _BOTH_SIDES,
    ),
    "the middle of a reduced range": Cause(
        "The other observers refuse it; a histogram gives the zero point 128 for the codes 0..127.",
        _reduced_middle,
        setting("HistogramObserver", dtype=torch.quint8, reduce_range=True, **_SYMMETRIC),
        _BOTH_SIDES,
    ),
    "channels of one axis": Cause(
        "A tensor of one axis, a vector of scales, say, has channels too; torch.ao raises.",
        _one_axis,
        setting("PerChannelMinMaxObserver"),
        (torch.tensor([1.0, -2.0]),),
    ),
}
"""By what differs."""
