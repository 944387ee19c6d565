"""The qparams that torch's fused operator takes for a range while a model trains.

`torch.fused_moving_avg_obs_fake_quant` rounds with others than its observer gives, in float64:

    affine       scale = (maximum - minimum) / n, zero_point = round(quant_min - minimum / scale), or what the maximum
                 gives where that is exact to more digits
    symmetric    scale = 2 * max(-minimum / (m + 1), maximum / m) * (m + 1/2) / n with m = n // 2, which is
                 max(-minimum / 128, maximum / 127) for 8 bits; zero_point in the middle. A range on one side of zero
                 is affine nevertheless: all codes are spent on it.

where `n = quant_max - quant_min`, and no scale is less than 6.1e-5. Source: torch's `quantized/cpu/QuantUtils.h`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfunc.numerics.qparams import QParams, QuantSpec

LEAST_SCALE = 6.1e-5
"""Below it, the scale would be no normal float16."""


def fused_qparams_of_range(minimum: Tensor, maximum: Tensor, spec: QuantSpec) -> QParams:
    """Scale and zero point for values in `[minimum, maximum]`, of shape `()` or `(channels,)`; both are finite.

    >>> from qfunc.numerics.qparams import INT8_SYMMETRIC
    >>> q = fused_qparams_of_range(torch.tensor(-1.28), torch.tensor(1.0), INT8_SYMMETRIC)
    >>> round(q.scale.item(), 6), q.zero_point.item()
    (0.01, 0)
    >>> q = fused_qparams_of_range(torch.tensor(0.5), torch.tensor(2.55), INT8_SYMMETRIC)
    >>> round(q.scale.item(), 6), q.zero_point.item()
    (0.01, -128)
    """
    low, high = minimum.detach().to(torch.float32), maximum.detach().to(torch.float32)
    steps = spec.quant_max - spec.quant_min
    both = (low < 0) & (high > 0) & spec.symmetric
    half = steps // 2
    widest = torch.maximum((low / (half + 1)).abs(), (high / half).abs()).double()
    low = torch.where(both, (-widest * (half + 1)).to(torch.float32), low).clamp(max=0)
    high = torch.where(both, (widest * half).to(torch.float32), high).clamp(min=0)
    scale = (high.double() - low.double()) / steps
    scale = torch.where(torch.isfinite(1.0 / scale.to(torch.float32)), scale, 0.1)
    # what is widened to the least scale keeps where zero is
    wider = (LEAST_SCALE / scale).to(torch.float32).clamp(min=1.0)
    low, high, scale = (low * wider).double(), (high * wider).double(), scale.clamp(min=LEAST_SCALE)
    from_low, from_high = spec.quant_min - low / scale, spec.quant_max - high / scale
    errors = abs(spec.quant_min) - (low / scale).abs(), abs(spec.quant_max) - (high / scale).abs()
    zero_point = torch.where(errors[0] < errors[1], from_low, from_high)
    zero_point = torch.where(both, (spec.quant_min + spec.quant_max) / 2, zero_point)
    zero_point = zero_point.clamp(spec.quant_min, spec.quant_max).round().to(torch.int64)
    return QParams(scale.to(torch.float32), zero_point, spec)
