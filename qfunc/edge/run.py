"""A run of calibration: data through a materialized module, batch by batch, and what its observers have found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from returns.result import Failure
from torch import Tensor, fx

from qfunc.edge.content import batch_digest
from qfunc.edge.facts import bind_inputs, may_write, own_inputs
from qfunc.edge.interpret import NodeError, interpreter
from qfunc.edge.observer import ObserverError, ObserverModule, is_plain
from qfunc.errors import BadBatch, ConstantValue, NonFinite, Problem, QuantError, Unobserved, problems, several, told
from qfunc.ir import Node, TensorFact
from qfunc.numerics.statistic import clipped, finite, range_in
from qfunc.passes.stages import Prepared
from qfunc.passes.statistics import MODULUS, Answers, Measured, Statistics, merge_of

Policy: TypeAlias = Literal["fail", "skip", "clip"]
"""What is done about NaN, infinity and empty batches: an error, leave the batch out, or clip the values."""

POLICIES: tuple[Policy, ...] = ("fail", "skip", "clip")

Execute: TypeAlias = Callable[[tuple[Any, ...]], Any]
"""Runs a module that observes on inputs that are bound to its parameters."""

BINDING = (
    "pass a tensor, a tuple of inputs or a dict of keyword inputs for each batch; of batches (inputs, labels), pass "
    "the inputs only: [inputs for inputs, _ in loader]"
)


@dataclass(frozen=True, slots=True)
class Point:
    """Where a run stands after a whole batch: all that is needed to go on from there.

    `statistics` are of the `read` batches, less those that were left out, and of what was measured before the run;
    `seen` is the sum of the digests of the batches read.
    """

    statistics: Statistics
    read: int = 0
    seen: int = 0
    warnings: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class _Folded:
    """What a run has done since it began: which cells of the tallies are settled, and the batches."""

    settled: int = 0
    batches: int = 0
    data: int = 0
    read: int = 0
    seen: int = 0
    warnings: tuple[Problem, ...] = ()


class Run:
    """Observers that go on from a point; it moves on by whole batches, in one assignment, so that it can stop anywhere.

    `pool` has a thread for the digests of batches, which take about as long as reading the data once.
    """

    def __init__(
        self,
        prepared: Prepared,
        module: fx.GraphModule,
        start: Point,
        *,
        policy: Policy,
        pool: Executor,
        execute: Execute,
    ) -> None:
        self._prepared, self._graph, self._inputs = prepared, prepared.graph, module.graph
        self._placeholders = [node for node in prepared.graph if node.kind == "placeholder"]
        self._tapped = {tap for fold in prepared.folds for tap in fold.taps}
        self._writes = may_write(prepared.graph)
        self._policy: Policy = policy
        # What custom modules have observed cannot be taken back, only kept from them.
        self._inner_policy: Policy = "fail" if prepared.swapped else policy
        self._start, self._pool, self._execute = start, pool, execute
        self._observers = [child for child in module.modules() if isinstance(child, ObserverModule)]
        answers = Answers(start.statistics)
        self._before = [answers.entry(observer.fold) for observer in self._observers]
        for observer, entry in zip(self._observers, self._before, strict=True):
            if entry is not None:
                observer.tally.start(entry.state)
        self._folded = _Folded()

    @property
    def batches(self) -> int:
        """How many batches were folded."""
        return self._folded.batches

    def digest(self, batch: Any, index: int) -> int | BadBatch:
        """The digest of a batch that is not to be run."""
        inputs = bind_inputs(self._inputs, batch)
        return BadBatch(index, inputs, BINDING) if isinstance(inputs, str) else batch_digest(inputs)

    def fold(self, batch: Any) -> QuantError | None:
        """Run one batch, or leave it out, as the policy says; why the run cannot go on, if so."""
        index = self._start.read + self._folded.read
        inputs = bind_inputs(self._inputs, batch)
        if isinstance(inputs, str):
            return BadBatch(index, inputs, BINDING)
        misfits = list(_misfits(self._placeholders, inputs, index))
        if misfits:
            return several(misfits)
        digest = self._pool.submit(batch_digest, inputs)
        empty = list(_empty(self._placeholders, inputs, index))
        faults = [*empty, *self._nonfinite(inputs, index)]
        if faults and self._policy == "fail":
            return several(faults)
        if empty or (faults and self._policy == "skip"):
            self._move_on(digest.result(), _done(faults, _LEFT_OUT), folded=False)
            return None
        if faults:
            inputs = tuple(
                clipped(x) if node.id in self._tapped and _measurable(x) else x
                for node, x in zip(self._placeholders, inputs, strict=True)
            )
        found = self._observe(inputs, index)
        if not isinstance(found, list):
            return found
        return self._settle(inputs, index, digest.result(), faults, found)

    def _settle(
        self, inputs: tuple[Any, ...], index: int, digest: int, faults: list[Problem], found: list[Problem]
    ) -> QuantError | None:
        """Keep what a batch gave, or not, as the policy says of the values `found` that are not finite."""
        policy = self._inner_policy
        if found and policy == "fail":
            return several(found)
        if found and policy == "clip":
            again = self._observe(inputs, index, clips=True)
            if not isinstance(again, list):
                return again
        kept = not found or policy == "clip"
        self._move_on(digest, [*_done(faults, "clipped"), *_done(found, "clipped" if kept else _LEFT_OUT)], folded=kept)
        return None

    def _move_on(self, digest: int, warnings: list[Problem], *, folded: bool) -> None:
        before = self._folded
        self._folded = _Folded(
            1 - before.settled if folded else before.settled,
            before.batches + folded,
            (before.data + digest * folded) % MODULUS,
            before.read + 1,
            (before.seen + digest) % MODULUS,
            (*before.warnings, *warnings),
        )

    def _observe(self, inputs: tuple[Any, ...], index: int, *, clips: bool = False) -> list[Problem] | QuantError:
        """Run the observers on one batch; the values that hold NaN or infinity."""
        for observer in self._observers:
            observer.clips = clips
            observer.tally.go_on(self._folded.settled)
        try:
            with torch.no_grad():
                self._execute(own_inputs(inputs) if self._writes else inputs)
        except NodeError as error:
            return error.problem
        except ObserverError as error:
            problem = error.problem
            nodes = self._graph.nodes
            return replace(problem, node=nodes[problem.node].place) if problem.node in nodes else problem
        except Exception as error:
            # Operators and the user's modules raise anything on inputs that do not fit; our own mathematics must not.
            if _raised_in(error).startswith(("qfunc.numerics", "qfunc.edge.tally")):
                raise
            return self._located(inputs, index) or BadBatch(index, f"the model fails on it: {told(error)}")
        return [] if clips else list(self._not_finite(index))

    def _located(self, inputs: tuple[Any, ...], index: int) -> BadBatch | None:
        """That the model fails, at the operator at which it does when it is run one by one."""
        again = interpreter(self._prepared).bind(lambda made: made.run(inputs))
        found = problems(again.failure()) if isinstance(again, Failure) else ()
        return next((BadBatch(index, f"at {p.node}, {p.reason}") for p in found if p.node != f"batch {index}"), None)

    def _nonfinite(self, inputs: tuple[Any, ...], index: int) -> Iterator[Problem]:
        """Inputs that hold NaN or infinity, of those that are to be quantized: an additive mask may well."""
        for node, value in zip(self._placeholders, inputs, strict=True):
            if node.id in self._tapped and _measurable(value) and not finite(value):
                remedy = "clean the batch, or choose policy='skip' or 'clip'"
                yield NonFinite(f"batch {index}", f"{node.place} holds NaN or infinity", remedy)

    def _not_finite(self, index: int) -> Iterator[Problem]:
        """The values at which an observer saw NaN or infinity, in graph order."""
        found = {observer.tap for observer in self._observers if not observer.tally.is_finite}
        remedy = "mend the batch or the model, keep what uses the value float, or choose policy='skip' or 'clip'"
        if self._inner_policy != self._policy:
            remedy = "mend the batch or the model: custom modules have seen it, which no policy can take back"
        for id in (id for id in self._graph.order if id in found) if found else ():
            yield NonFinite(self._graph[id].place, f"NaN or infinity was computed from batch {index}", remedy)

    def point(self) -> Point:
        """Where the run stands, together with what there was before it."""
        start, folded = self._start, self._folded
        earlier = start.statistics
        measured = earlier.measured.evolver()
        for observer, entry in zip(self._observers, self._before, strict=True):
            state, elements = observer.tally.settled(folded.settled)
            before = Measured(None) if entry is None else entry
            measured[observer.fold.key] = Measured(
                state,
                before.batches + folded.batches,
                before.elements + elements,
                (before.data + folded.data) % MODULUS,
                merge_of(observer.observer),
            )
        statistics = replace(
            earlier,
            measured=measured.persistent(),
            batches=earlier.batches + folded.batches,
            data=(earlier.data + folded.data) % MODULUS,
        )
        seen, warnings = (start.seen + folded.seen) % MODULUS, (*start.warnings, *folded.warnings)
        return Point(statistics, start.read + folded.read, seen, warnings)


def unmeasured(prepared: Prepared, earlier: Statistics) -> Iterator[Unobserved]:
    """The values of which earlier statistics do not tell what a run that goes on from them measures."""
    reason = "the statistics given have nothing of it: it has seen the batches of this run only"
    remedy = "calibrate on the earlier data as well, if that matters"
    for fold in Answers(earlier).missing(prepared.folds) if earlier.batches else ():
        yield Unobserved(prepared.graph[fold.taps[0]].place, reason, remedy)


def doubts(prepared: Prepared, statistics: Statistics) -> Iterator[Unobserved | ConstantValue]:
    """The values that were measured on fewer batches than others, and those that were one and the same number."""
    answers = Answers(statistics)
    for fold, less, most in answers.uneven(prepared.folds):
        reason = f"it was measured on {less.batches} batches, others were on {most}"
        remedy = "calibrate(prepared, batches) on the same data for all, if that matters"
        yield Unobserved(prepared.graph[fold.taps[0]].place, reason, remedy)
    for fold in prepared.folds:
        entry = answers.entry(fold)
        found = None if entry is None else range_in(entry.state)
        if entry is None or found is None or not found.observed:
            continue
        low, high = found.minimum.min().item(), found.maximum.max().item()
        if low == high:
            yield ConstantValue(prepared.graph[fold.taps[0]].place, low, entry.batches, entry.elements)


_LEFT_OUT = "the batch was left out"


def _done(faults: list[Problem], what: str) -> list[Problem]:
    """Faults that were borne, as warnings that say how."""
    return [
        replace(fault, reason=f"{fault.reason}: {what}", remedy="clean the data, if that matters")
        for fault in faults
        if isinstance(fault, (NonFinite, BadBatch))
    ]


def _raised_in(error: Exception) -> str:
    """The module whose Python code an exception came out of."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else str(frame.tb_frame.f_globals.get("__name__", ""))


def _misfits(placeholders: list[Node], inputs: tuple[Any, ...], index: int) -> Iterator[Problem]:
    """Inputs that are not like the example's in kind, rank, dtype or device."""
    for node, value in zip(placeholders, inputs, strict=True):
        differs = _differs(node, value)
        if differs:
            yield BadBatch(index, f"{node.place} is {differs}", *_remedy(node, value))


def _empty(placeholders: list[Node], inputs: tuple[Any, ...], index: int) -> Iterator[Problem]:
    """Inputs without elements."""
    for node, value in zip(placeholders, inputs, strict=True):
        if isinstance(value, Tensor) and not value.numel():
            reason = f"{node.place} has no elements: its shape is {tuple(value.shape)}"
            yield BadBatch(index, reason, "leave empty batches out, or have policy='skip' do so")


def _measurable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and is_plain(value)


def _remedy(node: Node, value: Any) -> tuple[str, ...]:
    fact = node.fact
    if isinstance(value, Tensor) and isinstance(fact, TensorFact) and str(value.dtype) != f"torch.{fact.dtype}":
        return (f"convert the batches: x.to(torch.{fact.dtype}), or trace with an example of that dtype",)
    return ()


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
