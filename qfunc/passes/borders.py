"""Inputs and outputs of a model that are codes: which values these are, and what keeps one from being quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeAlias

from pyrsistent import pmap

from qfunc.config.annotation import Annotations, SharedWith, Spec
from qfunc.config.custom_config import CustomConfig
from qfunc.config.point import Edge, Point
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.resolve import unfit, values_of
from qfunc.errors import BadConfig, Problem, UnknownName
from qfunc.ir import Arg, DictArg, Graph, ListArg, RecordArg, Ref, refs
from qfunc.numerics.fake_quantize import is_fixed
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, Quantization, ReuseInput, told
from qfunc.passes.numbers import non_tensors

Shared: TypeAlias = Mapping[Point, Sequence[Point]]


def quantized_outputs(graph: Graph, custom: CustomConfig) -> dict[int, str]:
    """The values that leave the model as codes, by their positions in its output; impossible positions are left out."""
    elements = output_elements(graph)
    found = {index: elements[index] for index in custom.output_quantized_indexes if 0 <= index < len(elements)}
    return {index: element.id for index, element in found.items() if isinstance(element, Ref)}


def output_elements(graph: Graph) -> tuple[Arg, ...]:
    """What a model returns: the items of a tuple or list, the values of a dict in their order, or the one value."""
    (result,) = (value for node in graph if node.kind == "output" for _, value in node.args)
    match result:
        case tuple():
            return result
        case ListArg(items) | RecordArg(_, items):
            return items
        case DictArg(items):
            return tuple(value for _, value in items)
        case _:
            return (result,)


def with_borders(
    graph: Graph, annotations: Annotations, mapping: QConfigMapping, custom: CustomConfig
) -> tuple[Annotations, list[Problem]]:
    """The annotations with the inputs and outputs quantized that are to be codes, and the problems."""
    inputs = [node.id for node in graph if node.kind == "placeholder"]
    problems = [*_no_such("input", custom.input_quantized_indexes, len(inputs))]
    problems += _no_such("output", custom.output_quantized_indexes, len(output_elements(graph)))
    chosen = [inputs[index] for index in custom.input_quantized_indexes if 0 <= index < len(inputs)]
    values = _specs(graph, annotations, mapping, chosen) if chosen else {}
    found = replace(
        annotations,
        outputs=annotations.outputs.update(pmap(values)),
        quantized_inputs=frozenset(chosen),
        quantized_outputs=frozenset(custom.output_quantized_indexes),
    )
    borders = _Borders(
        graph,
        found,
        kept=frozenset(id for id, way in mapping.outputs.items() if isinstance(way, KeepFloat)),
        edges=frozenset(mapping.edges),
        leave_out="leave its index out of input_quantized_indexes",
        observe="give it an observer: set_output({!r}, Histogram())",
    )
    problems += borders.wrong_inputs(dict.fromkeys(chosen))
    problems += borders.wrong_outputs()
    return found, problems


def wrong_borders(graph: Graph, annotations: Annotations) -> Iterator[Problem]:
    """Inputs and outputs that annotations make codes and that cannot be."""
    leave_out = "leave it out of quantized_inputs"
    borders = _Borders(graph, annotations, leave_out, observe="give it an observer: outputs.set({!r}, Histogram())")
    inputs = tuple(node.id for node in graph if node.kind == "placeholder")
    known = frozenset(inputs)
    for id in sorted(annotations.quantized_inputs - known):
        yield UnknownName(str(id), "input", inputs)
    yield from borders.wrong_inputs(sorted(annotations.quantized_inputs & known))
    yield from _no_such("output", tuple(sorted(annotations.quantized_outputs)), len(output_elements(graph)))
    yield from borders.wrong_outputs()


def _no_such(what: str, indexes: tuple[int, ...], count: int) -> Iterator[Problem]:
    for index in indexes:
        if not 0 <= index < count:
            reason = f"there is no {what} {index}, the model has {count}"
            yield BadConfig(f"{what}_quantized_indexes", reason, f"count the {what}s from 0")


def _specs(graph: Graph, annotations: Annotations, mapping: QConfigMapping, inputs: Iterable[str]) -> dict[str, Spec]:
    """How inputs with no way of their own are: as their first quantized use, or as the configuration quantizes."""
    wanted, position = frozenset(inputs), {id: index for index, id in enumerate(graph.order)}
    chosen = mapping.global_qconfig
    default: list[Spec | Quantization] = [] if chosen is None else [chosen.of_inputs]
    given: dict[str, list[Spec | Quantization]] = {id: [] for id in wanted}
    carried = values_of(annotations.inputs, graph)
    for edge in sorted(carried, key=lambda edge: (position[edge.user], edge.slot, edge.index)):
        value = carried[edge]
        if value in wanted:
            given[value].append(annotations.inputs[edge])
    found: dict[str, Spec] = {}
    for id in (id for id in wanted if id not in annotations.outputs):
        for spec in [*given[id], *default]:
            # The fixed range of one use need not be the input's.
            if not isinstance(spec, (Dynamic, Cast, KeepFloat, ReuseInput)) and not is_fixed(spec):
                found.setdefault(id, spec)
    return found


@dataclass(frozen=True, slots=True)
class _Borders:
    """A graph and its annotations, what a mapping says of single values and uses, and how remedies are worded."""

    graph: Graph
    annotations: Annotations
    leave_out: str
    observe: str
    kept: frozenset[str] = frozenset()
    """The values that the mapping keeps float."""
    edges: frozenset[Edge] = frozenset()
    """The uses that the mapping has entries for."""

    def wrong_inputs(self, ids: Iterable[str]) -> Iterator[Problem]:
        """Inputs that cannot be codes."""
        chosen = tuple(ids)
        if chosen:
            numbers, indexes, shared = non_tensors(self.graph), _indexes(self.graph), _shared(self.annotations)
            for id in chosen:
                hindrance = "is no tensor" if id in numbers else "is the index of an embedding" if id in indexes else ""
                yield from self._wrong_input(id, hindrance and f"{id!r} {hindrance}", shared)

    def _wrong_input(self, id: str, hindrance: str, shared: Shared) -> Iterator[Problem]:
        node, spec = self.graph[id], self.annotations.outputs.get(id)
        reason = next((problem.reason for problem in unfit(node, () if spec is None else (spec,))), "")
        reason = reason or hindrance
        if not reason and id in self.kept:
            reason = f"set_output({id!r}, None) keeps it float"
        unmeasured = [] if reason else _without_qparams(id, self.annotations, shared)
        if reason:
            yield BadConfig(node.place, f"it is to be codes: {reason}", self.leave_out)
        elif spec is None:
            reason = "nothing that reads it is quantized, so that it has no qparams"
            yield BadConfig(node.place, f"it is to be codes: {reason}", self.observe.format(id))
        elif unmeasured:
            reason = f"it is to be codes: as {told(unmeasured[0])} it has no qparams beforehand"
            yield BadConfig(node.place, reason, self.observe.format(id))

    def wrong_outputs(self) -> Iterator[Problem]:
        """Outputs that are wanted as codes and are not quantized, or leave in another way than the value is."""
        wanted = self.annotations.quantized_outputs
        edges, shared = (_output_edges(self.graph), _shared(self.annotations)) if wanted else ((), {})
        for index, element in enumerate(output_elements(self.graph) if wanted else ()):
            if index in wanted and isinstance(element, Ref):
                yield from self._wrong_output(index, element.id, edges[index], shared)
            elif index in wanted:
                reason = f"output {index} is no tensor but {element!r:.40}"
                yield BadConfig("output_quantized_indexes", reason, "leave the index out")

    def _wrong_output(self, index: int, id: str, edge: Edge, shared: Shared) -> Iterator[Problem]:
        node, unmeasured = self.graph[id], _without_qparams(id, self.annotations, shared)
        if id not in self.annotations.outputs or unmeasured:
            why = self.annotations.floats.get(id, "its operator writes float")
            if unmeasured:
                why = f"as {told(unmeasured[0])} it has no qparams beforehand"
            elif id in self.kept:
                why = f"set_output({id!r}, None) keeps it so"
            remedy = f"quantize it all the same with set_output({id!r}, Histogram()), or leave the index out"
            yield BadConfig(node.place, f"output {index} stays float: {why}", remedy)
        elif edge in self.annotations.inputs or edge in self.edges:
            reason = f"output {index} is to be the codes of {id!r}, and {edge} is configured for itself"
            remedy = f"configure the value, {id!r}, and not this use of it, or leave the index out"
            yield BadConfig(node.place, reason, remedy)


def _indexes(graph: Graph) -> frozenset[str]:
    """The values that embeddings look their rows up by: where no example was given, nothing else tells."""
    users = (node for node in graph if node.kind in ("embedding", "embedding_bag"))
    given = (value for node in users for name, value in node.args if name in ("input", "offsets"))
    return frozenset(id for value in given for id in refs(value))


def _output_edges(graph: Graph) -> tuple[Edge, ...]:
    """The use that each element of the output begins with, of all that leave the model."""
    (output,) = (node for node in graph if node.kind == "output")
    ((slot, result),) = output.args
    total, edges = sum(1 for _ in refs(result)), []
    for element in reversed(output_elements(graph)):
        total -= sum(1 for _ in refs(element))
        edges.append(Edge(output.id, slot, total))
    return tuple(reversed(edges))


def _shared(annotations: Annotations) -> Shared:
    """The points that share qparams, from each to its neighbours."""
    shared: dict[Point, list[Point]] = {}
    links = [
        (point, spec.other)
        for table in (annotations.inputs, annotations.outputs)
        for point, spec in table.items()
        if isinstance(spec, SharedWith)
    ]
    for group in (*annotations.groups, *links):
        for point, other in pairwise(group):
            shared.setdefault(point, []).append(other)
            shared.setdefault(other, []).append(point)
    return shared


def _without_qparams(value: str, annotations: Annotations, shared: Shared) -> list[Dynamic | Cast]:
    """The ways without qparams among those of a value and of all the points that share with it."""
    seen: dict[Point, None] = {value: None}
    queue: list[Point] = [value]
    while queue:
        for point in shared.get(queue.pop(), ()):
            if point not in seen:
                seen[point] = None
                queue.append(point)
    specs = [annotations.inputs.get(p) if isinstance(p, Edge) else annotations.outputs.get(p) for p in seen]
    return [spec for spec in specs if isinstance(spec, (Dynamic, Cast))]
