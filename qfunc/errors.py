"""The closed union of everything a qfunc function can report instead of a value.

Each case is a frozen dataclass that names the `node` (or place) it is about and gives, in plain words, the `reason`
and the `remedy`. `Several` carries all that was found at once; `several` builds it and `render` prints any of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from os.path import basename
from typing import Any, TypeAlias


@dataclass(frozen=True, slots=True)
class NotAModule:
    """Something else than an `nn.Module` was given where a model is needed."""

    given: str
    node: str = "model"

    @property
    def reason(self) -> str:
        return f"expected a torch.nn.Module, got {self.given}"

    @property
    def remedy(self) -> str:
        return "pass the model itself: an nn.Module or a torch.fx.GraphModule"


@dataclass(frozen=True, slots=True)
class InTrainingMode:
    """A model in training mode was given to an evaluation-mode transform."""

    node: str

    @property
    def reason(self) -> str:
        return (
            "it is in training mode, where batch norm follows the batch and dropout drops: neither can be folded away"
        )

    @property
    def remedy(self) -> str:
        return "call model.eval() first, and trace the model again"


@dataclass(frozen=True, slots=True)
class Untraceable:
    """The model's forward cannot be traced symbolically; `node` is the place in the user's code."""

    node: str
    source: str
    cause: str
    remedy: str

    @property
    def reason(self) -> str:
        return f"{self.cause}: {self.source}" if self.source else self.cause


@dataclass(frozen=True, slots=True)
class BadExampleInputs:
    """The model does not run on the given `example_inputs`."""

    node: str
    reason: str
    remedy: str = "pass a tensor, a tuple of inputs or a dict of keyword inputs, on which the model itself runs"


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
class UnknownName:
    """A configuration names a module, engine, dtype or scheme that does not exist."""

    node: str
    what: str
    known: tuple[str, ...]

    @property
    def reason(self) -> str:
        return f"there is no {self.what} {self.node!r}"

    @property
    def remedy(self) -> str:
        close = get_close_matches(self.node, [name for name in self.known if name], n=3, cutoff=0.6)
        return f"did you mean {' or '.join(map(repr, close))}?" if close else self.choice

    @property
    def choice(self) -> str:
        """The remedy without a guess at what was meant."""
        known = [name for name in self.known if name]
        if not known:
            return "remove it: there is none at all"
        more = f" and {len(known) - 8} more" if len(known) > 8 else ""
        return f"there are {', '.join(map(repr, known[:8]))}{more}"


@dataclass(frozen=True, slots=True)
class BadConfig:
    """An argument or a part of a configuration that cannot be meant: of a wrong type, or with an impossible value."""

    node: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class UnsupportedDType:
    """The backend cannot run this node with the configured dtypes, or a value is of a dtype that is not quantized."""

    node: str
    reason: str
    remedy: str = "configure a dtype that the backend runs, use another backend, or keep the module float"


@dataclass(frozen=True, slots=True)
class SeveralDevices:
    """A model's tensors live on more than one device."""

    devices: tuple[str, ...]
    node: str = "model"
    remedy: str = "move the whole model to one device first: model.to('cpu')"

    @property
    def reason(self) -> str:
        return f"its parameters and buffers are on several devices: {', '.join(self.devices)}"


@dataclass(frozen=True, slots=True)
class WrongStage:
    """A function was given a stage of another kind than it takes."""

    given: str
    expected: str
    node: str = "stage"

    @property
    def reason(self) -> str:
        return f"expected {self.expected}, got {self.given}"

    @property
    def remedy(self) -> str:
        if self.expected == "Statistics":
            return "pass calibrated.statistics, or what load(path) gives, unwrapped"
        if self.given in ("Success", "Failure"):
            return "take the stage out of the result with unwrap(result), or chain with result.bind(function)"
        return "follow trace -> fuse -> prepare -> calibrate -> convert -> lower; materialize takes any stage of them"


@dataclass(frozen=True, slots=True)
class EngineMissing:
    """This machine cannot run the engine asked for."""

    node: str
    available: tuple[str, ...]

    @property
    def reason(self) -> str:
        return f"the host report has no {self.node!r} engine: this machine's torch cannot run its kernels"

    @property
    def remedy(self) -> str:
        return f"use {' or '.join(f'engine={name!r}' for name in self.available)}"


@dataclass(frozen=True, slots=True)
class NotLowered:
    """Under `strict`, a node that was meant to be int8 stays float, or its kernel fails its contract."""

    node: str
    reason: str
    remedy: str = "lower with strict=False, or keep the module float in the configuration: set_module_name(name, None)"


@dataclass(frozen=True, slots=True)
class StaleSource:
    """A source tensor changed after the graph was traced."""

    node: str

    @property
    def reason(self) -> str:
        return "this tensor of the model was changed or replaced after the model was traced"

    @property
    def remedy(self) -> str:
        return "trace the model again"


@dataclass(frozen=True, slots=True)
class InvalidGraph:
    """A graph breaks an invariant: an undefined or duplicate value, a use before its definition."""

    node: str
    reason: str
    remedy: str = "build graphs with trace and qfunc.ir.edit, which keep the invariants"


@dataclass(frozen=True, slots=True)
class CannotFuse:
    """Modules that were listed to be fused cannot be; `node` is their names, joined by " + "."""

    node: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class UserFunctionFailed:
    """Code handed over by the user raised: an iterable of batches, an observer, a module; `reason` is its exception."""

    node: str
    reason: str
    remedy: str = "mend the code at that place: it is called by qfunc, but is none of its own"


@dataclass(frozen=True, slots=True)
class Several:
    """Two or more errors found by one call, in graph order."""

    errors: tuple[Problem, ...]
    node: str = ""

    @property
    def reason(self) -> str:
        return f"{len(self.errors)} errors: " + "; ".join(f"{e.node}: {e.reason}" for e in self.errors)

    @property
    def remedy(self) -> str:
        return "; ".join(dict.fromkeys(_remedies(self.errors)))


Problem: TypeAlias = (
    NotAModule | InTrainingMode | Untraceable | BadExampleInputs | NoBatches | BadBatch | Interrupted | ConstantValue
    | BadFile | MoreWarnings | WorkerLost | NonFinite | Unobserved | UnknownName | BadConfig | UnsupportedDType
    | SeveralDevices | WrongStage | EngineMissing | NotLowered | StaleSource | InvalidGraph | CannotFuse
    | UserFunctionFailed
)  # fmt: skip
"""One thing that is wrong."""

QuantError: TypeAlias = Problem | Several
"""What a `Failure` of qfunc carries."""


def problems(error: QuantError) -> tuple[Problem, ...]:
    """The single problems of an error, in order.

    >>> len(problems(NoBatches()))
    1
    """
    return error.errors if isinstance(error, Several) else (error,)


def kept(error: QuantError) -> Any:
    """The `Statistics` that an error of calibration keeps: what was measured before it; None where nothing was.

    >>> kept(NoBatches()) is None
    True
    """
    return next((problem.statistics for problem in problems(error) if isinstance(problem, Interrupted)), None)


def several(errors: Iterable[QuantError]) -> QuantError:
    """Join errors into one, without repetition; at least one must be given.

    >>> several([NoBatches(), NoBatches()]) == NoBatches()
    True
    """
    flat = tuple(dict.fromkeys(p for error in errors for p in problems(error)))
    assert flat, "no error to report"
    return flat[0] if len(flat) == 1 else Several(flat)


def render(error: QuantError) -> str:
    """An error as people read it: what, where, why, and what to do about it; alike problems are told together.

    >>> print(render(InTrainingMode("model")))
    InTrainingMode at model
      why: it is in training mode, where batch norm follows the batch and dropout drops: neither can be folded away
      fix: call model.eval() first, and trace the model again
    """
    places: dict[tuple[str, str, str], list[str]] = {}
    found = problems(error)
    for p, remedy in zip(found, _remedies(found), strict=True):
        places.setdefault((type(p).__name__, p.reason, remedy), []).append(p.node)
    return "\n".join(
        f"{name} at {_listed(nodes)}\n  why: {reason}\n  fix: {remedy}"
        for (name, reason, remedy), nodes in places.items()
    )


MOST_GUESSES = 20
"""To guess which name was meant is slow: of many unknown names it is done for the first."""


def _remedies(found: Iterable[Problem]) -> Iterator[str]:
    unknown = 0
    for p in found:
        unknown += isinstance(p, UnknownName)
        yield p.choice if isinstance(p, UnknownName) and unknown > MOST_GUESSES else p.remedy


def _listed(nodes: list[str]) -> str:
    more = f" and {len(nodes) - 6} more" if len(nodes) > 6 else ""
    return ", ".join(nodes[:6]) + more


def told(error: BaseException) -> str:
    """An exception of the user's code in one line, with the user's innermost line that was running, if any.

    >>> told(KeyError("label"))
    "KeyError: 'label'"
    """
    lines = str(error).strip().splitlines()
    message = lines[0].removesuffix(", but expected one of:").removesuffix(":") if lines else ""
    return type(error).__name__ + (f": {message}" if message else "") + _place(error)


def _place(error: BaseException) -> str:
    place, trace = "", error.__traceback__
    while trace is not None:
        code, package = trace.tb_frame.f_code, str(trace.tb_frame.f_globals.get("__name__")).split(".")[0]
        if package not in ("torch", "qfunc") and not code.co_filename.startswith("<"):
            place = f" ({basename(code.co_filename)}:{trace.tb_lineno}, in {code.co_name})"
        trace = trace.tb_next
    return place
