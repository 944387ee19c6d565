"""Whether the arguments of qfunc's functions are of their types, for callers without a type checker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from returns.result import Result

from qfunc.config.backend_config import BackendConfig, wrong_backend
from qfunc.config.custom_config import CustomConfig, CustomModule, Standalone
from qfunc.config.custom_fusion import wrong_fusion
from qfunc.config.host_report import HostReport
from qfunc.config.kernel import KernelRow
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping, kind_shown
from qfunc.errors import BadConfig, Problem

_EXPECTED: Mapping[str, tuple[type, str]] = MappingProxyType(
    {
        "backend": (BackendConfig, "pass qfunc.CPU, qfunc.X86, qfunc.ONEDNN or another BackendConfig"),
        "qconfig_mapping": (QConfigMapping, "pass a QConfigMapping, or None for the backend's own"),
        "custom": (CustomConfig, "pass a CustomConfig, or leave it out"),
        "host": (HostReport, "pass the report of check_host(), or leave it out"),
        "engine": (str, "pass the name of an engine: 'onednn', 'quantized' or 'reference', or 'auto'"),
        "qat": (bool, "pass qat=True to fuse for training, qat=False for evaluation"),
        "kernels": (tuple, "pass a tuple of rows: kernels=(unwrap(own_kernel(...)),)"),
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
        elif isinstance(value, Result):
            remedy = "take it out of the result first: unwrap(result)"
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
    yield from _wrong_tables(custom)


def _wrong_tables(custom: CustomConfig) -> Iterator[Problem]:
    """What is wrong with the standalone modules, the replacements and the custom modules."""
    for field, key, expected in _TABLES:
        table = getattr(custom, field)
        remedy = f"pass a dict from {_PLURAL[key]} to {_CALLED[expected]}"
        if not isinstance(table, Mapping) or not _all(table, key) or not _all(list(table.values()), expected):
            yield BadConfig(field, _no_table(table, expected), remedy)
            continue
        for name, value in table.items():
            if isinstance(value, Standalone):
                yield from _wrong_standalone(f"{field}[{_label(name)!r}]", value)
    modules = custom.custom_modules
    if not isinstance(modules, tuple) or not _all(modules, CustomModule):
        reason = f"expected a tuple of CustomModule, got {shown(modules)}"
        yield BadConfig("custom_modules", reason, "pass a tuple such as (QUANTIZABLE_LSTM,)")
        return
    types = [module.float_type for module in modules]
    for module in modules:
        made = (module.observed, module.quantized)
        if not isinstance(module.float_type, type) or not all(map(callable, made)):
            remedy = "pass CustomModule(MyModule, observed=..., quantized=...), a class and two functions"
            yield BadConfig("custom_modules", f"{shown(module.float_type)} has no class or no functions", remedy)
        elif types.count(module.float_type) > 1:
            name = module.float_type.__name__
            yield BadConfig("custom_modules", f"there are several for {name}", "give one for each type")


_TABLES: tuple[tuple[str, type, Any], ...] = (
    ("standalone_names", str, Standalone),
    ("standalone_types", type, Standalone),
    ("replacements", type, Callable),
)
_PLURAL = MappingProxyType({str: "paths of modules", type: "module classes"})
_CALLED: Mapping[Any, str] = MappingProxyType({Standalone: "Standalone", Callable: "functions"})


def _wrong_standalone(place: str, standalone: Standalone) -> Iterator[Problem]:
    mapping, backend = standalone.qconfig_mapping, standalone.backend
    if mapping is not None and not isinstance(mapping, QConfigMapping):
        reason = f"expected a QConfigMapping, got {shown(mapping)}"
        yield BadConfig(place, reason, "pass a QConfigMapping, or None for the parent's")
    if backend is not None and not isinstance(backend, BackendConfig):
        yield BadConfig(place, f"expected a BackendConfig, got {shown(backend)}", "pass one, or None for the parent's")
    elif backend is not None:
        yield from wrong_backend(backend)


def _no_table(table: object, expected: Any) -> str:
    """What is no dict, or is in a dict that should not be there."""
    values = table.values() if isinstance(table, Mapping) else ()
    odd = next((value for value in values if not isinstance(value, expected)), None)
    return f"expected such a dict, got {shown(table)}" + (f" with {shown(odd)}" if odd is not None else "")


def _label(name: object) -> object:
    return name.__name__ if isinstance(name, type) else name


def _all(items: object, expected: type) -> bool:
    return isinstance(items, (tuple, list, Mapping)) and all(isinstance(item, expected) for item in items)


def shown(value: object) -> str:
    """A value in a message: short ones as they are, others by their type."""
    text = repr(value) if isinstance(value, (str, int, float, type(None), type, list, tuple)) else ""
    return text if 0 < len(text) <= 60 else f"a {kind_shown(value)}"
