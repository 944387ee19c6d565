"""The graph that a stage prepared for training computes while it trains: with fake quantization written in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from qfunc.backends.cpu import MAX_POOLS, MOVES, TRANSPOSED
from qfunc.config.annotation import Derived, ParameterSpec
from qfunc.ir import Draft, Expression, Graph, Node, Opaque, Origin, PostOp, Ref, TensorFact, Token
from qfunc.ir.node import NamedArgs, Written
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import finished
from qfunc.numerics.qparams import QParams
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.params import FakeQuantizeWeight, Load, NormFactor
from qfunc.passes.codes import insert_behind
from qfunc.passes.custom_modules import custom_node, to_observe
from qfunc.passes.derived import owner
from qfunc.passes.fold import norms_behind
from qfunc.passes.reroute import reroute, with_unrounded
from qfunc.passes.stages import Calibrated, Owner, Prepared, SiteObserver, measures
from qfunc.passes.statistics import Answers, Fold, Measured

_MOVING = frozenset({*MOVES, *MAX_POOLS, "cat", "stack", "relu"})
"""Operators whose results are among the numbers that they read, or zero.

A dropout's are in evaluation. In training they are larger, and would be clipped by the range of what it reads.
"""

Rounding: TypeAlias = FakeQuantize | Dynamic | Cast | Derived
"""What is rounded to while a model trains."""


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """With what a fake quantizer begins."""

    quantization: Rounding
    place: str
    owners: tuple[Owner, ...]
    """What has its qparams."""
    channels: int | None = None
    """How many scales there will be, where that is known."""
    rounds: bool = True
    """Whether it rounds; what is only observed does not."""
    state: Any = None
    """What its observer has found already."""
    qparams: QParams | None = None
    """What it rounds with already."""
    sources: tuple[Owner, ...] = ()
    """Those whose qparams its own are made of."""


def with_fake_quantization(stage: Prepared | Calibrated) -> Graph:
    """The graph in which every quantized value and weight is rounded in float, and everything trains.

    A calibrated stage begins with what was measured, one that was trained before where that ended. Values that are only
    observed are handed on, as in calibration. What a functional operator was told of the mode of the model (a literal
    `True`, in a model that was traced in training) follows the mode from now on.
    """
    prepared = stage if isinstance(stage, Prepared) else stage.prepared
    writing = _Writing(prepared, _Known(stage))
    reroute(writing.draft, prepared, writing.round_output, writing.round)
    for id in prepared.swapped:
        writing.draft.put(custom_node(writing.draft[id]))
    for id in prepared.graph.order:
        writing.draft.put(writing.round_parameters(writing.draft[id]))
    made = with_unrounded(prepared, writing.draft.commit())
    modules = stage.modules if isinstance(stage, Calibrated) else {}
    objects = made.objects.update(writing.objects).update(to_observe(prepared, modules))
    return _following_mode(replace(made, objects=objects))


def rounds(graph: Graph) -> bool:
    """Whether a graph is one with fake quantization."""
    return any(
        node.kind == "fake_quantize" or any(isinstance(value, FakeQuantizeWeight) for _, value in node.args)
        for node in graph
    )


class _Known:
    """What a stage has of states and qparams; nothing where it was only prepared."""

    def __init__(self, stage: Prepared | Calibrated) -> None:
        calibrated = stage if isinstance(stage, Calibrated) else None
        self._answers = None if calibrated is None else Answers(calibrated.statistics)
        self._qparams = {} if calibrated is None else calibrated.qparams
        self._states = {} if calibrated is None else calibrated.states

    def of(self, start: Start, folds: Iterable[Fold] = ()) -> Start:
        """The start with what is known of its owners."""
        # what was trained has the state of a site under each of its values
        filed = tuple(folds)[:1] if self._qparams else folds
        held = None if self._answers is None else self._answers.find(filed)
        state = next((self._states[each] for each in start.owners if each in self._states), None)
        state = held.state if isinstance(held, Measured) else state
        grid = next((self._qparams[each] for each in start.owners if each in self._qparams), None)
        if grid is not None:
            return replace(start, state=state, qparams=grid.qparams())
        if state is None or not isinstance(start.quantization, FakeQuantize):
            return start
        found = finished(start.quantization.observer, state)
        return replace(start, state=state, qparams=found if isinstance(found, QParams) else None)


class _Writing:
    """One run over one prepared graph; `objects` are the starts of what was put in."""

    def __init__(self, prepared: Prepared, known: _Known) -> None:
        self.draft = Draft(prepared.graph)
        self.objects: dict[str, Opaque] = {}
        self._prepared, self._known = prepared, known
        self._paths = dict(_paths(prepared))
        self._tokens: dict[tuple[Any, ...], Token] = {}
        self._turned = {edge.user for edge in (*prepared.inputs, *prepared.unrounded)}

    def round(self, node: Node, site: str) -> str:
        """Put what a site is for behind a value; gives the id of what is read instead."""
        found, path = self._prepared.sites[site], self._paths[site]
        token = Token(f"fake_quantize:{path}")
        if token.id not in self.objects:
            first = self._prepared.graph[found.taps[0]]
            start = self._start(found.observer, first.place, ("site", site))
            start = replace(start, channels=_channels(found.observer, first))
            self.objects[token.id] = Opaque(self._known.of(start, found.folds))
        # what shares the qparams of what it is made of, and is not observed itself, is rounded without being measured
        inputs = (Ref(node.id),) if node.id in found.taps else (Ref(node.id), False)
        given: NamedArgs = (("inputs", inputs), ("start", token))
        return insert_behind(self.draft, node, "rounded", "fake_quantize", given, origin=Origin(path))

    def round_output(self, node: Node, site: str) -> str:
        """The same for all users of a value; a value that only moves rounded numbers is left as it is."""
        prepared = self._prepared
        moves = node.kind in _MOVING and node.id not in prepared.sites[site].taps and not node.post
        of_one_site = node.id not in self._turned and all(prepared.outputs.get(used) == site for used in node.uses())
        if moves and of_one_site:
            return node.id
        return self.round(node, site)

    def _start(self, observer: SiteObserver | ParameterSpec, place: str, of: Owner) -> Start:
        rounds = isinstance(observer, Rounding)
        quantization: Any = observer if rounds else FakeQuantize(observer)  # type: ignore[arg-type]
        start = Start(quantization, place, (of,), rounds=rounds)
        if not isinstance(observer, Derived):
            return start
        sources = (owner(self._prepared, point) for point in observer.of)
        return replace(start, sources=tuple(source for source in sources if source is not None))

    def round_parameters(self, node: Node) -> Node:
        """The node with its weight and bias rounded, where they are rounded in training."""
        specs = {"weight": self._prepared.weights.get(node.id), "bias": self._prepared.biases.get(node.id)}
        rounded = {
            name: self._rounded(node, name, spec)
            for name, spec in specs.items()
            if isinstance(spec, Rounding) and node.has(name) and isinstance(node.get(name), Load)
        }
        return node.with_args(**rounded) if rounded else node

    def _rounded(self, node: Node, name: str, spec: Rounding) -> Expression:
        value = node.get(name)
        assert isinstance(value, Load)
        norms = tuple(map(_factor, norms_behind(node))) if name == "weight" else ()
        transpose = node.kind in TRANSPOSED
        groups = node.get("groups") if transpose else 1
        assert isinstance(groups, int), node
        key = (value, spec, norms, transpose, groups)
        if key in self._tokens:  # calls of one layer share what they round its weight with
            token = self._tokens[key]
            start = self.objects[token.id].value
            self.objects[token.id] = Opaque(replace(start, owners=(*start.owners, (name, node.id))))
        else:
            token = self._tokens[key] = Token(f"fake_quantize:{name} of {node.id}")
            axis = None if not isinstance(spec, FakeQuantize) else spec.spec.ch_axis
            start = self._start(spec, node.place, (name, node.id))
            start = replace(start, channels=None if axis is None else value.shape[axis])
            self.objects[token.id] = Opaque(self._known.of(start))
        exact = bool(norms) and self._prepared.folding == "exact"
        return FakeQuantizeWeight(value, token, norms, transpose, groups, exact)


def _paths(prepared: Prepared) -> Iterator[tuple[str, str]]:
    """The module paths of sites, by name: numbered in the order of the graph."""
    position = {id: index for index, id in enumerate(prepared.graph.order)}
    ordered = sorted(prepared.sites.values(), key=lambda site: (position[site.taps[0]], site.id))
    yield from ((site.id, f"activation_post_process_{index}") for index, site in enumerate(ordered))


def _channels(observer: SiteObserver, node: Node) -> int | None:
    """How many channels a value has along the axis of its spec, as far as an example has shown."""
    axis = observer.spec.ch_axis if measures(observer) else None
    return node.fact.shape[axis] if axis is not None and isinstance(node.fact, TensorFact) else None


def _factor(norm: PostOp) -> NormFactor:
    gamma, var, eps = norm.get("weight"), norm.get("running_var"), norm.get("eps")
    assert isinstance(var, Expression) and isinstance(eps, (int, float)), norm
    assert gamma is None or isinstance(gamma, Expression), norm
    return NormFactor(gamma, var, float(eps))


# The mode of the model ------------------------------------------------------------------------------------------------


def _following_mode(graph: Graph) -> Graph:
    """The graph whose functional operators ask the model for the mode that they were told when it was traced."""
    if not graph.training:
        return graph
    draft = Draft(graph)
    asked: dict[str, str] = {}
    first = graph.order[0]

    def mode(kind: str) -> Ref:
        of = "norm_mode" if kind == "batch_norm" else "training_mode"
        if of not in asked:
            asked[of] = draft.fresh(of)
            draft.insert_before(first, Node(asked[of], of, (("inputs", ()),), origin=Origin(asked[of])))
        return Ref(asked[of])

    for node in graph:
        post = tuple(
            PostOp(p.kind, _asking(p.args, mode(p.kind)), _told(p.origin)) if _is_told(p) else p for p in node.post
        )
        args, origin = (node.args, node.origin)
        if _is_told(node):
            args, origin = _asking(node.args, mode(node.kind)), _told(node.origin)
        if args is not node.args or any(a is not b for a, b in zip(post, node.post, strict=True)):
            draft.put(replace(node, args=args, post=post, origin=origin))
    return draft.commit()


def _is_told(node: Node | PostOp) -> bool:
    """Whether a function was told that the model trains."""
    written = node.origin.written
    functional = written is not None and written.op in ("call_function", "call_method")
    if node.kind == "batch_norm" and node.get("running_mean") is None:
        return False  # it has no statistics to take in evaluation
    return functional and any(name == "training" and value is True for name, value in node.args)


def _asking(args: NamedArgs, mode: Ref) -> NamedArgs:
    return tuple((name, mode if name == "training" else value) for name, value in args)


def _told(origin: Origin) -> Origin:
    """The origin of a call that is given the mode whether or not it was written with it."""
    written = origin.written
    assert written is not None
    if "training" in written.args or any(name == "training" for _, name in written.kwargs):
        return origin
    kwargs = (*written.kwargs, ("train" if written.target == "torch.dropout" else "training", "training"))
    return replace(origin, written=Written(written.op, written.target, written.args, kwargs))
