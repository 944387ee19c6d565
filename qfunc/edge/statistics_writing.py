"""`Statistics` as a document and tensors."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qfunc.config import shapes as s
from qfunc.config.arguments import shown
from qfunc.config.writing import Place, fits, place_of
from qfunc.edge.container import DTYPES
from qfunc.edge.statistic_types import SCALARS, Types, faults
from qfunc.errors import BadConfig, Problem
from qfunc.passes.statistics import MODULUS, Key, Measured, Statistics

KIND = "Statistics"
VERSION = 1
"""The version of the documents that are written, and the only one that is read."""

_DEEPEST = 40


def is_text(value: str) -> bool:
    """Whether it can be encoded: JSON can name halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


class StatisticsWriter:
    """Statistics as JSON and tensors; what has no form is kept as `problems`."""

    def __init__(self, types: Types) -> None:
        self._types = types
        self._tensors: dict[str, Tensor] = {}
        self.problems: list[Problem] = []

    def document(self, statistics: Statistics, extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that is to be written; of no use where there are `problems`."""
        keys = [(self._key(key), key) for key in statistics.measured]
        rows = [
            self._row(key, written, statistics.measured[key], (f"[{index}]",))
            for index, (written, key) in enumerate(sorted(keys, key=lambda row: json.dumps(row[0])))
        ]
        document = {
            "qfunc": KIND,
            "version": VERSION,
            "graph": self._scalar(s.TEXT, statistics.graph, (".graph",)),
            "weights": self._scalar(s.TEXT, statistics.weights, (".weights",)),
            "batches": self._count(statistics.batches, (".batches",)),
            "data": self._digest(statistics.data, (".data",)),
            "measured": rows,
            "extra": self._json(extra, (".extra",)),
        }
        return document, self._tensors

    def _key(self, key: Key) -> tuple[Any, Any]:
        values, statistic = key
        at = (", ".join(map(str, values)), ".statistic")
        return [self._scalar(s.TEXT, value, at) for value in values], self._value(statistic, at, None)

    def _row(self, key: Key, written: tuple[Any, Any], entry: Measured, name: Place) -> dict[str, Any]:
        at = (", ".join(map(str, key[0])),)
        state = self._value(entry.state, (*at, ".state"), "".join((*name, ".state")))
        if state is not None or entry.state is None:
            for fault in faults(key[1], entry.state):
                self._wrong((*at, ".state"), fault, "no calibration gives such a state: calibrate again")
        return {
            "values": written[0],
            "statistic": written[1],
            "state": state,
            "batches": self._count(entry.batches, (*at, ".batches")),
            "elements": self._count(entry.elements, (*at, ".elements")),
            "data": self._digest(entry.data, (*at, ".data")),
        }

    def _value(self, value: object, at: Place, tensor: str | None) -> Any:
        """A value as JSON; its tensors are named after where they stand in `tensor`, and not allowed without."""
        if len(at) > _DEEPEST:
            return self._wrong(at, f"it nests deeper than {_DEEPEST} levels", "make it flatter")
        if isinstance(value, float) and type(value) is float and not math.isfinite(value):
            return {"float": "nan" if math.isnan(value) else f"{value:+}".removeprefix("+")}
        if type(value) in SCALARS:
            # Adding zero makes -0.0 zero, as in tensors.
            plain = value + 0.0 if type(value) is float else value
            return plain if plain is None else self._scalar(s.SCALARS[type(value)], plain, at)
        if type(value) is tuple:
            steps = ((f"[{index}]", item) for index, item in enumerate(value))
            return [self._value(item, (*at, step), tensor and tensor + step) for step, item in steps]
        if isinstance(value, Tensor) and tensor is not None:
            return self._tensor(value, at, tensor)
        return self._object(value, at, tensor)

    def _object(self, value: Any, at: Place, tensor: str | None) -> Any:
        cls = type(value)
        name = self._types.name(cls)
        if name is None:
            own = cls.__name__
            if dataclasses.is_dataclass(cls):
                remedy = f"give it one, here and where the file is read: types={{'mine.{own}': {own}}}"
                return self._wrong(at, f"the class {own} has no name for files", remedy)
            remedy = "use frozen dataclasses of None, bool, str, numbers, tuples and tensors"
            return self._wrong(at, f"{shown(value)} has no form in files", remedy)
        fields = {}
        for field in dataclasses.fields(cls):
            item, place = getattr(value, field.name), (*at, f".{field.name}")
            if self._types.misfit(cls, field.name, item):
                self._wrong(place, f"{shown(item)} is not of the type of this field", f"mend the {cls.__name__}")
            fields[field.name] = self._value(
                self._types.normal(cls, field.name, item), place, tensor and f"{tensor}.{field.name}"
            )
        return {"type": name, "fields": fields}

    def _tensor(self, value: Tensor, at: Place, name: str) -> Any:
        plain = str(value.layout) == "torch.strided" and not value.is_meta and value.dtype in DTYPES.values()
        if not plain:
            return self._wrong(at, f"tensors of {value.dtype}, {value.layout} have no form in files", "use a plain one")
        # Adding zero makes -0.0 zero: they are equal, and equal states are to be written alike.
        self._tensors[name] = value.detach() + 0.0 if value.is_floating_point() else value
        return {"tensor": name}

    def _scalar(self, shape: s.Scalar, value: object, at: Place) -> Any:
        if not fits(shape, value) or (isinstance(value, str) and not is_text(value)):
            return self._wrong(at, f"{shown(value)} is no {shape.type.__name__} that files hold", "use another value")
        return value

    def _count(self, value: int, at: Place) -> Any:
        negative = isinstance(value, int) and value < 0
        return self._wrong(at, f"{value} is no number", "count from 0") if negative else self._scalar(s.INT, value, at)

    def _digest(self, value: int, at: Place) -> Any:
        if not isinstance(value, int) or not 0 <= value < MODULUS:
            return self._wrong(at, f"{shown(value)} is no digest of data", "calibrate again")
        return f"{value:064x}"

    def _json(self, value: object, at: Place) -> Any:
        if len(at) > _DEEPEST:
            return self._wrong(at, f"it nests deeper than {_DEEPEST} levels", "make it flatter")
        match value:
            case Mapping() if all(isinstance(key, str) and is_text(key) for key in value):
                return {key: self._json(item, (*at, f"[{key!r}]")) for key, item in value.items()}
            case list() | tuple():
                return [self._json(item, (*at, f"[{index}]")) for index, item in enumerate(value)]
            case None:
                return None
            case bool() | int() | float() | str():
                return self._scalar(s.SCALARS[type(value)], value, at) if type(value) in SCALARS else value
        return self._wrong(at, f"{shown(value)} is no JSON", "use None, bool, str, finite numbers, lists and dicts")

    def _wrong(self, at: Place, reason: str, remedy: str) -> Any:
        self.problems.append(BadConfig(place_of(at), reason, remedy))
