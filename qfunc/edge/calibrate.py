"""`calibrate`: run data through a prepared graph and keep the statistics as a value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from pyrsistent import pmap
from returns.result import Failure, Success
from torch import Tensor, fx

from qfunc.config.weights import weights_of
from qfunc.edge.batches import length, not_batches, read
from qfunc.edge.custom_modules import calibrated_modules
from qfunc.edge.evaluate import unquantizable
from qfunc.edge.facts import bind_inputs
from qfunc.edge.materialize import materialize
from qfunc.edge.observer import ObserverError, ObserverModule
from qfunc.edge.progress import tracked
from qfunc.errors import BadBatch, NoBatches, NonFinite, Problem, QuantError, WrongStage, several, told
from qfunc.ir import Graph, Node, TensorFact, digest
from qfunc.numerics.statistic import finite, state_is_finite
from qfunc.params import loads
from qfunc.passes.stages import Calibrated, Prepared, Statistics
from qfunc.result import R


def calibrate(prepared: Prepared, batches: Iterable[Any], *, progress: bool | None = None) -> R[Calibrated]:
    """The prepared graph together with the statistics of `batches`, a fold over them in order.

    Args:
        prepared: what to observe.
        batches: an iterable of batches, each a tensor, a tuple or list of positional inputs, or a dict of keyword
            inputs. It is read once. There may be none where nothing is measured.
        progress: whether to show a progress bar; by default where standard error is a terminal.

    Returns:
        The calibrated stage, or `NoBatches`, `BadConfig` for what is no iterable of batches, `BadBatch` for a batch
        whose structure, shape, dtype or device does not fit, `NonFinite` for NaN or infinity in a weight to quantize,
        in a batch or in a value computed from it, `UserFunctionFailed` for an iterable or observer that raises,
        `UnsupportedDType` for an observed value that is no floating-point tensor, `WrongStage`, or what `materialize`
        reports. Nothing is kept of a run that fails.

    >>> from torch import nn
    >>> from qfunc import prepare, trace
    >>> prepared = trace(nn.Sequential(nn.Linear(2, 2)).eval()).bind(prepare).unwrap()
    >>> calibrate(prepared, [torch.ones(1, 2), torch.zeros(1, 2)]).unwrap().statistics.batches
    2
    """
    if not isinstance(prepared, Prepared):
        return Failure(WrongStage(type(prepared).__name__, "Prepared"))
    problems = not_batches(batches)
    if problems:
        return Failure(several(problems))
    return calibrate_on(prepared, read(batches), total=length(batches), progress=progress)


def calibrate_on(
    prepared: Prepared, batches: Iterator[R[Any]], *, total: int | None, progress: bool | None
) -> R[Calibrated]:
    """`calibrate` on batches that are read already, or could not be."""
    problems = list(_nonfinite_weights(prepared))
    if problems:
        return Failure(several(problems))
    made = materialize(prepared)
    if isinstance(made, Failure):
        return made
    module = made.unwrap()
    observers = [child for child in module.modules() if isinstance(child, ObserverModule)]
    count = 0
    with closing(tracked(batches, "calibrating", shown=progress, total=total)) as shown:
        for batch in shown:
            if isinstance(batch, Failure):
                return batch
            error = _run(prepared.graph, module, observers, batch.unwrap(), count)
            if error is not None:
                return Failure(error)
            count += 1
    if not count and (prepared.measured or prepared.swapped):
        return Failure(NoBatches())
    states = {key: observer.state for observer in observers if (key := observer.site.key) is not None}
    statistics = Statistics(digest(prepared.graph), pmap(states), count)
    return Success(Calibrated(prepared, statistics, calibrated_modules(prepared, module)))


def _nonfinite_weights(prepared: Prepared) -> Iterator[Problem]:
    """Weights that are to be quantized and cannot be; told here, before any data runs."""
    graph = prepared.graph
    for id in (id for id in graph.order if id in prepared.weights):
        for weight in weights_of(graph, graph[id]).values():
            for load in loads(weight):
                tensor, _ = graph.sources[load.source].tensors[load.name]
                yield from unquantizable(tensor, load.name, graph[id].place)


def _run(
    graph: Graph, module: fx.GraphModule, observers: list[ObserverModule], batch: Any, index: int
) -> QuantError | None:
    """Run one batch through the observers; what is wrong with it, if anything."""
    inputs = bind_inputs(module.graph, batch)
    if isinstance(inputs, str):
        return BadBatch(index, inputs, BINDING)
    problems = list(_misfits(graph, inputs, index))
    if problems:
        return several(problems)
    try:
        with torch.no_grad():
            module(*_kept(graph, inputs))
    except ObserverError as error:
        problem = error.problem
        return replace(problem, node=graph[problem.node].place) if problem.node in graph.nodes else problem
    except Exception as error:
        # Operators and the user's modules raise anything on inputs that do not fit; our own mathematics must not.
        if _raised_in(error).startswith("qfunc.numerics"):
            raise
        return BadBatch(index, f"the model fails on it: {told(error)}")
    remedy = "mend the batch or the model, or keep what uses the value float: set_module_name(name, None)"
    seen = [
        NonFinite(graph[id].place, f"NaN or infinity was computed from batch {index}", remedy)
        for id in _nonfinite_values(graph, observers)
    ]
    return several(seen) if seen else None


def _raised_in(error: Exception) -> str:
    """The module whose Python code an exception came out of."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else str(frame.tb_frame.f_globals.get("__name__", ""))


def _kept(graph: Graph, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs, copied where the model writes in place to memory that may be theirs: batches stay as they are."""
    if not any(node.aliased for node in graph):
        return inputs
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


BINDING = (
    "pass a tensor, a tuple of inputs or a dict of keyword inputs for each batch; of batches (inputs, labels), pass "
    "the inputs only: [inputs for inputs, _ in loader]"
)


def _nonfinite_values(graph: Graph, observers: list[ObserverModule]) -> list[str]:
    """The first taps of the observers that saw NaN or infinity, in graph order."""
    found = {observer.site.taps[0] for observer in observers if not state_is_finite(observer.state)}
    return [id for id in graph.order if id in found] if found else []


def _misfits(graph: Graph, inputs: tuple[Any, ...], index: int) -> Iterator[Problem]:
    """Inputs that are not like the example's in kind, rank, dtype or device, and those that are not finite."""
    placeholders = [node for node in graph if node.kind == "placeholder"]
    for node, value in zip(placeholders, inputs, strict=True):
        differs = _differs(node, value)
        if differs:
            remedy = "convert it with torch.from_numpy" if hasattr(value, "__array_interface__") else ""
            yield BadBatch(index, f"{node.place} is {differs}", *([remedy] if remedy else ()))
        elif isinstance(value, Tensor) and value.layout == torch.strided and not finite(value):
            yield NonFinite(f"batch {index}", f"{node.place} holds NaN or infinity", "clean the batch or leave it out")


def _differs(node: Node, value: Any) -> str:
    """How an input differs from the example's; empty where it does not, or where there was none."""
    fact = node.fact
    if not isinstance(value, Tensor):
        wanted = isinstance(fact, TensorFact) or hasattr(value, "__array_interface__")
        return f"of type {type(value).__name__}, not a tensor" if wanted else ""
    if value.is_meta:
        return "a tensor without data (device meta)"
    if not isinstance(fact, TensorFact):
        return ""
    dtype, device = str(value.dtype).removeprefix("torch."), str(value.device)
    if dtype != fact.dtype:
        return f"{dtype}, the example was {fact.dtype}"
    if device != fact.device:
        return f"on {device}, the example was on {fact.device}"
    if value.dim() != len(fact.shape):
        return f"of shape {tuple(value.shape)}, the example was of shape {tuple(fact.shape)}"
    return ""
