"""Rounding that trains: quantized numbers on the way forward, and gradients as if most of it were not there.

    v = x / s,  n = quant_min - z,  p = quant_max - z
    forward     y = clamp(round(v), n, p) * s                  bit for bit `qfunc.numerics.affine.fake_quantize`
    backward    dy/dx = 1 where n <= round(v) <= p, else 0

Where the scale and the zero point are learned as well, by the same rule that `round` has the gradient 1,

    dy/ds = round(v) - v where n <= round(v) <= p, n below, p above
    dy/dz = 0 where n <= round(v) <= p, else -s

A zero point that is a float, and is not learned, is added before rounding, since its fraction counts:

    forward     y = (clamp(round(v + z), quant_min, quant_max) - z) * s
    backward    dy/dx = 1 where quant_min <= round(v + z) <= quant_max, else 0

Sources: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons" (straight through);
Esser et al. 2020, "Learned Step Size Quantization" (the gradient of the scale, and its factor); Bhalgat et al. 2020,
"LSQ+" (that of the zero point).

All of it is made of vectorized operators: torch's own fake-quantize kernels take one element at a time.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor

from qfunc.numerics.affine import along

ZeroPoint: TypeAlias = Tensor | int
"""One for each scale; a number where it is the same for all and known beforehand."""


def round_through(
    x: Tensor, scale: Tensor, zero_point: ZeroPoint, quant_min: int, quant_max: int, ch_axis: int | None = None
) -> Tensor:
    """`x` rounded to the numbers that its integers stand for; gradients pass where they are in range.

    `scale` and `zero_point` have shape `()`, or `(x.shape[ch_axis],)`, and have no gradients. The result has x's type;
    float64 is computed as such, any other type in float32.

    >>> x = torch.tensor([-1.5, 0.3, 9.0], requires_grad=True)
    >>> y = round_through(x, torch.tensor(0.5), torch.tensor(2), 0, 8)
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([-1.0, 0.5, 3.0], [0.0, 1.0, 0.0])
    """
    if torch.is_grad_enabled() and x.requires_grad:
        # the backward pass is to see what was rounded with, whatever has become of it in between
        scale = scale.clone()
        zero_point = zero_point.clone() if isinstance(zero_point, Tensor) else zero_point
    rounded: Tensor = _RoundThrough.apply(x, scale, zero_point, quant_min, quant_max, ch_axis)  # type: ignore[no-untyped-call]
    return rounded


def round_and_learn(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    ch_axis: int | None = None,
    *,
    scale_gradient: bool = True,
) -> Tensor:
    """`round_through` with gradients of the scale, which is positive, and of the zero point, any number.

    The zero point is rounded and clamped to the range of the integers. With `scale_gradient` both gradients are divided
    by the square root of the number of elements that share a scale times `quant_max`, as the source has it, so that a
    step size learns about as fast as a weight.

    >>> x, s = torch.tensor([0.3, 9.0]), torch.tensor(0.5, requires_grad=True)
    >>> y = round_and_learn(x, s, torch.tensor(0.0), -4, 3, scale_gradient=False)
    >>> [round(torch.autograd.grad(each, s, retain_graph=True)[0].item(), 3) for each in y]
    [0.4, 3.0]
    """
    factor = 1.0
    if scale_gradient:
        factor = 1.0 / math.sqrt(max(x.numel() // max(scale.numel(), 1), 1) * max(quant_max, 1))
    rounded: Tensor = _RoundAndLearn.apply(x, scale.clone(), zero_point.clone(), quant_min, quant_max, ch_axis, factor)  # type: ignore[no-untyped-call]
    return rounded


def cast_through(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to the numbers of a smaller floating-point type; gradients pass as they are.

    >>> x = torch.tensor([0.1], requires_grad=True)
    >>> y = cast_through(x, torch.float16)
    >>> y.item(), torch.autograd.grad(y, x)[0].item()
    (0.0999755859375, 1.0)
    """
    cast: Tensor = _CastThrough.apply(x, dtype)  # type: ignore[no-untyped-call]
    return cast


def _steps(x: Tensor, scale: Tensor, ch_axis: int | None, shift: Tensor | None = None) -> Tensor:
    """`x` in units of the scale, plus `shift`, in new memory: in float64 where x is, else in float32."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    steps = wide * (1.0 / along(scale, x, ch_axis))
    return steps if shift is None else steps.add_(shift)


class _Bounds:
    """The least and the largest number of steps from zero: numbers where they can be known, for which kernels are fast.

    Looking at a zero point would stop a device's queue, or a compiler.
    """

    def __init__(self, x: Tensor, zero_point: ZeroPoint, quant_min: int, quant_max: int, ch_axis: int | None) -> None:
        self.low: Any
        self.high: Any
        if (
            isinstance(zero_point, Tensor)
            and zero_point.numel() == 1
            and x.is_cpu
            and not torch.compiler.is_compiling()
        ):
            zero_point = zero_point.item()  # type: ignore[assignment]
        shift = along(zero_point, x, ch_axis) if isinstance(zero_point, Tensor) else zero_point
        self.low, self.high = quant_min - shift, quant_max - shift
        self.known = not isinstance(shift, Tensor)

    def clamp_(self, steps: Tensor) -> Tensor:
        return steps.clamp_(self.low, self.high)

    def passed(self, rounded: Tensor, gradient: Tensor) -> Tensor:
        """The gradient where rounded steps are in range, else 0."""
        if self.known:
            # between two whole numbers of steps there is none, so that on which side a bound lies is clear
            low, high = self.low - 0.5, self.high + 0.5
            return torch.ops.aten.hardtanh_backward(gradient.to(rounded.dtype), rounded, low, high)  # type: ignore[no-any-return]
        inside = (rounded >= self.low) & (rounded <= self.high)
        return torch.where(inside, gradient.to(rounded.dtype), 0)


class _RoundThrough(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: ZeroPoint, quant_min: int, quant_max: int, ch_axis: int | None
    ) -> Tensor:
        shift = _fraction(x, zero_point, ch_axis)
        bounds = _Bounds(x, zero_point if shift is None else 0, quant_min, quant_max, ch_axis)
        return _rounded(x, scale, bounds, ch_axis, shift)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        x, scale, zero_point, *ctx.numbers = inputs
        ctx.known = zero_point
        kept = (zero_point,) if isinstance(zero_point, Tensor) else ()
        ctx.save_for_backward(x, scale, *kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale, *rest = ctx.saved_tensors
        quant_min, quant_max, ch_axis = ctx.numbers
        zero_point = rest[0] if rest else ctx.known
        shift = _fraction(x, zero_point, ch_axis)
        bounds = _Bounds(x, zero_point if shift is None else 0, quant_min, quant_max, ch_axis)
        passed = bounds.passed(_steps(x, scale, ch_axis, shift).round_(), gradients[0])
        return passed.to(x.dtype), None, None, None, None, None


def _fraction(x: Tensor, zero_point: ZeroPoint, ch_axis: int | None) -> Tensor | None:
    """What is added before rounding: a zero point that is no integer."""
    is_float = isinstance(zero_point, Tensor) and zero_point.is_floating_point()
    return along(zero_point, x, ch_axis) if is_float else None  # type: ignore[arg-type]


def _rounded(x: Tensor, scale: Tensor, bounds: _Bounds, ch_axis: int | None, shift: Tensor | None = None) -> Tensor:
    steps = bounds.clamp_(_steps(x, scale, ch_axis, shift).round_())
    if shift is not None:
        steps.sub_(shift)
    return steps.mul_(along(scale, x, ch_axis)).to(x.dtype)


class _RoundAndLearn(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        ch_axis: int | None,
        factor: float,  # noqa: ARG004 - of the gradients
    ) -> Tensor:
        whole = zero_point.round().clamp(quant_min, quant_max)
        return _rounded(x, scale, _Bounds(x, whole, quant_min, quant_max, ch_axis), ch_axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        x, scale, zero_point, *ctx.numbers = inputs
        ctx.save_for_backward(x, scale, zero_point)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, ch_axis, factor = ctx.numbers
        bounds = _Bounds(x, zero_point.round().clamp(quant_min, quant_max), quant_min, quant_max, ch_axis)
        steps = _steps(x, scale, ch_axis)
        rounded = steps.round()
        given = gradients[0].to(rounded.dtype)
        passed = bounds.passed(rounded, given)
        # the difference to the unrounded steps is what rounding adds; beyond the range there is only the bound
        unrounded = bounds.passed(rounded, steps)
        of_scale = bounds.clamp_(rounded).sub_(unrounded).mul_(given)
        of_zero_point = (given - passed) * -along(scale, x, ch_axis)
        return (
            passed.to(x.dtype),
            _summed(of_scale, scale, ch_axis) * factor,
            _summed(of_zero_point, zero_point, ch_axis) * factor,
            *(None,) * 4,
        )


def _summed(values: Tensor, like: Tensor, ch_axis: int | None) -> Tensor:
    """The sums of all values that share one of `like`, in its shape and type."""
    others = [axis for axis in range(values.dim()) if axis != ch_axis]
    whole = ch_axis is None or like.dim() == 0
    return (values.sum() if whole else values.sum(others) if others else values).to(like.dtype).view(like.shape)


class _CastThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004
        return gradients[0], None
