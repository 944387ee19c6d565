import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qfunc.numerics import qparams as q
from qfunc.numerics.affine import dequantize, fake_quantize, quantize
from qfunc.numerics.qparams import QuantSpec, qparams_of_range

NARROW = (
    q.UINT8,
    q.UINT8_REDUCED,
    q.INT8,
    q.INT8_SYMMETRIC,
    QuantSpec("uint8", 0, 255, "per_tensor_symmetric"),
    QuantSpec("uint8", 0, 9),
    QuantSpec("int16", -(2**15), 2**15 - 1),
    QuantSpec("uint16", 0, 2**16 - 1),
)
pytestmark = pytest.mark.filterwarnings("ignore:.*quantiz.*deprecated:UserWarning")

values = st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=30)
seeds = st.integers(0, 2**32 - 1)


def there_and_back(x, qparams):
    spec = qparams.spec
    integers = quantize(
        x, qparams.scale, qparams.zero_point, spec.quant_min, spec.quant_max, spec.torch_dtype, spec.ch_axis
    )
    return integers, dequantize(integers, qparams.scale, qparams.zero_point, spec.ch_axis)


@given(values, values, st.sampled_from(NARROW))
def test_law_10_error_is_at_most_half_a_step(data, ranged, spec):
    """Within the range that `ranged` gives, not only of the data itself."""
    x, other = torch.tensor(data), torch.tensor(ranged)
    qparams = qparams_of_range(other.min(), other.max(), spec)
    integers, back = there_and_back(x, qparams)
    scale, zero_point = qparams.scale.double(), qparams.zero_point
    assert integers.dtype == spec.torch_dtype
    assert (integers.to(torch.int64) >= spec.quant_min).all()
    assert (integers.to(torch.int64) <= spec.quant_max).all()
    low, high = (spec.quant_min - zero_point) * scale, (spec.quant_max - zero_point) * scale
    inside = (x.double() >= low) & (x.double() <= high)
    error = (x.double() - back.double()).abs()
    assert (error <= scale / 2 + 2**-21 * x.double().abs())[inside].all()
    outside = torch.where(x.double() < low, low, high)
    assert torch.allclose(back.double()[~inside], outside[~inside], rtol=1e-6)


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=5), st.sampled_from(NARROW))
def test_zero_is_exact_and_infinity_saturates(data, spec):
    x = torch.tensor([0.0, -0.0, *data, torch.inf, -torch.inf])
    qparams = qparams_of_range(x[:-2].min(), x[:-2].max(), spec)
    integers, back = there_and_back(x, qparams)
    assert back[0] == back[1] == 0
    assert integers.to(torch.int64)[-2:].tolist() == [spec.quant_max, spec.quant_min]


@given(seeds, st.sampled_from(NARROW))
def test_quantizing_what_was_dequantized_changes_nothing(seed, spec):
    g = torch.Generator().manual_seed(seed)
    scale = 10 ** (torch.rand((), generator=g) * 12 - 6)
    zero_point = torch.randint(spec.quant_min, spec.quant_max + 1, (), generator=g)
    integers = torch.randint(spec.quant_min, spec.quant_max + 1, (200,), generator=g).to(spec.torch_dtype)
    back = dequantize(integers, scale, zero_point)
    again = quantize(back, scale, zero_point, spec.quant_min, spec.quant_max, spec.torch_dtype)
    assert torch.equal(again.to(torch.int64), integers.to(torch.int64))


def test_halves_go_to_the_even_step_whatever_the_zero_point():
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5, 2.5])
    for zero_point in (10, 11):
        steps = quantize(x, torch.tensor(1.0), torch.tensor(zero_point), 0, 255, torch.uint8).to(torch.int64)
        assert (steps - zero_point).tolist() == [-2, 0, 0, 2, 2]


@pytest.mark.parametrize("bits", [8, 24, 31])
def test_int32_saturates_at_its_ends(bits):
    x = torch.tensor([-3e38, -1.0, 0.0, 1.0, 3e38])
    low, high = -(2**bits), 2**bits - 1
    steps = quantize(x, torch.tensor(1e-3), torch.tensor(5), low, high, torch.int32)
    assert steps.tolist() == [low, max(low, -995), 5, min(high, 1005), high]
    back = dequantize(steps, torch.tensor(1e-3), torch.tensor(5))
    assert back[2] == 0


def at_a_half(x, scale):
    """Where x / scale is a half up to rounding error: there, adding the zero point first may change the step."""
    steps = x.double() / scale.double()
    return (steps - steps.floor() - 0.5).abs() < 1e-4


@given(seeds)
def test_agrees_with_fake_quantize_per_tensor_bit_for_bit(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(500, generator=g) * 10
    x[:50] = (torch.arange(50) - 20.5) * 0.1
    scale, zero_point = torch.rand((), generator=g) + 0.01, torch.randint(0, 256, (), generator=g)
    ours = fake_quantize(x, scale, zero_point, 0, 255)
    assert torch.equal(ours, torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), 0, 255))
    integers = quantize(x, scale, zero_point, 0, 255, torch.uint8)
    assert torch.equal(ours, dequantize(integers, scale, zero_point))


@given(seeds, st.integers(0, 2))
def test_agrees_with_fake_quantize_per_channel_bit_for_bit(seed, axis):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 6, 7, generator=g) * 10
    channels = x.shape[axis]
    scale, zero_point = torch.rand(channels, generator=g) + 0.01, torch.randint(-9, 9, (channels,), generator=g)
    ours = fake_quantize(x, scale, zero_point, -128, 127, axis)
    assert torch.equal(ours, torch.fake_quantize_per_channel_affine(x, scale, zero_point.int(), axis, -128, 127))
    integers = quantize(x, scale, zero_point, -128, 127, torch.int8, axis)
    assert torch.equal(ours, dequantize(integers, scale, zero_point, axis))


@pytest.mark.parametrize(("dtype", "quantized"), [("uint8", torch.quint8), ("int8", torch.qint8)])
@given(seed=seeds)
def test_agrees_with_quantize_per_tensor_but_at_halves(dtype, quantized, seed):
    g = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(getattr(torch, dtype))
    x = torch.randn(2000, generator=g) * 10
    scale = torch.rand((), generator=g) + 0.01
    zero_point = torch.randint(limits.min, limits.max + 1, (), generator=g)
    theirs = torch.quantize_per_tensor(x, scale, zero_point, quantized)
    ours = quantize(x, scale, zero_point, limits.min, limits.max, getattr(torch, dtype))
    apart = (theirs.int_repr().int() - ours.int()).abs()
    assert apart.max() <= 1
    assert not apart[~at_a_half(x, scale)].any()
    assert torch.equal(dequantize(theirs.int_repr(), scale, zero_point), theirs.dequantize())


@given(seeds)
def test_agrees_with_quantize_per_channel_but_at_halves(seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 4, 9, generator=g)
    scale, zero_point = torch.rand(4, generator=g) + 0.01, torch.zeros(4, dtype=torch.int64)
    theirs = torch.quantize_per_channel(x, scale, zero_point, 1, torch.qint8)
    ours = quantize(x, scale, zero_point, -128, 127, torch.int8, 1)
    apart = (theirs.int_repr().int() - ours.int()).abs()
    assert not apart[~at_a_half(x, scale.view(1, 4, 1))].any()
    assert apart.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_types(dtype):
    x = torch.linspace(-1, 1, 33).to(dtype)
    scale, zero_point = torch.tensor(2**-6), torch.tensor(64)
    steps = quantize(x, scale, zero_point, 0, 255, torch.uint8)
    assert torch.equal(steps, quantize(x.float(), scale, zero_point, 0, 255, torch.uint8))
    assert fake_quantize(x, scale, zero_point, 0, 255).dtype == dtype
    assert dequantize(steps, scale, zero_point, dtype=dtype).dtype == dtype


def test_the_memory_format_and_the_input_stay():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    before = x.clone()
    steps = quantize(x, torch.ones(3), torch.zeros(3, dtype=torch.int64), -128, 127, torch.int8, 1)
    assert steps.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
