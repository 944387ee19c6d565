"""Parameter expressions: how a tensor is made from source tensors, written down by passes, computed at the edge.

They are data: `repr` is complete, as digests need it, and `str` is for reading. Comparing two graphs compares
expressions, never tensors, and a pass costs nothing for large weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from qfunc.ir.value import Expression, Token
from qfunc.numerics.grid import Grid
from qfunc.numerics.observers import Observer
from qfunc.numerics.qparams import QParams, QuantSpec
from qfunc.numerics.saturation import PairLayout


@dataclass(frozen=True, slots=True)
class Load(Expression):
    """A parameter or buffer of a source model."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str = "model"

    def __repr__(self) -> str:
        shape = ", ".join(map(str, self.shape))
        source = "" if self.source == "model" else f", source={self.source!r}"
        return f"load({self.name}: {self.dtype}[{shape}]{source})"

    def __str__(self) -> str:
        return f"load({self.name})"


@dataclass(frozen=True, slots=True)
class FoldBatchNorm(Expression):
    """The weight or bias of a convolution or linear layer with a batch norm folded into it.

    `W' = W * gamma / sqrt(var + eps)` per output channel, `b' = (b - mean) * gamma / sqrt(var + eps) + beta` for one
    that follows the layer; per input channel for one that stands `before` it (see `qfunc.numerics.batch_norm`).
    """

    part: Literal["weight", "bias"]
    weight: Expression
    bias: Expression | None
    mean: Expression
    var: Expression
    gamma: Expression | None
    beta: Expression | None
    eps: float
    transpose: bool = False
    groups: int = 1
    before: bool = False

    def __str__(self) -> str:
        name = "fold_batch_norm_before" if self.before else "fold_batch_norm"
        return f"{name}({self.weight if self.part == 'weight' else self.bias}, mean={self.mean})"


@dataclass(frozen=True, slots=True)
class QuantizeWeight(Expression):
    """The integer weight that `observer` makes of a float one; its qparams are computed with it, or are known.

    Where `pairs` says which products a kernel adds in int16 (see `qfunc.numerics.saturation`), the scale of a channel
    whose pairs could saturate for activations up to `activation_max` is enlarged.
    """

    value: Expression
    observer: Observer[Any] | Grid | DeriveQParams
    pairs: PairLayout = "none"
    activation_max: int = 255

    def __str__(self) -> str:
        return f"quantize_weight({self.value}, {self.observer.spec.dtype})"


@dataclass(frozen=True, slots=True)
class DequantizeWeight(Expression):
    """The float weight that a quantized one stands for."""

    value: QuantizeWeight

    def __str__(self) -> str:
        return f"dequantize_weight({self.value})"


@dataclass(frozen=True, slots=True)
class NormFactor:
    """What a batch norm multiplies a channel with: `gamma / sqrt(var + eps)`; an absent `gamma` is 1."""

    gamma: Expression | None
    var: Expression
    eps: float


@dataclass(frozen=True, slots=True)
class FakeQuantizeWeight(Expression):
    """A parameter that is rounded while it trains, by what the token stands for.

    Where `norms` follow the layer it is rounded as it will be once they are folded into it: times their factors. With
    `exact`, the statistics of a batch are those of the layer without rounding.
    """

    value: Load
    start: Token
    norms: tuple[NormFactor, ...] = ()
    transpose: bool = False
    groups: int = 1
    exact: bool = False

    def __str__(self) -> str:
        return f"fake_quantize({self.value})"


@dataclass(frozen=True, slots=True)
class DeriveQParams(Expression):
    """Qparams for `spec` that a function of the user's makes of others, of which some are those of weights.

    `place` is where a user finds what has them.
    """

    of: tuple[QParamsSource, ...]
    function: Callable[[tuple[QParams, ...]], QParams]
    spec: QuantSpec
    place: str

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", None) or type(self.function).__name__
        return f"DeriveQParams(of={self.of!r}, function={name}, spec={self.spec!r}, place={self.place!r})"

    def __str__(self) -> str:
        return f"derived {self.spec.dtype}"


QParamsSource: TypeAlias = Grid | QuantizeWeight | DeriveQParams
"""Where qparams come from: known, found with a weight, or made of others."""


@dataclass(frozen=True, slots=True)
class CastWeight(Expression):
    """A parameter rounded to a smaller floating-point type, in its own type again.

    What the smaller type cannot hold becomes what `Tensor.to` makes of it: infinity in float16, as in the reference.
    """

    value: Expression
    dtype: str

    def __str__(self) -> str:
        return f"cast({self.value}, {self.dtype})"


@dataclass(frozen=True, slots=True)
class WeightCodes(Expression):
    """What a state holds of a parameter: the integers of a quantized one, the smaller floats of one that is cast."""

    value: QuantizeWeight | CastWeight

    def __str__(self) -> str:
        return f"codes({self.value})"


@dataclass(frozen=True, slots=True)
class QParamsPart(Expression):
    """The scale or the zero point of qparams, as a tensor: one number, or one for each channel."""

    part: Literal["scale", "zero_point"]
    of: QParamsSource

    def __str__(self) -> str:
        return f"{self.part}({self.of})"


@dataclass(frozen=True, slots=True)
class Constant(Expression):
    """Numbers that a pass has computed, of a dtype and shape."""

    values: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"constant({len(self.values)} numbers)"


@dataclass(frozen=True, slots=True)
class DivideColumns(Expression):
    """The weight of an equalized layer: each input channel is divided by the scale that its input is multiplied by."""

    value: Expression
    scale: tuple[float, ...]
    groups: int = 1

    def __str__(self) -> str:
        return f"divide_columns({self.value})"


@dataclass(frozen=True, slots=True)
class MultiplyRows(Expression):
    """The weight or bias of a layer whose output channels are scaled, for the layers behind it."""

    value: Expression
    scale: tuple[float, ...]

    def __str__(self) -> str:
        return f"multiply_rows({self.value})"


def loads(expression: Expression | Grid | None) -> Iterator[Load]:
    """The source tensors that an expression reads.

    >>> [load.name for load in loads(Load("fc.weight", "float32", (2, 3)))]
    ['fc.weight']
    """
    if isinstance(expression, Load):
        yield expression
    elif type(expression) in _PARTS:
        for part in _PARTS[type(expression)](expression):
            yield from loads(part)


def _of_value(expression: Any) -> tuple[Expression]:
    return (expression.value,)


def _of_quantized(expression: QuantizeWeight) -> tuple[Expression | None, ...]:
    return expression.value, expression.observer if isinstance(expression.observer, DeriveQParams) else None


def _of_rounded(expression: FakeQuantizeWeight) -> tuple[Expression | None, ...]:
    return expression.value, *(part for norm in expression.norms for part in (norm.gamma, norm.var))


def _of_folded(fold: FoldBatchNorm) -> tuple[Expression | None, ...]:
    return fold.weight, fold.bias, fold.mean, fold.var, fold.gamma, fold.beta


_PARTS: Mapping[type, Callable[[Any], tuple[Any, ...]]] = MappingProxyType(
    {
        FoldBatchNorm: _of_folded,
        QuantizeWeight: _of_quantized,
        FakeQuantizeWeight: _of_rounded,
        DeriveQParams: lambda derived: derived.of,
        QParamsPart: lambda part: (part.of,),
        **dict.fromkeys((DequantizeWeight, CastWeight, WeightCodes, DivideColumns, MultiplyRows), _of_value),
    }
)
"""What expressions are made of; one that is not named here is made of none."""
