"""Configurations for training, made of those for quantization after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyrsistent import PMap, pmap

from qfunc.config.qconfig import Choice, QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.numerics.fake_quantize import FakeQuantize, is_fixed
from qfunc.numerics.observers import MovingAverageMinMax, MovingAveragePerChannelMinMax
from qfunc.numerics.qparams import FLOAT_QPARAMS
from qfunc.numerics.unmeasured import UNMEASURED


def for_training(mapping: QConfigMapping, *, learned: bool = False) -> QConfigMapping:
    """The mapping that rounds to the same integers while a model trains.

    What activations are measured with becomes a moving average of their ranges, and stays one that it is already; for
    weights it becomes the range that they have now. Known qparams stay. What is a `FakeQuantize` already, and what
    measures nothing, stays as it is.

    Args:
        mapping: a configuration, such as a backend's own.
        learned: whether scales and zero points are learned (LSQ), beginning with these ranges.

    >>> from qfunc.numerics.observers import Histogram, PerChannelMinMax
    >>> from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
    >>> mapping = QConfigMapping().set_global(QConfig(Histogram(), PerChannelMinMax(INT8_NARROW_PER_CHANNEL)))
    >>> qconfig = for_training(mapping).global_qconfig
    >>> type(qconfig.activation.observer).__name__, type(qconfig.weight.observer).__name__
    ('MovingAverageMinMax', 'MovingAveragePerChannelMinMax')
    """

    def of_operator(choice: Choice) -> Choice:
        return trained(choice, learned=learned)

    def of_value(given: Any) -> Any:
        return _trained(given, learned=learned)

    return with_each(mapping, of_operator, of_value)


def with_each(
    mapping: QConfigMapping, of_operator: Callable[[Choice], Choice], of_value: Callable[[Any], Any]
) -> QConfigMapping:
    """The mapping with what functions make of each of its choices: of those for operators, and for single values."""
    return replace(
        mapping,
        global_qconfig=of_operator(mapping.global_qconfig),
        object_types=_each(mapping.object_types, of_operator),
        selections=_each(mapping.selections, of_operator),
        module_name_regexes=tuple((text, of_operator(choice)) for text, choice in mapping.module_name_regexes),
        module_names=_each(mapping.module_names, of_operator),
        module_name_object_type_orders=_each(mapping.module_name_object_type_orders, of_operator),
        nodes=_each(mapping.nodes, of_operator),
        outputs=_each(mapping.outputs, of_value),
        edges=_each(mapping.edges, of_value),
    )


def trained(choice: Choice, *, learned: bool = False) -> Choice:
    """The configuration of an operator that `for_training` makes of another."""
    if choice is None:
        return None
    given = choice.input_activation
    inputs = None if given is None else _trained(given, learned=learned)
    activation = _trained(choice.activation, learned=learned)
    return QConfig(activation, _trained(choice.weight, of_weight=True, learned=learned), inputs)


def _each(table: PMap[Any, Any], function: Callable[[Any], Any]) -> PMap[Any, Any]:
    return pmap({key: function(value) for key, value in table.items()})


def _trained(given: Any, *, of_weight: bool = False, learned: bool) -> Any:
    """What rounds to the integers that a way to quantize gives."""
    if isinstance(given, (FakeQuantize, *UNMEASURED)):
        return given
    if is_fixed(given):
        return FakeQuantize(given)
    average = MovingAveragePerChannelMinMax if given.spec.per_channel else MovingAverageMinMax
    learns = learned and given.spec.qscheme != FLOAT_QPARAMS
    if type(given) is average and not of_weight:
        return FakeQuantize(given, learned=learns)
    return FakeQuantize(average(given.spec, 1.0 if of_weight else 0.01), learned=learns)
