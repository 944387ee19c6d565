"""`QConfigMapping`: which operators, values and uses are quantized how, as an immutable value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pyrsistent import PMap, pmap

from qfunc.config.columns import aligned
from qfunc.config.point import Edge
from qfunc.config.qconfig import Choice, QConfig
from qfunc.ir import Graph
from qfunc.numerics.unmeasured import KeepFloat, Quantization, told
from qfunc.ops import name_of, type_name

Selector: TypeAlias = Callable[[Graph], Iterable[str]]
"""The ids of the nodes of a graph that an entry is about."""


@dataclass(frozen=True, slots=True)
class QConfigMapping:
    """Which operators get which `QConfig`. Every `set_*` returns a new mapping; the order of calls does not matter.

    From weakest to strongest: global, object type, selector, module-name regex (of several that match, the one set
    first), module name (the nearest enclosing module's), module name + object type + index, node. A `None` keeps what
    it names float. Single values and single uses have entries of their own, which hold whatever the operators say.

    >>> mapping = QConfigMapping().set_module_name("head", None)
    >>> mapping.module_names
    pmap({'head': None})
    """

    global_qconfig: Choice = None
    object_types: PMap[str, Choice] = pmap()
    selections: PMap[Selector, Choice] = pmap()
    module_name_regexes: tuple[tuple[str, Choice], ...] = ()
    module_names: PMap[str, Choice] = pmap()
    module_name_object_type_orders: PMap[tuple[str, str, int], Choice] = pmap()
    nodes: PMap[str, Choice] = pmap()
    outputs: PMap[str, Quantization] = pmap()
    edges: PMap[Edge, Quantization] = pmap()

    def set_global(self, qconfig: Choice) -> QConfigMapping:
        """Configure everything that nothing else names."""
        return replace(self, global_qconfig=qconfig)

    def set_object_type(self, object_type: Any, qconfig: Choice) -> QConfigMapping:
        """Configure a module class, a function, or a method by its name."""
        return replace(self, object_types=self.object_types.set(form_named(object_type), qconfig))

    def set_selected(self, selector: Selector, qconfig: Choice) -> QConfigMapping:
        """Configure the operators that a function picks from the graph, such as `depthwise_convolutions`.

        Two selectors may not pick one operator for two configurations.
        """
        return replace(self, selections=self.selections.set(selector, qconfig))

    def set_module_name_regex(self, module_name_regex: str, qconfig: Choice) -> QConfigMapping:
        """Configure the modules whose path a regular expression matches from its start."""
        kept = tuple((text, old) for text, old in self.module_name_regexes if text != module_name_regex)
        return replace(self, module_name_regexes=(*kept, (module_name_regex, qconfig)))

    def set_module_name(self, module_name: str, qconfig: Choice) -> QConfigMapping:
        """Configure a module and all inside it by path."""
        return replace(self, module_names=self.module_names.set(module_name, qconfig))

    def set_module_name_object_type_order(
        self, module_name: str, object_type: Any, index: int, qconfig: Choice
    ) -> QConfigMapping:
        """Configure the `index`-th use of an object type inside the module at a path."""
        key = (module_name, form_named(object_type), index)
        return replace(self, module_name_object_type_orders=self.module_name_object_type_orders.set(key, qconfig))

    def set_node(self, node: str, qconfig: Choice) -> QConfigMapping:
        """Configure one operator by the id of its node, as the printed graph shows it."""
        return replace(self, nodes=self.nodes.set(node, qconfig))

    def set_output(self, node: str, quantization: Quantization | None) -> QConfigMapping:
        """Quantize the value of a node in a way of its own, for all its uses; `None` keeps it float for them all."""
        return replace(self, outputs=self.outputs.set(node, KeepFloat() if quantization is None else quantization))

    def set_edge(self, edge: Edge, quantization: Quantization | None) -> QConfigMapping:
        """Quantize one use of a value in a way of its own; `None` keeps it float."""
        return replace(self, edges=self.edges.set(edge, KeepFloat() if quantization is None else quantization))

    def __repr__(self) -> str:
        parts = [f"global_qconfig={self.global_qconfig!r}"]
        for name, table in tables(self):
            if table:
                keys = list(table) if name == "module_name_regexes" else sorted(table, key=str)
                parts.append(f"{name}={{{', '.join(f'{key!r}: {table[key]!r}' for key in keys)}}}")
        return f"QConfigMapping({', '.join(parts)})"

    def __str__(self) -> str:
        return "\n".join(aligned([("entry", "activation", "weight"), *_entries(self)]))


def tables(mapping: QConfigMapping) -> tuple[tuple[str, Mapping[Any, Any]], ...]:
    """The entries of a mapping but the global one, by the names of their fields."""
    return (
        ("object_types", mapping.object_types),
        ("selections", mapping.selections),
        ("module_name_regexes", dict(mapping.module_name_regexes)),
        ("module_names", mapping.module_names),
        ("module_name_object_type_orders", mapping.module_name_object_type_orders),
        ("nodes", mapping.nodes),
        ("outputs", mapping.outputs),
        ("edges", mapping.edges),
    )


def form_named(object_type: Any) -> str:
    """How a call of this type is written, as `qfunc.match.form_of` says it of a node."""
    if isinstance(object_type, str):
        return f".{object_type.lstrip('.')}"
    return type_name(object_type) if isinstance(object_type, type) else name_of(object_type) or repr(object_type)


def _entries(mapping: QConfigMapping) -> Iterator[tuple[str, str, str]]:
    """Every entry in words, the strongest first."""
    for edge in sorted(mapping.edges, key=str):
        yield f"{edge.slot}[{edge.index}] of node {edge.user!r}", told(mapping.edges[edge]), ""
    for id in sorted(mapping.outputs, key=str):
        yield f"result of node {id!r}", told(mapping.outputs[id]), ""
    for entry, choice in _choices(mapping):
        yield (entry, *_told(choice))


def _choices(mapping: QConfigMapping) -> Iterator[tuple[str, Choice]]:
    yield from ((f"node {id!r}", mapping.nodes[id]) for id in sorted(mapping.nodes, key=str))
    for (name, form, index), choice in sorted(mapping.module_name_object_type_orders.items(), key=str):
        yield f"{form} no. {index} of module {name!r}", choice
    yield from ((f"module {name!r}", mapping.module_names[name]) for name in sorted(mapping.module_names, key=str))
    yield from ((f"modules like {text!r}", choice) for text, choice in mapping.module_name_regexes)
    selected = {selector_name(selector): choice for selector, choice in mapping.selections.items()}
    yield from ((f"what {name} selects", selected[name]) for name in sorted(selected))
    yield from ((f"type {form}", mapping.object_types[form]) for form in sorted(mapping.object_types, key=str))
    yield "everything else", mapping.global_qconfig


def kind_shown(value: object) -> str:
    """The type of a value in a message: one of the reference's, which may be called as qfunc's own, with its module.

    >>> kind_shown("x86"), kind_shown(QConfigMapping())
    ('str', 'QConfigMapping')
    """
    cls = type(value)
    return type_name(cls) if cls.__module__.startswith("torch.ao.") else cls.__name__


def selector_name(selector: Any) -> str:
    """A selector in words.

    >>> from qfunc.config.selectors import depthwise_convolutions
    >>> selector_name(depthwise_convolutions)
    'depthwise_convolutions'
    """
    return getattr(selector, "__qualname__", "") or repr(selector)


def _told(choice: Choice) -> tuple[str, str]:
    if choice is None:
        return "float", "float"
    if not isinstance(choice, QConfig):
        return repr(choice), ""
    both = dict.fromkeys(told(part) for part in (choice.of_inputs, choice.activation))
    return " -> ".join(both), told(choice.weight)
