"""The way of a model through training as one value: prepared, trained for a few steps, absorbed, converted, lowered."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from returns.result import Failure
from torch import Tensor, fx, nn

from qfunc.edge.absorb import absorb
from qfunc.edge.trace import trace
from qfunc.errors import QuantError
from qfunc.ir import Graph
from qfunc.passes.convert import convert
from qfunc.passes.prepare_qat import prepare_qat
from qfunc.passes.stages import Calibrated, Converted, Folding, Prepared
from qfunc.quantize import fuse, lower
from qfunc.result import R
from qfunc.testing.walk import Case, made


@dataclass(frozen=True, slots=True, eq=False)
class TrainingCase:
    """A model, how to quantize it and how it is trained: a step on its inputs and on each batch of the case."""

    case: Case
    folding: Folding = "approximate"
    evaluates: bool = False
    """Whether the model is traced in evaluation mode, and told to train when it is materialized."""
    rate: float = 1e-3
    """The learning rate; gradients are clipped."""

    def __repr__(self) -> str:
        return f"TrainingCase({self.case!r}, {self.folding!r}, evaluates={self.evaluates})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002 - the protocol's signature
        printer.text(repr(self))

    def model(self) -> nn.Module:
        """A copy of the model, in the mode in which it is traced."""
        return copy.deepcopy(self.case.model).train(not self.evaluates)

    def inputs(self) -> Iterator[tuple[Any, ...]]:
        """What each step is made on."""
        yield self.case.inputs
        yield from self.case.batches


@dataclass(frozen=True, slots=True, eq=False)
class TrainingWalk:
    """The stages that a case reaches; those behind a failure are missing.

    `stages` maps the names of the steps to what they gave, in order; `module` is what was trained.
    """

    case: TrainingCase
    model: nn.Module
    """The float model that was traced."""
    stages: Mapping[str, Any]
    module: fx.GraphModule | None = None
    failure: QuantError | None = None

    @property
    def fused(self) -> Graph | None:
        """What `fuse` gave."""
        return self.stages.get("fuse")

    @property
    def prepared(self) -> Prepared | None:
        """What `prepare_qat` gave."""
        return self.stages.get("prepare_qat")

    @property
    def absorbed(self) -> Calibrated | None:
        """What `absorb` gave."""
        return self.stages.get("absorb")

    @property
    def converted(self) -> Converted | None:
        """What `convert` gave."""
        return self.stages.get("convert")


Step = tuple[str, Callable[[Any], R[Any]]]


def training_steps(training: TrainingCase) -> tuple[Step, ...]:
    """The functions from a model to the stage that is trained, each of the stage before it."""
    case = training.case

    def prepare(graph: Graph) -> R[Prepared]:
        options: dict[str, Any] = {"backend": case.backend, "custom": case.custom, "folding": training.folding}
        return prepare_qat(graph, case.qconfig_mapping, **options)

    return (
        ("trace", lambda model: trace(model, case.inputs, custom=case.custom)),
        ("fuse", lambda graph: fuse(graph, backend=case.backend, qat=True, custom=case.custom)),
        ("prepare_qat", prepare),
    )


def steps_back(training: TrainingCase, module: nn.Module | Mapping[str, Any]) -> tuple[Step, ...]:
    """The functions from the stage that was trained to the lowered one; `module` has been trained."""
    case = training.case
    return (
        ("absorb", lambda prepared: absorb(prepared, module)),
        ("convert", convert),
        ("lower", lambda converted: lower(converted, engine=case.engine, host=case.host)),
    )


def trained_walk(training: TrainingCase) -> TrainingWalk:
    """Go the whole way, or as far as it leads.

    >>> x = torch.randn(2, 3)
    >>> list(trained_walk(TrainingCase(Case(nn.Linear(3, 3).eval(), (x,), ((x,),)))).stages)
    ['trace', 'fuse', 'prepare_qat', 'absorb', 'convert', 'lower']
    """
    model = training.model()
    stages: dict[str, Any] = {}
    failure = _go(training_steps(training), model, stages)
    if failure is not None:
        return TrainingWalk(training, model, stages, failure=failure)
    module: Any = made(stages["prepare_qat"])
    train(module.train(), training)
    failure = _go(steps_back(training, module), stages["prepare_qat"], stages)
    return TrainingWalk(training, model, stages, module, failure)


def _go(steps: tuple[Step, ...], stage: Any, stages: dict[str, Any]) -> QuantError | None:
    for name, function in steps:
        result = function(stage)
        if isinstance(result, Failure):
            error: QuantError = result.failure()
            return error
        stage = stages[name] = result.unwrap()
    return None


_CLIP = 1.0


def train(module: nn.Module, training: TrainingCase) -> None:
    """A step of gradient descent on each of the inputs, with a loss that pulls all outputs to zero."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learned, training.rate, momentum=0.5) if learned else None
    for index, inputs in enumerate(training.inputs()):
        trained_step(module, inputs, index)
        if optimizer is not None:
            nn.utils.clip_grad_norm_(learned, _CLIP)
            optimizer.step()
            optimizer.zero_grad()


def trained_step(module: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> Any:
    """The outputs of a module, and the way back through it; what drops drops the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = module(*inputs)
    reached = [tensor.square().mean() for tensor in tensors_in(output) if tensor.requires_grad and tensor.numel()]
    if reached:
        torch.stack([each.to(torch.float64).real for each in reached]).sum().backward()  # type: ignore[no-untyped-call]
    return output


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of a nested output."""
    match value:
        case Tensor():
            yield value
        case dict():
            yield from (tensor for part in value.values() for tensor in tensors_in(part))
        case tuple() | list():
            yield from (tensor for part in value for tensor in tensors_in(part))


def trains(training: TrainingCase) -> bool:
    """Whether the float model itself can be trained: some write over what the way back needs, or norm one value."""
    try:
        train(training.model().train(), training)
    except (RuntimeError, ValueError):
        return False
    return True
