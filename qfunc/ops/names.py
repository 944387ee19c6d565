"""Canonical names of torch objects, and the objects of canonical names."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from qfunc.ops.kind import Form, Kind
from qfunc.ops.table import KINDS


def resolve(name: str) -> Any:
    """The object of a dotted name; an `AttributeError` or `ImportError` when there is none.

    >>> resolve("torch.nn.functional.relu") is torch.nn.functional.relu
    True
    """
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:split]))
        except ModuleNotFoundError:
            continue
        for part in parts[split:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def _index() -> Mapping[tuple[str, str], tuple[Kind, Form]]:
    return MappingProxyType({(form.op, form.target): (row, form) for row in KINDS for form in row.forms})


FORMS: Mapping[tuple[str, str], tuple[Kind, Form]] = _index()
"""(fx op, canonical target) -> the kind and the form written so."""

BY_NAME: Mapping[str, Kind] = MappingProxyType({row.name: row for row in KINDS})
"""Name of a kind -> its row."""

_NAMED = MappingProxyType(
    {id(resolve(form.target)): form.target for (op, _), (_, form) in FORMS.items() if op != "call_method"}
)


def name_of(target: Any) -> str | None:
    """The canonical name of a function, class, dtype or other torch object; `None` for what no import would find again.

    >>> name_of(torch.nn.ReLU), name_of(torch.sin), name_of(torch.float16), name_of(lambda: 0)
    ('torch.nn.ReLU', 'torch.sin', 'torch.float16', None)
    """
    if (known := _NAMED.get(id(target))) is not None:
        return known
    if isinstance(target, (torch.dtype, torch.memory_format, torch.layout)):
        return str(target)
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{target}"
    place = (getattr(target, "__module__", None) or "torch").replace("_operator", "operator")
    qualified = getattr(target, "__qualname__", None) or getattr(target, "__name__", None)
    if qualified is None or "<" in qualified or place == "__main__":
        return None
    own = qualified.removeprefix("_VariableFunctionsClass.")  # where torch keeps its functions written in C++
    for candidate in (f"torch.nn.{own}", f"{place}.{own}", f"torch.{own}"):
        try:
            if resolve(candidate) is target:
                return candidate
        except (AttributeError, ImportError):
            continue
    return None


def type_name(cls: type) -> str:
    """The canonical name of a module's type, also where no import finds it (a class made inside a function).

    >>> type_name(torch.nn.Conv2d)
    'torch.nn.Conv2d'
    """
    return name_of(cls) or f"{cls.__module__}.{cls.__qualname__}"
