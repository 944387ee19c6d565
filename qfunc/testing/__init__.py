"""What qfunc is tested with, for users' own tests too: random models, metrics, and the torch.ao oracle.

The strategies need hypothesis; it is imported when one of them is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from qfunc.testing.metrics import max_abs_error, same_bits, sqnr
from qfunc.testing.operations import FAMILIES
from qfunc.testing.program import Input, ModelCase, Program, build
from qfunc.testing.write import write_program

if TYPE_CHECKING:
    from qfunc.testing.strategies import models, programs

__all__ = [
    "FAMILIES",
    "Input",
    "ModelCase",
    "Program",
    "build",
    "max_abs_error",
    "models",
    "programs",
    "same_bits",
    "sqnr",
    "write_program",
]


def __getattr__(name: str) -> object:
    if name in {"models", "programs"}:
        return getattr(import_module("qfunc.testing.strategies"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
