"""The closed union of everything a qfunc function can report instead of a value.

Each case is a frozen dataclass that names the `node` (or place) it is about and gives, in plain words, the `reason`
and the `remedy`. `Several` carries all that was found at once; `several` builds it and `render` prints any of them.
"""

from qfunc.errors.data import (
    BadBatch,
    BadFile,
    ConstantValue,
    Interrupted,
    MoreWarnings,
    NoBatches,
    NonFinite,
    Unobserved,
    UserFunctionFailed,
    WorkerLost,
)
from qfunc.errors.model import (
    BadConfig,
    BadExampleInputs,
    CannotFuse,
    EngineMissing,
    InTrainingMode,
    InvalidGraph,
    NotAModule,
    NotLowered,
    SeveralDevices,
    StaleSource,
    UnknownName,
    UnsupportedDType,
    Untraceable,
    WrongStage,
)
from qfunc.errors.rendering import render, told
from qfunc.errors.union import MOST_GUESSES, Problem, QuantError, Several, kept, problems, several

__all__ = [
    "MOST_GUESSES",
    "BadBatch",
    "BadConfig",
    "BadExampleInputs",
    "BadFile",
    "CannotFuse",
    "ConstantValue",
    "EngineMissing",
    "InTrainingMode",
    "Interrupted",
    "InvalidGraph",
    "MoreWarnings",
    "NoBatches",
    "NonFinite",
    "NotAModule",
    "NotLowered",
    "Problem",
    "QuantError",
    "Several",
    "SeveralDevices",
    "StaleSource",
    "UnknownName",
    "Unobserved",
    "UnsupportedDType",
    "Untraceable",
    "UserFunctionFailed",
    "WorkerLost",
    "WrongStage",
    "kept",
    "problems",
    "render",
    "several",
    "told",
]
