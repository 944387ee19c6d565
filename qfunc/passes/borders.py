"""Inputs and outputs of a model that are codes: which values these are, and what keeps one from being quantized."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from pyrsistent import pmap

from qfunc.config.annotation import Annotations, Spec
from qfunc.config.custom_config import CustomConfig
from qfunc.config.point import used
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.errors import BadConfig, Problem, UnknownName
from qfunc.ir import Arg, DictArg, Graph, ListArg, RecordArg, Ref
from qfunc.numerics.fake_quantize import is_fixed
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, Quantization, ReuseInput


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
    for id in (id for id in chosen if id not in values):
        reason = "nothing that reads it is quantized, so that it has no qparams"
        problems.append(BadConfig(graph[id].place, reason, f"quantize it: set_output({id!r}, Histogram())"))
    problems += _unquantized(output_elements(graph), graph, annotations, custom.output_quantized_indexes)
    found = replace(
        annotations,
        outputs=annotations.outputs.update(pmap(values)),
        quantized_inputs=frozenset(chosen),
        quantized_outputs=frozenset(custom.output_quantized_indexes),
    )
    return found, problems


def wrong_borders(graph: Graph, annotations: Annotations) -> Iterator[Problem]:
    """Inputs and outputs that annotations make codes and that cannot be."""
    for id in sorted(annotations.quantized_inputs):
        if id not in graph.nodes or graph[id].kind != "placeholder":
            yield UnknownName(str(id), "input", tuple(node.id for node in graph if node.kind == "placeholder"))
        elif isinstance(annotations.outputs.get(id, KeepFloat()), (Dynamic, Cast, KeepFloat)):
            remedy = f"give it an observer: outputs.set({id!r}, Histogram())"
            yield BadConfig(graph[id].place, "it is to be codes, and has no qparams", remedy)
    elements = output_elements(graph)
    yield from _no_such("output", tuple(sorted(annotations.quantized_outputs)), len(elements))
    yield from _unquantized(elements, graph, annotations, sorted(annotations.quantized_outputs))


def _no_such(what: str, indexes: tuple[int, ...], count: int) -> Iterator[Problem]:
    for index in indexes:
        if not 0 <= index < count:
            reason = f"there is no {what} {index}, the model has {count}"
            yield BadConfig(f"{what}_quantized_indexes", reason, f"count the {what}s from 0")


def _specs(graph: Graph, annotations: Annotations, mapping: QConfigMapping, inputs: Iterable[str]) -> dict[str, Spec]:
    """How inputs are quantized: as their first quantized use, or as the configuration quantizes activations."""
    wanted, position = frozenset(inputs), {id: index for index, id in enumerate(graph.order)}
    chosen = mapping.global_qconfig
    default: list[Spec | Quantization] = [] if chosen is None else [chosen.of_inputs]
    given: dict[str, list[Spec | Quantization]] = {id: [] for id in wanted}
    for edge in sorted(annotations.inputs, key=lambda edge: (position[edge.user], edge.slot, edge.index)):
        value = used(graph[edge.user], edge)
        if value in wanted:
            given[value].append(annotations.inputs[edge])
    found: dict[str, Spec] = {}
    for id in wanted:
        own = annotations.outputs.get(id)
        for spec in [*([own] if own is not None else []), *given[id], *default]:
            # The fixed range of one use need not be the input's.
            if not isinstance(spec, (Dynamic, Cast, KeepFloat, ReuseInput)) and (spec is own or not is_fixed(spec)):
                found.setdefault(id, spec)
    return found


def _unquantized(
    elements: tuple[Arg, ...], graph: Graph, annotations: Annotations, indexes: Iterable[int]
) -> Iterator[Problem]:
    """Outputs that are wanted as codes and are not quantized."""
    for index in indexes:
        element = elements[index] if 0 <= index < len(elements) else None
        spec = annotations.outputs.get(element.id) if isinstance(element, Ref) else None
        if isinstance(element, Ref) and isinstance(spec, (Dynamic, Cast, type(None))):
            why = annotations.floats.get(element.id, "its operator writes float")
            remedy = f"quantize it all the same with set_output({element.id!r}, Histogram()), or leave the index out"
            yield BadConfig(graph[element.id].place, f"output {index} stays float: {why}", remedy)
        elif 0 <= index < len(elements) and not isinstance(element, Ref):
            reason = f"output {index} is no tensor but {element!r:.40}"
            yield BadConfig("output_quantized_indexes", reason, "leave the index out")
