"""Rounding that trains is torch's own, forward and backward; where that is wrong, the formulas judge."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qfunc.numerics.affine import along, fake_quantize
from qfunc.numerics.straight_through import cast_through, round_and_learn, round_through
from tests.training.comparing import assert_close, gradients

LIMITS = ((0, 255), (-128, 127), (-127, 127), (0, 127), (0, 15), (-8, 7), (-2, 1), (0, 1))
SHAPES = ((), (1,), (7,), (64,), (3, 0), (5, 9), (4, 3, 5), (2, 4, 3, 3), (2, 3, 2, 3, 2))


@dataclass(frozen=True)
class Case:
    """A tensor and qparams; without `ch_axis` one scale for all."""

    x: Tensor
    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    ch_axis: int | None

    def ours(self, x: Tensor) -> Tensor:
        return round_through(x, self.scale, self.zero_point, self.quant_min, self.quant_max, self.ch_axis)

    def theirs(self, x: Tensor) -> Tensor:
        kept = self.zero_point if self.zero_point.is_floating_point() else self.zero_point.int()
        if self.ch_axis is None:
            return torch.fake_quantize_per_tensor_affine(x, self.scale, kept, self.quant_min, self.quant_max)
        qparams = (self.scale, kept, self.ch_axis, self.quant_min, self.quant_max)
        return torch.fake_quantize_per_channel_affine(x, *qparams)


def hard(shape: tuple[int, ...], scale: Tensor, low: int, high: int, random: torch.Generator) -> Tensor:
    """Values all over the range and beyond it: half of them on, or next to, half and whole steps."""
    width = high - low + 1
    anywhere = torch.rand(shape, generator=random) * 2 * width + low - width / 2
    halves = torch.randint(2 * low - 4, 2 * high + 5, shape, generator=random) / 2
    exact = torch.rand(shape, generator=random) < 0.5
    return torch.where(exact, halves, anywhere) * scale


@st.composite
def cases(draw, zero_points=("whole",), dtypes=(torch.float32,)):
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape, (low, high) = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(LIMITS))
    kind = draw(st.sampled_from(zero_points))
    per_channel = bool(shape) and (kind == "fraction" or draw(st.booleans()))
    if kind == "fraction" and not shape:
        shape, per_channel = (6,), True
    axis = draw(st.sampled_from([axis for axis, size in enumerate(shape) if size])) if per_channel else None
    of = () if axis is None else (shape[axis],)
    scale = torch.rand(of, generator=random) * 10.0 ** draw(st.integers(-4, 2)) + 1e-5
    zero_point = torch.randint(low, high + 1, of, generator=random)
    if kind == "fraction":
        zero_point = zero_point + torch.rand(of, generator=random)
    x = hard(shape, along(scale, torch.empty(shape), axis), low - high, high - low, random)
    if draw(st.booleans()) and len(shape) > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return Case(x.to(draw(st.sampled_from(dtypes))), scale, zero_point, low, high, axis)


def both(case: Case, ours: Any, theirs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = case.x.clone().requires_grad_(), case.x.clone().requires_grad_()
    found, expected = ours(x), theirs(y)
    return found, expected, gradients(found, {"x": x})["x"], gradients(expected, {"x": y})["x"]


@given(cases())
def test_float32_is_bit_for_bit_torchs(case):
    found, expected, gradient, expected_gradient = both(case, case.ours, case.theirs)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)


@given(cases(zero_points=("fraction",)))
def test_zero_points_of_tables_are_torchs(case):
    """Those of embeddings are floats; torch may add and multiply at once, so that values at a half go either way."""
    found, expected, gradient, expected_gradient = both(case, case.ours, case.theirs)
    codes = case.x / along(case.scale, case.x, case.ch_axis) + along(case.zero_point, case.x, case.ch_axis)
    clear = ((codes - codes.floor()) - 0.5).abs() > 1e-3
    assert_close({"y": found[clear]}, {"y": expected[clear]}, within=1e-6)
    assert torch.equal(gradient[clear], expected_gradient[clear])


@given(cases(zero_points=("whole", "fraction")))
def test_training_rounds_as_quantization_does(case):
    qparams = (case.scale, case.zero_point, case.quant_min, case.quant_max, case.ch_axis)
    assert torch.equal(case.ours(case.x), fake_quantize(case.x, *qparams))


@given(cases(dtypes=(torch.float64,)))
def test_float64_is_torchs(case):
    """Torch multiplies by the scale in float32, where there is one."""
    found, expected, gradient, expected_gradient = both(case, case.ours, case.theirs)
    assert found.dtype == gradient.dtype == torch.float64
    assert_close({"y": found}, {"y": expected}, within=1e-7)
    assert torch.equal(gradient, expected_gradient)


@given(cases(zero_points=("whole", "fraction"), dtypes=(torch.bfloat16, torch.float16)))
def test_small_floats_are_rounded_in_float32(case):
    found, expected, gradient, expected_gradient = both(case, case.ours, lambda x: case.ours(x.float()).to(x.dtype))
    assert found.dtype == gradient.dtype == case.x.dtype
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)


@given(cases(dtypes=(torch.bfloat16, torch.float16)))
def test_small_floats_are_torchs(case):
    found, expected, gradient, expected_gradient = both(case, case.ours, case.theirs)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, expected_gradient)


@given(cases(zero_points=("whole", "fraction")))
def test_the_zero_point_may_be_a_number_known_beforehand(case):
    known = int(case.zero_point.flatten()[0]) if case.zero_point.numel() else 0
    given_as = (
        round_through(case.x, case.scale, z, case.quant_min, case.quant_max, case.ch_axis)
        for z in (known, torch.full_like(case.scale, known, dtype=torch.int64))
    )
    assert torch.equal(*given_as)


@pytest.mark.parametrize("zero_point", [torch.zeros(0, dtype=torch.int64), torch.zeros(0)])
def test_no_channels(zero_point):
    """Torch raises for them."""
    x = torch.zeros(3, 0, requires_grad=True)
    y = round_through(x, torch.zeros(0), zero_point, 0, 15, 1)
    assert y.shape == torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("ch_axis", [None, 0])
def test_infinity_saturates(ch_axis):
    """Torch gives the least number for infinity and, with a scale per channel, for any that is too large for int64."""
    x = torch.tensor([math.inf, -math.inf, 1e30, -1e30, 0.3], requires_grad=True)
    shape = () if ch_axis is None else (5,)
    y = round_through(x, torch.full(shape, 0.5), torch.full(shape, 3), 0, 15, ch_axis)
    assert y.tolist() == [6.0, -1.5, 6.0, -1.5, 0.5]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_nan_stays():
    """Torch makes the least number of it, and a diverged training looks sound."""
    assert round_through(torch.tensor([math.nan]), torch.tensor(0.5), torch.tensor(3), 0, 15).isnan().all()


@pytest.mark.parametrize("zero_point", [torch.tensor([3, 5]), torch.tensor([2.5, 5.1])])
def test_the_way_back_sees_what_was_rounded_with(zero_point):
    """An observer writes the next scale into the memory of this one, before the backward pass."""
    x = torch.linspace(-9, 9, 40).view(2, 20).requires_grad_()
    scale, zero_point = torch.tensor([0.5, 0.25]), zero_point.clone()
    expected = torch.autograd.grad(round_through(x, scale, zero_point, 0, 15, 0).sum(), x)[0]
    y = round_through(x, scale, zero_point, 0, 15, 0)
    scale.fill_(100)
    zero_point.zero_()
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


# Learned scales and zero points ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learned(Case):
    """`scale` and `zero_point` are learned."""

    def parameters(self) -> dict[str, Tensor]:
        given_as = {"x": self.x, "scale": self.scale, "zero_point": self.zero_point}
        return {name: value.clone().requires_grad_() for name, value in given_as.items()}

    def learn(self, x: Tensor, scale: Tensor, zero_point: Tensor, *, scale_gradient: bool = False) -> Tensor:
        given_as = (x, scale, zero_point, self.quant_min, self.quant_max, self.ch_axis)
        return round_and_learn(*given_as, scale_gradient=scale_gradient)

    def torch_learns(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Of one dimension more: on the way back through one alone, torch gives gradients of no shape, and raises."""
        bounds, x = (self.quant_min, self.quant_max, 1.0), x.unsqueeze(-1)
        if self.ch_axis is None:
            y = torch._fake_quantize_learnable_per_tensor_affine(x, scale.view(1), zero_point.view(1), *bounds)
        else:
            y = torch._fake_quantize_learnable_per_channel_affine(x, scale, zero_point, self.ch_axis, *bounds)
        return y.squeeze(-1)

    def by_formula(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Of differentiable operators, where `round` has the gradient 1."""
        scale, zero_point = along(scale, x, self.ch_axis), along(zero_point, x, self.ch_axis)
        whole = zero_point.round().clamp(self.quant_min, self.quant_max).detach() + (zero_point - zero_point.detach())
        steps = x * (1.0 / scale)
        rounded = steps + (steps.round() - steps).detach()
        low, high = self.quant_min - whole, self.quant_max - whole
        below, above = steps.round() < low, steps.round() > high
        return torch.where(below, low, torch.where(above, high, rounded)) * scale


@st.composite
def learned(draw, negative=False):
    case = draw(cases(zero_points=("whole",)))
    fraction = draw(st.sampled_from((0.0, 0.3, -0.4, 0.5)))
    if not negative:
        # nor does it round halves as it did on the way there, where the zero point is odd
        x = case.x + 0.1 * along(case.scale, case.x, case.ch_axis)
        span = case.quant_max - case.quant_min
        # torch's kernel for one scale rounds a half up on the way back, and to even on the way there
        fraction = 0.3 if fraction == 0.5 else fraction
        zero_point = (case.zero_point - case.quant_min + fraction).clamp(min=0)
        return Learned(x, case.scale, zero_point, 0, span, case.ch_axis)
    shift = case.quant_max // 2 + 1
    zero_point = case.zero_point.float() - shift + fraction
    return Learned(case.x, case.scale, zero_point, case.quant_min - shift, case.quant_max - shift, case.ch_axis)


def assert_learned(found: dict[str, Tensor], expected: dict[str, Tensor], case: Learned) -> None:
    """Sums of terms of either sign are near in proportion to the terms: on whole steps, all are rounding errors."""
    assert_close({"x": found["x"]}, {"x": expected["x"]}, within=1e-6)
    steps = (case.x / along(case.scale, case.x, case.ch_axis)).abs().sum().item() + case.x.numel()
    for name in ("scale", "zero_point"):
        assert case.x.numel() == 0 or (found[name] - expected[name]).abs().max() <= 3e-6 * steps


@given(learned())
def test_learning_is_torchs(case):
    ours, theirs = case.parameters(), case.parameters()
    y, expected = case.learn(**ours), case.torch_learns(**theirs)
    assert torch.equal(y, expected)
    assert_learned(gradients(y, ours), gradients(expected, theirs), case)


@given(st.one_of(learned(), learned(negative=True)))
def test_learning_follows_the_formulas(case):
    """Also below zero and at halves, where torch's kernel for one scale casts `zero_point + 0.5` to an integer."""
    ours, formula = case.parameters(), case.parameters()
    y, expected = case.learn(**ours), case.by_formula(**formula)
    assert_close({"y": y}, {"y": expected}, within=1e-6)
    assert_learned(gradients(y, ours), gradients(expected, formula), case)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("ch_axis", [None, 0, 1])
def test_gradients_of_ordinary_data_are_torchs(ch_axis, seed):
    random = torch.Generator().manual_seed(seed)
    shape = () if ch_axis is None else (4,)
    scale, zero_point = torch.rand(shape, generator=random) / 10 + 0.02, torch.rand(shape, generator=random) * 8
    case = Learned(torch.randn((4, 4, 50), generator=random), scale, zero_point, 0, 15, ch_axis)
    ours, theirs = case.parameters(), case.parameters()
    y, expected = case.learn(**ours), case.torch_learns(**theirs)
    assert_close({"y": y, **gradients(y, ours)}, {"y": expected, **gradients(expected, theirs)})


@pytest.mark.parametrize("zero_point", [-2.0, -2.4, 2.5])
def test_torch_is_wrong_below_zero_and_at_halves(zero_point):
    """Its backward pass for one scale rounds with another zero point than its forward pass."""
    x = torch.linspace(-3, 3, 61)
    case = Learned(x, torch.tensor(0.25), torch.tensor(zero_point), -8, 7, None)
    ours, theirs, formula = case.parameters(), case.parameters(), case.parameters()
    found, judged = gradients(case.learn(**ours), ours), gradients(case.by_formula(**formula), formula)
    assert_close(found, judged)
    with pytest.raises(AssertionError):
        assert_close(gradients(case.torch_learns(**theirs), theirs), judged)


@given(learned())
def test_gradients_are_divided_by_the_root_of_how_many_share_them(case):
    plain, scaled = case.parameters(), case.parameters()
    of_one = gradients(case.learn(**plain), plain)
    found = gradients(case.learn(**scaled, scale_gradient=True), scaled)
    shared = max(case.x.numel() // max(case.scale.numel(), 1), 1)
    factor = 1 / math.sqrt(shared * max(case.quant_max, 1))
    assert torch.equal(found["x"], of_one["x"])
    assert_close({"scale": found["scale"]}, {"scale": of_one["scale"] * factor})
    assert_close({"zero_point": found["zero_point"]}, {"zero_point": of_one["zero_point"] * factor})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ch_axis", [None, 1])
def test_learning_of_other_floats(dtype, ch_axis):
    """Torch has no backward pass for float64."""
    shape = () if ch_axis is None else (6,)
    random = torch.Generator().manual_seed(3)
    x = hard((5, 6), torch.tensor(0.25), -10, 10, random).to(dtype)
    case = Learned(x, torch.full(shape, 0.25), torch.full(shape, 3.0), 0, 15, ch_axis)
    ours, formula = case.parameters(), case.parameters()
    y = case.learn(**ours)
    wide = x.double().requires_grad_()
    expected = case.by_formula(wide, formula["scale"], formula["zero_point"])
    assert y.dtype == dtype
    assert_close({"y": y}, {"y": expected}, within=1e-2 if dtype != torch.float64 else 1e-7)
    found = gradients(y.double(), ours)
    assert found["x"].dtype == dtype
    assert_close(found, gradients(expected, {**formula, "x": wide}), within=1e-2 if dtype != torch.float64 else 1e-6)


# Casts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smaller", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_casts_round_to_the_smaller_type_and_let_gradients_through(dtype, smaller):
    x = (torch.randn(4, 5, generator=torch.Generator().manual_seed(0)) * 100).to(dtype).requires_grad_()
    y = cast_through(x, smaller)
    assert y.dtype == dtype
    assert torch.equal(y, x.to(smaller).to(dtype))
    given_gradient = torch.randn(4, 5).to(dtype)
    assert torch.equal(torch.autograd.grad(y, x, given_gradient)[0], given_gradient)
    assert y.data_ptr() != x.data_ptr()
