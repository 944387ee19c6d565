"""`QConfig` and `QConfigMapping`: which observers to use where, as immutable values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from pyrsistent import PMap, pmap

from qfunc.errors import BadConfig, Problem, UnknownName
from qfunc.ir import Graph, Node
from qfunc.match import form_of
from qfunc.numerics.observers import Observer
from qfunc.ops import name_of, type_name


@dataclass(frozen=True, slots=True)
class QConfig:
    """The observers of a node: of its input and output activations, and of its weight."""

    activation: Observer[Any]
    weight: Observer[Any]


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
    object_types: PMap[str, Choice] = field(default_factory=pmap)
    module_name_regexes: tuple[tuple[str, Choice], ...] = ()
    module_names: PMap[str, Choice] = field(default_factory=pmap)
    module_name_object_type_orders: PMap[tuple[str, str, int], Choice] = field(default_factory=pmap)

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
        tables: tuple[tuple[str, Mapping[Any, Choice]], ...] = (
            ("object_types", self.object_types),
            ("module_name_regexes", dict(self.module_name_regexes)),
            ("module_names", self.module_names),
            ("module_name_object_type_orders", self.module_name_object_type_orders),
        )
        for name, table in tables:
            if table:
                keys = list(table) if name == "module_name_regexes" else sorted(table)
                parts.append(f"{name}={{{', '.join(f'{key!r}: {table[key]!r}' for key in keys)}}}")
        return f"QConfigMapping({', '.join(parts)})"


def resolve_qconfigs(mapping: QConfigMapping, graph: Graph) -> dict[str, Choice]:
    """The configuration of every node, by id."""
    counts: dict[tuple[str, str], int] = {}
    patterns = [(re.compile(text), qconfig) for text, qconfig in mapping.module_name_regexes]
    chosen: dict[str, Choice] = {}
    for node in graph:
        form, parent = form_of(node), _container(node)
        index = counts.get((parent, form), 0)
        counts[parent, form] = index + 1
        chosen[node.id] = _choose(mapping, patterns, node, (parent, form, index))
    return chosen


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


def problems_of(mapping: QConfigMapping, graph: Graph) -> list[Problem]:
    """Names that the graph's model does not have, and patterns that cannot be read."""
    names = [*mapping.module_names, *(name for name, _, _ in mapping.module_name_object_type_orders)]
    known = tuple(sorted(graph.modules))
    found: list[Problem] = [
        UnknownName(name, "module", known) for name in sorted(set(names)) if name not in graph.modules
    ]
    for text, _ in mapping.module_name_regexes:
        try:
            re.compile(text)
        except re.error as error:
            found.append(BadConfig(text, f"not a regular expression: {error}", "mend the pattern"))
    return found


def qconfigs(mapping: QConfigMapping) -> Iterator[QConfig]:
    """Every configuration that a mapping holds."""
    tables = (mapping.object_types.values(), mapping.module_names.values())
    orders = mapping.module_name_object_type_orders.values()
    regexes = [qconfig for _, qconfig in mapping.module_name_regexes]
    for qconfig in (mapping.global_qconfig, *(q for table in (*tables, orders, regexes) for q in table)):
        if qconfig is not None:
            yield qconfig


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
