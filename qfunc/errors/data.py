"""Errors of data and of what is measured on it, of files, and of code handed over by the user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NoBatches:
    """Calibration was given nothing to run on."""

    node: str = "batches"
    reason: str = "there are none: the iterable is empty"
    remedy: str = "pass at least one batch; a generator gives its batches once only, so make a new one for each call"


@dataclass(frozen=True, slots=True)
class BadBatch:
    """A batch does not fit the model's inputs; batches are counted from 0."""

    index: int
    reason: str
    remedy: str = "pass batches that the model runs on: a tensor, a tuple of inputs or a dict of keyword inputs each"

    @property
    def node(self) -> str:
        return f"batch {self.index}"


@dataclass(frozen=True, slots=True)
class Interrupted:
    """Calibration ended before its batches did: `batches` were read, `statistics` are what was measured until then."""

    batches: int
    statistics: Any
    cause: str
    remedy: str = "go on with the batches that are left and statistics=kept(error)"

    def __hash__(self) -> int:
        return hash((self.batches, self.cause))

    @property
    def node(self) -> str:
        return f"batch {self.batches}"

    @property
    def reason(self) -> str:
        return f"{self.cause}; what was measured until then is kept in this error"


@dataclass(frozen=True, slots=True)
class ConstantValue:
    """Nothing but one number was seen at a value that is to be quantized."""

    node: str
    value: float
    batches: int
    elements: int
    remedy: str = "calibrate with data in which it varies, or leave it so if it is meant to be constant"

    @property
    def reason(self) -> str:
        return f"all it held was {self.value:.6g}, in all {self.batches} batches ({self.elements} elements)"


@dataclass(frozen=True, slots=True)
class BadFile:
    """A file cannot be written, or does not hold what it is read for; `node` is its path."""

    node: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class MoreWarnings:
    """A checkpoint keeps the first warnings of its run; `count` more were given."""

    count: int
    node: str = "checkpoint"
    remedy: str = "mend the data that the first ones name; a run without a checkpoint tells all of them"

    @property
    def reason(self) -> str:
        return f"{self.count} more warnings were given than it keeps"


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A process or machine that calibrated a part of the data ended before it was done; `node` names the part."""

    node: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class NonFinite:
    """NaN or infinity where quantization needs finite numbers: in a batch, a value or a weight."""

    node: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Unobserved:
    """A value is to be quantized, but no data reached its observer."""

    node: str
    reason: str = "no data reached the observer of this value, or empty tensors only"
    remedy: str = "calibrate with batches that hold data, or keep what uses it float: set_module_name(name, None)"


@dataclass(frozen=True, slots=True)
class UserFunctionFailed:
    """Code handed over by the user raised: an iterable of batches, an observer, a module; `reason` is its exception."""

    node: str
    reason: str
    remedy: str = "mend the code at that place: it is called by qfunc, but is none of its own"
