"""Whether the arguments of qfunc's functions are of their types, for callers without a type checker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from qfunc.config.backend_config import BackendConfig, wrong_backend
from qfunc.config.custom_config import CustomConfig
from qfunc.config.custom_fusion import wrong_fusion
from qfunc.config.host_report import HostReport
from qfunc.config.kernel import KernelRow
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.errors import BadConfig, Problem

_EXPECTED: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "backend": (BackendConfig, "pass qfunc.CPU, qfunc.X86, qfunc.ONEDNN or another BackendConfig"),
        "qconfig_mapping": (QConfigMapping, "pass a QConfigMapping, or None for the backend's own"),
        "custom": (CustomConfig, "pass a CustomConfig, or leave it out"),
        "host": (HostReport, "pass the report of check_host(), or leave it out"),
        "engine": (str, "pass the name of an engine: 'onednn', 'quantized' or 'reference'"),
        "qat": (bool, "pass qat=True to fuse for training, qat=False for evaluation"),
        "kernels": (tuple, "pass a tuple of KernelRow"),
    }
)


_NAMES = MappingProxyType(
    {
        "non_traceable_names": ("head",),
        "preserved_attributes": ("class_names",),
        "unfused_names": ("layer1.0",),
        "unfused_patterns": ("conv2d + relu",),
    }
)


def wrong_arguments(**arguments: Any) -> list[Problem]:
    """A `BadConfig` for each argument that is not of the type its name calls for.

    >>> [problem.reason for problem in wrong_arguments(engine=3)]
    ['expected a str, got 3']
    """
    return [problem for name, value in arguments.items() for problem in _wrong(name, value)]


def _wrong(name: str, value: object) -> Iterator[Problem]:
    expected, remedy = _EXPECTED[name]
    if not isinstance(value, expected):
        if isinstance(value, QConfig) and expected is QConfigMapping:
            remedy = "pass QConfigMapping().set_global(qconfig)"
        yield BadConfig(name, f"expected a {expected.__name__}, got {shown(value)}", remedy)
    elif isinstance(value, tuple) and not all(isinstance(row, KernelRow) for row in value):
        yield BadConfig(name, "not every item is a KernelRow", remedy)
    elif isinstance(value, BackendConfig):
        yield from wrong_backend(value)
    elif isinstance(value, CustomConfig):
        yield from _wrong_custom(value)


def _wrong_custom(custom: CustomConfig) -> Iterator[Problem]:
    for field, example in _NAMES.items():
        names = getattr(custom, field)
        if isinstance(names, str) or not _all(names, str):
            yield BadConfig(field, f"expected a tuple of str, got {shown(names)}", f"pass a tuple such as {example!r}")
    types, fixed = custom.non_traceable_types, custom.concrete_args
    if not isinstance(types, tuple) or not _all(types, type):
        remedy = "pass a tuple of module classes, such as (MyAttention,)"
        yield BadConfig("non_traceable_types", f"expected a tuple of classes, got {shown(types)}", remedy)
    for field in ("input_quantized_indexes", "output_quantized_indexes"):
        indexes = getattr(custom, field)
        if not isinstance(indexes, tuple) or any(type(index) is not int for index in indexes):
            yield BadConfig(field, f"expected a tuple of int, got {shown(indexes)}", "pass a tuple such as (0,)")
    if not isinstance(fixed, Mapping) or not _all(fixed, str):
        remedy = "pass a dict from names of forward's inputs to their values"
        yield BadConfig("concrete_args", f"expected a dict, got {shown(fixed)}", remedy)
    if not isinstance(custom.fusions, tuple):
        remedy = "pass a tuple of CustomFusion"
        yield BadConfig("fusions", f"expected a tuple, got {shown(custom.fusions)}", remedy)
    else:
        for fusion in custom.fusions:
            yield from wrong_fusion(fusion)


def _all(items: object, expected: type) -> bool:
    return isinstance(items, (tuple, list, Mapping)) and all(isinstance(item, expected) for item in items)


def shown(value: object) -> str:
    """A value in a message: short ones as they are, others by their type."""
    text = repr(value) if isinstance(value, (str, int, float, type(None), type, list, tuple)) else ""
    return text if 0 < len(text) <= 60 else f"a {type(value).__name__}"
