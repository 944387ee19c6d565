"""`Statistics` as bytes and files: tensors as safetensors, the rest as JSON. Files need not be trusted.

What a file names is looked up among qfunc's statistics and states and the `types` of the caller; nothing is imported,
evaluated or unpickled. Only classes of `types` run code of the user's, with the fields of the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike, fspath
from types import MappingProxyType
from typing import Any

from returns.result import Failure, Success
from torch import Tensor

from qfunc.config.arguments import shown
from qfunc.config.reading import MOST_PROBLEMS, Object, as_written
from qfunc.edge.container import ANOTHER, decode, encode
from qfunc.edge.files import read_file, write_file
from qfunc.edge.statistic_types import NO_TYPES, Types, wrong_types
from qfunc.edge.statistics_reading import StatisticsReader
from qfunc.edge.statistics_writing import KIND, VERSION, StatisticsWriter
from qfunc.errors import BadConfig, BadFile, Problem, WrongStage, several
from qfunc.passes.statistics import Statistics
from qfunc.result import R

_NO_EXTRA: Mapping[str, Any] = MappingProxyType({})


def to_bytes(
    statistics: Statistics, *, types: Mapping[str, type] = NO_TYPES, extra: Mapping[str, Any] = _NO_EXTRA
) -> R[bytes]:
    """Statistics as the bytes of a safetensors file, the same bytes for equal ones; -0.0 is written as the equal 0.0.

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
    writer = StatisticsWriter(Types(types))
    document, tensors = writer.document(statistics, extra)
    if writer.problems:
        return Failure(several(writer.problems[:MOST_PROBLEMS]))
    return encode(document, tensors)


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
    return decode(data, place).bind(lambda found: from_document(*found, types, place))


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


def from_document(
    document: Object, tensors: Mapping[str, Tensor], types: Mapping[str, type], place: str
) -> R[tuple[Statistics, Mapping[str, Any]]]:
    """The statistics of a document and its tensors, as `decode` gives them."""
    wrong = list(_wrong_header(document))
    if wrong:
        return Failure(several(BadFile(place, reason, remedy) for reason, remedy in wrong))
    reader = StatisticsReader(Types(types), tensors)
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
