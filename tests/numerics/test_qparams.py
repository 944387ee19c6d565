import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qfunc.errors import BadConfig, UnknownName
from qfunc.numerics import qparams as q
from qfunc.numerics.qparams import QParams, QuantSpec, qparams_of_range, same_values, validate

SPECS = (
    q.UINT8,
    q.UINT8_REDUCED,
    q.INT8,
    q.INT8_SYMMETRIC,
    QuantSpec("uint8", 0, 255, "per_tensor_symmetric"),
    QuantSpec("uint8", 0, 15, "per_tensor_symmetric"),
    QuantSpec("int8", -8, 7, "per_tensor_symmetric"),
    QuantSpec("int16", -(2**15), 2**15 - 1),
    QuantSpec("int32", -(2**31), 2**31 - 1),
    QuantSpec("uint16", 0, 2**16 - 1, "per_tensor_symmetric"),
    QuantSpec("uint32", 0, 2**32 - 1),
    QuantSpec("int8", 0, 1),
    QuantSpec("uint4", 0, 15),
    QuantSpec("int4", -8, 7, "per_tensor_symmetric"),
)
CHANNEL_SPECS = (q.INT8_SYMMETRIC_PER_CHANNEL, q.INT8_NARROW_PER_CHANNEL)
FLOAT_SPECS = (q.UINT8_FLOAT_QPARAMS, q.UINT4_FLOAT_QPARAMS)

any_float = st.floats(width=32)


@pytest.mark.parametrize("spec", SPECS + CHANNEL_SPECS + FLOAT_SPECS)
def test_the_known_specs_are_valid(spec):
    assert validate(spec) == ()


@given(any_float, any_float, st.sampled_from(SPECS))
def test_qparams_are_always_finite_and_zero_is_always_exact(a, b, spec):
    found = qparams_of_range(torch.tensor(a), torch.tensor(b), spec)
    assert found.scale.dtype == torch.float32
    assert found.zero_point.dtype == torch.int64
    assert found.scale.shape == found.zero_point.shape == ()
    assert math.isfinite(found.scale.item())
    assert found.scale.item() >= spec.eps
    assert spec.quant_min <= found.zero_point.item() <= spec.quant_max


def test_a_width_that_overflows_float32_keeps_its_scale():
    big = torch.finfo(torch.float32).max
    found = qparams_of_range(torch.tensor(-big), torch.tensor(big), q.UINT8)
    assert found.scale.item() == pytest.approx(2 * big / 255)
    assert found.zero_point.item() in (127, 128)


@pytest.mark.parametrize(
    ("spec", "zero_point"),
    [
        (q.INT8_SYMMETRIC, 0),
        (QuantSpec("uint8", 0, 255, "per_tensor_symmetric"), 128),
        (QuantSpec("uint8", 0, 127, "per_tensor_symmetric"), 63),
        (QuantSpec("uint16", 0, 2**16 - 1, "per_tensor_symmetric"), 2**15),
        (QuantSpec("uint4", 0, 15, "per_tensor_symmetric"), 8),
        (QuantSpec("uint4", 0, 7, "per_tensor_symmetric"), 3),
        (QuantSpec("int4", -8, 7, "per_tensor_symmetric"), 0),
    ],
)
def test_symmetric_zero_points(spec, zero_point):
    assert qparams_of_range(torch.tensor(-1.0), torch.tensor(3.0), spec).zero_point.item() == zero_point


def test_each_channel_has_its_qparams():
    low, high = torch.tensor([-1.0, 0.0, -4.0]), torch.tensor([2.0, 0.0, 1.0])
    found = qparams_of_range(low, high, q.INT8_SYMMETRIC_PER_CHANNEL)
    for c in range(3):
        alone = qparams_of_range(low[c], high[c], q.INT8_SYMMETRIC)
        assert found.scale[c] == alone.scale
        assert found.zero_point[c] == alone.zero_point
    assert found.scale[1].item() == q.INT8_SYMMETRIC.eps


@given(any_float, any_float, st.sampled_from(FLOAT_SPECS))
def test_float_zero_points_are_finite(a, b, spec):
    found = qparams_of_range(torch.tensor([a, 0.0]), torch.tensor([b, 1.0]), spec)
    assert found.scale.dtype == found.zero_point.dtype == torch.float32
    assert found.scale.shape == found.zero_point.shape == (2,)
    assert torch.isfinite(found.scale).all()
    assert torch.isfinite(found.zero_point).all()
    assert (found.scale > spec.eps).all()


@given(st.floats(-100, 100, width=32), st.floats(0.25, 100, width=32), st.sampled_from(FLOAT_SPECS))
def test_float_zero_points_put_the_ends_of_the_range_on_the_ends_of_the_codes(low, width, spec):
    low, high = torch.tensor([low]), torch.tensor([low + width])
    found = qparams_of_range(low, high, spec)
    for end, code in ((low, spec.quant_min), (high, spec.quant_max)):
        assert torch.allclose((code - found.zero_point) * found.scale, end, atol=1e-4)


def test_a_range_of_no_width_has_the_scale_one():
    found = qparams_of_range(torch.tensor([0.25, 0.0]), torch.tensor([0.25, 0.0]), q.UINT8_FLOAT_QPARAMS)
    assert found.scale.tolist() == [1.0, 1.0]
    assert found.zero_point.tolist() == [-0.25, 0.0]


@pytest.mark.parametrize(("dtype", "limits", "held"), [("uint4", (0, 15), torch.uint8), ("int4", (-8, 7), torch.int8)])
def test_four_bits(dtype, limits, held):
    spec = QuantSpec(dtype, *limits)
    assert spec.limits == limits
    assert spec.torch_dtype == held
    for wider in (dataclasses.replace(spec, quant_max=16), dataclasses.replace(spec, quant_min=-9)):
        (problem,) = validate(wider)
        assert f"{dtype}, which holds {limits[0]}..{limits[1]}" in problem.reason


def test_the_bounds_may_require_grad_and_are_not_changed():
    low = torch.tensor(-1.0, requires_grad=True)
    found = qparams_of_range(low, torch.tensor(2.0), q.UINT8)
    assert not found.scale.requires_grad
    assert low.item() == -1.0


@pytest.mark.parametrize(
    ("change", "case"),
    [
        ({"dtype": "uint9"}, UnknownName),
        ({"dtype": torch.uint8}, UnknownName),
        ({"qscheme": "per_tensor"}, UnknownName),
        ({"quant_max": 256}, BadConfig),
        ({"quant_min": -1}, BadConfig),
        ({"quant_min": 1}, BadConfig),
        ({"quant_max": 0}, BadConfig),
        ({"quant_min": 0.5}, BadConfig),
        ({"quant_max": True}, BadConfig),
        ({"ch_axis": 0}, BadConfig),
        ({"qscheme": "per_channel_affine"}, BadConfig),
        ({"qscheme": "per_channel_affine", "ch_axis": -1}, BadConfig),
        ({"eps": 0.0}, BadConfig),
        ({"eps": math.nan}, BadConfig),
        ({"eps": math.inf}, BadConfig),
        ({"eps": 1e-40}, BadConfig),
    ],
)
def test_impossible_specs_are_told(change, case):
    (problem,) = validate(dataclasses.replace(q.UINT8, **change))
    assert type(problem) is case
    assert problem.reason
    assert problem.remedy


def test_all_problems_are_told_at_once():
    assert len(validate(QuantSpec("float8", 3, 2, "none", None, -1.0))) == 4


def test_qparams_are_equal_by_value():
    def one(scale, zero_point=0, spec=q.INT8_SYMMETRIC):
        return QParams(torch.tensor(scale), torch.tensor(zero_point), spec)

    assert one([0.5, 1.0]) == one([0.5, 1.0])
    assert hash(one([0.5, 1.0])) == hash(one([0.5, 1.0]))
    assert one([0.5, 1.0]) != one([0.5, 1.5])
    assert one(0.5) != one([0.5])
    assert one(0.5) != one(0.5, 1)
    assert one(0.5) != one(0.5, 0, q.INT8)
    assert one(0.5) != 0.5


def test_tensors_of_other_type_or_shape_have_other_values():
    assert not same_values(torch.tensor(1), torch.tensor(1.0))
    assert not same_values(torch.ones(2), torch.ones(1))
    assert same_values(torch.empty(0), torch.empty(0))
