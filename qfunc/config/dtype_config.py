"""What an operator of a backend takes, as data: dtypes of its operands and its result, with bounds on their qparams."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from qfunc.config.qconfig import QConfig, WeightQuantization
from qfunc.errors import Problem, UnknownName
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import FixedQParams
from qfunc.numerics.qparams import DTYPES, QuantSpec
from qfunc.numerics.unmeasured import FLOATS, Cast, KeepFloat, Quantization, ReuseInput, dtype_of


@dataclass(frozen=True, slots=True)
class DTypeWithConstraints:
    """A dtype, and what a backend asks of the codes and the scale; what is None does not matter.

    `quant_min_lower_bound` and `quant_max_upper_bound` bound the codes that may be used, `scale_min_lower_bound` the
    least scale (a spec's `eps`), `scale_max_upper_bound` that of fixed qparams; `scale_exact_match` and
    `zero_point_exact_match` ask for fixed qparams of just these values.

    >>> from qfunc.numerics.observers import MinMax
    >>> DTypeWithConstraints("uint8", quant_max_upper_bound=127).misfit(MinMax())
    'codes 0..255, higher than 127'
    """

    dtype: str
    quant_min_lower_bound: int | None = None
    quant_max_upper_bound: int | None = None
    scale_min_lower_bound: float | None = None
    scale_max_upper_bound: float | None = None
    scale_exact_match: float | None = None
    zero_point_exact_match: int | None = None

    def misfit(self, quantization: Quantization) -> str:
        """Why a way to quantize does not fit, in words; empty where it does."""
        dtype = dtype_of(quantization)
        if dtype != self.dtype:
            return dtype
        if isinstance(quantization, FakeQuantize):
            quantization = quantization.observer
        spec = getattr(quantization, "spec", None)
        return next(self._of_spec(spec, quantization), "") if isinstance(spec, QuantSpec) else ""

    def _of_spec(self, spec: QuantSpec, quantization: Quantization) -> Iterator[str]:
        low, high, least = self.quant_min_lower_bound, self.quant_max_upper_bound, self.scale_min_lower_bound
        codes, fixed = f"codes {spec.quant_min}..{spec.quant_max}", isinstance(quantization, FixedQParams)
        if low is not None and spec.quant_min < low:
            yield f"{codes}, lower than {low}"
        if high is not None and spec.quant_max > high:
            yield f"{codes}, higher than {high}"
        if least is not None and not fixed and spec.eps < least:
            yield f"scales from {spec.eps:.4g}, less than {least:.4g}"
        if isinstance(quantization, FixedQParams):
            yield from self._of_qparams(quantization.scale, quantization.zero_point)
        elif self.scale_exact_match is not None or self.zero_point_exact_match is not None:
            yield f"measured qparams instead of the fixed {self._wanted}"

    def _of_qparams(self, scale: float, zero_point: int) -> Iterator[str]:
        least, most = self.scale_min_lower_bound, self.scale_max_upper_bound
        if least is not None and scale < least:
            yield f"a scale of {scale:.4g}, less than {least:.4g}"
        if most is not None and scale > most:
            yield f"a scale of {scale:.4g}, more than {most:.4g}"
        if self.scale_exact_match not in (None, scale) or self.zero_point_exact_match not in (None, zero_point):
            yield f"a scale of {scale:.4g} and a zero point of {zero_point} instead of the fixed {self._wanted}"

    @property
    def _wanted(self) -> str:
        return f"scale {self.scale_exact_match} and zero point {self.zero_point_exact_match}"


DTypeLike: TypeAlias = "str | DTypeWithConstraints | None"
"""A dtype by its name, one with constraints, or None: any."""


@dataclass(frozen=True, slots=True)
class DTypeConfig:
    """One combination of dtypes that an operator takes: of its inputs, its result, its weight and its bias.

    `is_dynamic`: the inputs' qparams are chosen when the model runs, and the result is float32.
    """

    input_dtype: DTypeLike = "uint8"
    output_dtype: DTypeLike = "uint8"
    weight_dtype: DTypeLike = "int8"
    bias_dtype: DTypeLike = None
    is_dynamic: bool = False

    def misfit(self, qconfig: QConfig, *, weighted: bool, output: Quantization | None = None) -> str:
        """Why a configuration does not fit, in words; empty where it does.

        Args:
            qconfig: the configuration.
            weighted: whether the operator has a weight that is quantized.
            output: how its result is quantized, where that is not for `qconfig` to say.
        """
        if isinstance(qconfig.activation, ReuseInput):
            quantizes = weighted and not isinstance(qconfig.weight, KeepFloat)
            reason = _misfit(self.weight_dtype, qconfig.weight) if quantizes else ""
            return f"weights of {reason}" if reason else ""
        if qconfig.is_dynamic != self.is_dynamic and not isinstance(qconfig.of_inputs, KeepFloat):
            return "qparams chosen when the model runs" if qconfig.is_dynamic else "qparams of calibration"
        result = qconfig.of_output if output is None else output
        parts: list[tuple[str, DTypeLike, Quantization | WeightQuantization]] = [
            ("activations", self.input_dtype, qconfig.of_inputs),
            ("a result", "float32" if self.is_dynamic else self.output_dtype, result),
        ]
        parts += [("weights", self.weight_dtype, qconfig.weight)] if weighted else []
        parts += [("a bias", self.bias_dtype, _of_bias(qconfig))] if weighted else []
        told = ((what, _misfit(allowed, given)) for what, allowed, given in parts)
        return next((f"{what} of {text}" for what, text in told if text), "")

    def __str__(self) -> str:
        kind = "dynamic " if self.is_dynamic else ""
        parts = (("activations", self.input_dtype), ("weights", self.weight_dtype))
        return kind + " and ".join(f"{_named(dtype)} {what}" for what, dtype in parts if dtype is not None)


def wrong_dtypes(dtypes: DTypeConfig) -> Iterator[Problem]:
    """Names of dtypes that there are none of."""
    known = ("float32", *FLOATS, *DTYPES)
    for given in (dtypes.input_dtype, dtypes.output_dtype, dtypes.weight_dtype, dtypes.bias_dtype):
        name = given.dtype if isinstance(given, DTypeWithConstraints) else given
        if name is not None and name not in known:
            yield UnknownName(str(name), "dtype", known)


def _of_bias(qconfig: QConfig) -> Quantization:
    """A bias is float16 where all the rest is."""
    match qconfig.of_inputs, qconfig.weight:
        case Cast(dtype, dynamic=False), Cast(other) if dtype == other:
            return Cast(dtype)
        case _:
            return KeepFloat()


def _misfit(allowed: DTypeLike, given: Quantization) -> str:
    match allowed:
        case None:
            return ""
        case str():
            return DTypeWithConstraints(allowed).misfit(given)
        case _:
            # Float16 has no qparams that could be fixed.
            return "" if isinstance(given, Cast) and given.dtype == allowed.dtype else allowed.misfit(given)


def _named(dtype: DTypeLike) -> str:
    return dtype if isinstance(dtype, str) else "any" if dtype is None else dtype.dtype
