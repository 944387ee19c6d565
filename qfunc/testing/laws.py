"""The laws of qfunc as values: what holds for any model, configuration, observer and data, each stated once.

A law is checked on a subject: `LAWS` on the way of a model (`Case`), `OBSERVER_LAWS` on an observer with data. Users
check their own models, backends, kernels and observers with them:

    from qfunc.testing import Case, check_laws

    assert not check_laws(Case(model, inputs, batches, backend=MY_BACKEND))
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from returns.result import Failure

from qfunc.edge.materialize import materialize
from qfunc.edge.observer import ObserverError
from qfunc.engines import ENGINES
from qfunc.errors import render
from qfunc.ir import Graph, digest, verify
from qfunc.passes.convert import convert
from qfunc.passes.moves import moved_on_codes
from qfunc.passes.observe import erase_observers, with_observers
from qfunc.passes.prepare import prepare
from qfunc.quantize import fuse, lower
from qfunc.testing.fuse_laws import fused_is_near, training_is_exact
from qfunc.testing.kernel_law import kernels_off
from qfunc.testing.metrics import same_bits, sqnr
from qfunc.testing.numeric_laws import OBSERVER_LAW_TABLE, Measurement
from qfunc.testing.reordering import reordered
from qfunc.testing.statistics_laws import going_on, interpreted, kept, parts
from qfunc.testing.walk import BrokenError, Case, Walk, fingerprint, graph_of, made, run, steps, walk

Subject = TypeVar("Subject")


@dataclass(frozen=True, slots=True)
class Law(Generic[Subject]):
    """A statement about any subject; `check` says how the law is broken there, or gives an empty text."""

    number: int
    """Its place in the list of laws; a law may be stated in several parts."""
    name: str
    statement: str
    check: Callable[[Subject], str]

    def __repr__(self) -> str:
        return f"Law {self.number} ({self.name})"


@dataclass(frozen=True, slots=True)
class Violation:
    """A law that does not hold, and how."""

    law: Law[Any]
    reason: str

    def __str__(self) -> str:
        return f"{self.law!r} is broken: {self.law.statement}\n  {self.reason}"


def check_law(law: Law[Subject], subject: Subject) -> Violation | None:
    """How a law is broken on a subject: a `Walk` or a `Measurement`; None where it holds."""
    try:
        reason = law.check(subject)
    except BrokenError as broken:
        reason = str(broken)
    return Violation(law, reason) if reason else None


def check_laws(case: Case, laws: Iterable[Law[Walk]] | None = None) -> tuple[Violation, ...]:
    """The laws that do not hold for a case, of `LAWS` by default; its way is walked once.

    >>> import torch
    >>> from torch import nn
    >>> x = torch.randn(2, 3)
    >>> check_laws(Case(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).eval(), (x,), ((x,),)))
    ()
    """
    broken = check_law(TOTAL, case)
    if broken is not None:
        return (broken,)
    way = walk(case)
    found = (check_law(law, way) for law in (LAWS if laws is None else laws))
    return tuple(violation for violation in found if violation is not None)


# 1, 5: what is computed -----------------------------------------------------------------------------------------------


def _traced_is_exact(way: Walk) -> str:
    if way.graph is None:
        return ""
    found = (_differ(run(way.case.model, inputs), way.run("trace", inputs)) for inputs in way.inputs())
    return next(filter(None, found), "")


def _observed_is_exact(way: Walk) -> str:
    for name in ("prepare", "calibrate"):
        for inputs in way.inputs() if name in way.stages else ():
            try:
                observed = way.run(name, inputs)
            except ObserverError:  # channels along an axis whose size changes from one batch to the next
                continue
            reason = _differ(way.run("fuse", inputs), observed)
            if reason:
                return f"after {name}: {reason}"
    return ""


def _differ(a: Any, b: Any) -> str:
    return "" if same_bits(a, b) else f"the outputs differ, at {_sqnr(a, b)}"


def _sqnr(a: Any, b: Any) -> str:
    try:
        return f"{sqnr(a, b):.1f} dB"
    except ValueError as error:
        return str(error)


def _erased_is_bare(way: Walk) -> str:
    if way.prepared is None:
        return ""
    observed = with_observers(way.prepared)
    failed = verify(observed)
    if isinstance(failed, Failure):
        return f"the observed graph is malformed: {render(failed.failure())}"
    erased, bare = erase_observers(observed), way.prepared.graph
    return "" if erased.nodes == bare.nodes and erased.order == bare.order else "erasing the observers leaves a trace"


# 2: inputs are never changed ------------------------------------------------------------------------------------------


def _nothing_changes(way: Walk) -> str:
    case = way.case
    outside = (case.model, case.inputs, case.batches)
    before, output = fingerprint(outside), run(case.model, case.inputs)
    stage: Any = case.model
    for name, function in steps(case):
        held = fingerprint(stage)
        result = function(stage)
        if fingerprint(stage) != held:
            return f"{name} changes the stage it is given"
        if fingerprint(outside) != before:
            return f"{name} changes the model or the data"
        if isinstance(result, Failure):
            break
        stage = result.unwrap()
        held = fingerprint(stage)
        if name == "trace":
            materialize(stage, copy=True)
        run(made(stage), case.inputs)
        if fingerprint(stage) != held or fingerprint(outside) != before:
            return f"materializing what {name} gave, or running it, changes it, the model or the data"
    return "" if same_bits(run(case.model, case.inputs), output) else "the model computes something else now"


# 3, 4, 6, 7, 8: graphs ------------------------------------------------------------------------------------------------


def _well_formed(way: Walk) -> str:
    for name, stage in way.stages.items():
        result = verify(graph_of(stage))
        if isinstance(result, Failure):
            return f"after {name}: {render(result.failure())}"
    return ""


def _idempotent(way: Walk) -> str:
    if way.fused is not None:
        again = fuse(way.fused, backend=way.case.backend)
        if isinstance(again, Failure) or again.unwrap() is not way.fused:
            return "fusing again gives another graph"
        if way.graph is not None and way.fused == way.graph and way.fused.nodes is not way.graph.nodes:
            return "fuse changed nothing, but gave another graph"
    if way.lowered is not None and way.converted is not None:
        second = lower(way.converted, engine=way.case.engine, host=way.case.host)
        if isinstance(second, Failure) or second.unwrap() != way.lowered:
            return "lowering again gives another result"
        if digest(second.unwrap().graph) != digest(way.lowered.graph):
            return "lowering again gives another digest"
        unlowered = lower(way.converted, engine="reference").unwrap()
        if unlowered.graph == way.converted.graph and unlowered.graph is not way.converted.graph:
            return "lower changed nothing, but gave another graph"
    return ""


def _convert_again(way: Walk) -> str:
    if way.calibrated is None or way.converted is None:
        return ""
    held = fingerprint(way.calibrated)
    for _ in range(3):
        again = convert(way.calibrated)
        if isinstance(again, Failure) or again.unwrap() != way.converted:
            return "converting again gives another result"
    return "" if fingerprint(way.calibrated) == held else "converting changes the calibrated stage"


def _order_of_entries(way: Walk) -> str:
    if way.prepared is None or way.graph is None or way.case.qconfig_mapping is None:
        return ""
    mapping = reordered(way.case.qconfig_mapping, way.graph)
    other = prepare(way.prepared.graph, mapping, backend=way.case.backend)
    same = not isinstance(other, Failure) and other.unwrap() == way.prepared
    return "" if same else f"set in another order, the configuration prepares otherwise: {mapping!r}"


def _repeatable(way: Walk) -> str:
    again = walk(way.case)
    if again.failure != way.failure:
        return "the second walk fails otherwise"
    for name, stage in way.stages.items():
        if digest(graph_of(stage)) != digest(graph_of(again.stages[name])):
            return f"{name} gives another digest the second time"
        if (graph_of(stage).history, graph_of(stage).notes) != _told(graph_of(again.stages[name])):
            return f"{name} tells another history the second time"
    return ""


def _told(graph: Graph) -> tuple[Any, Any]:
    return graph.history, graph.notes


# 11: totality ---------------------------------------------------------------------------------------------------------


def _total(case: Case) -> str:
    reached, stage = "", case.model
    try:
        for name, function in steps(case):
            reached = name
            result = function(stage)
            if isinstance(result, Failure):
                render(result.failure())
                return ""
            stage = result.unwrap()
            module = materialize(stage)
            if isinstance(module, Failure):
                render(module.failure())
    except Exception as error:  # noqa: BLE001 - any exception whatever breaks this law
        last = "".join(traceback.format_exception(error)[-8:])
        return f"{reached}, or materializing what it gave, raises {type(error).__name__}: {error}\n{last}"
    return ""


# 12: kernels ----------------------------------------------------------------------------------------------------------


def _kernels_hold(way: Walk) -> str:
    if way.converted is None or way.lowered is None:
        return ""
    return "; ".join(filter(None, kernels_off(way.converted, way.lowered, way.inputs())))


def _moving_is_exact(way: Walk) -> str:
    """The rewriting before kernels are chosen, which `_kernels_hold` takes for granted."""
    if way.converted is None or way.lowered is None:
        return ""
    graph, _ = moved_on_codes(way.converted.graph, ENGINES[way.case.engine])
    if graph is way.converted.graph:
        return ""
    moved = made(graph)
    differing = (_differ(way.run("convert", inputs), run(moved, inputs)) for inputs in way.inputs())
    return next(filter(None, differing), "")


_GOOD = 30.0
_LOSS = 12.0


def _near_the_reference(way: Walk) -> str:
    if way.converted is None or way.lowered is None:
        return ""
    for inputs in way.inputs():
        exact, reference, actual = run(way.case.model, inputs), way.run("convert", inputs), way.run("lower", inputs)
        try:
            expected, found = sqnr(exact, reference), sqnr(exact, actual)
        except ValueError as error:
            return f"the outputs do not compare: {error}"
        if way.case.engine == "reference" and not same_bits(reference, actual):
            return "the reference engine computes something else than the reference form"
        if expected >= _GOOD and (math.isnan(found) or found < _GOOD - _LOSS):
            return f"the reference form is at {expected:.1f} dB of the float model, the lowered one at {found:.1f} dB"
    return ""


TOTAL: Law[Case] = Law(
    11,
    "totality",
    "Every function gives Success or Failure, never an exception, and every failure can be rendered.",
    _total,
)

LAWS: tuple[Law[Walk], ...] = (
    Law(1, "tracing is exact", "materialize(trace(m)) computes what m computes, bit for bit.", _traced_is_exact),
    Law(
        1,
        "fusing keeps the meaning",
        "Fused, each output is within 1e-5 of its largest value, or as near to the model in float64 as four times the"
        " distance of the model itself.",
        fused_is_near,
    ),
    Law(
        1,
        "fusing for training keeps the meaning",
        "Fused for training, a model computes the same bits in evaluation; in training the same outputs and statistics,"
        " and the gradients of the traced model, bit for bit.",
        training_is_exact,
    ),
    Law(2, "purity", "No function changes its input: digests, state, hooks, flags and outputs stay.", _nothing_changes),
    Law(3, "well-formedness", "verify holds after every pass.", _well_formed),
    Law(4, "idempotence", "fuse and lower are idempotent; what changes nothing gives the same object.", _idempotent),
    Law(5, "observers are data", "Erasing the observers undoes prepare.", _erased_is_bare),
    Law(5, "observing is exact", "A prepared model computes what the fused one does, bit for bit.", _observed_is_exact),
    Law(6, "converting again", "convert gives the same result however often it is run on a value.", _convert_again),
    Law(7, "order of entries", "The order of configuration entries does not matter.", _order_of_entries),
    Law(8, "repeatability", "The same model, configuration and host give the same digests.", _repeatable),
    Law(9, "going on", "Calibration that goes on from statistics ends where one run does.", going_on),
    Law(9, "parts", "Statistics of parts of the data, merged in any order, are those of all of it.", parts),
    Law(9, "interpretation", "Run operator by operator, a model gives the same statistics.", interpreted),
    Law(9, "files", "Statistics are the same after they were written and read.", kept),
    Law(12, "moving is exact", "What moves elements computes on codes what it computes on floats.", _moving_is_exact),
    Law(
        12,
        "kernels keep their contracts",
        "Each kernel, fed its reference inputs, is within one quantization step of its reference.",
        _kernels_hold,
    ),
    Law(
        12,
        "the way ends near the reference",
        "Where the reference form is near the float model, so is the lowered form.",
        _near_the_reference,
    ),
)
"""The laws of the way from a model to kernels."""

OBSERVER_LAWS: tuple[Law[Measurement], ...] = tuple(Law(*row) for row in OBSERVER_LAW_TABLE)
"""The laws of observers, on data."""
