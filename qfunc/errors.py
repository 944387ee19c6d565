"""The closed union of everything a qfunc function can report instead of a value.

Each case is a frozen dataclass that names the `node` (or place) it is about and gives, in plain words, the `reason`
and the `remedy`. `Several` carries all that was found at once; `several` builds it and `render` prints any of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeAlias


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
        return "the module is in training mode: its batch statistics and dropout cannot be folded away"

    @property
    def remedy(self) -> str:
        return "call model.eval() before tracing, or use prepare_qat to train with fake quantization"


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

    @property
    def remedy(self) -> str:
        return "pass a tuple (or a dict of keyword inputs) that the model accepts as model(*example_inputs)"


@dataclass(frozen=True, slots=True)
class NoBatches:
    """Calibration was given nothing to run on."""

    node: str = "batches"
    reason: str = "the iterable of batches is empty"
    remedy: str = "pass at least one batch; a generator can be used once only"


@dataclass(frozen=True, slots=True)
class BadBatch:
    """A batch does not fit the model's inputs."""

    index: int
    reason: str
    remedy: str = "pass batches like the example inputs: a tensor, a tuple of inputs, or a dict of keyword inputs"

    @property
    def node(self) -> str:
        return f"batch {self.index}"


@dataclass(frozen=True, slots=True)
class NonFinite:
    """NaN or infinity where quantization needs finite numbers: in a batch, a value or a weight."""

    node: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Unobserved:
    """An edge is to be quantized, but no data reached its observer."""

    node: str

    @property
    def reason(self) -> str:
        return "no data reached the observer of this value"

    @property
    def remedy(self) -> str:
        return "calibrate with batches that reach this value, or keep it float with set_module_name(..., None)"


@dataclass(frozen=True, slots=True)
class UnknownName:
    """A configuration names a module, type, engine or dtype that does not exist."""

    node: str
    what: str
    known: tuple[str, ...]

    @property
    def reason(self) -> str:
        return f"there is no {self.what} {self.node!r}"

    @property
    def remedy(self) -> str:
        close = get_close_matches(self.node, self.known, n=3, cutoff=0.4) or self.known[:5]
        return f"use one of the existing names, for example {', '.join(map(repr, close))}" if close else "remove it"


@dataclass(frozen=True, slots=True)
class BadConfig:
    """A configuration value that cannot be meant: an impossible range, dtype or combination."""

    node: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class UnsupportedDType:
    """The backend cannot run this node with the configured dtypes."""

    node: str
    reason: str
    remedy: str = "choose a dtype that the backend lists for this operator, or another backend"


@dataclass(frozen=True, slots=True)
class SeveralDevices:
    """A model's tensors live on more than one device."""

    devices: tuple[str, ...]
    node: str = "model"
    remedy: str = "move the whole model to one device: model.to('cpu')"

    @property
    def reason(self) -> str:
        return f"its parameters and buffers are on {', '.join(self.devices)}"


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
        return "follow trace -> fuse -> prepare -> calibrate -> convert -> lower -> materialize"


@dataclass(frozen=True, slots=True)
class EngineMissing:
    """This machine cannot run the engine asked for."""

    node: str
    available: tuple[str, ...]

    @property
    def reason(self) -> str:
        return f"this machine's torch has no {self.node!r} engine"

    @property
    def remedy(self) -> str:
        return f"use engine={' or engine='.join(map(repr, self.available))}" if self.available else "use another torch"


@dataclass(frozen=True, slots=True)
class NotLowered:
    """Under `strict`, a node that was meant to be int8 stays float, or its kernel fails its contract."""

    node: str
    reason: str
    remedy: str = "lower with strict=False, exclude the node in the configuration, or pass a kernel row for it"


@dataclass(frozen=True, slots=True)
class StaleSource:
    """A source tensor changed after the graph was traced."""

    node: str

    @property
    def reason(self) -> str:
        return "this tensor of the source model was modified or replaced after tracing"

    @property
    def remedy(self) -> str:
        return "trace the model again, and change its weights before tracing only"


@dataclass(frozen=True, slots=True)
class InvalidGraph:
    """A graph breaks an invariant: an undefined or duplicate value, a use before its definition."""

    node: str
    reason: str
    remedy: str = "build graphs with trace and qfunc.ir.edit, which keep the invariants"


@dataclass(frozen=True, slots=True)
class UserFunctionFailed:
    """A function handed over by the user raised; `reason` is its exception."""

    node: str
    reason: str
    remedy: str = "mend the function; its traceback is chained to nothing of qfunc"


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
        return "; ".join(dict.fromkeys(e.remedy for e in self.errors))


Problem: TypeAlias = (
    NotAModule
    | InTrainingMode
    | Untraceable
    | BadExampleInputs
    | NoBatches
    | BadBatch
    | NonFinite
    | Unobserved
    | UnknownName
    | BadConfig
    | UnsupportedDType
    | SeveralDevices
    | WrongStage
    | EngineMissing
    | NotLowered
    | StaleSource
    | InvalidGraph
    | UserFunctionFailed
)
"""One thing that is wrong."""

QuantError: TypeAlias = Problem | Several
"""What a `Failure` of qfunc carries."""


def problems(error: QuantError) -> tuple[Problem, ...]:
    """The single problems of an error, in order.

    >>> len(problems(NoBatches()))
    1
    """
    return error.errors if isinstance(error, Several) else (error,)


def several(errors: Iterable[QuantError]) -> QuantError:
    """Join errors into one, without repetition; at least one must be given.

    >>> several([NoBatches(), NoBatches()]) == NoBatches()
    True
    """
    flat = tuple(dict.fromkeys(p for error in errors for p in problems(error)))
    assert flat, "no error to report"
    return flat[0] if len(flat) == 1 else Several(flat)


def render(error: QuantError) -> str:
    """An error as people read it: what, where, why, and what to do about it.

    >>> print(render(InTrainingMode("model")))
    InTrainingMode at model
      why: the module is in training mode: its batch statistics and dropout cannot be folded away
      fix: call model.eval() before tracing, or use prepare_qat to train with fake quantization
    """
    return "\n".join(f"{type(p).__name__} at {p.node}\n  why: {p.reason}\n  fix: {p.remedy}" for p in problems(error))
