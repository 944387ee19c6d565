"""What qfunc is tested with, for users' own tests too: laws, random models, metrics, and the torch.ao oracle.

The strategies need hypothesis; it is imported when one of them is first asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from qfunc.testing.laws import LAWS, OBSERVER_LAWS, TOTAL, Law, Violation, check_law, check_laws
from qfunc.testing.metrics import max_abs_error, relative_error, same_bits, sqnr
from qfunc.testing.numeric_laws import Measurement
from qfunc.testing.operations import FAMILIES
from qfunc.testing.program import Input, ModelCase, Program, build
from qfunc.testing.training_laws import TRAINING_IS_TOTAL, TRAINING_LAWS, check_training_laws
from qfunc.testing.training_walk import TrainingCase, TrainingWalk, trained_walk
from qfunc.testing.walk import Case, Walk, walk
from qfunc.testing.write import write_program

if TYPE_CHECKING:
    from qfunc.testing.strategies import cases, configurations, models, programs, qconfigs
    from qfunc.testing.training_strategies import training_cases

__all__ = [
    "FAMILIES",
    "LAWS",
    "OBSERVER_LAWS",
    "TOTAL",
    "TRAINING_IS_TOTAL",
    "TRAINING_LAWS",
    "Case",
    "Input",
    "Law",
    "Measurement",
    "ModelCase",
    "Program",
    "TrainingCase",
    "TrainingWalk",
    "Violation",
    "Walk",
    "build",
    "cases",
    "check_law",
    "check_laws",
    "check_training_laws",
    "configurations",
    "max_abs_error",
    "models",
    "programs",
    "qconfigs",
    "relative_error",
    "same_bits",
    "sqnr",
    "trained_walk",
    "training_cases",
    "walk",
    "write_program",
]

_STRATEGIES = {
    **dict.fromkeys(("cases", "configurations", "models", "programs", "qconfigs"), "strategies"),
    "training_cases": "training_strategies",
}


def __getattr__(name: str) -> object:
    if name in _STRATEGIES:
        return getattr(import_module(f"qfunc.testing.{_STRATEGIES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
