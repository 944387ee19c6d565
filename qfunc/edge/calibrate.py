"""`calibrate`: run data through a prepared graph and keep the statistics as a value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyrsistent import pmap
from returns.result import Failure, Success
from torch import Tensor, fx

from qfunc.edge.facts import bind_inputs
from qfunc.edge.materialize import materialize
from qfunc.edge.observer import ObserverModule
from qfunc.edge.progress import tracked
from qfunc.errors import BadBatch, NoBatches, NonFinite, Problem, QuantError, WrongStage, several
from qfunc.ir import Graph, TensorFact, digest
from qfunc.numerics.statistic import finite, state_is_finite
from qfunc.passes.stages import Calibrated, Prepared, Statistics
from qfunc.result import R


def calibrate(prepared: Prepared, batches: Iterable[Any], *, progress: bool | None = None) -> R[Calibrated]:
    """The prepared graph together with the statistics of `batches`, a fold over them in order.

    Args:
        prepared: what to observe.
        batches: an iterable of batches, each a tensor, a tuple or list of positional inputs, or a dict of keyword
            inputs. It is read once.
        progress: whether to show a progress bar; by default where standard error is a terminal.

    Returns:
        The calibrated stage, or `NoBatches`, `BadBatch` for one whose structure, shape, dtype or device does not fit,
        `NonFinite` for NaN or infinity in a batch or in a value computed from it, `WrongStage`, or what `materialize`
        reports. Nothing is kept of a run that fails.
    """
    if not isinstance(prepared, Prepared):
        return Failure(WrongStage(type(prepared).__name__, "Prepared"))
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        reason = f"batches is one {type(batches).__name__}, not an iterable of batches"
        return Failure(BadBatch(0, reason, "wrap it in a list: [batch]"))
    made = materialize(prepared)
    if isinstance(made, Failure):
        return made
    module = made.unwrap()
    observers = [child for child in module.modules() if isinstance(child, ObserverModule)]
    count = 0
    for batch in tracked(batches, "calibrating", shown=progress):
        error = _run(prepared.graph, module, observers, batch, count)
        if error is not None:
            return Failure(error)
        count += 1
    if not count:
        return Failure(NoBatches())
    states = {observer.site.key: observer.state for observer in observers}
    return Success(Calibrated(prepared, Statistics(digest(prepared.graph), pmap(states), count)))


def _run(
    graph: Graph, module: fx.GraphModule, observers: list[ObserverModule], batch: Any, index: int
) -> QuantError | None:
    """Run one batch through the observers; what is wrong with it, if anything."""
    inputs = bind_inputs(module.graph, batch)
    if isinstance(inputs, str):
        return BadBatch(index, inputs)
    problems = list(_misfits(graph, inputs, index))
    if problems:
        return several(problems)
    try:
        with torch.no_grad():
            module(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return BadBatch(index, f"the model fails on it: {reason}")
    hint = "mend the batch or the model, or keep the value float with set_module_name(..., None)"
    seen = [
        NonFinite(observer.site.id, f"NaN or infinity was observed in batch {index}", hint)
        for observer in observers
        if not state_is_finite(observer.state)
    ]
    return several(seen) if seen else None


def _misfits(graph: Graph, inputs: tuple[Any, ...], index: int) -> Iterable[Problem]:
    """Inputs that are not like the example's in kind, rank, dtype or device, and those that are not finite."""
    placeholders = [node for node in graph if node.kind == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        fact = node.fact
        if not isinstance(value, Tensor):
            if isinstance(fact, TensorFact):
                yield BadBatch(index, f"input {node.id!r} is {type(value).__name__}, not a tensor")
            continue
        if isinstance(fact, TensorFact):
            seen = TensorFact(tuple(value.shape), str(value.dtype).removeprefix("torch."), str(value.device))
            if len(seen.shape) != len(fact.shape) or (seen.dtype, seen.device) != (fact.dtype, fact.device):
                told = f"{seen!r} on {seen.device}, the example was {fact!r} on {fact.device}"
                yield BadBatch(index, f"input {node.id!r} is {told}")
        if value.is_floating_point() and not finite(value):
            yield NonFinite(
                f"batch {index}", f"input {node.id!r} holds NaN or infinity", "clean the batch or leave it out"
            )
