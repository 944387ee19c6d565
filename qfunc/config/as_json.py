"""Configurations, host reports and certificates as JSON: `to_json` and `from_json`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from returns.result import Failure, Success

from qfunc.config.arguments import shown
from qfunc.config.backend_config import BackendConfig
from qfunc.config.certificate import Certificate
from qfunc.config.host_report import HostReport
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.reading import LONGEST, MOST_PROBLEMS, Object, Reader, as_written, parse
from qfunc.config.selectors import SELECTORS
from qfunc.config.shapes import DOCUMENTS, OBSERVERS, OPERATORS, QUANTIZATIONS
from qfunc.config.writing import Writer
from qfunc.errors import BadConfig, Problem, several
from qfunc.result import R

Configuration: TypeAlias = QConfig | QConfigMapping | BackendConfig
Document: TypeAlias = Configuration | HostReport | Certificate
"""What a document holds."""

_Value = TypeVar("_Value", HostReport, Certificate)

VERSION = 1
"""The version of the documents that are written, and the only one that is read."""

_NO_NAMES: Mapping[str, Any] = MappingProxyType({})


def to_json(configuration: Document, *, names: Mapping[str, type | Callable[..., Any]] = _NO_NAMES) -> R[str]:
    """A configuration, host report or certificate as a JSON document, the same text for equal ones.

    Observers of qfunc are written as the names of their classes and their fields, operators of patterns as their
    canonical names, selectors of `qfunc.config.selectors` as their own. What is the user's own is written as a name:
    `names` holds the classes of observers (frozen dataclasses) and the functions by the names that `from_json` is to be
    given them again with.

    Returns:
        The text, or a `BadConfig` for each part that has no name or is of a wrong type.

    >>> from qfunc.numerics.observers import MinMax
    >>> text = to_json(QConfigMapping().set_module_name("head", None)).unwrap()
    >>> from_json(text).unwrap().module_names
    pmap({'head': None})
    """
    kind = type(configuration).__name__
    if kind not in DOCUMENTS or type(configuration) is not DOCUMENTS[kind].type:
        remedy = "pass a QConfig, QConfigMapping, BackendConfig, HostReport or Certificate"
        return Failure(BadConfig("configuration", f"there is no document of {shown(configuration)}", remedy))
    writer, problems = Writer(names), list(_wrong_names(names))
    body = {} if problems else writer.write(DOCUMENTS[kind], configuration, ())
    problems += writer.problems
    if problems:
        return Failure(several(problems[:MOST_PROBLEMS]))
    text = json.dumps({"qfunc": kind, "version": VERSION, **body}, indent=1, sort_keys=True, allow_nan=False)
    if len(text) > LONGEST:
        reason = f"its document has {len(text)} characters, the most are {LONGEST}"
        return Failure(BadConfig("configuration", reason, "split the configuration"))
    return Success(text)


def from_json(text: str, *, names: Mapping[str, type | Callable[..., Any]] = _NO_NAMES) -> R[Document]:
    """The value that a document of `to_json`, or one written by hand, stands for.

    Fields that are left out have their defaults. The text need not be trusted: what it names is looked up among qfunc's
    observers, torch's operators and `names`, and never imported or evaluated; only classes of observers in `names` are
    called, with the fields of the document. Whether the configuration suits a model is for `prepare` to say. (Its
    regular expressions are run then: a hostile one can take long.)

    Returns:
        The configuration, or a `BadConfig` with the place in the document for all that is wrong with it: no JSON,
        unknown or missing fields, wrong types, names that are not registered, another version; `UserFunctionFailed` for
        a class of the user's that raises.

    >>> print(from_json('{"qfunc": "QConfigMapping", "version": 1, "object_type": {}}').failure().remedy)
    did you mean 'object_types'?
    """
    if not isinstance(text, str):
        return Failure(BadConfig("text", f"expected a str, got a {type(text).__name__}", "pass the text of a document"))
    problems = list(_wrong_names(names))
    return Failure(several(problems)) if problems else parse(text).bind(lambda found: _document(found, names))


def read_host_report(text: str) -> R[HostReport]:
    """The host report of a document of `to_json`, as to lower for another machine; `BadConfig` as of `from_json`."""
    return _read(HostReport, text)


def read_certificate(text: str) -> R[Certificate]:
    """The certificate of a document of `to_json`, as to compare another with it; `BadConfig` as of `from_json`."""
    return _read(Certificate, text)


def _read(expected: type[_Value], text: str) -> R[_Value]:
    def of_type(found: Document) -> R[_Value]:
        if isinstance(found, expected):
            return Success(found)
        reason = f"expected a {expected.__name__}, got a {type(found).__name__}"
        return Failure(BadConfig("qfunc", reason, f"pass the text that to_json made of a {expected.__name__}"))

    return from_json(text).bind(of_type)


def _document(found: Any, names: Mapping[str, Any]) -> R[Document]:
    if not isinstance(found, Object):
        return Failure(BadConfig("document", "it is no object", 'write {"qfunc": "QConfigMapping", "version": 1, ...}'))
    problems = list(_wrong_header(found))
    if problems:
        return Failure(several(problems))
    reader = Reader(names)
    rest = Object(tuple((name, value) for name, value in found.pairs if name not in _HEADER))
    value = reader.read(DOCUMENTS[found.get("qfunc")], rest, ())
    return Failure(several(reader.problems[:MOST_PROBLEMS])) if reader.problems else Success(value)


_HEADER = ("qfunc", "version")


def _wrong_header(document: Object) -> Iterator[Problem]:
    keys = [name for name, _ in document.pairs]
    for name in _HEADER:
        if keys.count(name) > 1:
            yield BadConfig(name, "it stands there twice", "keep one of the two")
    kind, version = document.get("qfunc"), document.get("version")
    if not isinstance(kind, str) or kind not in DOCUMENTS:
        known = " or ".join(f'"{name}"' for name in DOCUMENTS)
        reason = "it is missing" if "qfunc" not in keys else f"there is no document of {as_written(kind)}"
        yield BadConfig("qfunc", reason, f'write "qfunc": {known}')
    if version != VERSION or isinstance(version, (bool, float)):
        reason = (
            "it is missing" if "version" not in keys else f"it is {as_written(version)}, and only {VERSION} can be read"
        )
        yield BadConfig("version", reason, f'write "version": {VERSION}; later versions need a later qfunc')


def _wrong_names(names: object) -> Iterator[Problem]:
    remedy = "pass a dict from names to your classes of observers and functions: names={'mine.Sketch': Sketch}"
    if not isinstance(names, Mapping):
        yield BadConfig("names", f"expected a dict, got {shown(names)}", remedy)
        return
    for name, value in names.items():
        if not isinstance(name, str) or not name or name.startswith("."):
            yield BadConfig("names", f"{shown(name)} is no name: a str without a dot before it", remedy)
        elif any(name in known for known in (OBSERVERS, QUANTIZATIONS, OPERATORS, SELECTORS)):
            yield BadConfig(f"names[{name!r}]", "the name is qfunc's or torch's own", "put your own before it")
        elif not callable(value):
            yield BadConfig(f"names[{name!r}]", f"expected a class or a function, got {shown(value)}", remedy)
