"""Errors of models, graphs, configurations and machines."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches


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
        return (
            "call model.eval() first, and trace the model again; or fuse(graph, qat=True), to train with quantization"
        )


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
        if "prepare_qat" in self.expected:
            return "pass what prepare_qat gave; what absorb gives is for convert, or for materialize to go on training"
        return "follow trace -> fuse -> prepare -> calibrate -> convert -> lower; materialize takes any stage of them"


@dataclass(frozen=True, slots=True)
class EngineMissing:
    """This machine cannot run the engine asked for."""

    node: str
    available: tuple[str, ...]

    @property
    def reason(self) -> str:
        return f"there is no {self.node!r} engine on this machine: its torch cannot run the operators"

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
