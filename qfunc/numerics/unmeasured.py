"""Ways to quantize a value for which nothing is measured beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from qfunc.errors import BadConfig, Problem, UnknownName
from qfunc.numerics.fake_quantize import FakeQuantize, is_fixed
from qfunc.numerics.observers import MovingAverageMinMax, MovingAveragePerChannelMinMax, Observer, validate_observer
from qfunc.numerics.qparams import FLOAT_QPARAMS, UINT8, QuantSpec, validate

FLOATS = ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
"""The floating-point types that values can be cast to."""


@dataclass(frozen=True, slots=True)
class Dynamic:
    """Qparams of each tensor's own, made of its least and largest value when the model runs.

    Only inputs are quantized so; the result of an operator that is configured with it stays float.
    """

    spec: QuantSpec = UINT8


@dataclass(frozen=True, slots=True)
class Cast:
    """Rounding to a smaller floating-point type, which needs no qparams.

    With `dynamic` only inputs are cast, and the result of an operator that is configured with it stays float.
    """

    dtype: str = "float16"
    dynamic: bool = False


@dataclass(frozen=True, slots=True)
class KeepFloat:
    """No quantization: of the activations of an operator whose weight alone is quantized, say."""


@dataclass(frozen=True, slots=True)
class ReuseInput:
    """The qparams of the input, where that is quantized; float otherwise."""


Quantization: TypeAlias = Observer[Any] | Dynamic | Cast | KeepFloat | ReuseInput
"""How the activations of an operator are quantized: with what an observer finds, or in a way that measures nothing."""

UNMEASURED = (Dynamic, Cast, KeepFloat, ReuseInput)


def dtype_of(quantization: Quantization) -> str:
    """The dtype that values have: that of the codes, of the cast, or float32.

    >>> dtype_of(Dynamic()), dtype_of(Cast()), dtype_of(KeepFloat())
    ('uint8', 'float16', 'float32')
    """
    match quantization:
        case Cast(dtype):
            return dtype
        case KeepFloat():
            return "float32"
        case ReuseInput():
            return UINT8.dtype
        case _:
            return quantization.spec.dtype


def told(quantization: object) -> str:
    """A way to quantize in words: its class, the numbers it is for, and the scheme.

    >>> told(Dynamic())
    'Dynamic uint8 0..255 per_tensor_affine'
    """
    name, spec = class_told(quantization), getattr(quantization, "spec", None)
    match quantization:
        case Cast(dtype, dynamic):
            return f"Cast {dtype}{' of inputs' if dynamic else ''}"
        case KeepFloat():
            return "float"
        case _ if isinstance(spec, QuantSpec):
            return f"{name} {spec.dtype} {spec.quant_min}..{spec.quant_max} {spec.qscheme}"
        case _:
            return repr(quantization)


def class_told(quantization: object) -> str:
    """The class of a way to quantize, and of what it wraps.

    >>> from qfunc.numerics.observers import MovingAverageMinMax
    >>> class_told(FakeQuantize(MovingAverageMinMax(), learned=True))
    'FakeQuantize(MovingAverageMinMax, learned)'
    """
    if not isinstance(quantization, FakeQuantize):
        return type(quantization).__name__
    how = "".join(f", {each}" for each in ("learned", "fused") if getattr(quantization, each))
    return f"FakeQuantize({class_told(quantization.observer)}{how})"


def validate_quantization(quantization: Any) -> Iterator[Problem]:
    """All that is impossible about a way to quantize."""
    match quantization:
        case Dynamic(spec):
            yield from validate(spec)
        case Cast(dtype):
            if dtype not in FLOATS:
                yield UnknownName(str(dtype), "floating-point dtype", FLOATS)
        case KeepFloat() | ReuseInput():
            return
        case FakeQuantize(observer) if not isinstance(observer, UNMEASURED):
            yield from validate_quantization(observer)
            if quantization.learned:
                yield from _unlearnable(quantization)
            if quantization.fused:
                yield from _unfusable(quantization)
        case None:
            remedy = "pass KeepFloat() for what stays float, or an observer such as MinMax()"
            yield BadConfig("quantization", "it is None", remedy)
        case _:
            yield from validate_observer(quantization)


def _unlearnable(quantization: FakeQuantize) -> Iterator[Problem]:
    """Why qparams cannot be learned, if so."""
    name, remedy = type(quantization.observer).__name__, "leave learned=True out, or use another observer or qscheme"
    if is_fixed(quantization):
        yield BadConfig(name, "its qparams are fixed, and cannot be learned as well", remedy)
    elif getattr(quantization.spec, "qscheme", None) == FLOAT_QPARAMS:
        yield BadConfig(name, f"qparams of the qscheme {FLOAT_QPARAMS} cannot be learned", remedy)


def _unfusable(quantization: FakeQuantize) -> Iterator[Problem]:
    """Why torch's fused operator has no qparams for it, if so."""
    name, remedy = type(quantization.observer).__name__, "leave fused=True out"
    if type(quantization.observer) not in (MovingAverageMinMax, MovingAveragePerChannelMinMax):
        yield BadConfig(name, "only a moving average of ranges can be fused", remedy)
    elif quantization.learned:
        yield BadConfig(name, "its qparams are learned, and cannot be those of the fused operator as well", remedy)
    elif quantization.spec.qscheme == FLOAT_QPARAMS:
        yield BadConfig(name, f"the fused operator does not know the qscheme {FLOAT_QPARAMS}", remedy)
