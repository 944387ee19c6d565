"""The qparams of torch's fused operator for moving averages are its own, bit for bit; not those of its observer."""

from dataclasses import replace

import pytest
import torch

from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.fused_range import fused_qparams_of_range
from qfunc.numerics.observers import MinMax, MovingAverageMinMax, MovingAveragePerChannelMinMax
from qfunc.numerics.qparams import (
    INT8_SYMMETRIC,
    UINT8,
    UINT8_FLOAT_QPARAMS,
    UINT8_REDUCED,
    QuantSpec,
    qparams_of_range,
)
from qfunc.numerics.unmeasured import validate_quantization

SPECS = (
    *(UINT8, UINT8_REDUCED, INT8_SYMMETRIC, QuantSpec("int8", -128, 127)),
    *(QuantSpec("int8", -127, 127, "per_tensor_symmetric"), QuantSpec("uint8", 0, 255, "per_tensor_symmetric")),
    *(QuantSpec("int4", -8, 7, "per_tensor_symmetric"), QuantSpec("uint8", 0, 15)),
)


def ranges(count=4096):
    """Of all widths, on both sides of zero and on one."""
    generator = torch.Generator().manual_seed(0)
    width = 10 ** torch.empty(count).uniform_(-7, 3, generator=generator)
    ends = torch.randn(2, count, generator=generator) * width
    ends[:, ::7] = ends[:, ::7].clamp(min=0)
    ends[:, ::11] = ends[:, ::11].clamp(max=0)
    return ends.amin(0), ends.amax(0)


def of_torch(low, high, spec):
    on, count = torch.ones(1, dtype=torch.long), len(low)
    scale, zero_point = torch.ones(count), torch.zeros(count, dtype=torch.int32)
    measured = torch.full((count,), torch.inf), torch.full((count,), -torch.inf)
    settings = (0.01, spec.quant_min, spec.quant_max, 0, True, spec.symmetric)
    torch.fused_moving_avg_obs_fake_quant(torch.stack([low, high], 1), on, on, *measured, scale, zero_point, *settings)
    return scale, zero_point


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_bit_for_bit(spec):
    low, high = ranges()
    scale, zero_point = of_torch(low, high, spec)
    found = fused_qparams_of_range(low, high, spec)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.zero_point, zero_point.long())


@pytest.mark.parametrize("spec", [INT8_SYMMETRIC, replace(INT8_SYMMETRIC, quant_min=-127)], ids=str)
def test_symmetric_ones_are_not_the_observers(spec):
    low, high = ranges()
    wide = (high - low) > 0.1
    found, own = fused_qparams_of_range(low, high, spec), qparams_of_range(low, high, spec)
    both = (low < 0) & (high > 0) & wide
    ratio = (found.scale / own.scale)[both]
    assert ratio.min() > 0.99
    assert ratio.max() < 1.01
    assert (found.zero_point[both] == own.zero_point[both]).all()
    assert (found.zero_point[(low > 0) & wide] == spec.quant_min).all()


@pytest.mark.parametrize(
    ("quantization", "reason"),
    [
        (FakeQuantize(MinMax(UINT8), fused=True), "only a moving average"),
        (FakeQuantize(MovingAverageMinMax(UINT8), learned=True, fused=True), "its qparams are learned"),
        (FakeQuantize(MovingAveragePerChannelMinMax(UINT8_FLOAT_QPARAMS), fused=True), "does not know the qscheme"),
    ],
    ids=repr,
)
def test_what_cannot_be_fused(quantization, reason):
    (problem,) = validate_quantization(quantization)
    assert reason in problem.reason
    assert not list(validate_quantization(FakeQuantize(MovingAverageMinMax(UINT8), fused=True)))
