"""`QConfig` and `QConfigMapping`: which observers to use where, as immutable values."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pyrsistent import PMap, pmap

from qfunc.config.columns import aligned
from qfunc.errors import BadConfig, Problem, UnknownName
from qfunc.ir import Graph, Node
from qfunc.match import form_of
from qfunc.numerics.observers import Observer, validate_observer
from qfunc.numerics.qparams import QuantSpec
from qfunc.ops import name_of, type_name


@dataclass(frozen=True, slots=True)
class QConfig:
    """The observers of a node: of its activations, and of its weight.

    `input_activation` is for its inputs, where they are to be quantized otherwise than its output.
    """

    activation: Observer[Any]
    weight: Observer[Any]
    input_activation: Observer[Any] | None = None

    @property
    def of_inputs(self) -> Observer[Any]:
        """The observer of its inputs."""
        return self.activation if self.input_activation is None else self.input_activation

    def __str__(self) -> str:
        given = "" if self.input_activation is None else f"input: {_told(self.input_activation)}; "
        return f"{given}activation: {_told(self.activation)}; weight: {_told(self.weight)}"


Choice: TypeAlias = QConfig | None
"""A configuration, or `None`: stay float."""


@dataclass(frozen=True, slots=True)
class QConfigMapping:
    """Which nodes get which `QConfig`. Every `set_*` returns a new mapping; the order of calls does not matter.

    From weakest to strongest: global, object type, module-name regex (of several that match, the one set first), module
    name (the nearest enclosing module's), module name + object type + index. A `None` keeps what it names float.

    >>> mapping = QConfigMapping().set_module_name("head", None)
    >>> mapping.module_names
    pmap({'head': None})
    """

    global_qconfig: Choice = None
    object_types: PMap[str, Choice] = pmap()
    module_name_regexes: tuple[tuple[str, Choice], ...] = ()
    module_names: PMap[str, Choice] = pmap()
    module_name_object_type_orders: PMap[tuple[str, str, int], Choice] = pmap()

    def set_global(self, qconfig: Choice) -> QConfigMapping:
        """Configure everything that nothing else names."""
        return replace(self, global_qconfig=qconfig)

    def set_object_type(self, object_type: Any, qconfig: Choice) -> QConfigMapping:
        """Configure a module class, a function, or a method by its name."""
        return replace(self, object_types=self.object_types.set(_form(object_type), qconfig))

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
        key = (module_name, _form(object_type), index)
        return replace(self, module_name_object_type_orders=self.module_name_object_type_orders.set(key, qconfig))

    def __repr__(self) -> str:
        parts = [f"global_qconfig={self.global_qconfig!r}"]
        for name, table in _tables(self):
            if table:
                keys = list(table) if name == "module_name_regexes" else sorted(table, key=str)
                parts.append(f"{name}={{{', '.join(f'{key!r}: {table[key]!r}' for key in keys)}}}")
        return f"QConfigMapping({', '.join(parts)})"

    def __str__(self) -> str:
        rows = [(entry, *_observers(choice)) for entry, choice in _entries(self)]
        return "\n".join(aligned([("entry", "activation", "weight"), *rows]))


def _entries(mapping: QConfigMapping) -> Iterator[tuple[str, Choice]]:
    """Every entry in words, the strongest first."""
    for (name, form, index), choice in sorted(mapping.module_name_object_type_orders.items(), key=str):
        yield f"{form} no. {index} of module {name!r}", choice
    yield from ((f"module {name!r}", mapping.module_names[name]) for name in sorted(mapping.module_names, key=str))
    yield from ((f"modules like {text!r}", choice) for text, choice in mapping.module_name_regexes)
    yield from ((f"type {form}", mapping.object_types[form]) for form in sorted(mapping.object_types, key=str))
    yield "everything else", mapping.global_qconfig


def _observers(choice: Choice) -> tuple[str, str]:
    if choice is None:
        return "float", "float"
    if not isinstance(choice, QConfig):
        return repr(choice), ""
    both = dict.fromkeys(_told(observer) for observer in (choice.of_inputs, choice.activation))
    return " -> ".join(both), _told(choice.weight)


def _told(observer: object) -> str:
    """An observer in words: its class, the integers it is for, and the scheme."""
    spec = getattr(observer, "spec", None)
    if not isinstance(spec, QuantSpec):
        return repr(observer)
    return f"{type(observer).__name__} {spec.dtype} {spec.quant_min}..{spec.quant_max} {spec.qscheme}"


def _tables(mapping: QConfigMapping) -> tuple[tuple[str, Mapping[Any, Choice]], ...]:
    return (
        ("object_types", mapping.object_types),
        ("module_name_regexes", dict(mapping.module_name_regexes)),
        ("module_names", mapping.module_names),
        ("module_name_object_type_orders", mapping.module_name_object_type_orders),
    )


def resolve_qconfigs(mapping: QConfigMapping, graph: Graph) -> dict[str, Choice]:
    """The configuration of every node, by id."""
    patterns = [(re.compile(text), qconfig) for text, qconfig in mapping.module_name_regexes]
    return {node.id: _choose(mapping, patterns, node, key) for node, key in numbered(graph)}


def numbered(graph: Graph) -> Iterator[tuple[Node, tuple[str, str, int]]]:
    """Every node with its key among `module_name_object_type_orders`: the module whose forward calls, what, and which.

    The calls of one thing by one module are counted from 0.
    """
    counts: dict[tuple[str, str], int] = {}
    for node in graph:
        form, parent = form_of(node), _container(node)
        index = counts.get((parent, form), 0)
        counts[parent, form] = index + 1
        yield node, (parent, form, index)


def _choose(
    mapping: QConfigMapping, patterns: list[tuple[re.Pattern[str], Choice]], node: Node, key: tuple[str, str, int]
) -> Choice:
    orders, path = mapping.module_name_object_type_orders, node.origin.module
    if key in orders:
        return orders[key]
    for prefix in _ancestors(path):
        if prefix in mapping.module_names:
            return mapping.module_names[prefix]
    for pattern, qconfig in patterns:
        if pattern.match(path):
            return qconfig
    # As in the reference, the type of the module that contains a function is stronger than the function itself.
    for name in (node.origin.type, key[1]):
        if name in mapping.object_types:
            return mapping.object_types[name]
    return mapping.global_qconfig


def problems_of(mapping: QConfigMapping, modules: Collection[str]) -> list[Problem]:
    """All that is wrong with a mapping for a model with these module paths.

    Names that the model does not have, patterns that cannot be read, entries that are no `QConfig`, and observers that
    are impossible for what they are to observe.
    """
    found: list[Problem] = [*_name_problems(mapping, modules), *_pattern_problems(mapping)]
    for place, choice in _choices(mapping):
        if choice is not None and not isinstance(choice, QConfig):
            reason = f"expected a QConfig or None, got a {type(choice).__name__}"
            found.append(BadConfig(place, reason, "pass QConfig(activation=observer, weight=observer), or None"))
        elif choice is not None:
            given = [choice.activation] if choice.input_activation is None else [choice.of_inputs, choice.activation]
            for activation in given:
                found += [*validate_observer(activation), *activation_problems(activation)]
            found += validate_observer(choice.weight)
    return list(dict.fromkeys(found))


def _name_problems(mapping: QConfigMapping, modules: Collection[str]) -> Iterator[Problem]:
    names = [*mapping.module_names, *(name for name, _, _ in mapping.module_name_object_type_orders)]
    for name in sorted(dict.fromkeys(names), key=str):
        if not isinstance(name, str):
            yield BadConfig(str(name), f"a module name must be a str, not {name!r}", "pass a path such as 'layer1.0'")
        elif name not in modules:
            yield UnknownName(name, "module", tuple(sorted(modules)))
    for form in sorted(mapping.object_types):
        if not form.removeprefix(".").replace(".", "").isidentifier():
            remedy = "pass a module class, a function that can be imported, or the name of a tensor method"
            yield BadConfig("object_type", f"{form} is no type of call", remedy)


def _pattern_problems(mapping: QConfigMapping) -> Iterator[Problem]:
    for text, _ in mapping.module_name_regexes:
        try:
            re.compile(text)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            remedy = "pass a regular expression as a str, such as r'layer1\\..*'"
            yield BadConfig(str(text), f"not a regular expression: {error}", remedy)


def activation_problems(observer: Observer[Any]) -> Iterator[Problem]:
    """Why an observer cannot be an activation's."""
    spec = getattr(observer, "spec", None)
    if isinstance(spec, QuantSpec) and spec.per_channel:
        reason = f"activations have one scale for the whole tensor, the qscheme {spec.qscheme} has one per channel"
        yield BadConfig(type(observer).__name__, reason, "use a per_tensor qscheme for activations")


def _choices(mapping: QConfigMapping) -> Iterator[tuple[str, Choice]]:
    """Every entry of a mapping, with its place."""
    yield "global_qconfig", mapping.global_qconfig
    for name, table in _tables(mapping):
        for key in sorted(table, key=str):
            yield f"{name}[{key!r}]", table[key]


def _form(object_type: Any) -> str:
    if isinstance(object_type, str):
        return f".{object_type.lstrip('.')}"
    return type_name(object_type) if isinstance(object_type, type) else name_of(object_type) or repr(object_type)


def _container(node: Node) -> str:
    """The path of the module whose forward makes the call."""
    written = node.origin.written
    if written is not None and written.op == "call_module":
        return written.target.rpartition(".")[0]
    return node.origin.module


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""
