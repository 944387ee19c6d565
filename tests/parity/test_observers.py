"""qparams equal those of torch.ao's observers on the same sequence of tensors, wherever those are finite."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qfunc.numerics import observers as o
from qfunc.numerics import qparams as q
from qfunc.numerics.qparams import QuantSpec

ao = pytest.importorskip("torch.ao.quantization.observer")

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated.*:UserWarning"),
]

TENSOR = (
    (q.UINT8, {"dtype": torch.quint8}),
    (q.UINT8_REDUCED, {"dtype": torch.quint8, "reduce_range": True}),
    (q.UINT8_REDUCED, {"dtype": torch.quint8, "quant_min": 0, "quant_max": 127}),
    (q.INT8, {"dtype": torch.qint8}),
    (q.INT8_SYMMETRIC, {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}),
    (
        QuantSpec("int8", -127, 127, "per_tensor_symmetric", None, 2.0**-12),
        {
            "dtype": torch.qint8,
            "qscheme": torch.per_tensor_symmetric,
            "quant_min": -127,
            "quant_max": 127,
            "eps": 2**-12,
        },
    ),
    (
        QuantSpec("uint8", 0, 255, "per_tensor_symmetric"),
        {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric},
    ),
    (
        QuantSpec("uint8", 0, 15, "per_tensor_symmetric"),
        {"dtype": torch.quint8, "qscheme": torch.per_tensor_symmetric, "quant_min": 0, "quant_max": 15},
    ),
    (QuantSpec("int8", -8, 7), {"dtype": torch.qint8, "quant_min": -8, "quant_max": 7}),
    (QuantSpec("int16", -(2**15), 2**15 - 1), {"dtype": torch.int16}),
)
CHANNEL = (
    (q.INT8_SYMMETRIC_PER_CHANNEL, {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}),
    (
        QuantSpec("int8", -128, 127, "per_channel_affine", 0),
        {"dtype": torch.qint8, "qscheme": torch.per_channel_affine},
    ),
    (
        QuantSpec("uint8", 0, 255, "per_channel_affine", 1),
        {"dtype": torch.quint8, "qscheme": torch.per_channel_affine, "ch_axis": 1},
    ),
    (q.UINT8_FLOAT_QPARAMS, {"dtype": torch.quint8, "qscheme": torch.per_channel_affine_float_qparams}),
    (q.UINT4_FLOAT_QPARAMS, {"dtype": torch.quint4x2, "qscheme": torch.per_channel_affine_float_qparams}),
)


@st.composite
def tensors(draw, largest=3.4e38):
    """Tensors of shape (3, n): drawn value by value, or many of one distribution and magnitude."""
    if draw(st.booleans()):
        largest = torch.tensor(largest).item()
        value = st.floats(-largest, largest, width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-40, 1.0, largest])
        return torch.tensor(draw(st.lists(value, min_size=3, max_size=12))).repeat(3, 1)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    x = torch.randn(3, draw(st.integers(1, 3000)), generator=g)
    shape = draw(st.sampled_from(["normal", "relu", "cubed", "constant", "rounded", "clamped", "offset"]))
    x = {
        "normal": x,
        "relu": x.relu(),
        "cubed": x**3,
        "constant": torch.ones_like(x),
        "rounded": x.round(),
        "clamped": x.clamp(-1, 1),
        "offset": x + 4,
    }[shape]
    return x * draw(st.sampled_from([1.0, -0.3, 1e-9, 1e-5, 20.0, 1e8]))


def batches(largest=3.4e38):
    return st.lists(tensors(largest), min_size=1, max_size=5)


def check(ours, theirs, data):
    state = ours.init()
    for x in data:
        state = ours.update(state, x)
        theirs(x)
        if (theirs.min_val > theirs.max_val).any():
            return  # its moving average may cancel to a minimum above the maximum; in the end, it asserts
    found, (scale, zero_point) = ours.finish(state), theirs.calculate_qparams()
    assert torch.isfinite(found.scale).all()
    scale, zero_point = scale.view(found.scale.shape), zero_point.view(found.scale.shape)
    finite = torch.isfinite(scale) & torch.isfinite(zero_point)
    assert torch.allclose(found.scale[finite], scale[finite], rtol=1e-6, atol=0)
    if ours.spec.qscheme == q.FLOAT_QPARAMS:
        assert torch.allclose(found.zero_point[finite], zero_point[finite], rtol=1e-6, atol=0)
    else:
        assert torch.equal(found.zero_point[finite], zero_point[finite].to(torch.int64))


@given(st.sampled_from(TENSOR), batches())
def test_min_max(spec, data):
    check(o.MinMax(spec[0]), ao.MinMaxObserver(**spec[1]), data)


@given(st.sampled_from(TENSOR), batches(1e38), st.sampled_from([0.01, 0.5, 1.0]))
def test_moving_average(spec, data, constant):
    check(
        o.MovingAverageMinMax(spec[0], constant),
        ao.MovingAverageMinMaxObserver(averaging_constant=constant, **spec[1]),
        data,
    )


def same_shape(data):
    return [x[:, : min(y.shape[1] for y in data)] for x in data]


@given(st.sampled_from(CHANNEL), batches().map(same_shape))
def test_per_channel_min_max(spec, data):
    check(o.PerChannelMinMax(spec[0]), ao.PerChannelMinMaxObserver(**spec[1]), data)


@given(st.sampled_from(CHANNEL), batches(1e38).map(same_shape))
def test_moving_average_per_channel(spec, data):
    check(o.MovingAveragePerChannelMinMax(spec[0]), ao.MovingAveragePerChannelMinMaxObserver(**spec[1]), data)


# up to 1e9: from about 1e12, torch.ao's search compares NaN and keeps a single bin around the median
@given(st.sampled_from(TENSOR[:8]), batches(1e9))
@settings(max_examples=30, deadline=None)
@example(TENSOR[0], [torch.zeros(3, 4)])
@example(TENSOR[0], [torch.full((3, 4), 2.0), torch.full((3, 4), -5.0), torch.ones(3, 4)])
@example(TENSOR[0], [torch.tensor([1.0, 1.0000001]), torch.tensor([1.0000005])])
def test_histogram(spec, data):
    check(o.Histogram(spec[0]), ao.HistogramObserver(**spec[1]), data)


@pytest.mark.parametrize("bins", [128, 1000, 2048])
def test_histograms_are_equal_bin_by_bin(bins):
    ours, theirs = o.Histogram(bins=bins), ao.HistogramObserver(bins=bins)
    g, state = torch.Generator().manual_seed(0), ours.init()
    for grown in (1.0, 0.5, 1.5, 4.0, 4.1):
        x = torch.randn(5000, generator=g) * grown
        state = ours.update(state, x)
        theirs(x)
        assert torch.equal(state.counts, theirs.histogram)


def test_weights_of_a_convolution():
    weight = torch.randn(64, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        data = [weight.to(memory_format=memory_format)]
        check(o.PerChannelMinMax(CHANNEL[0][0]), ao.PerChannelMinMaxObserver(**CHANNEL[0][1]), data)
