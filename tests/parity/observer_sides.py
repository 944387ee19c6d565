"""One case through an observer of torch.ao's and through ours, and what is judged of the qparams of both."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qfunc.numerics.qparams import FLOAT_QPARAMS, QuantSpec
from qfunc.testing import oracle
from tests.parity.observer_meaning import meaning

CLOSE = 1e-6
"""How far, relatively, scales may be apart; integer zero points may not be."""


@dataclass(frozen=True, slots=True)
class Setting:
    """An observer of torch.ao's, by the name of its class and the arguments it is made with."""

    name: str
    arguments: tuple[tuple[str, Any], ...]

    @property
    def given(self) -> Mapping[str, Any]:
        """The arguments by name."""
        return dict(self.arguments)

    @property
    def constructor(self) -> Callable[[], Any]:
        """What makes it."""
        return partial(oracle.named_observers()[self.name], **self.given)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in self.arguments)})"


class Found(NamedTuple):
    """Scales and zero points, both of shape `(channels,)`; a float zero point is no integer."""

    scale: Tensor
    zero_point: Tensor


class Theirs(NamedTuple):
    """What torch.ao gives: qparams, or the error it raises.

    `overflowed` and `crossed` say in which channels a bound was not finite, and where the minimum was above the
    maximum, after any of the tensors; `low` and `high` are the bounds after the last.
    """

    found: Found | None
    error: str
    overflowed: Tensor
    crossed: Tensor
    low: Tensor
    high: Tensor


class Ours(NamedTuple):
    """Our qparams, for one channel where they are for the tensor, and the spec that they are for."""

    found: Found | None
    spec: QuantSpec


def qscheme_of(setting: Setting) -> str:
    """Its scheme by name."""
    return str(setting.given.get("qscheme", "per_channel_affine" if "PerChannel" in setting.name else "affine"))


def theirs_of(setting: Setting, tensors: tuple[Tensor, ...]) -> Theirs:
    """Run torch.ao's observer."""
    overflowed = crossed = torch.zeros(1, dtype=torch.bool)
    low = high = torch.full((1,), math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        observer = setting.constructor()
        try:
            for x in tensors:
                observer(x)
                if x.numel() and hasattr(observer, "min_val"):
                    low, high = observer.min_val.reshape(-1).clone(), observer.max_val.reshape(-1).clone()
                    overflowed = overflowed | ~(low.isfinite() & high.isfinite())
                    crossed = crossed | (low > high)
            scale, zero_point = observer.calculate_qparams()
        except Exception as error:  # noqa: BLE001 - whatever it raises is compared
            return Theirs(None, f"{type(error).__name__}: {error}", overflowed, crossed, low, high)
    return Theirs(Found(scale.reshape(-1), zero_point.reshape(-1)), "", overflowed, crossed, low, high)


def ours_of(setting: Setting, tensors: tuple[Tensor, ...]) -> Ours:
    """Fold ours."""
    observer: Any = meaning(setting.constructor)
    state = observer.init()
    for x in tensors:
        state = observer.update(state, x)
    qparams = observer.finish(state)
    if qparams is None:
        return Ours(None, observer.spec)
    return Ours(Found(qparams.scale.reshape(-1), qparams.zero_point.reshape(-1)), observer.spec)


def agree(ours: Found, theirs: Found, spec: QuantSpec) -> Tensor:
    """Where both are the same, up to `CLOSE` in scale and in a float zero point: bool, shape `(channels,)`."""
    scales = (ours.scale.double() - theirs.scale.double()).abs() <= CLOSE * theirs.scale.double()
    if spec.qscheme != FLOAT_QPARAMS:
        return scales & (ours.zero_point == theirs.zero_point)
    apart = (ours.zero_point.double() - theirs.zero_point.double()).abs()
    return scales & (apart <= CLOSE * theirs.zero_point.double().abs())


def finite(found: Found) -> Tensor:
    """Where scale and zero point are finite: bool, shape `(channels,)`."""
    return found.scale.isfinite() & found.zero_point.isfinite()


def meant(found: Found, spec: QuantSpec, low: Tensor, high: Tensor, rounding: float = 0.0) -> Tensor:
    """Where qparams mean `[low, high]`: finite, zero exact, and numbers of that range within half a step of theirs.

    `low` and `high` are float64 of shape `(channels,)`; as many steps are allowed for
    as float32 rounds the ratio of a bound and the scale to. With float zero points, zero is a number like others.
    """
    scale, zero_point = found.scale.double(), found.zero_point.double()
    integer = spec.qscheme != FLOAT_QPARAMS
    if integer:
        low, high = low.clamp(max=0), high.clamp(min=0)
    x = low + (high - low) * torch.linspace(0, 1, 41, dtype=torch.float64)[:, None]
    codes = torch.round(x / scale + zero_point).clamp(spec.quant_min, spec.quant_max)
    error = ((x - (codes - zero_point) * scale).abs() - rounding) / scale
    rounded = zero_point.abs() + (spec.quant_max - spec.quant_min) + torch.maximum(-low, high) / scale
    slack = 1e-6 + 2.0**-22 * rounded
    zero = (zero_point >= spec.quant_min) & (zero_point <= spec.quant_max) if integer else torch.tensor(True)
    return finite(found) & (scale > 0) & zero & (error <= 0.5 + slack).all(0)


def range_of(setting: Setting, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """The range that an observer of ranges should find, in float64, shape `(channels,)`."""
    constant = setting.given.get("averaging_constant", 0.01 if "Moving" in setting.name else None)
    axis = setting.given.get("ch_axis", 0 if "PerChannel" in setting.name else None)
    low = high = None
    for x in tensors:
        if x.numel() == 0:
            continue
        rows = x.to(torch.float32).double()
        rows = rows.reshape(1, -1) if axis is None else rows.movedim(axis, 0).reshape(rows.shape[axis], -1)
        least, largest = rows.amin(1), rows.amax(1)
        if low is None or high is None:
            low, high = least, largest
        elif constant is None:
            low, high = torch.minimum(low, least), torch.maximum(high, largest)
        else:
            low, high = low + constant * (least - low), high + constant * (largest - high)
    assert low is not None
    assert high is not None
    return low, high
