"""Ways to quantize for random configurations: such that can be meant, and such that must be refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from qfunc.ir import Graph
from qfunc.numerics import observers as o
from qfunc.numerics import qparams as q
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.qparams import QuantSpec
from qfunc.numerics.recording import Recording
from qfunc.numerics.search_observers import Entropy, MeanSquaredError, Percentile
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, ReuseInput

ACTIVATION_SPECS = (
    q.UINT8,
    q.UINT8_REDUCED,
    QuantSpec(quant_max=15),
    QuantSpec(quant_max=200),
    QuantSpec(qscheme="per_tensor_symmetric"),
    QuantSpec(eps=0.01),
)
WEIGHT_SPECS = (
    q.INT8_NARROW_PER_CHANNEL,
    q.INT8_SYMMETRIC_PER_CHANNEL,
    q.INT8_SYMMETRIC,
    QuantSpec("int8", -8, 7, "per_channel_symmetric", 0),
    QuantSpec("int8", -128, 127, "per_channel_affine", 0),
    q.INT8,
)
PLACE_SPECS = (
    *ACTIVATION_SPECS,
    q.INT8,
    QuantSpec("int16", -(2**15), 2**15 - 1),
    QuantSpec(qscheme="per_channel_affine", ch_axis=0),
    QuantSpec("int8", -127, 127, "per_channel_symmetric", 1),
)
"""Those of single values and uses, which may have one scale for each channel."""

WRONG_SPECS = (
    QuantSpec("uint7"),
    QuantSpec("int8", -128, 127, "per_channel"),
    QuantSpec(quant_max=256),
    QuantSpec(quant_min=5, quant_max=3),
    QuantSpec(quant_min=1, quant_max=255),
    QuantSpec(quant_max=2.5),  # type: ignore[arg-type]
    QuantSpec("int32", -(2**31), 2**31 - 1),
    QuantSpec("uint16", 0, 65535),
    QuantSpec("int8", -128, 127),
    QuantSpec("int8", -128, 127, "per_channel_symmetric", 7),
    QuantSpec("int8", -128, 127, "per_channel_symmetric", 1),
    QuantSpec("int8", -128, 127, "per_channel_symmetric"),
    QuantSpec(ch_axis=0),
    QuantSpec(eps=0.0),
    QuantSpec(eps=float("nan")),
)


def activation_observers(spec: QuantSpec) -> tuple[Any, ...]:
    """Observers of activations."""
    fixed = o.FixedQParams(spec, 0.05, 0) if spec.qscheme.endswith("affine") else o.MinMax(spec)
    averages = (o.MovingAverageMinMax(spec), o.MovingAverageMinMax(spec, 0.5))
    observers = (o.MinMax(spec), *averages, o.Histogram(spec), o.Histogram(spec, 64, 2), fixed)
    searching = (Percentile(spec), Percentile(spec, 99.0, 512, 3), MeanSquaredError(spec, 512), Entropy(spec, 1024))
    return (*observers, *searching, Recording(spec), FakeQuantize(averages[0]), FakeQuantize(fixed))


def activation_ways(spec: QuantSpec) -> tuple[Any, ...]:
    """How activations can be quantized with a spec, or without one."""
    return (*activation_observers(spec), Dynamic(spec), *CASTS, Cast(dynamic=True), KeepFloat(), ReuseInput())


def weight_observers(spec: QuantSpec) -> tuple[Any, ...]:
    """Observers of weights."""
    per_channel = (o.PerChannelMinMax(spec), o.MovingAveragePerChannelMinMax(spec))
    per_tensor = (o.MinMax(spec), o.Histogram(spec), MeanSquaredError(spec, 512))
    observers = per_channel if spec.per_channel else per_tensor
    return (*observers, FakeQuantize(observers[0]))


def weight_ways(spec: QuantSpec) -> tuple[Any, ...]:
    """How weights can be quantized with a spec, or without one."""
    return (*weight_observers(spec), *CASTS, KeepFloat())


def place_ways(spec: QuantSpec) -> tuple[Any, ...]:
    """How single values and uses can be quantized; `None` keeps them float."""
    observer = o.PerChannelMinMax(spec) if spec.per_channel else o.MinMax(spec)
    return (None, observer, FakeQuantize(observer), Dynamic(spec), *CASTS, Cast(dynamic=True))


def wrong_ways(spec: QuantSpec) -> tuple[Any, ...]:
    """Observers with a spec that is impossible, or is so for them, and other ways that cannot be meant."""
    return (
        *(o.MinMax(spec), o.PerChannelMinMax(spec), o.Histogram(spec), o.FixedQParams(spec, 0.1, 0)),
        *(o.MovingAverageMinMax(q.UINT8, -1.0), o.Histogram(q.UINT8, 1), o.Histogram(q.UINT8, 64, 0)),
        *(Percentile(spec), MeanSquaredError(spec), Entropy(spec), Percentile(q.UINT8, 50.0), Entropy(q.UINT8, 1)),
        *(MeanSquaredError(q.UINT8, 2**15 + 1), Percentile(q.UINT8, stride=0)),
        *(o.FixedQParams(q.UINT8, 0.0, 0), o.FixedQParams(q.UINT8, 0.1, 300)),
        *(Dynamic(), Dynamic(spec), ReuseInput(), Cast("float12"), Cast("float32"), Cast("int8", dynamic=True)),
        *(FakeQuantize(o.MinMax(spec)), FakeQuantize(o.MovingAverageMinMax(q.UINT8, 2.0)), FakeQuantize(Dynamic())),  # type: ignore[arg-type]
    )


CASTS = (Cast(), Cast("bfloat16"))


def _raises(graph: Graph) -> list[str]:
    raise ValueError(f"a graph of {len(graph.order)} nodes")


def _nothing(_: Graph) -> None:
    return None


def _number(_: Graph) -> int:
    return 3


def _objects(graph: Graph) -> list[Any]:
    return [[], 3, None, *graph.order]


def _unknown(graph: Graph) -> list[str]:
    return ["no_such_node", *graph.order[:1]]


def _letters(_: Graph) -> str:
    return "abc"


def _falls_short(graph: Graph) -> Any:
    yield from graph.order[:2]
    raise KeyError("the third")


_WRONG: tuple[Callable[[Graph], Any], ...] = (_raises, _nothing, _number, _objects, _unknown, _letters, _falls_short)

WRONG_SELECTORS: Mapping[str, Callable[[Graph], Any]] = MappingProxyType({f"wrong.{f.__name__[1:]}": f for f in _WRONG})
"""Selectors that raise, or return no ids, by names for documents."""
