"""`Statistics` as bytes and files: tensors as safetensors, the rest as JSON. Files need not be trusted.

What a file names is looked up among qfunc's statistics and states and the `types` of the caller; nothing is imported,
evaluated or unpickled. Only classes of `types` run code of the user's, with the fields of the file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from types import MappingProxyType
from typing import Any

from pyrsistent import pmap
from returns.result import Failure, Success
from torch import Tensor

from qfunc.config import shapes as s
from qfunc.config.arguments import shown
from qfunc.config.reading import MOST_PROBLEMS, Object, Reader, as_written
from qfunc.config.writing import Place, fits, place_of
from qfunc.edge.container import ANOTHER, DTYPES, pack, read_file, unpack, write_file
from qfunc.edge.statistic_types import FLOATS, NO_TYPES, OWN, SCALARS, Types, faults, wrong_types
from qfunc.errors import BadConfig, BadFile, Problem, WrongStage, several, told
from qfunc.numerics.observers import is_hashable
from qfunc.passes.statistics import MODULUS, Key, Measured, Statistics
from qfunc.result import R

KIND = "Statistics"
VERSION = 1
"""The version of the documents that are written, and the only one that is read."""

_DIGEST = re.compile("[0-9a-f]{64}")
_DEEPEST = 40
_NO_EXTRA: Mapping[str, Any] = MappingProxyType({})


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


def to_bytes(
    statistics: Statistics, *, types: Mapping[str, type] = NO_TYPES, extra: Mapping[str, Any] = _NO_EXTRA
) -> R[bytes]:
    """Statistics as the bytes of a safetensors file, the same bytes for equal ones.

    Args:
        statistics: what to write.
        types: the frozen dataclasses of the user's own statistics and states, by the names to write for them.
        extra: JSON data to write beside them.

    Returns:
        The bytes, or a `BadConfig` for each class without a name and each value that files cannot hold; `WrongStage`.

    >>> from_bytes(to_bytes(Statistics("g", batches=2)).unwrap()).unwrap()[0].batches
    2
    """
    if not isinstance(statistics, Statistics):
        return Failure(WrongStage(type(statistics).__name__, "Statistics"))
    problems = list(wrong_types(types))
    if problems:
        return Failure(several(problems))
    writer = _Writer(Types(types))
    document, tensors = writer.document(statistics, extra)
    if writer.problems:
        return Failure(several(writer.problems[:MOST_PROBLEMS]))
    return pack(document, tensors)


def from_bytes(
    data: bytes, *, types: Mapping[str, type] = NO_TYPES, place: str = "statistics"
) -> R[tuple[Statistics, Mapping[str, Any]]]:
    """The statistics that bytes of `to_bytes` hold, and what was written beside them; the bytes need not be trusted.

    A state can be merged if its statistic says how; that of a user's observer which merges itself can be again once a
    calibration of this observer has gone on from it.

    Returns:
        The statistics and the extra data, or a `BadFile` at `place` for all that is wrong with the bytes; `BadConfig`
        for wrong `types`.
    """
    if not isinstance(data, bytes):
        return Failure(BadConfig("data", f"expected bytes, got {shown(data)}", "pass the bytes of a file"))
    problems = list(wrong_types(types))
    if problems:
        return Failure(several(problems))
    return unpack(data, place).bind(lambda found: from_document(*found, types, place))


def write_statistics(
    path: str | PathLike[str],
    statistics: Statistics,
    *,
    types: Mapping[str, type] = NO_TYPES,
    extra: Mapping[str, Any] = _NO_EXTRA,
) -> R[None]:
    """`to_bytes` into a file, which is whole at any time; `BadFile` where it cannot be written."""
    return to_bytes(statistics, types=types, extra=extra).bind(lambda data: write_file(path, data))


def read_statistics(
    path: str | PathLike[str], *, types: Mapping[str, type] = NO_TYPES
) -> R[tuple[Statistics, Mapping[str, Any]]]:
    """`from_bytes` of a file; `BadFile` where it cannot be read."""
    return read_file(path).bind(lambda data: from_bytes(data, types=types, place=fspath(path)))


class _Writer:
    """Statistics as JSON and tensors; what has no form is kept as `problems`."""

    def __init__(self, types: Types) -> None:
        self._types = types
        self._tensors: dict[str, Tensor] = {}
        self.problems: list[Problem] = []

    def document(self, statistics: Statistics, extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
            return value if value is None else self._scalar(s.SCALARS[type(value)], value, at)
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
        self._tensors[name] = value
        return {"tensor": name}

    def _scalar(self, shape: s.Scalar, value: object, at: Place) -> Any:
        if not fits(shape, value) or (isinstance(value, str) and not _is_text(value)):
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
            case Mapping() if all(isinstance(key, str) and _is_text(key) for key in value):
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


def from_document(
    document: Object, tensors: Mapping[str, Tensor], types: Mapping[str, type], place: str
) -> R[tuple[Statistics, Mapping[str, Any]]]:
    """The statistics of a document and its tensors, as `unpack` gives them."""
    wrong = list(_wrong_header(document))
    if wrong:
        return Failure(several(BadFile(place, reason, remedy) for reason, remedy in wrong))
    reader = _Reader(Types(types), tensors)
    found = reader.statistics(document)
    if isinstance(found, Statistics) and not reader.problems:
        return Success((found, reader.extra))
    return Failure(several(_of_file(problem, place) for problem in reader.problems[:MOST_PROBLEMS]))


def _of_file(problem: Problem, place: str) -> BadFile:
    remedy = ANOTHER if problem.remedy in ("", "write that instead", "keep one of the two") else problem.remedy
    return BadFile(place, f"{problem.node}: {problem.reason}", remedy)


def _wrong_header(document: Object) -> Iterator[tuple[str, str]]:
    kind, version = document.get("qfunc"), document.get("version")
    if kind != KIND:
        yield f"it holds {as_written(kind)}, not statistics", "give a file of statistics"
    elif type(version) is not int or version != VERSION:
        reason = f"its version is {as_written(version)}, and only {VERSION} can be read"
        yield reason, "read it with the qfunc that wrote it, or a later one"


class _Reader(Reader):
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
            case s.Scalar() if isinstance(value, str) and not _is_text(value):
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


def _is_text(value: str) -> bool:
    """Whether it can be encoded: JSON can name halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in value)
