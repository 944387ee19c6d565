"""What the reference form means, written by hand in plain torch, and short ways to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qfunc import calibrate, convert, fuse, lower, materialize, prepare, trace, unwrap
from qfunc.config.annotation import Annotations


def annotations(*, inputs=None, outputs=None, weights=None, biases=None) -> Annotations:
    from pyrsistent import pmap

    return Annotations(pmap(inputs or {}), pmap(outputs or {}), pmap(weights or {}), biases=pmap(biases or {}))


def converted_of(model, given, configuration, data=None, **options: Any):
    """The reference form of a model, fused; `given` serves as the example, and to calibrate unless `data` does."""
    graph = unwrap(fuse(unwrap(trace(model.eval(), given)), **options))
    prepared = unwrap(prepare(graph, configuration, **options))
    return unwrap(convert(unwrap(calibrate(prepared, [given] if data is None else data, progress=False))))


def reference_of(model, given, configuration, data=None, **options: Any):
    return unwrap(materialize(converted_of(model, given, configuration, data, **options)))


def run(module, *inputs):
    with torch.no_grad():
        return module(*inputs)


def rounded(x: Tensor, scale, zero_point, low: int, high: int) -> Tensor:
    """`x` on a grid, in float64 but for the inverse of the scale; what broadcasts against x broadcasts."""
    scale = torch.as_tensor(scale, dtype=torch.float32)
    zero_point = torch.as_tensor(zero_point)
    steps = torch.round((x * (1.0 / scale)).double() + (zero_point if zero_point.is_floating_point() else 0))
    shift = 0 if zero_point.is_floating_point() else zero_point
    codes = torch.clamp(steps + shift, low, high)
    return ((codes - zero_point) * scale.double()).float()


def affine(low: Tensor, high: Tensor, quant_min: int, quant_max: int):
    """Scale and zero point of a range, affine."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / (quant_max - quant_min)).clamp(min=2.0**-23)
    return scale, (quant_min - torch.round(low / scale).long()).clamp(quant_min, quant_max)


def symmetric(low: Tensor, high: Tensor, quant_min: int, quant_max: int, middle: int = 0):
    largest = torch.maximum(-low.clamp(max=0), high.clamp(min=0))
    scale = (largest / ((quant_max - quant_min) / 2)).clamp(min=2.0**-23)
    return scale, torch.full_like(scale, middle, dtype=torch.long)


def on_range(x: Tensor, quant_min: int, quant_max: int, *, middle: int | None = None) -> Tensor:
    """`x` on the grid of its own range, symmetric where the middle of the codes is told."""
    if x.numel() == 0:
        return x
    args = (x.min(), x.max(), quant_min, quant_max)
    return rounded(x, *(affine(*args) if middle is None else symmetric(*args, middle)), quant_min, quant_max)


def per_row(x: Tensor, quant_min: int, quant_max: int, axis: int = 0) -> Tensor:
    """`x` on symmetric grids, one per channel."""
    others = [d for d in range(x.dim()) if d != axis]
    scale, zero_point = symmetric(x.amin(others, keepdim=True), x.amax(others, keepdim=True), quant_min, quant_max)
    return rounded(x, scale, zero_point, quant_min, quant_max)


def lowered_of(converted, engine):
    return unwrap(lower(converted, engine=engine))
