"""The observers that both systems have, with every kind of spec."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from tests.parity.observer_sides import Setting

AFFINE = "per_{}_affine"
SYMMETRIC = "per_{}_symmetric"
FLOATS = "per_{}_affine_float_qparams"

SPECS: tuple[tuple[torch.dtype, str, dict[str, Any]], ...] = (
    (torch.quint8, AFFINE, {}),
    (torch.quint8, AFFINE, {"reduce_range": True}),
    (torch.quint8, AFFINE, {"quant_min": 0, "quant_max": 127}),
    (torch.quint8, AFFINE, {"quant_min": 0, "quant_max": 15, "eps": 2.0**-12}),
    (torch.quint8, AFFINE, {"quant_min": 0, "quant_max": 100, "eps": 0.5}),
    (torch.uint8, AFFINE, {"eps": 1e-30}),
    (torch.quint8, SYMMETRIC, {}),
    (torch.quint8, SYMMETRIC, {"quant_min": 0, "quant_max": 255}),
    (torch.quint8, SYMMETRIC, {"quant_min": 0, "quant_max": 15}),
    (torch.uint8, SYMMETRIC, {"quant_min": 0, "quant_max": 100}),
    (torch.qint8, AFFINE, {}),
    (torch.qint8, AFFINE, {"reduce_range": True, "eps": 1e-38}),
    (torch.qint8, AFFINE, {"quant_min": -8, "quant_max": 7}),
    (torch.qint8, AFFINE, {"quant_min": 0, "quant_max": 100}),
    (torch.int8, AFFINE, {"quant_min": -128, "quant_max": 127, "reduce_range": True}),
    (torch.qint8, SYMMETRIC, {}),
    (torch.qint8, SYMMETRIC, {"reduce_range": True}),
    (torch.qint8, SYMMETRIC, {"quant_min": -127, "quant_max": 127, "eps": 2.0**-12}),
    (torch.int8, SYMMETRIC, {"quant_min": -8, "quant_max": 7, "eps": 1e-30}),
    (torch.int16, AFFINE, {}),
    (torch.int16, AFFINE, {"quant_min": -1000, "quant_max": 999}),
    (torch.int16, SYMMETRIC, {}),
    (torch.qint32, AFFINE, {}),
    (torch.int32, AFFINE, {"quant_min": -(2**20), "quant_max": 2**20}),
    (torch.int32, SYMMETRIC, {}),
    (torch.uint16, AFFINE, {}),
    (torch.uint16, SYMMETRIC, {}),
    (torch.uint16, SYMMETRIC, {"quant_min": 0, "quant_max": 4095}),
    (torch.quint4x2, AFFINE, {}),
    (torch.quint4x2, SYMMETRIC, {}),
)
"""Dtype, scheme, and what else is said of the range."""

CONSTANTS = (0.01, 0.1, 0.5, 1.0)
BINS = (2048, 128, 500, 64)


def _made(name: str, dtype: torch.dtype, qscheme: str, more: dict[str, Any]) -> Setting:
    return Setting(name, (("dtype", dtype), ("qscheme", getattr(torch, qscheme)), *more.items()))


def _averaged(settings: Iterable[Setting], name: str) -> Iterator[Setting]:
    for setting, constant in zip(settings, itertools.cycle(CONSTANTS), strict=False):
        yield Setting(name, (*setting.arguments, ("averaging_constant", constant)))


def _per_channel(axes: int = 4) -> Iterator[Setting]:
    floats = [
        (dtype, FLOATS, {"eps": eps})
        for dtype, eps in itertools.product((torch.quint8, torch.quint4x2), (2.0**-23, 1e-30, 0.5))
    ]
    for dtype, scheme, more in (*SPECS, *floats):
        for ch_axis in range(axes):
            yield _made("PerChannelMinMaxObserver", dtype, scheme.format("channel"), {**more, "ch_axis": ch_axis})


def _per_tensor(name: str) -> tuple[Setting, ...]:
    return tuple(_made(name, dtype, scheme.format("tensor"), more) for dtype, scheme, more in SPECS)


def _histograms() -> Iterator[Setting]:
    reduced = _made("HistogramObserver", torch.quint8, "per_tensor_symmetric", {"reduce_range": True})
    for setting, bins in zip((*_per_tensor("HistogramObserver"), reduced), itertools.cycle(BINS), strict=False):
        yield Setting(setting.name, (*setting.arguments, ("bins", bins)))


RANGES = _per_tensor("MinMaxObserver")
CHANNEL_RANGES = tuple(_per_channel())
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "MinMaxObserver": RANGES,
    "MovingAverageMinMaxObserver": tuple(_averaged(RANGES, "MovingAverageMinMaxObserver")),
    "PerChannelMinMaxObserver": CHANNEL_RANGES,
    "MovingAveragePerChannelMinMaxObserver": tuple(_averaged(CHANNEL_RANGES, "MovingAveragePerChannelMinMaxObserver")),
    "HistogramObserver": tuple(_histograms()),
    "FixedQParamsObserver": tuple(
        Setting(
            "FixedQParamsObserver",
            (("scale", scale), ("zero_point", zero), ("dtype", dtype), ("quant_min", low), ("quant_max", high)),
        )
        for scale, zero, dtype, low, high in (
            (1 / 256, 0, torch.quint8, 0, 255),
            (2 / 256, 128, torch.quint8, 0, 255),
            (0.1, -128, torch.qint8, -128, 127),
            (1e-30, 7, torch.quint8, 0, 15),
        )
    ),
}
"""By the name of torch.ao's class."""
