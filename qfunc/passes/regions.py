"""Which standalone module each node of a graph is in, and which configuration holds there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches

from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig, Standalone
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.resolve import ancestors, problems_of, relative
from qfunc.errors import Problem, UnknownName
from qfunc.ir import Graph, Note
from qfunc.ops import type_name


@dataclass(frozen=True, slots=True)
class Region:
    """A standalone module, by its path, and what holds in it.

    The names in `qconfig_mapping` are relative to the module at the path `base`: this one, or the standalone module
    around it whose mapping it takes. A mapping or backend of `None` is that of the graph as a whole.
    """

    path: str
    qconfig_mapping: QConfigMapping | None = None
    base: str = ""
    backend: BackendConfig | None = None


def regions(graph: Graph, custom: CustomConfig) -> dict[str, Region]:
    """The region of each node that is in one, by the node's id; of nested standalone modules the innermost holds.

    >>> from qfunc.ir import Node, Origin
    >>> from pyrsistent import pmap
    >>> nodes = {"x": Node("x", "relu", origin=Origin("a.b")), "y": Node("y", "relu", origin=Origin("c"))}
    >>> found = regions(Graph(pmap(nodes), ("x", "y")), CustomConfig(standalone_names={"a": Standalone()}))
    >>> {id: region.path for id, region in found.items()}
    {'x': 'a'}
    """
    if not (custom.standalone_names or custom.standalone_types):
        return {}
    around = Regions(graph, custom)
    found = ((node.id, around.of(node.origin.module)) for node in graph)
    return {id: region for id, region in found if region is not None}


class Regions:
    """The regions of one graph, by the path of a module; each path is looked at once."""

    def __init__(self, graph: Graph, custom: CustomConfig) -> None:
        self._modules = graph.modules
        self._names = custom.standalone_names
        self._types = _by_type(custom)
        self._found: dict[str, Region | None] = {}

    def of(self, path: str) -> Region | None:
        """The innermost region that a module is in."""
        if path not in self._found:
            outer = self.of(path.rpartition(".")[0]) if path else None
            own = self._names.get(path) or self._types.get(getattr(self._modules.get(path), "type", ""))
            self._found[path] = outer if own is None else _entered(path, own, outer)
        return self._found[path]


def _entered(path: str, own: Standalone, outer: Region | None) -> Region:
    around = outer or Region("")
    backend = around.backend if own.backend is None else own.backend
    if own.qconfig_mapping is None:
        return Region(path, around.qconfig_mapping, around.base, backend)
    return Region(path, own.qconfig_mapping, path, backend)


def _by_type(custom: CustomConfig) -> dict[str, Standalone]:
    return {type_name(cls): standalone for cls, standalone in custom.standalone_types.items()}


def _entries(graph: Graph, custom: CustomConfig) -> list[tuple[Standalone, list[str]]]:
    """Each standalone configuration, with the paths of the modules that it is for."""
    of_type: dict[str, list[str]] = {}
    for path in sorted(graph.modules):
        of_type.setdefault(graph.modules[path].type, []).append(path)
    names = custom.standalone_names.items()
    return [
        *((standalone, [name] if name in graph.modules else []) for name, standalone in names),
        *((standalone, of_type.get(cls, [])) for cls, standalone in _by_type(custom).items()),
    ]


def region_problems(graph: Graph, custom: CustomConfig) -> Iterator[Problem]:
    """Standalone modules that do not exist, and what is wrong with their mappings for the modules inside them."""
    unknown = [name for name in custom.standalone_names if name not in graph.modules]
    known = tuple(sorted(graph.modules)) if unknown else ()
    yield from (UnknownName(name, "module", known) for name in unknown)
    entries = [
        (given, paths) for given, paths in _entries(graph, custom) if given.qconfig_mapping is not None and paths
    ]
    around: dict[str, list[set[str]]] = {}
    inside = [set[str]() for _ in entries]
    for (_, paths), names in zip(entries, inside, strict=True):
        for path in paths:
            around.setdefault(path, []).append(names)
    for module in graph.modules if around else ():
        for path in ancestors(module):
            for names in around.get(path, ()):
                names.add(relative(module, path))
    for (standalone, paths), names in zip(entries, inside, strict=True):
        assert standalone.qconfig_mapping is not None
        for problem in problems_of(standalone.qconfig_mapping, names):
            if isinstance(problem, UnknownName) and problem.what == "module":
                yield replace(problem, what=f"submodule of {paths[0]!r} named")
            else:
                yield problem


def region_notes(graph: Graph, custom: CustomConfig, found: dict[str, Region]) -> Iterator[Note]:
    """Standalone modules without an operator of their own, and types that no module is of."""
    paths = {region.path for region in found.values()}
    for name in custom.standalone_names:
        if name in graph.modules and name not in paths:
            yield Note(f"standalone_names[{name!r}]", "has no operator of its own in the graph")
    types = sorted({fact.type for fact in graph.modules.values()})
    for name in _by_type(custom):
        if name not in types:
            close = get_close_matches(name, types, n=2) or types[:8]
            yield Note(f"standalone_types[{name}]", f"matches no module; there are {', '.join(close)}")
