"""`QConfig`: how the activations and the weight of an operator are quantized, as an immutable value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from qfunc.errors import BadConfig, Problem
from qfunc.numerics.observers import Observer
from qfunc.numerics.qparams import QuantSpec
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, Quantization, ReuseInput, told, validate_quantization

WeightQuantization: TypeAlias = Observer[Any] | Cast | KeepFloat
"""How a weight is quantized."""


@dataclass(frozen=True, slots=True)
class QConfig:
    """How an operator is quantized: its activations, and its weight.

    `input_activation` is for its inputs, where they are to be quantized otherwise than its output. A known range
    (`FixedQParams`) is that of the output alone: without `input_activation`, inputs are then quantized as the global
    configuration has it.

    >>> from qfunc.numerics.observers import MinMax
    >>> print(QConfig(activation=KeepFloat(), weight=MinMax()))
    activation: float; weight: MinMax uint8 0..255 per_tensor_affine
    """

    activation: Quantization
    weight: WeightQuantization
    input_activation: Quantization | None = None

    @property
    def of_inputs(self) -> Quantization:
        """How its inputs are quantized."""
        return self.activation if self.input_activation is None else self.input_activation

    @property
    def of_output(self) -> Quantization:
        """How its result is quantized: what is chosen when the model runs is chosen for inputs alone."""
        match self.activation:
            case Dynamic() | Cast(dynamic=True):
                return KeepFloat()
            case _:
                return self.activation

    @property
    def is_dynamic(self) -> bool:
        """Whether its inputs are quantized when the model runs, and its result is not."""
        match self.of_inputs:
            case Dynamic() | Cast(dynamic=True):
                return True
            case _:
                return False

    def __str__(self) -> str:
        given = "" if self.input_activation is None else f"input: {told(self.input_activation)}; "
        return f"{given}activation: {told(self.activation)}; weight: {told(self.weight)}"


Choice: TypeAlias = QConfig | None
"""A configuration, or `None`: stay float."""


def wrong_qconfig(qconfig: QConfig) -> Iterator[Problem]:
    """What is impossible about a configuration."""
    given = [qconfig.activation] if qconfig.input_activation is None else [qconfig.of_inputs, qconfig.activation]
    for activation in given:
        yield from validate_quantization(activation)
        yield from activation_problems(activation)
    if isinstance(qconfig.input_activation, ReuseInput):
        reason = "an input has no input of its own whose qparams to reuse"
        yield BadConfig("ReuseInput", reason, "use it for the activation: QConfig(ReuseInput(), weight)")
    yield from validate_quantization(qconfig.weight)
    if isinstance(qconfig.weight, (Dynamic, ReuseInput)):
        reason = f"a weight does not change and has no input, so that it cannot be {told(qconfig.weight)}"
        yield BadConfig(type(qconfig.weight).__name__, reason, "use an observer such as PerChannelMinMax(spec)")


def activation_problems(quantization: Quantization) -> Iterator[Problem]:
    """Why a way to quantize cannot be that of all activations of an operator."""
    spec = getattr(quantization, "spec", None)
    if isinstance(spec, QuantSpec) and spec.per_channel:
        reason = f"activations have one scale for the whole tensor, the qscheme {spec.qscheme} has one per channel"
        remedy = "use a per_tensor qscheme for activations; set_edge and set_output can ask for it at single places"
        yield BadConfig(type(quantization).__name__, reason, remedy)
