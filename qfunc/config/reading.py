"""JSON as a value of a configuration, by its shape. The text is not trusted: what it names is looked up, no more."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pyrsistent import pmap
from returns.result import Failure, Success

from qfunc.config import shapes as s
from qfunc.config.arguments import shown
from qfunc.config.writing import DEEPEST, Place, fits, place_of, user_record
from qfunc.errors import BadConfig, Problem, UserFunctionFailed, told
from qfunc.result import R

LONGEST = 1 << 23
"""How many characters a document may have."""

MOST_PROBLEMS = 100
"""After how many problems the rest is not read."""

# A string that does not end goes to the end, so that the search takes a time in proportion to the text.
_TOKEN = re.compile(r'"(?:[^"\\]++|\\.)*+"?|([\[{])|([\]}])', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Object:
    """An object as it was written: its fields in order, duplicates included."""

    pairs: tuple[tuple[str, Any], ...]

    def get(self, name: str) -> Any:
        """The first value of a field, or `None`."""
        return next((value for key, value in self.pairs if key == name), None)


class _Bad:
    """Stands for what could not be read; a problem says why."""


_BAD = _Bad()


def parse(text: str) -> R[Any]:
    """The JSON of a text, with objects as `Object`, or `BadConfig` with the line and column.

    >>> parse('{"a": [1, 2.5]}').unwrap()
    Object(pairs=(('a', [1, 2.5]),))
    """
    if len(text) > LONGEST:
        reason = f"it has {len(text)} characters, the most are {LONGEST}"
        return Failure(BadConfig("document", reason, "split the configuration"))
    if _depth(text) > DEEPEST:
        return Failure(BadConfig("document", f"it nests deeper than {DEEPEST} levels", "write it flatter"))
    try:
        found = json.loads(text, object_pairs_hook=lambda pairs: Object(tuple(pairs)), parse_int=_integer)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        return Failure(
            BadConfig(place, f"this is no JSON: {error.msg}", "mend the text; to_json writes such documents")
        )
    return Success(found)


def _depth(text: str) -> int:
    depth = deepest = 0
    for token in _TOKEN.finditer(text):
        depth += bool(token[1]) - bool(token[2])
        deepest = max(deepest, depth)
    return deepest


def _integer(digits: str) -> int | float:
    """An int; one of so many digits that it fits no integer type counts as infinite, and is refused where it stands."""
    return int(digits) if len(digits) <= 20 else math.inf


class Reader:
    """Reads values, and keeps what cannot be read as `problems`."""

    def __init__(self, names: Mapping[str, Any]) -> None:
        self._names = names
        self.problems: list[Problem] = []

    def read(self, shape: s.Shape, value: Any, at: Place) -> Any:  # noqa: C901 - one case for each shape
        """The value that some JSON stands for; where there is none, a placeholder and a problem."""
        if self._full:
            return _BAD
        match shape:
            case s.Scalar(cls):
                if not fits(shape, value):
                    return self._mistyped(at, _CALLED[cls], value)
                return float(value) if cls is float else value
            case s.Plain():
                return self._plain(value, at)
            case s.Choices(members):
                known = {member.value: member for member in members}
                if not isinstance(value, str) or value not in known:
                    return self._mistyped(at, " or ".join(map(repr, known)), value)
                return known[value]
            case s.Word(words):
                fit = isinstance(value, str) and value in words
                return value if fit else self._mistyped(at, " or ".join(map(repr, words)), value)
            case s.Maybe(of):
                return None if value is None else self.read(of, value, at)
            case s.Many(of):
                return self._items(of, value, at)
            case s.Names():
                return _through(frozenset, self._items(s.TEXT, value, at))
            case s.Table():
                return self._table(shape, value, at)
            case s.Record():
                return self._record(shape, value, at)
            case s.Row(fields):
                return _through(lambda row: tuple(row[name] for name in fields), self._row(fields, value, at))
            case s.Rows():
                return self._rows(shape, value, at)
            case s.OneOf(cases):
                given = self._fields(value, at)
                if len(given) != 1 or next(iter(given)) not in cases:
                    return self._mistyped(at, f"an object of one field: {' or '.join(cases)}", value)
                ((name, item),) = given.items()
                return self.read(cases[name][1], item, (*at, f".{name}"))
            case s.WithOrWithout(field, first, second):
                has = isinstance(value, Object) and any(name == field for name, _ in value.pairs)
                return self._record(first if has else second, value, at)
            case s.TextOr(of):
                return value if isinstance(value, str) else self._record(of, value, at)
            case s.Late(late):
                return self.read(late(), value, at)
            case s.Function():
                return self._function(shape, value, at)
            case s.Operator():
                return self._operator(value, at)
            case s.Quantized():
                return self._quantization(value, at)

    @property
    def _full(self) -> bool:
        return len(self.problems) >= MOST_PROBLEMS

    def _plain(self, value: Any, at: Place) -> Any:
        match value:
            case list():
                return self._items(s.Plain(), value, at)
            case Object():
                tagged = any(name in s.TAGS for name, _ in value.pairs)
                return self._quantization(value, at) if tagged else self._record(s.SPEC, value, at)
            case int() | float() if not isinstance(value, bool):
                return value if fits(s.FLOAT if isinstance(value, float) else s.INT, value) else self._too_large(at)
            case _:
                return value

    def _items(self, of: s.Shape, value: Any, at: Place) -> Any:
        if not isinstance(value, list):
            return self._mistyped(at, "an array", value)
        found = tuple([self.read(of, item, (*at, f"[{index}]")) for index, item in enumerate(value)])
        return _BAD if any(item is _BAD for item in found) else found

    def _fields(self, value: Any, at: Place, step: Callable[[str], str] | None = None) -> dict[str, Any]:
        """The fields of an object, each once; empty, with a problem, where it is none."""
        if not isinstance(value, Object):
            self._mistyped(at, "an object", value)
            return {}
        found: dict[str, Any] = {}
        for name, item in value.pairs:
            if name in found and not self._full:
                self._wrong((*at, (step or _step)(name)), "it stands there twice", "keep one of the two")
            found[name] = item
        return found

    def _row(self, shapes: Mapping[str, s.Shape], value: Any, at: Place, optional: frozenset[str] = frozenset()) -> Any:
        before = len(self.problems)
        given = self._fields(value, at)
        for name in given:
            if name not in shapes and not self._full:
                reason, known = f"there is no field {shown(name)} here", _close(name, shapes)
                self._wrong((*at, _step(name)), reason, known)
        if isinstance(value, Object):
            for name in shapes:
                if name not in given and name not in optional:
                    self._wrong((*at, f".{name}"), "it is missing", f"add the field {name!r}")
        found = {name: self.read(of, given[name], (*at, f".{name}")) for name, of in shapes.items() if name in given}
        return _BAD if len(self.problems) > before else found

    def _record(self, shape: s.Record, value: Any, at: Place) -> Any:
        return _through(lambda fields: shape.type(**fields), self._parts(shape, value, at))

    def _parts(self, shape: s.Record, value: Any, at: Place) -> Any:
        """The fields of a record that are given."""
        fields, missing = (field for field in dataclasses.fields(shape.type) if field.init), dataclasses.MISSING
        optional = (f.name for f in fields if f.default is not missing or f.default_factory is not missing)
        return self._row(shape.fields, value, at, frozenset(optional))

    def _table(self, shape: s.Table, value: Any, at: Place) -> Any:
        found: dict[Any, Any] = {}
        before = len(self.problems)
        for name, item in self._fields(value, at, _key).items():
            place = (*at, _key(name))
            key = name if isinstance(shape.key, s.Scalar) else self._function(shape.key, name, place)
            read = self.read(shape.of, item, place)
            if key is _BAD:
                continue
            if not _hashable(key):
                self._wrong(place, "what has this name is not hashable", "register a function, or a frozen dataclass")
            elif key in found:
                self._wrong(place, "an entry before it names the same", "keep one of the two")
            else:
                found[key] = read
        return _BAD if len(self.problems) > before else pmap(found)

    def _rows(self, shape: s.Rows, value: Any, at: Place) -> Any:
        rows = self._items(s.Row(shape.fields), value, at)
        if rows is _BAD:
            return _BAD
        found: dict[Any, Any] = {}
        for index, (*parts, item) in enumerate(rows):
            key = tuple(parts) if shape.key is tuple else shape.key(*parts)
            if key in found:
                return self._wrong((*at, f"[{index}]"), "an entry before it names the same", "keep one of the two")
            found[key] = item
        return pmap(found)

    def _function(self, shape: s.Function, value: Any, at: Place) -> Any:
        known = {**shape.known, **self._names}
        if isinstance(value, str) and value in known:
            return known[value]
        return self._unregistered(at, value, shape.what, shape.known)

    def _operator(self, value: Any, at: Place) -> Any:
        if isinstance(value, list):
            return self._items(s.Operator(), value, at)
        if not isinstance(value, str):
            return self._plain(value, at)
        if value.startswith("."):
            return value[1:]
        known = {**s.OPERATORS, **self._names}
        return known[value] if value in known else self._unregistered(at, value, "operator", s.OPERATORS)

    def _quantization(self, value: Any, at: Place) -> Any:
        if not isinstance(value, Object):
            return self._mistyped(at, "an object with the field 'observer' or 'quantization'", value)
        if not any(name == "quantization" for name, _ in value.pairs):
            return self._observer(value, at)
        name = value.get("quantization")
        if not isinstance(name, str) or name not in s.QUANTIZATIONS:
            return self._mistyped((*at, ".quantization"), " or ".join(map(repr, s.QUANTIZATIONS)), name)
        return self._record(s.QUANTIZATIONS[name], _without(value, "quantization"), at)

    def _observer(self, value: Object, at: Place) -> Any:
        name = value.get("observer")
        own = self._names.get(name) if isinstance(name, str) else None
        if isinstance(name, str) and name in s.OBSERVERS:
            record: s.Record | None = s.OBSERVERS[name]
        elif isinstance(name, str) and name in s.QUANTIZATIONS:
            remedy = f"write 'quantization': {name!r}"
            return self._wrong((*at, ".observer"), f"{name} observes nothing itself", remedy)
        elif own is None:
            return self._unregistered((*at, ".observer"), name, "observer", s.OBSERVERS)
        else:
            record = user_record(own) if isinstance(own, type) else None
        if record is None:
            reason = f"what is registered as {name!r} is no class of an observer"
            return self._wrong((*at, ".observer"), reason, "register a frozen dataclass under this name")
        fields = self._parts(record, _without(value, "observer"), at)
        if fields is _BAD or own is None:
            return _through(lambda found: record.type(**found), fields)
        try:
            return record.type(**fields)
        except Exception as error:  # noqa: BLE001 - the user's class: anything may come out of it
            self.problems.append(UserFunctionFailed(place_of(at), f"{name} raised {told(error)}"))
            return _BAD

    def _unregistered(self, at: Place, value: Any, what: str, known: Mapping[str, Any] | None = None) -> Any:
        if not isinstance(value, str):
            return self._mistyped(at, f"the name of {_ARTICLES[what]} {what}", value)
        close = get_close_matches(value[:100], [*(known or ()), *self._names], n=1)
        register = f"register yours: names={{{shown(value)}: ...}}"
        remedy = f"did you mean {close[0]!r}? If not, {register}" if close else register
        return self._wrong(at, f"there is no {what} {shown(value)}", remedy)

    def _too_large(self, at: Place) -> Any:
        return self._wrong(at, "the number is not finite or too large", "write a number of at most 64 bits")

    def _mistyped(self, at: Place, expected: str, value: Any) -> Any:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and not fits(s.INT, value) and not fits(s.FLOAT, value):
            return self._too_large(at)
        return self._wrong(at, f"expected {expected}, got {as_written(value)}", "write that instead")

    def _wrong(self, at: Place, reason: str, remedy: str) -> Any:
        self.problems.append(BadConfig(place_of(at), reason, remedy))
        return _BAD


def _through(build: Any, found: Any) -> Any:
    return _BAD if found is _BAD else build(found)


def _without(value: Object, name: str) -> Object:
    """An object without the first field of a name."""
    first = next(index for index, (key, _) in enumerate(value.pairs) if key == name)
    return Object(value.pairs[:first] + value.pairs[first + 1 :])


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except Exception:  # noqa: BLE001 - the user's own hash: anything may come out of it
        return False
    return True


def _step(name: str) -> str:
    return f".{name}" if name.isidentifier() and len(name) <= 60 else _key(name)


def _key(name: str) -> str:
    return f"[{shown(name)}]"


def _close(name: str, known: Mapping[str, Any]) -> str:
    close = get_close_matches(name[:100], list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {', '.join(map(repr, known)) or 'none'}"


def as_written(value: Any) -> str:
    """A value in a message, in the words of JSON.

    >>> as_written([1]), as_written(None)
    ('an array', 'null')
    """
    match value:
        case None | bool():
            return {None: "null", True: "true", False: "false"}[value]
        case Object():
            return "an object"
        case list():
            return "an array"
        case str():
            return shown(value) if len(value) <= 56 else f"a string of {len(value)} characters"
        case _:
            return shown(value)


_ARTICLES: Mapping[str, str] = {"function": "a", "selector": "a", "operator": "an", "observer": "an"}
_CALLED: Mapping[Any, str] = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
