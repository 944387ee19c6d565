"""A prepared stage with its equalizations done: inputs scaled, weights scaled back, and sites for the scaled values.

A layer whose result only equalized layers read takes their scale into its own rows, if that changes no code of its
weight; behind all others the graph multiplies. Either way the float values are scaled, before they are quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from pyrsistent import pmap

from qfunc.config.annotation import Derived
from qfunc.config.point import Edge
from qfunc.errors import BadConfig, Problem, Unobserved
from qfunc.ir import Draft, Expression, Node, Origin, Ref, TensorFact, Written, fresh_id, users
from qfunc.numerics.equalization import equalization_scale, scaled_range
from qfunc.numerics.fake_quantize import is_fixed
from qfunc.numerics.observers import MinMax
from qfunc.numerics.qparams import QParams, QuantSpec
from qfunc.numerics.statistic import RangeState
from qfunc.numerics.unmeasured import KeepFloat
from qfunc.params import Constant, DivideColumns, MultiplyRows
from qfunc.passes.equalize import SPATIAL, grouped_weight
from qfunc.passes.stages import Calibrated, Equalization, Prepared, Site, SiteObserver, measures

_HOMOGENEOUS = frozenset({"relu", "leaky_relu"})
"""What a positive factor may be moved across."""

_CHOOSING: Mapping[str, int | None] = MappingProxyType(
    {"relu": None, "dropout": None, "identity": None, "max_pool1d": 1, "max_pool2d": 2, "max_pool3d": 3}
)
"""What hands on some of the values of each channel, the largest among them; pools with the rank of their channels."""


@dataclass(frozen=True, slots=True)
class _Scaling:
    """An equalization with its scale, and the range of the scaled value."""

    of: Equalization
    scale: tuple[float, ...]
    range: RangeState

    @property
    def value(self) -> str:
        return self.of.site.taps[0]


def equalized(calibrated: Calibrated) -> tuple[Prepared, dict[str, QParams], list[Problem]]:
    """The stage without equalizations that means the same, the qparams of its new sites, and the problems.

    Those come from all of the range that was measured, whatever the observer of the layer's input: nothing observed
    the scaled values. The problems are `Unobserved` for values without data, and for layers of whose weights the range
    is unknown, and `BadConfig` for statistics of other channels than a weight has.
    """
    prepared = calibrated.prepared
    if not prepared.equalizations:
        return prepared, {}, []
    found: list[_Scaling] = []
    problems: list[Problem] = []
    for equalization in _in_order(prepared):
        made = _scaling(calibrated, equalization)
        if isinstance(made, _Scaling):
            found.append(made)
        else:
            problems.append(made)
    if problems:
        return prepared, {}, problems
    applying = _Applying(prepared)
    for scaling in found:
        applying.divide(scaling)
    for scaling in found:
        applying.multiply(scaling)
    return applying.prepared(), applying.qparams, []


def _in_order(prepared: Prepared) -> list[Equalization]:
    position = {id: index for index, id in enumerate(prepared.graph.order)}
    return sorted(prepared.equalizations.values(), key=lambda e: (position[e.site.taps[0]], e.site.id))


def _scaling(calibrated: Calibrated, of: Equalization) -> _Scaling | Problem:
    graph, place = calibrated.prepared.graph, calibrated.prepared.graph[of.site.taps[0]].place
    state = calibrated.statistics.state(of.site.folds)
    if not isinstance(state, RangeState) or not state.observed:
        return Unobserved(place)
    columns: RangeState | None = None
    for edge in of.edges:
        weights = calibrated.columns.get(edge.user)
        if weights is None:
            reason = "it is to be equalized, and the range of its weights is not known"
            return Unobserved(graph[edge.user].place, reason, "calibrate(prepared, batches) or reuse(...) tells it")
        if weights.minimum.shape != state.minimum.shape:
            reason = f"its weight has {len(weights.minimum)} input channels, the statistics have {len(state.minimum)}"
            return BadConfig(graph[edge.user].place, reason, "calibrate with data that the model takes")
        columns = weights if columns is None else _joined(columns, weights)
    assert columns is not None, of
    scale = equalization_scale(state, columns)
    return _Scaling(of, tuple(scale.tolist()), scaled_range(state, scale))


def _joined(a: RangeState, b: RangeState) -> RangeState:
    return RangeState(torch.minimum(a.minimum, b.minimum), torch.maximum(a.maximum, b.maximum))


class _Applying:
    """The edits that equalize one stage; `qparams` are those of the new sites."""

    def __init__(self, prepared: Prepared) -> None:
        self.qparams: dict[str, QParams] = {}
        self._before = prepared
        self._draft = Draft(prepared.graph)
        tensors = (name for source in prepared.graph.sources.values() for name in source.tensors)
        self._names = {*prepared.graph.order, *prepared.graph.modules, *tensors}
        self._users = users(prepared.graph)
        self._derived = any(
            isinstance(spec, Derived)
            for spec in (*(s.observer for s in prepared.sites.values()), *prepared.biases.values())
        )
        self._sites = dict(prepared.sites)
        self._outputs, self._inputs = dict(prepared.outputs), dict(prepared.inputs)
        self._floats, self._unrounded = dict(prepared.floats), set(prepared.unrounded)

    def prepared(self) -> Prepared:
        """The stage after all edits."""
        return replace(
            self._before,
            graph=self._draft.commit(),
            sites=pmap(self._sites),
            outputs=pmap(self._outputs),
            inputs=pmap(self._inputs),
            floats=pmap(self._floats),
            unrounded=frozenset(self._unrounded),
            equalizations=pmap(),
        )

    def divide(self, scaling: _Scaling) -> None:
        """Divide the columns of the weights that read the scaled value."""
        for edge in scaling.of.edges:
            node = self._draft[edge.user]
            weight, groups = grouped_weight(node)
            self._draft.put(node.with_args(weight=DivideColumns(weight, scaling.scale, groups)))

    def multiply(self, scaling: _Scaling) -> None:
        """Scale the value, and give its scaled uses sites of their own."""
        value, path = scaling.value, self._path(scaling)
        if path:
            self._into_rows(path[-1], scaling.scale)
        else:
            value = self._behind(scaling)
            for edge in scaling.of.edges:
                self._draft.put(self._draft[edge.user].with_args(input=Ref(value)))
        named: dict[QuantSpec, str] = {}
        for edge, spec in zip(scaling.of.edges, scaling.of.specs, strict=True):
            if spec not in named:
                named[spec] = self._site(scaling, spec, value)
            self._inputs[edge] = named[spec]
        for id in path:
            observed = self._outputs.pop(id, None) is not None
            if observed and id != value:
                self._outputs[id] = named[scaling.of.specs[0]]
        for edge in map(_input, path[:-1]):
            if edge in self._inputs:
                self._inputs[edge] = named[scaling.of.specs[0]]

    def _site(self, scaling: _Scaling, spec: QuantSpec, value: str) -> str:
        observer = MinMax(spec)
        id = fresh_id(scaling.of.site.id, self._sites)
        self._sites[id] = Site(id, observer, (value,))
        qparams = observer.finish(scaling.range)
        assert qparams is not None, scaling
        self.qparams[id] = qparams
        return id

    def _path(self, scaling: _Scaling) -> tuple[str, ...]:
        """The values from the scaled one up to the layer that takes the scale into its rows; empty where none can.

        Between the two only the largest values are chosen, so that the range of the scaled value does for all.
        """
        graph, path = self._before.graph, [scaling.value]
        readers = {edge.user for edge in scaling.of.edges}
        while self._read_by(path[-1], readers):
            node = graph[path[-1]]
            value = node.get("input") if node.kind in _CHOOSING and not node.post and not node.aliased else None
            if not isinstance(value, Ref):
                return tuple(path) if self._takes(node, scaling, path) else ()
            readers = {node.id}
            path.append(value.id)
        return ()

    def _read_by(self, value: str, readers: AbstractSet[str]) -> bool:
        """Whether a value is read by these alone, by each of them once."""
        graph = self._before.graph
        return set(self._users[value]) == readers and all(Counter(graph[id].uses())[value] == 1 for id in readers)

    def _takes(self, node: Node, scaling: _Scaling, path: Sequence[str]) -> bool:
        """Whether a layer takes the scale of what is made of its result into its rows, at no cost in its own codes."""
        graph, outputs, inputs = self._before.graph, self._before.outputs, self._before.inputs
        if node.aliased or (node.kind != "linear" and node.kind not in SPATIAL):
            return False
        rank = _rank_behind(node)
        named = [outputs[id] for id in path[1:] if id in outputs]
        named += [inputs[edge] for edge in map(_input, path[:-1]) if edge in inputs]
        sites: list[Any] = [self._before.sites[name].observer for name in named]
        bias = node.get("bias")
        return (
            isinstance(node.get("weight"), Expression)
            and (bias is None or isinstance(bias, Expression))
            and all(_rank_behind(graph[edge.user]) == rank for edge in scaling.of.edges)
            and all(_CHOOSING[graph[id].kind] in (None, rank) for id in path[:-1])
            and all(_only_measures(site) and {site.spec} == set(scaling.of.specs) for site in sites)
            and all(post.kind in _HOMOGENEOUS for post in node.post)
            and self._rows_are_free(node.id)
        )

    def _rows_are_free(self, id: str) -> bool:
        """Whether the rows of a weight may have any scale: it is float, or has a scale for each of them."""
        spec = self._before.weights.get(id, KeepFloat())
        if self._derived or id in self._before.biases:
            return False
        own = spec.spec if measures(spec) else None
        return isinstance(spec, KeepFloat) or (own is not None and own.per_channel and own.ch_axis == 0)

    def _into_rows(self, id: str, scale: tuple[float, ...]) -> None:
        node = self._draft[id]
        given = {name: node.get(name) for name in ("weight", "bias")}
        rows = {name: MultiplyRows(value, scale) for name, value in given.items() if isinstance(value, Expression)}
        self._draft.put(node.with_args(**rows))

    def _behind(self, scaling: _Scaling) -> str:
        """Multiply behind a value; gives the id of the product."""
        value, draft = scaling.value, self._draft
        fact = self._before.graph[value].fact
        dtype = fact.dtype if isinstance(fact, TensorFact) else "float32"
        ranks = _rank_behind(self._before.graph[scaling.of.edges[0].user])
        shape = (len(scaling.scale), *[1] * ranks)
        scale = self._fresh(f"{value}_equalization_scale")
        written = Written("get_attr", scale)
        constant = Constant(scaling.scale, shape, dtype)
        draft.insert_after(value, Node(scale, "get_attr", (("value", constant),), origin=Origin(written=written)))
        product = self._fresh(f"{value}_equalized")
        args = (("input", Ref(value)), ("other", Ref(scale)))
        draft.insert_after(value, Node(product, "mul", args, fact=fact))
        self._floats[product] = "it scales the channels of what equalized layers read"
        if value in self._outputs and value not in self._before.quantized_inputs:
            self._unrounded.add(Edge(product, "input"))
        return product

    def _fresh(self, base: str) -> str:
        """A name for a node, and for a buffer of the module that is to be made."""
        name = fresh_id(base, self._names)
        self._names.add(name)
        return name


def _input(id: str) -> Edge:
    return Edge(id, "input")


def _only_measures(observer: SiteObserver) -> bool:
    """Whether the range is one that was found, not one that is known."""
    return measures(observer) and not is_fixed(observer)


def _rank_behind(layer: Node) -> int:
    """How many axes follow that of the channels in what a layer reads and makes."""
    return SPATIAL.get(layer.kind, 0)
