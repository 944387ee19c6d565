"""A value of a configuration as JSON, by its shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping
from enum import Enum
from types import MethodType
from typing import Any, get_type_hints

from qfunc.config import shapes as s
from qfunc.config.arguments import shown
from qfunc.errors import BadConfig, Problem
from qfunc.match import MatchAllNode
from qfunc.numerics.qparams import QuantSpec
from qfunc.ops import name_of

Place = tuple[str, ...]
"""Where in a document: the steps from its root, as they are printed."""

DEEPEST = 100
"""How deep a document may nest."""


def place_of(at: Place) -> str:
    """A place as people read it.

    >>> place_of((".fusions", "[2]", ".name"))
    'fusions[2].name'
    """
    return "".join(at).removeprefix(".") or "document"


def fits(scalar: s.Scalar, value: object) -> bool:
    """Whether a value is of a scalar's type; an int that a float holds exactly counts as one."""
    match value:
        case bool():
            return scalar.type is bool
        case str():
            return scalar.type is str
        case float():
            return scalar.type is float and math.isfinite(value)
        case int() if scalar.type is float:
            return -(2**63) <= value < 2**63 and int(float(value)) == value
        case int():
            return scalar.type is int and -(2**63) <= value < 2**63
        case _:
            return False


def user_record(cls: Any) -> s.Record | None:
    """The shape of a class of the user's, if it is a dataclass: fields annotated with a scalar or a spec hold that."""
    if not isinstance(cls, type) or not dataclasses.is_dataclass(cls):
        return None
    try:
        hints = get_type_hints(cls)
    except Exception:  # noqa: BLE001 - the user's annotations: names that exist for a checker only
        hints = {}
    known: dict[Any, s.Shape] = {**s.SCALARS, QuantSpec: s.SPEC}
    fields = (field.name for field in dataclasses.fields(cls) if field.init)
    return s.Record(cls, {name: known.get(hints.get(name), s.Plain()) for name in fields})


class Writer:
    """Writes values, and keeps what cannot be written as `problems`."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names
        self.problems: list[Problem] = []

    def write(self, shape: s.Shape, value: Any, at: Place) -> Any:  # noqa: C901 - one case for each shape
        """The JSON for a value; where there is none, `None` and a problem."""
        if len(at) > DEEPEST:
            return self._wrong(at, f"it nests deeper than {DEEPEST} levels", "write it as several smaller patterns")
        match shape:
            case s.Scalar():
                return value if fits(shape, value) else self._mistyped(at, f"a {_CALLED[shape.type]}", value)
            case s.Plain():
                return self._plain(value, at)
            case s.Choices(members):
                return value.value if isinstance(value, members) else self._mistyped(at, members.__name__, value)
            case s.Word(known):
                words = " or ".join(map(repr, known))
                return value if isinstance(value, str) and value in known else self._mistyped(at, words, value)
            case s.Maybe(of):
                return None if value is None else self.write(of, value, at)
            case s.Many(of):
                return self._items(of, value, at)
            case s.Names():
                if isinstance(value, frozenset) and all(isinstance(item, str) for item in value):
                    return sorted(value)
                return self._mistyped(at, "a frozenset of str", value)
            case s.Table():
                return self._table(shape, value, at)
            case s.Record(cls, fields):
                if type(value) is not cls:
                    return self._mistyped(at, f"a {cls.__name__}", value)
                return {name: self.write(of, getattr(value, name), (*at, f".{name}")) for name, of in fields.items()}
            case s.Row(fields):
                return self._row(fields, value, at)
            case s.Rows():
                return self._rows(shape, value, at)
            case s.OneOf(cases):
                for name, (cls, of) in cases.items():
                    if isinstance(value, cls):
                        return {name: self.write(of, value, (*at, f".{name}"))}
                return self._mistyped(at, " or ".join(cls.__name__ for cls, _ in cases.values()), value)
            case s.WithOrWithout(_, first, second):
                return self.write(first if isinstance(value, first.type) else second, value, at)
            case s.TextOr(of):
                return value if fits(s.TEXT, value) else self.write(of, value, at)
            case s.Late(late):
                return self.write(late(), value, at)
            case s.Function():
                return self._function(shape, value, at)
            case s.Operator():
                return self._operator(value, at)
            case s.Quantized():
                return self._quantization(value, at)

    def _plain(self, value: Any, at: Place) -> Any:
        if value is None or isinstance(value, (str, bool)):
            return value
        match value:
            case Enum():
                pass
            case int() | float() if fits(s.SCALARS[float if isinstance(value, float) else int], value):
                return value
            case tuple() if type(value) is tuple:
                return self._items(s.Plain(), value, at)
            case QuantSpec():
                return self.write(s.SPEC, value, at)
            case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
                return self._quantization(value, at)
        remedy = "use None, bool, str, finite numbers, QuantSpec, observers, and tuples of these"
        return self._wrong(at, f"{shown(value)} has no form in JSON", remedy)

    def _items(self, of: s.Shape, value: Any, at: Place) -> Any:
        if not isinstance(value, tuple):
            return self._mistyped(at, "a tuple", value)
        return [self.write(of, item, (*at, f"[{index}]")) for index, item in enumerate(value)]

    def _table(self, shape: s.Table, value: Any, at: Place) -> Any:
        if not isinstance(value, Mapping):
            return self._mistyped(at, "a map", value)
        if isinstance(shape.key, s.Scalar):
            if not all(isinstance(key, str) for key in value):
                return self._mistyped(at, "a map from str", value)
            return {key: self.write(shape.of, item, (*at, f"[{key!r}]")) for key, item in value.items()}
        names = [(self._function(shape.key, key, at), item) for key, item in value.items()]
        return {name: self.write(shape.of, item, (*at, f"[{name!r}]")) for name, item in names if name is not None}

    def _row(self, fields: Mapping[str, s.Shape], value: Any, at: Place) -> Any:
        if not isinstance(value, tuple) or len(value) != len(fields):
            return self._mistyped(at, f"a tuple of {', '.join(fields)}", value)
        parts = zip(fields.items(), value, strict=True)
        return {name: self.write(of, part, (*at, f".{name}")) for (name, of), part in parts}

    def _rows(self, shape: s.Rows, value: Any, at: Place) -> Any:
        if not isinstance(value, Mapping) or not all(isinstance(key, shape.key) for key in value):
            return self._mistyped(at, f"a map from {shape.key.__name__}", value)
        parts = {_parts(key): key for key in value}
        rows = sorted(parts, key=lambda row: [(part, "") if isinstance(part, int) else (0, str(part)) for part in row])
        return [self._row(shape.fields, (*row, value[parts[row]]), (*at, f"[{i}]")) for i, row in enumerate(rows)]

    def _function(self, shape: s.Function, value: Any, at: Place) -> Any:
        own = (name for name, known in shape.known.items() if known is value)
        return next(own, None) or self._registered(value, at, shape.what)

    def _operator(self, value: Any, at: Place) -> Any:
        if isinstance(value, tuple):
            return self._items(s.Operator(), value, at)
        if isinstance(value, str):
            return f".{value}"
        if not callable(value):
            return self._plain(value, at)
        name = "MatchAllNode" if value is MatchAllNode else name_of(value)
        if name is not None and s.OPERATORS.get(name) is value:
            return name
        return self._registered(value, at, "operator")

    def _quantization(self, value: Any, at: Place) -> Any:
        cls = type(value)
        other = s.QUANTIZATIONS.get(cls.__name__)
        if other is not None and other.type is cls:
            return {"quantization": cls.__name__, **self.write(other, value, at)}
        known = s.OBSERVERS.get(cls.__name__)
        if known is not None and known.type is cls:
            return {"observer": cls.__name__, **self.write(known, value, at)}
        if isinstance(value, type) or not hasattr(value, "spec"):
            return self._mistyped(at, "an observer", value)
        name = self._registered(cls, at, "observer")
        record = user_record(cls)
        taken = () if record is None else [tag for tag in s.TAGS if tag in record.fields]
        if record is None or taken:
            reason = f"it has a field called {taken[0]!r}" if taken else f"{cls.__name__} is no dataclass"
            return self._wrong(at, reason, "make it a frozen dataclass, so that its fields can be written")
        return {"observer": name, **self.write(record, value, at)}

    def _registered(self, value: Any, at: Place, what: str) -> Any:
        for name in sorted(self._names):
            known = self._names[name]
            if known is value or (type(known) is type(value) and _is_value(value) and known == value):
                return name
        if not callable(value):
            return self._mistyped(at, f"a {what}", value)
        own = str(getattr(value, "__name__", type(value).__name__)).strip("<>")
        remedy = f"give it one, here and in from_json: names={{'mine.{own}': {own}}}"
        return self._wrong(at, f"the {what} {own} has no registered name", remedy)

    def _mistyped(self, at: Place, expected: str, value: object) -> Any:
        return self._wrong(at, f"expected {expected}, got {shown(value)}", "mend the configuration")

    def _wrong(self, at: Place, reason: str, remedy: str) -> Any:
        self.problems.append(BadConfig(place_of(at), reason, remedy))
        return None


def _is_value(function: Any) -> bool:
    """Whether a function is what it is made of: a method, or a frozen dataclass that can be called."""
    return isinstance(function, MethodType) or (
        dataclasses.is_dataclass(function) and not isinstance(function, type) and isinstance(function, Hashable)
    )


def _parts(key: Any) -> tuple[Any, ...]:
    return key if isinstance(key, tuple) else tuple(getattr(key, field.name) for field in dataclasses.fields(key))


_CALLED: Mapping[Any, str] = {str: "str", int: "int of 64 bits", float: "finite float", bool: "bool"}
