"""`Statistics` of a document and its tensors. They need not be trusted: what they name is looked up, no more."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pyrsistent import pmap
from torch import Tensor

from qfunc.config import shapes as s
from qfunc.config.arguments import shown
from qfunc.config.reading import Object, Reader, as_written
from qfunc.config.writing import Place
from qfunc.edge.statistic_types import FLOATS, OWN, Types, faults
from qfunc.edge.statistics_writing import is_text
from qfunc.errors import told
from qfunc.numerics.observers import is_hashable
from qfunc.passes.statistics import Key, Measured, Statistics

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class _Value:
    """A statistic, or with `tensors` a state: a scalar, a tuple, a tensor, or an object of a class of the table."""

    tensors: bool


@dataclass(frozen=True, slots=True)
class _Json:
    """Any JSON: as dicts and lists, or `raw`, as it is."""

    raw: bool = False


_ROW: Mapping[str, Any] = MappingProxyType(
    {
        "values": s.Many(s.TEXT),
        "statistic": _Value(tensors=False),
        "state": _Value(tensors=True),
        "batches": s.INT,
        "elements": s.INT,
        "data": s.TEXT,
    }
)
_DOCUMENT: Mapping[str, Any] = MappingProxyType(
    {
        "qfunc": s.TEXT,
        "version": s.INT,
        "graph": s.TEXT,
        "weights": s.TEXT,
        "batches": s.INT,
        "data": s.TEXT,
        "measured": s.Many(s.Row(_ROW)),
        "extra": _Json(),
    }
)


class StatisticsReader(Reader):
    """Reads the document, and looks up its tensors."""

    def __init__(self, types: Types, tensors: Mapping[str, Tensor]) -> None:
        super().__init__({})
        self._types, self._tensors = types, dict(tensors)
        self.extra: Mapping[str, Any] = {}

    def statistics(self, document: Object) -> Statistics | None:
        """The statistics; None, or something to be thrown away, where there are `problems`."""
        found = self._row(_DOCUMENT, document, ())
        for name in self._tensors:
            if not self._full:
                self._wrong((f"tensor {shown(name)}",), "nothing in the document is made of it", "")
        if self.problems:
            return None
        self.extra = found["extra"]
        if not isinstance(self.extra, dict):
            self._wrong((".extra",), "it is no object", "")
        measured: dict[Key, Measured] = {}
        for index, row in enumerate(found["measured"]):
            self._entry(measured, dict(zip(_ROW, row, strict=True)), (".measured", f"[{index}]"))
        graph, weights, batches = found["graph"], found["weights"], self._count(found, ())
        return Statistics(graph, weights, pmap(measured), batches, self._digest(found, ()))

    def _entry(self, measured: dict[Key, Measured], row: dict[str, Any], at: Place) -> None:
        key: Key = (row["values"], row["statistic"])
        state, name = row["state"], (*at, ".state")
        batches, data = self._count(row, at), self._digest(row, at)
        elements = self._count(row, at, "elements")
        if not key[0]:
            self._wrong((*at, ".values"), "there are none", "")
        elif not is_hashable(key[1]):
            self._wrong((*at, ".statistic"), "it is not hashable", "")
        elif key in measured:
            self._wrong(at, "an entry before it is of the same values and statistic", "")
        else:
            merge = getattr(key[1], "merge", None)
            measured[key] = Measured(state, batches, elements, data, merge if callable(merge) else None)
        for fault in faults(key[1], state):
            self._wrong(name, fault, "")

    def _count(self, row: Mapping[str, Any], at: Place, name: str = "batches") -> int:
        value: int = row[name]
        if value < 0:
            self._wrong((*at, f".{name}"), f"{value} is no number of {name}", "")
        return value

    def _digest(self, row: Mapping[str, Any], at: Place) -> int:
        value: str = row["data"]
        if _DIGEST.fullmatch(value):
            return int(value, 16)
        self._wrong((*at, ".data"), "it is no SHA-256 digest in hexadecimal digits", "")
        return 0

    def read(self, shape: Any, value: Any, at: Place) -> Any:
        """The value that some JSON stands for; where there is none, a placeholder and a problem."""
        match shape:
            case _Value() if not self._full:
                return self._value(shape, value, at)
            case _Json(raw) if not self._full:
                return value if raw else self._json(value, at)
            case s.Scalar() if isinstance(value, str) and not is_text(value):
                return self._wrong(at, "it is no text: half a character", "")
        return super().read(shape, value, at)

    def _value(self, shape: _Value, value: Any, at: Place) -> Any:
        match value:
            case None:
                return None
            case bool() | int() | float() | str():
                return self.read(s.SCALARS[type(value)], value, at)
            case list():
                return self._items(_any(shape), value, at)
        names = [name for name, _ in value.pairs]
        if names == ["float"]:
            name = value.get("float")
            known = isinstance(name, str) and name in FLOATS
            return FLOATS[name] if known else self._mistyped((*at, ".float"), " or ".join(FLOATS), name)
        if names == ["tensor"] and shape.tensors:
            return self._tensor(value.get("tensor"), (*at, ".tensor"))
        return self._object(shape, value, at)

    def _tensor(self, name: Any, at: Place) -> Any:
        if not isinstance(name, str):
            return self._mistyped(at, "the name of a tensor", name)
        found = self._tensors.pop(name, None)
        return self._wrong(at, f"there is no tensor {shown(name)}, or it is used twice", "") if found is None else found

    def _object(self, shape: _Value, value: Object, at: Place) -> Any:
        before = len(self.problems)
        given = self._row(_OBJECT, value, at)
        if len(self.problems) > before:
            return given
        name = given["type"]
        cls = self._types.classes.get(name)
        if cls is None:
            remedy = f"give the class, if you know it: types={{{shown(name)}: ...}}"
            return self._wrong((*at, ".type"), f"there is no class {as_written(name)}", remedy)
        inside = (*at, ".fields")
        names = [field.name for field in dataclasses.fields(cls)]
        shapes: dict[str, Any] = dict.fromkeys(names, _any(shape))
        found = self._row(shapes, given["fields"], inside)
        if len(self.problems) > before or self._full:
            return found
        for field in names:
            if self._types.misfit(cls, field, found[field]):
                self._wrong((*inside, f".{field}"), f"{shown(found[field])} is not of the type of this field", "")
        return found if len(self.problems) > before else self._made(name, cls, found, at)

    def _made(self, name: str, cls: type, fields: dict[str, Any], at: Place) -> Any:
        try:
            return cls(**fields)
        except Exception as error:
            if name in OWN:
                raise
            return self._wrong(at, f"{cls.__name__} raised {told(error)}", "")

    def _json(self, value: Any, at: Place) -> Any:
        match value:
            case Object():
                fields = self._fields(value, at)
                return {
                    self.read(s.TEXT, name, at): self._json(item, (*at, f".{name}")) for name, item in fields.items()
                }
            case list():
                return [self._json(item, (*at, f"[{index}]")) for index, item in enumerate(value)]
            case None:
                return None
        return self.read(s.SCALARS[type(value)], value, at)


def _any(shape: _Value | _Json) -> Any:
    """A shape of this module among those of configurations."""
    return shape


_OBJECT: Mapping[str, Any] = MappingProxyType({"type": s.TEXT, "fields": _Json(raw=True)})
