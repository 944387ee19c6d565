"""`describe`: what a prepared graph observes, with what and why, and why the rest stays float; `compare` of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from returns.result import Failure, Success

from qfunc.config.annotation import ParameterSpec
from qfunc.config.columns import aligned
from qfunc.errors import WrongStage
from qfunc.ir import Graph, Note
from qfunc.numerics.observers import PerChannelMinMax
from qfunc.numerics.unmeasured import Cast, KeepFloat, class_told
from qfunc.passes.numbers import non_tensors
from qfunc.passes.stages import Prepared, Site, SiteObserver
from qfunc.result import R


@dataclass(frozen=True, slots=True)
class SiteRow:
    """One site: the values it sees, its observer and what that is for, the dtype and scheme, and why it is there."""

    site: str
    values: tuple[str, ...]
    observer: str
    dtype: str
    qscheme: str
    why: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WeightRow:
    """The weight of a layer, and its observer."""

    node: str
    place: str
    observer: str
    dtype: str
    qscheme: str


@dataclass(frozen=True, slots=True)
class EqualizationRow:
    """A value that layers read scaled channel by channel, the axis of its channels, and the layers."""

    value: str
    ch_axis: int
    layers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FloatRow:
    """An operator that stays float, and why."""

    node: str
    place: str
    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class Description:
    """The decisions of `prepare` and its notes; prints as tables."""

    backend: str
    sites: tuple[SiteRow, ...]
    weights: tuple[WeightRow, ...]
    floats: tuple[FloatRow, ...]
    notes: tuple[Note, ...] = ()
    biases: tuple[WeightRow, ...] = ()
    equalizations: tuple[EqualizationRow, ...] = ()
    codes: tuple[str, ...] = ()
    """The inputs and outputs of the converted model that are codes."""
    unrounded: tuple[str, ...] = ()
    """The uses that read in float a value which others read quantized."""
    folding: str | None = None
    """How batch norms are folded while it trains; None where it is not for training."""

    def __str__(self) -> str:
        head = f"{self.backend}: {len(self.sites)} sites, {len(self.weights)} weights, {len(self.floats)} left float"
        head += "" if self.folding is None else f"; trains with {self.folding} folding"
        sites = [(s.site, ", ".join(s.values), s.observer, s.dtype, s.qscheme, "; ".join(s.why)) for s in self.sites]
        weights = [(w.node, w.place, w.observer, w.dtype, w.qscheme) for w in self.weights]
        biases = [(b.node, b.place, b.observer, b.dtype, b.qscheme) for b in self.biases]
        scaled = [(e.value, str(e.ch_axis), ", ".join(e.layers)) for e in self.equalizations]
        floats = [(f.node, f.place, f.operator, f.reason) for f in self.floats]
        tables = (
            [("site", "values", "observer", "dtype", "scheme", "why"), *sites] if sites else [],
            [("weight of", "module", "observer", "dtype", "scheme"), *weights] if weights else [],
            [("bias of", "module", "observer", "dtype", "scheme"), *biases] if biases else [],
            [("equalized", "channels", "layers"), *scaled] if scaled else [],
            [("float", "module", "operator", "why"), *floats] if floats else [],
        )
        return "\n".join(
            [
                head,
                *(f"codes: {name}" for name in self.codes),
                *(f"unrounded: {name}" for name in self.unrounded),
                *(line for table in tables for line in aligned(table)),
                *map(str, self.notes),
            ]
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """A decision in which two prepared graphs differ: as it is in the first and in the second, empty where absent."""

    what: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two prepared graphs decide differently; prints as a table."""

    differences: tuple[Difference, ...]

    def __bool__(self) -> bool:
        return bool(self.differences)

    def __str__(self) -> str:
        rows = [(d.what, d.first or "-", d.second or "-") for d in self.differences]
        return "\n".join(aligned([("decision", "first", "second"), *rows])) if rows else "no difference"


def describe(prepared: Prepared) -> R[Description]:
    """Every site with the values it sees and the reasons it has, every weight, and every operator that stays float.

    Returns:
        The description, or `WrongStage`.
    """
    if not isinstance(prepared, Prepared):
        return Failure(WrongStage(type(prepared).__name__, "Prepared"))
    graph = prepared.graph
    reasons = _reasons(prepared)
    position = {id: index for index, id in enumerate(graph.order)}
    sites = sorted(prepared.sites.values(), key=lambda site: position[site.taps[0]])
    numbers = non_tensors(graph)
    return Success(
        Description(
            prepared.backend,
            tuple(
                SiteRow(s.id, s.taps, class_told(s.observer), *_spec(s.observer), why=tuple(reasons.get(s.id, ())))
                for s in sites
            ),
            _rows(graph, prepared.weights),
            tuple(
                FloatRow(node.id, node.place, node.kind, prepared.floats[node.id])
                for node in graph
                if node.id in prepared.floats and node.kind not in _PLUMBING and node.id not in numbers
            ),
            prepared.notes,
            _rows(graph, prepared.biases),
            tuple(
                EqualizationRow(e.site.taps[0], _channels(e.site), tuple(edge.user for edge in e.edges))
                for _, e in sorted(prepared.equalizations.items())
            ),
            tuple(_codes(prepared)),
            tuple(f"{e.slot}[{e.index}] of {_named(graph, e.user)}" for e in sorted(prepared.unrounded, key=str)),
            prepared.folding,
        )
    )


def _codes(prepared: Prepared) -> Iterator[str]:
    yield from (f"input {id}" for id in prepared.graph.order if id in prepared.quantized_inputs)
    yield from (f"output {index}" for index in sorted(prepared.quantized_outputs))


def _rows(graph: Graph, table: Mapping[str, ParameterSpec]) -> tuple[WeightRow, ...]:
    """Parameters and how they are quantized, in graph order."""
    told = ((id, table[id]) for id in graph.order if id in table)
    return tuple(WeightRow(id, graph[id].place, class_told(spec), *_spec(spec)) for id, spec in told)


def _channels(site: Site) -> int:
    assert isinstance(site.observer, PerChannelMinMax) and site.observer.spec.ch_axis is not None
    return site.observer.spec.ch_axis


def compare(first: Prepared, second: Prepared) -> R[Comparison]:
    """What two prepared graphs decide differently, by the names of values and nodes.

    Returns:
        The differences in graph order of the first, or `WrongStage`.
    """
    for stage in (first, second):
        if not isinstance(stage, Prepared):
            return Failure(WrongStage(type(stage).__name__, "Prepared"))
    a, b = _decisions(first), _decisions(second)
    found = (Difference(what, a.get(what, ""), b.get(what, "")) for what in dict.fromkeys((*a, *b)))
    return Success(Comparison(tuple(d for d in found if d.first != d.second)))


_PLUMBING = ("placeholder", "get_attr", "output")


def _spec(quantization: SiteObserver | ParameterSpec) -> tuple[str, str]:
    """The dtype with its range, and the scheme."""
    match quantization:
        case Cast(dtype):
            return dtype, ""
        case KeepFloat():
            return "float32", ""
        case _:
            spec = quantization.spec
            return f"{spec.dtype} {spec.quant_min}..{spec.quant_max}", spec.qscheme


def _reasons(prepared: Prepared) -> Mapping[str, list[str]]:
    """Why each site is there: who writes what it quantizes, and who reads it."""
    graph, found = prepared.graph, dict[str, list[str]]()
    position = {id: index for index, id in enumerate(graph.order)}
    for id in (id for id in graph.order if id in prepared.outputs):
        site = prepared.sites[prepared.outputs[id]]
        verb = "result of" if id in site.taps else "shared by"
        found.setdefault(site.id, []).append(f"{verb} {_named(graph, id)}")
    for edge in sorted(prepared.inputs, key=lambda edge: (position[edge.user], edge.slot, edge.index)):
        text = f"{edge.slot} of {_named(graph, edge.user)}"
        found.setdefault(prepared.inputs[edge], []).append(text)
    return found


def _named(graph: Graph, id: str) -> str:
    node = graph[id]
    return f"{id} ({node.kind})"


def _decisions(prepared: Prepared) -> dict[str, str]:
    return dict(_each_decision(prepared))


def _each_decision(prepared: Prepared) -> Iterator[tuple[str, str]]:
    graph, outputs = prepared.graph, prepared.outputs
    edges: dict[str, list[tuple[str, str]]] = {}
    for edge, site in (*prepared.inputs.items(), *((edge, "") for edge in prepared.unrounded)):
        edges.setdefault(edge.user, []).append((f"{edge.slot}[{edge.index}] of {edge.user}", site))
    for id in graph.order:
        for name, site in sorted(edges.get(id, ())):
            yield name, _observed(prepared, site) if site else "unrounded"
        if id in outputs:
            yield f"result of {id}", _observed(prepared, outputs[id])
        if id in prepared.weights:
            yield f"weight of {id}", _parameter(prepared.weights[id])
        if id in prepared.biases:
            yield f"bias of {id}", _parameter(prepared.biases[id])
        if id in prepared.floats and graph[id].kind not in _PLUMBING:
            yield id, f"float: {prepared.floats[id]}"
    for id, equalization in sorted(prepared.equalizations.items()):
        yield id, f"equalized for {', '.join(edge.user for edge in equalization.edges)}"
    yield from ((name, "codes") for name in _codes(prepared))


def _parameter(spec: ParameterSpec) -> str:
    return " ".join((class_told(spec), *_spec(spec)))


def _observed(prepared: Prepared, site: str) -> str:
    found = prepared.sites[site]
    return " ".join((class_told(found.observer), *_spec(found.observer), "of", ", ".join(found.taps)))
