"""torch's registration of the `quantized_decomposed` operators: whether there is one, and loading it.

The operators are a Python library that `import torch` does not register; only a module inside torch.ao does. This is
the one place that loads it, when a graph that calls the operators is materialized or its module is unpickled.
"""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import PathFinder
from typing import Any

import torch

from qfunc.engines.decomposed import uses_decomposed
from qfunc.errors import EngineMissing, Problem
from qfunc.ir import Graph

_FOLDER = "ao/quantization/fx"
_MODULE = "_decomposed"


def has_decomposed() -> bool:
    """Whether this torch can register the operators; looks for the file, and loads nothing."""
    folders = [f"{folder}/{_FOLDER}" for folder in torch.__path__]
    return PathFinder.find_spec(_MODULE, folders) is not None


def missing_operators(graph: Graph) -> list[Problem]:
    """What keeps a graph's operators from running: a torch that has no registration. Loads it where there is one."""
    if not uses_decomposed(graph):
        return []
    try:
        register()
    except ImportError:
        return [EngineMissing("decomposed", ("reference",))]
    return []


def register() -> Registered:
    """Have torch register the operators, if it has not; a second time changes nothing.

    Raises:
        ImportError: where this torch has no such module.
    """
    import_module(f"torch.{_FOLDER.replace('/', '.')}.{_MODULE}")
    return REGISTERED


class Registered:
    """What a module that calls the operators carries, so that the process that unpickles it registers them first."""

    def __reduce__(self) -> Any:
        return register, ()

    def __copy__(self) -> Registered:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Registered:
        return self


REGISTERED = Registered()
"""The one there is: it holds nothing."""
