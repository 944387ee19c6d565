"""`save` and `load`: values of qfunc as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

from returns.result import Failure
from torch import Tensor

from qfunc.config.arguments import shown
from qfunc.config.reading import Object, as_written
from qfunc.edge.container import decode
from qfunc.edge.files import read_file, write_file
from qfunc.edge.statistic_types import NO_TYPES
from qfunc.edge.statistics_file import from_document, to_bytes
from qfunc.edge.statistics_writing import KIND
from qfunc.errors import BadConfig, BadFile, Problem, WrongStage, several
from qfunc.passes.stages import Calibrated
from qfunc.passes.statistics import Statistics
from qfunc.result import R

Types: TypeAlias = Mapping[str, type]


def save(value: Statistics, path: str | PathLike[str], *, types: Types = NO_TYPES) -> R[Path]:
    """Write a value to a safetensors file, which is whole at any time: the old one, or the new one.

    Args:
        value: `Statistics`, those of a `Calibrated` for example.
        path: the file; its folder must exist.
        types: the frozen dataclasses of your own statistics and states, by the names to write for them.

    Returns:
        The path, or `BadConfig` for wrong arguments and for each part of the value that has no form in files,
        `BadFile` where it cannot be written, `WrongStage` for what is not saved.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = save(Statistics("g", batches=2), Path(folder) / "measured.safetensors").unwrap()
    ...     load(path).unwrap().batches
    2
    """
    problems = list(_wrong_path(path))
    write = _WRITERS.get(type(value))
    if isinstance(value, Calibrated):
        remedy = (
            "save its statistics: save(calibrated.statistics, path); calibrate(prepared, (), statistics=...) takes them"
        )
        problems.append(BadConfig("value", "a Calibrated holds the model, which files do not", remedy))
    elif write is None:
        problems.append(WrongStage(type(value).__name__, "Statistics"))
    if problems or write is None:
        return Failure(several(problems))
    return write(value, types).bind(lambda data: write_file(path, data)).map(lambda _: Path(path))


def load(path: str | PathLike[str], *, types: Types = NO_TYPES) -> R[Statistics]:
    """The value that a file of `save`, or a checkpoint of `calibrate`, holds. The file need not be trusted.

    Nothing is unpickled, and nothing that the file names is imported or evaluated: it is looked up among qfunc's own
    classes and those of `types`.

    Returns:
        The value, or a `BadFile` for all that is wrong with the file, `BadConfig` for wrong arguments.
    """
    problems = list(_wrong_path(path))
    if problems:
        return Failure(several(problems))
    place = str(Path(path))
    return read_file(path).bind(lambda data: decode(data, place)).bind(lambda found: _read(*found, types, place))


def _read(document: Object, tensors: Mapping[str, Tensor], types: Types, place: str) -> R[Statistics]:
    kind = document.get("qfunc")
    read = _READERS.get(kind) if isinstance(kind, str) else None
    if read is None:
        reason = f"it holds {as_written(kind)}, and only {', '.join(_READERS)} can be read"
        return Failure(BadFile(place, reason, "read it with the qfunc that wrote it, or a later one"))
    return read(document, tensors, types, place)


def _statistics(document: Object, tensors: Mapping[str, Tensor], types: Types, place: str) -> R[Statistics]:
    return from_document(document, tensors, types, place).map(lambda found: found[0])


def _wrong_path(path: object) -> list[Problem]:
    if isinstance(path, str) or (isinstance(path, PathLike) and isinstance(path.__fspath__(), str)):
        return []
    return [BadConfig("path", f"{shown(path)} is no path", "give the path of a file")]


_WRITERS: Mapping[type, Callable[[Any, Types], R[bytes]]] = MappingProxyType(
    {Statistics: lambda value, types: to_bytes(value, types=types)}
)
"""How a value is written, by its class."""

_READERS: Mapping[str, Callable[[Object, Mapping[str, Tensor], Types, str], R[Statistics]]] = MappingProxyType(
    {KIND: _statistics}
)
"""How a document is read, by its field `qfunc`."""
