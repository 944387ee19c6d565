"""`pack` and `unpack`: stages as bytes, for other processes."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import FunctionType, ModuleType
from typing import Any, TypeAlias

from returns.result import Failure, Success
from torch import nn

from qfunc.edge.carry import taken_apart
from qfunc.errors import BadConfig, Problem, UserFunctionFailed, WrongStage, several, told
from qfunc.ir import Graph, Opaque, Source
from qfunc.passes.lower import Lowered
from qfunc.passes.stages import Calibrated, Converted, Prepared
from qfunc.result import R

Stage: TypeAlias = Graph | Prepared | Calibrated | Converted | Lowered
_STAGES = (Graph, Prepared, Calibrated, Converted, Lowered)
_EXPECTED = "Graph, Prepared, Calibrated, Converted or Lowered"


def pack(stage: Stage) -> R[bytes]:
    """A stage as bytes, with the model it is of: what plain `pickle` makes of it, or what it is that cannot be pickled.

    The stage and the model stay as they are: memory is read, neither moved nor copied for good.

    Returns:
        The bytes; `WrongStage`; or `UserFunctionFailed` for each part that cannot be pickled: a module or an attribute
        of the model by its path, an object of the graph by the place that uses it, a part of a configuration by name.

    >>> from qfunc import trace
    >>> model = nn.Sequential(nn.Linear(2, 3)).eval()
    >>> graph = trace(model).unwrap()
    >>> pack(graph).bind(unpack).unwrap().order
    ('input_1', '_0', 'output')
    >>> model.scaled = lambda x: 2 * x
    >>> pack(graph).failure().node
    'scaled'
    """
    if not isinstance(stage, _STAGES):
        return Failure(WrongStage(type(stage).__name__, _EXPECTED))
    try:
        return Success(pickle.dumps(stage, protocol=pickle.HIGHEST_PROTOCOL))
    except Exception as error:  # noqa: BLE001 - what a user's object raises when it is pickled is the user's code
        place = type(stage).__name__
        try:
            found = _Search().problems(place, stage)
        except RecursionError:
            found = None
        return Failure(several(found or [_problem(place, error)]))


def unpack(data: bytes) -> R[Stage]:
    """The stage that `pack` made bytes of, of a model that came with it.

    Unpickling runs what the bytes say: unpack only what comes from where you trust.

    Returns:
        The stage; `BadConfig` for what are no bytes; `UserFunctionFailed` for bytes that are damaged, or name code
        that cannot be imported here; `WrongStage` for bytes of something else.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        reason = f"expected bytes, got a {type(data).__name__}"
        return Failure(BadConfig("data", reason, "pass what pack gave, unwrapped: pack(stage).unwrap()"))
    try:
        stage = pickle.loads(data)  # noqa: S301 - said above
    except Exception as error:  # noqa: BLE001 - anything may come out of bytes, and of the user's classes
        reason = f"it cannot be unpickled here: {told(error)}"
        remedy = "pass all the bytes that pack gave, and make the modules that define the model importable here"
        return Failure(UserFunctionFailed("data", reason, remedy))
    if not isinstance(stage, _STAGES):
        return Failure(WrongStage(type(stage).__name__, _EXPECTED))
    return Success(stage)


_REMEDY = (
    "define its class or function at the top level of an importable module, or take it out of the model; Ray and Dask, "
    "which pickle with cloudpickle, can carry a lambda or a local class"
)


def _problem(place: str, error: Exception) -> Problem:
    return UserFunctionFailed(place or "model", f"it cannot be pickled: {told(error)}", _REMEDY)


class _Search:
    """Looks for the innermost parts of a value that cannot be pickled, each once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[object, list[Problem] | None]] = {}

    def problems(self, place: str, value: Any) -> list[Problem] | None:
        """What is wrong with a value; `None` where nothing is, nothing again where it was told already."""
        if id(value) in self._known:
            found = self._known[id(value)][1]
            return None if found is None else []
        error = _refusal(value)
        self._known[id(value)] = value, None if error is None else []
        if error is None:
            return None
        inner = [self.problems(*part) for part in _parts(place, value)]
        told_inside = [found for found in inner if found is not None]
        return [problem for found in told_inside for problem in found] if told_inside else [_problem(place, error)]


def _refusal(value: Any) -> Exception | None:
    """Why a value cannot be pickled, if so; memory is not looked at, and always can."""
    try:
        _, code, _ = taken_apart(value)
        for item in code:
            pickle.dumps(item)
    except Exception as error:  # noqa: BLE001 - what a user's object raises when it is pickled is the user's code
        return error
    return None


def _parts(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value and where they are: of a model by their paths, of a stage by the names of its fields."""
    match value:
        case type() | FunctionType() | ModuleType():
            return
        case Source(model=model, original=original):
            yield "", model
            yield "", original
        case Opaque(value=held):
            yield place, held
        case Mapping():
            for key, item in value.items():
                yield f"{place}[{key!r}]", key
                yield f"{place}[{key!r}]", item
        case tuple() | list() | set() | frozenset():
            yield from ((f"{place}[{index}]", item) for index, item in enumerate(value))
        case _:
            yield place, type(value)
            yield from _held(place, value)


def _held(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, by attribute."""
    state = {each.name: getattr(value, each.name) for each in fields(value)} if is_dataclass(value) else _state(value)
    match value:
        case nn.Module():
            state.pop("_graph", None)  # of an fx module: it is pickled as its code
            state = {**state.pop("_modules", {}), **state}
        case Graph():
            for source in value.sources.values():
                yield place, source
            yield from ((_user(value, token, place), held) for token, held in value.objects.items())
        case _:
            pass
    yield from ((_joined(place, name), item) for name, item in state.items())


def _state(value: object) -> dict[str, Any]:
    """What of an object is pickled, by attribute; nothing where it is not known."""
    try:
        state = value.__getstate__()
    except Exception:  # noqa: BLE001 - the user's code; the object itself is told then
        return {}
    found: dict[str, Any] = {}
    for part in state if isinstance(state, tuple) else (state,):
        found.update(part if isinstance(part, dict) else {})
    return found


def _joined(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _user(graph: Graph, token: str, place: str) -> str:
    """The place of the first node that uses an object."""
    use = re.compile(rf"\${re.escape(token)}(?![\w.])")
    return next((node.place for node in graph if use.search(repr(node))), f"{place}.objects[{token!r}]")
