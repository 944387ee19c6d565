"""What files of statistics may hold: the classes by their names, what their fields are, and when a state is valid."""

from __future__ import annotations

import dataclasses
import math
import types as python_types
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import reduce
from types import MappingProxyType
from typing import Any, TypeAlias, Union, get_args, get_origin, get_type_hints

import torch

from qfunc.config.arguments import shown
from qfunc.errors import BadConfig, Problem
from qfunc.numerics.exact_histogram import ExactHistogramState, ExactHistogramStatistic
from qfunc.numerics.recording import RecordingState, RecordingStatistic
from qfunc.numerics.statistic import (
    HistogramState,
    HistogramStatistic,
    MinMaxStatistic,
    MovingAverageStatistic,
    NoState,
    NoStatistic,
    RangeState,
    finite,
)

Faults: TypeAlias = Iterator[str]

NO_TYPES: Mapping[str, type] = MappingProxyType({})


class Types:
    """The classes that may stand in a file, by name: qfunc's own, and those of the user."""

    def __init__(self, of_user: Mapping[str, type]) -> None:
        self.classes: Mapping[str, type] = {**of_user, **OWN}
        self._names = {cls: name for name, cls in sorted(self.classes.items(), reverse=True)}
        self._hints: dict[type, Mapping[str, Any]] = {}

    def name(self, cls: type) -> str | None:
        """The name of a class; the first in the alphabet where it has several."""
        return self._names.get(cls)

    def misfit(self, cls: type, field: str, value: object) -> bool:
        """Whether a value is not of the type that a field is annotated with."""
        return not _is_of(self._of_fields(cls).get(field, Any), value)

    def normal(self, cls: type, field: str, value: Any) -> Any:
        """An int in a field of floats as the float that it is equal to."""
        exact = type(value) is int and self._of_fields(cls).get(field) is float and abs(value) <= 2**53
        return float(value) if exact else value

    def _of_fields(self, cls: type) -> Mapping[str, Any]:
        if cls not in self._hints:
            self._hints[cls] = hints_of(cls)
        return self._hints[cls]


def wrong_types(types: object) -> Iterator[Problem]:
    """What is impossible about the `types` of a user."""
    remedy = "pass a dict from names to your frozen dataclasses: types={'mine.Sketch': Sketch}"
    if not isinstance(types, Mapping):
        yield BadConfig("types", f"expected a dict, got {shown(types)}", remedy)
        return
    for name, cls in types.items():
        if not isinstance(name, str) or not name:
            yield BadConfig("types", f"{shown(name)} is no name", remedy)
        elif name in OWN:
            yield BadConfig(f"types[{name!r}]", "the name is qfunc's own", "put your own before it")
        elif not is_frozen_dataclass(cls):
            yield BadConfig(f"types[{name!r}]", f"expected a frozen dataclass, got {shown(cls)}", remedy)
        elif any(not field.init for field in dataclasses.fields(cls)):
            reason = "it has a field that its constructor does not take"
            yield BadConfig(
                f"types[{name!r}]", reason, "let all fields be arguments: what is derived can be a property"
            )


def is_frozen_dataclass(cls: object) -> bool:
    """Whether it is a class of values with fields.

    >>> is_frozen_dataclass(RangeState), is_frozen_dataclass(dict)
    (True, False)
    """
    parameters = getattr(cls, "__dataclass_params__", None)
    return isinstance(cls, type) and parameters is not None and bool(parameters.frozen)


def classes_in(cls: object) -> Iterator[type]:
    """The frozen dataclasses that values of a type are made of, as far as annotations tell; itself first.

    >>> [found.__name__ for found in classes_in(HistogramState)]
    ['HistogramState', 'RangeState']
    """
    seen: dict[type, None] = {}
    todo: list[Any] = [cls]
    while todo:
        one = todo.pop()
        todo += get_args(one)
        if isinstance(one, type) and is_frozen_dataclass(one) and one not in seen:
            seen[one] = None
            todo += hints_of(one).values()
    yield from seen


def types_of_observers(observers: Iterable[Any]) -> dict[str, type]:
    """The classes of the user's statistics and of their states, by the names that they have in files."""
    values = [value for observer in observers for value in (observer.statistic, observer.init())]
    found = {cls: None for value in values for one in _parts(value) for cls in classes_in(one)}
    own = set(OWN.values())
    return {f"{cls.__module__}.{cls.__qualname__}": cls for cls in found if cls not in own}


def _parts(value: Any) -> Iterator[type]:
    """The frozen dataclasses that a value is made of."""
    if type(value) is tuple:
        for item in value:
            yield from _parts(item)
    elif is_frozen_dataclass(type(value)):
        yield type(value)
        for field in dataclasses.fields(value):
            yield from _parts(getattr(value, field.name))


def hints_of(cls: type) -> Mapping[str, Any]:
    """The types of a class's fields; none where an annotation names what exists for a checker only."""
    try:
        return get_type_hints(cls)
    except Exception:  # noqa: BLE001 - annotations are the user's code: anything may come out of them
        return {}


def _is_of(hint: Any, value: object) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, python_types.UnionType):
        return any(_is_of(part, value) for part in parts)
    if origin is tuple and isinstance(value, tuple):
        if len(parts) == 2 and parts[1] is ...:
            return all(_is_of(parts[0], item) for item in value)
        return len(parts) == len(value) and all(map(_is_of, parts, value))
    cls = type(None) if hint is None else origin or hint
    if not isinstance(cls, type):
        return True
    if isinstance(value, bool):
        return cls in (bool, object)
    return isinstance(value, (int, float) if cls is float else cls)


def faults(statistic: object, state: object) -> Faults:
    """Why a state is none that a statistic can have; nothing for those of the user's that hold valid ranges."""
    row = _STATES.get(type(statistic))
    if row is None:
        yield from _faults_within(state)
        return
    cls, parameters, fits = row
    wrong = list(parameters(statistic))
    yield from wrong
    if type(state) is not cls:
        yield f"a {type(statistic).__name__} has a {cls.__name__}, not {shown(state)}"
        return
    within = list(_faults_within(state))
    yield from within or (() if wrong else fits(statistic, state))


def _faults_within(state: object) -> Faults:
    """What is wrong with the qfunc's own states in a value."""
    if isinstance(state, tuple):
        for item in state:
            yield from _faults_within(item)
    elif dataclasses.is_dataclass(state) and not isinstance(state, type):
        inner = [fault for field in dataclasses.fields(state) for fault in _faults_within(getattr(state, field.name))]
        yield from inner or _WITHIN.get(type(state), _none)(state)


def _none(*_: Any) -> Faults:
    return iter(())


def _of_range(state: RangeState) -> Faults:
    low, high = state.minimum, state.maximum
    if not (low.dtype == high.dtype == torch.float32 and low.shape == high.shape and low.dim() <= 1):
        yield "its minimum and maximum are not two float32 tensors of one shape () or (channels,)"
    elif not low.numel():
        yield "it is of no channels"
    elif state.observed and not (torch.isfinite(low).all() and torch.isfinite(high).all() and (low <= high).all()):
        yield "its minimum is above its maximum, or one of them is not finite"


def _of_histogram(state: HistogramState) -> Faults:
    counts, seen = state.counts, state.range
    if counts.dtype != torch.float32 or counts.dim() != 1:
        yield "its counts are not float32 of shape (bins,)"
    elif not (torch.isfinite(counts).all() and (counts >= 0).all()):
        yield "its counts are negative or not finite"
    elif seen.minimum.dim() != 0:
        yield "its range is that of channels"
    elif bool(counts.any()) != seen.observed:
        yield "it has counts without a range, or a range without counts"


def _of_exact_histogram(state: ExactHistogramState) -> Faults:
    counts, seen = state.counts, state.range
    if counts.dtype != torch.int64 or counts.dim() != 1:
        yield "its counts are not int64 of shape (window,)"
    elif not ((counts >= 0) & (counts <= _MOST_COUNTED)).all():
        yield "its counts are negative or too large to be added"
    elif seen.minimum.dim() != 0:
        yield "its range is that of channels"
    elif bool(counts.any()) != seen.observed:
        yield "it has counts without a range, or a range without counts"


_MOST_COUNTED = 2**47
"""How often a value can have been counted: sums over all bins, of which there are 2**15, stay below 2**63."""


def _of_recording(state: RecordingState) -> Faults:
    if not all(tensor.is_floating_point() and tensor.numel() and finite(tensor) for tensor in state.tensors):
        yield "a tensor in it is empty, not finite or no floating-point tensor"
    elif reduce(_WHOLE.update, state.tensors, _WHOLE.init()) != state.range:
        yield "its range is not that of its tensors"


_WHOLE = MinMaxStatistic()


def _channels(statistic: Any, state: RangeState) -> Faults:
    if state.observed and (state.minimum.dim() == 1) != (statistic.ch_axis is not None):
        yield "it is of channels and its statistic of whole tensors, or the other way round"


def _bins(statistic: HistogramStatistic, state: HistogramState) -> Faults:
    if state.counts.shape[0] != statistic.bins:
        yield f"it has {state.counts.shape[0]} counts for {statistic.bins} bins"


def _window(statistic: ExactHistogramStatistic, state: ExactHistogramState) -> Faults:
    """The grid depends on the range alone, whatever the values in it."""
    seen = state.range
    ends = torch.stack([seen.minimum, seen.maximum]) if seen.observed else torch.zeros(0)
    grid = statistic.update(statistic.init(), ends)
    if (grid.exponent, grid.counts.shape) != (state.exponent, state.counts.shape):
        yield f"its bins are not those of its range in a histogram of {statistic.bins} bins"


def _axis(statistic: Any) -> Faults:
    if statistic.ch_axis is not None and statistic.ch_axis < 0:
        yield f"{statistic.ch_axis} is no ch_axis"


def _average(statistic: MovingAverageStatistic) -> Faults:
    if not 0 < statistic.averaging_constant <= 1:
        yield f"its averaging_constant {statistic.averaging_constant} is not in (0, 1]"
    yield from _axis(statistic)


def _histogram(statistic: HistogramStatistic) -> Faults:
    if statistic.bins < 2 or statistic.upsample_rate < 1:
        yield f"it has {statistic.bins} bins and upsample_rate {statistic.upsample_rate}"


def _exact_histogram(statistic: ExactHistogramStatistic) -> Faults:
    if not 2 <= statistic.bins <= 2**15 or statistic.stride < 1:
        yield f"it has {statistic.bins} bins and stride {statistic.stride}"


_STATES: Mapping[type, tuple[type, Callable[[Any], Faults], Callable[[Any, Any], Faults]]] = MappingProxyType(
    {
        MinMaxStatistic: (RangeState, _axis, _channels),
        MovingAverageStatistic: (RangeState, _average, _channels),
        HistogramStatistic: (HistogramState, _histogram, _bins),
        ExactHistogramStatistic: (ExactHistogramState, _exact_histogram, _window),
        RecordingStatistic: (RecordingState, _none, _none),
        NoStatistic: (NoState, _none, _none),
    }
)
"""For each statistic: the class of its state, what its parameters may be, and what it asks of a valid state."""

_WITHIN: Mapping[type, Callable[[Any], Faults]] = MappingProxyType(
    {
        RangeState: _of_range,
        HistogramState: _of_histogram,
        ExactHistogramState: _of_exact_histogram,
        RecordingState: _of_recording,
    }
)
"""What makes a state valid by itself."""

OWN: Mapping[str, type] = MappingProxyType(
    {cls.__name__: cls for cls in (*_STATES, *(row[0] for row in _STATES.values()))}
)
"""qfunc's own classes by their names."""

FLOATS: Mapping[str, float] = MappingProxyType({"inf": math.inf, "-inf": -math.inf, "nan": math.nan})
"""The floats that JSON has no number for."""

SCALARS: tuple[type, ...] = (type(None), bool, int, float, str)
"""What values in files are made of, beside tuples, tensors and the classes."""
