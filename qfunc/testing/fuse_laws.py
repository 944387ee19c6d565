"""What fusion must keep: the meaning of a model in evaluation, and all that training it does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from returns.result import Failure
from torch import Tensor, nn

from qfunc.edge.trace import trace
from qfunc.errors import render
from qfunc.quantize import fuse
from qfunc.testing.metrics import relative_error, same_bits
from qfunc.testing.walk import Case, Walk, made, run

_NEAR = 1e-5
_WORSE = 4.0


def fused_is_near(way: Walk) -> str:
    """How a fused model computes something else than the model in evaluation; empty where it does not.

    Folding rounds each weight once more. Where a model cancels what it has summed up, it makes any rounding larger, its
    own as well: there the float64 model tells.
    """
    if way.fused is None:
        return ""
    for inputs in way.inputs():
        plain, fused = run(way.case.model, inputs), way.run("fuse", inputs)
        error = relative_error(plain, fused)
        if error <= _NEAR:
            continue
        exact = run(_doubled(way.case.model), tuple(_doubled(inputs)))
        own, folded = relative_error(exact, plain), relative_error(exact, fused)
        if folded > max(_NEAR, _WORSE * own):
            return f"off by {error:.1e}; of float64 the fused model is off by {folded:.1e}, the model by {own:.1e}"
    return ""


def _doubled(value: Any) -> Any:
    """A model or inputs in float64."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _doubled(part) for key, part in value.items()}
    return type(value)(map(_doubled, value)) if type(value) in (tuple, list) else value


def training_is_exact(way: Walk) -> str:
    """How a model fused for training evaluates or trains otherwise; empty where it does not."""
    if way.graph is None:
        return ""
    case = way.case
    fused = fuse(way.graph, backend=case.backend, qat=True)
    if isinstance(fused, Failure):
        return f"a model in evaluation mode is not fused for training: {render(fused.failure())}"
    if fuse(fused.unwrap(), backend=case.backend, qat=True).value_or(None) is not fused.unwrap():
        return "fusing for training again gives another graph"
    if not same_bits(run(case.model, case.inputs), run(made(fused.unwrap()), case.inputs)):
        return "fused for training, it evaluates otherwise"
    return _trained_otherwise(case)


def _trained_otherwise(case: Case) -> str:
    model = copy.deepcopy(case.model).train()
    graph = trace(model, case.inputs)
    if isinstance(graph, Failure):
        return ""  # it does not run in training mode: a batch norm of one value, say
    fused = fuse(graph.unwrap(), backend=case.backend, qat=True)
    if isinstance(fused, Failure):
        return f"a model in training mode is not fused for training: {render(fused.failure())}"
    traced, module = made(graph.unwrap()), made(fused.unwrap())
    try:
        expected = _trained(model, case.inputs)
    except RuntimeError:
        return ""  # it overwrites what the way back needs
    actual = _trained(module, case.inputs)
    if not same_bits(expected, actual):
        return "fused for training, it computes something else in training"
    state = module.state_dict()
    changed = [n for n, t in model.state_dict().items() if n in state and not same_bits(t, state[n])]
    if changed:
        return f"fused for training, it updates otherwise: {', '.join(changed)}"
    # Of an in-place operator torch takes the derivative by its result, of the out-of-place twin by its input.
    _trained(traced, case.inputs)
    gradients = dict(_gradients(module))
    wrong = [name for name, gradient in _gradients(traced) if not same_bits(gradient, gradients.get(name))]
    return f"fused for training, it has other gradients: {', '.join(wrong)}" if wrong else ""


def _trained(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a module computes in training, after a step back through it; dropout drops the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        output = module(*inputs)
    reached = [tensor.sum() for tensor in _tensors(output) if tensor.requires_grad]
    if reached:
        torch.stack(reached).sum().backward()  # type: ignore[no-untyped-call]
    return output


def _tensors(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case dict():
            yield from (tensor for part in value.values() for tensor in _tensors(part))
        case tuple() | list():
            yield from (tensor for part in value for tensor in _tensors(part))


def _gradients(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    return ((name, parameter.grad) for name, parameter in module.named_parameters() if parameter.grad is not None)
