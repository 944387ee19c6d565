"""`prepare`: make observation sites of what is to be quantized. The graph itself is not changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pyrsistent import pmap
from returns.result import Failure, Success

from qfunc.backends.cpu import CPU
from qfunc.config.annotation import Annotations, SharedWith, Spec, Unshared, wrong_annotations
from qfunc.config.arguments import wrong_arguments
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.config.point import Edge, Point, edges_by_slot, values_in
from qfunc.config.qconfig_mapping import QConfigMapping, Selector
from qfunc.config.resolve import values_of
from qfunc.errors import BadConfig, Problem, WrongStage, several
from qfunc.ir import Graph, fresh_id
from qfunc.numerics.fake_quantize import is_fixed
from qfunc.numerics.qparams import QuantSpec
from qfunc.numerics.unmeasured import told
from qfunc.passes.annotate import NOTHING, annotate
from qfunc.passes.borders import wrong_borders
from qfunc.passes.derived import wrong_derived
from qfunc.passes.equalize import equalizations
from qfunc.passes.stages import Configuration, Prepared, Site, SiteObserver, measures
from qfunc.result import R


def prepare(
    graph: Graph,
    qconfig_mapping: QConfigMapping | Annotations | None = None,
    *,
    backend: BackendConfig = CPU,
    custom: CustomConfig = NOTHING,
    equalize: Selector | None = None,
) -> R[Prepared]:
    """The graph with observation sites for static quantization.

    What is quantized, and how, is told by annotations: those given, or those that `annotate` makes of a configuration.
    Points that share qparams become one site, transitively (two `cat`s that share an operand agree).

    Args:
        graph: a traced, usually fused graph.
        qconfig_mapping: what to quantize, and how: a mapping (by default the backend's own), or annotations.
        backend: what can be quantized.
        custom: exceptions for the model, see `annotate`; annotations have them in them.
        equalize: picks the layers whose inputs and weights are equalized, such as `layers`; none by default.

    Returns:
        The prepared graph, or what `annotate` reports; for annotations `UnknownName` for nodes that do not exist,
        `BadConfig` for uses that do not, for impossible observers, and for qparams that derive from themselves or from
        what has none. A layer that cannot be equalized is told of in the notes.
    """
    if not isinstance(graph, Graph):
        return Failure(WrongStage(type(graph).__name__, "Graph"))
    if not isinstance(qconfig_mapping, Annotations):
        found = annotate(graph, qconfig_mapping, backend=backend, custom=custom)
        return found.bind(lambda made: _prepared(graph, made, backend.name, equalize)).map(
            lambda made: replace(made, configuration=_configuration(made, qconfig_mapping, backend, custom))
        )
    problems = list(wrong_annotations(qconfig_mapping, graph)) or wrong_arguments(backend=backend, custom=custom)
    problems = problems or list(wrong_borders(graph, qconfig_mapping))
    if problems:
        return Failure(several(problems))
    return _prepared(graph, _with_reasons(graph, qconfig_mapping), backend.name, equalize)


def _configuration(
    prepared: Prepared, mapping: QConfigMapping | None, backend: BackendConfig, custom: CustomConfig
) -> Configuration:
    found = {edge.user for e in prepared.equalizations.values() for edge in e.edges}
    equalized = tuple(id for id in prepared.graph.order if id in found)
    return Configuration(backend.qconfig_mapping if mapping is None else mapping, backend, custom, equalized)


def _with_reasons(graph: Graph, annotations: Annotations) -> Annotations:
    """The annotations with a reason for each operator that they do not name: it stays float."""
    users = {edge.user for edge in annotations.inputs}
    named = {*users, *annotations.outputs, *annotations.weights, *annotations.biases, *annotations.swapped}
    left = (id for id in graph.order if id not in named and id not in annotations.floats)
    return replace(annotations, floats=annotations.floats.update(dict.fromkeys(left, "nothing annotates it")))


def _prepared(graph: Graph, annotations: Annotations, backend: str, equalize: Selector | None) -> R[Prepared]:
    sharing = _Sharing(graph, annotations)
    wrong = list(sharing.problems())
    sites, outputs, inputs = ({}, {}, {}) if wrong else sharing.sites()
    scaled, notes, problems = equalizations(graph, annotations, equalize, sites)
    problems += wrong
    if problems:
        return Failure(several(problems))
    prepared = Prepared(
        graph,
        pmap(sites),
        pmap(outputs),
        pmap(inputs),
        annotations.weights,
        backend,
        annotations.floats,
        annotations.refused,
        (*graph.notes, *annotations.notes, *notes),
        annotations.biases,
        annotations.quantized_inputs,
        annotations.quantized_outputs,
        scaled,
        swapped=annotations.swapped,
        unrounded=_unrounded(graph, annotations),
    )
    problems += wrong_derived(prepared)
    return Failure(several(problems)) if problems else Success(prepared)


def _unrounded(graph: Graph, annotations: Annotations) -> frozenset[Edge]:
    """The uses that read in float a value that is quantized; of an input that is codes there are no other floats."""
    carried = values_of(annotations.unrounded, graph)
    codes, rounded = annotations.quantized_inputs, annotations.outputs
    return frozenset(edge for edge, value in carried.items() if value in rounded and value not in codes)


class _Sharing:
    """Which points have the same qparams: a disjoint-set forest over sites, so that sharing is transitive.

    A walk in graph order finds the site of each point: of a value's own, of a use that is quantized as the value is,
    and of all other uses of the value with one observer.
    """

    def __init__(self, graph: Graph, annotations: Annotations) -> None:
        self._order = {id: index for index, id in enumerate(graph.order)}
        self._parent: list[int] = []
        self._observers: list[SiteObserver | None] = []
        self._unshared: set[int] = set()
        self._taps: list[dict[str, None]] = []
        self._points: dict[Point, int] = {}
        self._of_uses: dict[tuple[str, SiteObserver], int] = {}
        self._inputs: list[Edge] = []
        self._unlike: list[Problem] = []
        self._outputs = [id for id in graph.order if id in annotations.outputs]
        uses: dict[str, list[tuple[Edge, str]]] = {}
        for (user, slot), edges in edges_by_slot(annotations.inputs).items():
            values = values_in(graph[user], slot)
            uses.setdefault(user, []).extend((edge, values[edge.index]) for edge in edges)
        for node in graph:
            for edge, value in uses.get(node.id, ()):
                self._use(edge, value, annotations.inputs[edge])
            if node.id in annotations.outputs:
                self._value(node.id, annotations.outputs[node.id])
        shared = [
            (spec.other, point)
            for table in (annotations.inputs, annotations.outputs)
            for point, spec in table.items()
            if isinstance(spec, SharedWith)
        ]
        self._join([*annotations.groups, *shared])
        for value in sorted(annotations.taps, key=self._order.__getitem__):
            self._taps[self._root(self._points[value])][value] = None

    def problems(self) -> Iterator[Problem]:
        """Points that share with others of which none has an observer, or which are quantized in quite another way."""
        yield from self._unlike
        for point, site in self._points.items():
            if self._observers[self._root(site)] is None:
                reason = "it shares with points of which none has an observer"
                yield BadConfig(str(point), reason, "give one of them an observer")

    def sites(self) -> tuple[dict[str, Site], dict[str, str], dict[Edge, str]]:
        """The sites by name, and the names of those of values and of uses that the value's own does not serve.

        A site is called after the first value that it taps.
        """
        names: dict[int, str] = {}
        sites: dict[str, Site] = {}
        for index in (i for i, parent in enumerate(self._parent) if parent == i):
            observer, taps = self._observers[index], tuple(sorted(self._taps[index], key=self._order.__getitem__))
            assert observer is not None and taps, index
            names[index] = fresh_id(taps[0], sites)
            sites[names[index]] = Site(names[index], observer, taps)
        outputs = {value: names[self._root(self._points[value])] for value in self._outputs}
        return sites, outputs, {edge: names[self._root(self._points[edge])] for edge in self._inputs}

    def _use(self, edge: Edge, value: str, spec: Spec) -> None:
        own = self._points.get(value)
        match spec:
            case SharedWith():
                self._points[edge] = self._new(value, None) if own is None else own
            case Unshared(observer):
                self._points[edge] = self._new(value, observer)
                self._unshared.add(self._points[edge])
            case _ if own is not None and self._serves(own, spec):
                self._points[edge] = own
            case _:
                key = (value, spec)
                if key not in self._of_uses:
                    self._of_uses[key] = self._new(value, spec)
                self._points[edge] = self._of_uses[key]
        if self._points[edge] is not own:
            self._inputs.append(edge)

    def _value(self, value: str, spec: Spec) -> None:
        match spec:
            case SharedWith(other):
                known = self._points.get(other)
                self._points[value] = self._new(value, None) if known is None else known
            case Unshared(observer):
                self._points[value] = self._new(value, observer)
                self._unshared.add(self._points[value])
            case _:
                self._points[value] = self._new(value, spec)

    def _serves(self, site: int, observer: SiteObserver) -> bool:
        """Whether a value's own site serves a use.

        A fixed range is the value's, whatever observer the operator that reads it is configured with; others must be
        for the same spec.
        """
        own = self._observers[site]
        if own is None:
            return True
        if site in self._unshared:
            return False
        if is_fixed(observer) or not (measures(own) and measures(observer)):
            return own == observer
        return _fits(own.spec, observer.spec) if is_fixed(own) else own.spec == observer.spec

    def _new(self, value: str, observer: SiteObserver | None) -> int:
        self._parent.append(len(self._parent))
        self._observers.append(observer)
        self._taps.append({} if observer is None else {value: None})
        return len(self._parent) - 1

    def _root(self, site: int) -> int:
        while self._parent[site] != site:
            self._parent[site] = self._parent[self._parent[site]]
            site = self._parent[site]
        return site

    def _join(self, groups: list[tuple[Point, ...]]) -> None:
        """Make the sites of each group one, whatever the order of the groups.

        The observer is that of the first point in the graph that measures, so that a fixed range clips no other.
        """
        for first, *others in groups:
            for point in others:
                self._parent[self._root(self._points[point])] = self._root(self._points[first])
        together: dict[int, list[Point]] = {}
        for point in sorted({point for group in groups for point in group}, key=self._position):
            together.setdefault(self._root(self._points[point]), []).append(point)
        for root, points in together.items():
            self._lead(root, points)

    def _lead(self, root: int, points: list[Point]) -> None:
        """Have the site of one of the points, in graph order, be that of all that share with them."""
        sites = list(dict.fromkeys(self._points[point] for point in points))
        measured = [site for site in sites if self._observers[site] is not None]
        first = next((site for site in measured if not is_fixed(self._observers[site])), (*measured, *sites)[0])
        ways = dict.fromkeys(self._observers[site] for site in measured)
        if len(ways) > 1 and not all(map(measures, ways)):
            reason = f"it shares with points that are quantized in other ways: {' and '.join(map(told, ways))}"
            self._unlike.append(BadConfig(str(points[0]), reason, "quantize all of them alike"))
        self._parent[first] = self._parent[root] = first
        for site in sites:
            self._taps[first].update(self._taps[site])

    def _position(self, point: Point) -> tuple[int, bool, str, int]:
        """Where a point is in graph order: uses are before the value that is computed from them."""
        if isinstance(point, Edge):
            return self._order[point.user], False, point.slot, point.index
        return self._order[point], True, "", 0


def _fits(fixed: QuantSpec, wanted: QuantSpec) -> bool:
    """Whether a fixed range does for a use: one for the whole tensor, of the same codes or of those with a bit less."""
    ranges = ((fixed.quant_min, fixed.quant_max), (fixed.quant_min // 2, fixed.quant_max // 2))
    same = wanted.dtype == fixed.dtype and not wanted.per_channel
    return same and (wanted.quant_min, wanted.quant_max) in ranges
