"""Which entry of a `QConfigMapping` holds for each node of a graph, and what is wrong with a mapping."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pyrsistent import pmap

from qfunc.config.point import Edge, edges_by_slot, values_in
from qfunc.config.qconfig import Choice, QConfig, wrong_qconfig
from qfunc.config.qconfig_mapping import QConfigMapping, Selector, kind_shown, selector_name, tables
from qfunc.errors import BadConfig, Problem, UnknownName, UserFunctionFailed, told
from qfunc.ir import Graph, Node, Origin, Ref, TensorFact, fresh_id
from qfunc.match import form_of, form_of_origin
from qfunc.numerics.qparams import QuantSpec
from qfunc.numerics.unmeasured import KeepFloat, Quantization, ReuseInput, validate_quantization
from qfunc.params import FoldBatchNorm

Entry: TypeAlias = tuple[str, Any]
"""An entry of a mapping: the name of its field, and its key there."""

GLOBAL: Entry = ("global_qconfig", None)


@dataclass(frozen=True, slots=True)
class Chosen:
    """The configuration that holds for a node, and the entry it comes from."""

    qconfig: Choice
    entry: Entry


def resolve_qconfigs(mapping: QConfigMapping, graph: Graph) -> dict[str, Choice]:
    """The configuration of every node, by id; of a mapping without problems.

    >>> from torch import nn
    >>> from qfunc import trace
    >>> graph = trace(nn.Sequential(nn.ReLU()).eval()).unwrap()
    >>> resolve_qconfigs(QConfigMapping(), graph)["_0"] is None
    True
    """
    return {id: chosen.qconfig for id, chosen in Resolution(Lookup.of(mapping, graph), graph).chosen.items()}


@dataclass(frozen=True, slots=True)
class Lookup:
    """A mapping made ready for all nodes that it holds for: its patterns compiled, its selectors run.

    `problems` tells of selectors that fail or contradict each other; `unused` are those that pick nothing.
    """

    mapping: QConfigMapping
    patterns: tuple[tuple[str, re.Pattern[str], Choice], ...]
    selected: Mapping[str, tuple[Selector, Choice]]
    unused: tuple[Selector, ...]
    problems: tuple[Problem, ...]

    @staticmethod
    def of(mapping: QConfigMapping, graph: Graph, own: tuple[str, ...] | None = None) -> Lookup:
        """That of a mapping for a graph, or the nodes `own` of it, in graph order: selectors see only these."""
        patterns = tuple((text, re.compile(text), qconfig) for text, qconfig in mapping.module_name_regexes)
        seen = graph if own is None or not mapping.selections else _part(graph, own)
        held = frozenset(graph.order if own is None else own)
        found: dict[str, tuple[Selector, Choice]] = {}
        unused: list[Selector] = []
        problems: list[Problem] = []
        for selector in sorted(mapping.selections, key=selector_name):
            choice, name = mapping.selections[selector], selector_name(selector)
            ids = picked_by(selector, seen)
            if isinstance(ids, UserFunctionFailed):
                problems.append(ids)
                continue
            wrong = [id for id in ids if not isinstance(id, str) or not (id in graph.nodes or id in seen.nodes)]
            problems += [UnknownName(str(id), f"node (selected by {name})", graph.order) for id in wrong]
            picked = [id for id in ids if isinstance(id, str) and id in held]
            if not (picked or wrong):
                unused.append(selector)
            for id in picked:
                if found.setdefault(id, (selector, choice))[1] != choice and id not in mapping.nodes:
                    reason = f"{selector_name(found[id][0])} and {name} select it for different configurations"
                    remedy = f"let one of them leave it out, or say which holds with set_node({id!r}, qconfig)"
                    problems.append(BadConfig(graph[id].place, reason, remedy))
        return Lookup(mapping, patterns, found, tuple(unused), tuple(problems))


def picked_by(selector: Selector, graph: Graph) -> tuple[Any, ...] | UserFunctionFailed:
    """What a selector picks, which need not be ids of nodes, or how it failed."""
    try:
        return tuple(selector(graph))
    except Exception as error:  # noqa: BLE001 - the selector is the user's code
        return UserFunctionFailed(selector_name(selector), f"it raised {told(error)}")


def _part(graph: Graph, own: tuple[str, ...]) -> Graph:
    """The graph of some nodes: what they read of others are its inputs, what others read of them its outputs."""
    held = frozenset(own)
    inputs = {id for mine in own for id in graph[mine].uses()} - held
    nodes = {id: Node(id, "placeholder", fact=graph[id].fact, aliased=graph[id].aliased) for id in inputs}
    nodes.update((id, graph[id]) for id in own)
    order = tuple(id for id in graph.order if id in nodes)
    if not order or nodes[order[-1]].kind != "output":
        read = {id for node in graph if node.id not in held for id in node.uses()}
        result, leaving = fresh_id("output", graph.nodes), tuple(Ref(id) for id in own if id in read)
        nodes[result], order = Node(result, "output", (("value", leaving),)), (*order, result)
    return replace(graph, nodes=pmap(nodes), order=order)


class Resolution:
    """The entries that hold for the nodes of a graph.

    `problems` tells of fused operators with different configurations. The mapping's names of modules are relative to
    `base`, and it holds for the nodes `own` alone, where they are given. `is_default` tells the entries by type that
    are meant for any model.
    """

    def __init__(
        self,
        lookup: Lookup,
        graph: Graph,
        is_default: Callable[[str, Choice], bool] | None = None,
        *,
        base: str = "",
        own: tuple[str, ...] | None = None,
    ) -> None:
        self._base = base
        self.problems: list[Problem] = []
        self._mapping = lookup.mapping
        self._lookup = lookup
        self._meant_for_any = is_default
        self.chosen = {node.id: self._choose(node, key) for node, key in numbered(graph, base, own)}
        for id in self.chosen:
            self._compare_parts(graph[id], graph)

    def _choose(self, node: Node, key: tuple[str, str, int]) -> Chosen:
        mapping = self._mapping
        if node.id in mapping.nodes:
            return Chosen(mapping.nodes[node.id], ("nodes", node.id))
        if key in mapping.module_name_object_type_orders:
            return Chosen(mapping.module_name_object_type_orders[key], ("module_name_object_type_orders", key))
        named = self._by_name(node.origin.module)
        if named is not None:
            return named
        if node.id in self._lookup.selected:
            selector, choice = self._lookup.selected[node.id]
            return Chosen(choice, ("selections", selector))
        return self._by_type((node.origin.type, key[1]))

    def _by_name(self, path: str) -> Chosen | None:
        path = relative(path, self._base)
        for prefix in ancestors(path):
            if prefix in self._mapping.module_names:
                return Chosen(self._mapping.module_names[prefix], ("module_names", prefix))
        for text, pattern, qconfig in self._lookup.patterns:
            if pattern.match(path):
                return Chosen(qconfig, ("module_name_regexes", text))
        return None

    def _by_type(self, names: tuple[str, str]) -> Chosen:
        # As in the reference, the type of the module that contains a function is stronger than the function itself.
        for name in names:
            if name in self._mapping.object_types:
                return Chosen(self._mapping.object_types[name], ("object_types", name))
        return Chosen(self._mapping.global_qconfig, GLOBAL)

    def _compare_parts(self, node: Node, graph: Graph) -> None:
        """A problem where an entry names a part of a fused operator and wants something else than holds for it."""
        chosen = self.chosen[node.id]
        if chosen.entry[0] in ("nodes", "module_name_object_type_orders", "selections"):
            return  # they name the operator as it is in the graph, all of it
        for origin in parts_of(node, graph):
            names = (origin.type, form_of_origin(origin))
            part = self._by_name(origin.module) or self._by_type(names)
            if part.entry == GLOBAL or part.qconfig == chosen.qconfig or self._is_default(part):
                continue
            where = origin.module or names[1]
            reason = f"it is fused with {where!r}, for which {_named(part.entry)} says something else"
            remedy = "configure both alike, or keep them apart: CustomConfig(unfused_names=...)"
            self.problems.append(BadConfig(node.place, reason, remedy))

    def _is_default(self, chosen: Chosen) -> bool:
        field, key = chosen.entry
        known = self._meant_for_any
        return field == "object_types" and known is not None and known(key, chosen.qconfig)


def _named(entry: Entry) -> str:
    field, key = entry
    return f"{field}[{key!r}]"


def parts_of(node: Node, graph: Graph) -> Iterator[Origin]:
    """What was fused into a node: batch norms folded into its weight, and the operators behind it."""
    weight = node.get("weight") if node.has("weight") else None
    while isinstance(weight, FoldBatchNorm):
        mean, _, _ = getattr(weight.mean, "name", "").rpartition(".")
        fact = graph.modules.get(mean)
        if fact is not None and fact.type.startswith("torch.nn.BatchNorm"):
            yield Origin(mean, fact.type)
        weight = weight.weight
    for post in node.post:
        if post.origin.module or post.origin.written is not None:
            yield post.origin


def relative(path: str, base: str) -> str:
    """The path of a module as seen from the module at `base`.

    >>> relative("sub.conv", "sub"), relative("sub.conv", "")
    ('conv', 'sub.conv')
    """
    return path if not base else path.removeprefix(base).removeprefix(".")


def numbered(
    graph: Graph, base: str = "", own: Iterable[str] | None = None
) -> Iterator[tuple[Node, tuple[str, str, int]]]:
    """Every node with its key among `module_name_object_type_orders`: the module whose forward calls, what, and which.

    The calls of one thing by one module are counted from 0. Modules are named as seen from `base`; where `own` nodes
    are given, in graph order, there are only these.
    """
    counts: dict[tuple[str, str], int] = {}
    for node in map(graph.nodes.__getitem__, graph.order if own is None else own):
        form, parent = form_of(node), relative(_container(node), base)
        index = counts.get((parent, form), 0)
        counts[parent, form] = index + 1
        yield node, (parent, form, index)


def _container(node: Node) -> str:
    """The path of the module whose forward makes the call."""
    written = node.origin.written
    if written is not None and written.op == "call_module":
        return written.target.rpartition(".")[0]
    return node.origin.module


def ancestors(path: str) -> Iterator[str]:
    """The path of a module and those of all that it is in, the model's own last.

    >>> list(ancestors("layer1.0"))
    ['layer1.0', 'layer1', '']
    """
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def problems_of(mapping: QConfigMapping, modules: Collection[str]) -> list[Problem]:
    """All that is wrong with a mapping for a model with these module paths.

    Names that the model does not have, patterns that cannot be read, entries that are no `QConfig`, and observers that
    are impossible for what they are to observe.
    """
    found: list[Problem] = [*_name_problems(mapping, modules), *_pattern_problems(mapping)]
    for place, choice in _choices(mapping):
        if isinstance(choice, QConfig):
            found += wrong_qconfig(choice)
        elif choice is not None:
            reason = f"expected a QConfig or None, got a {kind_shown(choice)}"
            found.append(BadConfig(place, reason, "pass QConfig(activation=observer, weight=observer), or None"))
    outputs = [(str(id), mapping.outputs[id]) for id in sorted(mapping.outputs, key=str)]
    edges = [(str(edge), mapping.edges[edge]) for edge in sorted(mapping.edges, key=str)]
    for place, way in (*outputs, *edges):
        found += validate_quantization(way)
        if isinstance(way, ReuseInput):
            remedy = "configure the operator: set_node(id, QConfig(ReuseInput(), weight))"
            found.append(BadConfig(place, "a single place has no input whose qparams to reuse", remedy))
    return list(dict.fromkeys(found))


def places_of(mapping: QConfigMapping, graph: Graph) -> Iterator[Problem]:
    """Nodes and uses that a mapping names and the graph does not have, and named values that cannot be quantized."""
    edges = [edge for edge in sorted(mapping.edges, key=str) if _is_edge(edge)]
    named = (*mapping.nodes, *mapping.outputs, *(edge.user for edge in edges))
    for id in sorted(dict.fromkeys(named), key=str):
        if id not in graph.nodes:
            yield UnknownName(str(id), "node", graph.order)
    for key in sorted(mapping.edges, key=str):
        if not _is_edge(key):
            yield BadConfig("edges", f"{key!r} is no use of a value", "pass Edge(user, slot, index)")
    carried = values_of((edge for edge in edges if edge.user in graph.nodes), graph)
    for edge in edges:
        if edge.user in graph.nodes and edge not in carried:
            reason = f"it has no value no. {edge.index} in its argument {edge.slot!r}"
            yield BadConfig(edge.user, reason, "name an argument that holds values, and count them from 0")
    ways: dict[str, list[Quantization]] = {}
    uses = ((carried[edge], mapping.edges[edge]) for edge in edges if edge in carried)
    for id, way in (*uses, *mapping.outputs.items()):
        if not isinstance(way, KeepFloat):
            ways.setdefault(id, []).append(way)
    for id in (id for id in graph.order if id in ways):
        yield from unfit(graph[id], ways[id])


def values_of(edges: Iterable[Edge], graph: Graph) -> dict[Edge, str]:
    """The values that uses by nodes of a graph carry, without those that there are not; each argument is read once."""
    found: dict[Edge, str] = {}
    for (user, slot), of_slot in edges_by_slot(edges).items():
        values = values_in(graph[user], slot)
        found.update((edge, values[edge.index]) for edge in of_slot if 0 <= edge.index < len(values))
    return found


def unfit(node: Node, ways: Iterable[object]) -> Iterator[BadConfig]:
    """Why a value cannot be quantized: not at all, or not in one of these ways."""
    fact, remedy = node.fact, "leave it out: only tensors of float32 are quantized"
    if node.kind == "output":
        yield BadConfig(node.id, "it is no value but what the model returns", "name the value that it returns")
    elif node.aliased:
        yield BadConfig(node.place, f"the memory of {node.id!r} is changed in place", "leave it float")
    elif isinstance(fact, tuple):
        yield BadConfig(node.place, f"{node.id!r} is no tensor", remedy)
    elif isinstance(fact, TensorFact) and fact.dtype != "float32":
        yield BadConfig(node.place, f"{node.id!r} is a tensor of {fact.dtype}", remedy)
    elif isinstance(fact, TensorFact):
        specs = [spec for way in ways if isinstance(spec := getattr(way, "spec", None), QuantSpec)]
        axes = {spec.ch_axis for spec in specs if spec.ch_axis is not None}
        for axis in sorted(axis for axis in axes if axis >= len(fact.shape)):
            reason = f"ch_axis {axis} is no axis of {node.id!r}, a tensor of {len(fact.shape)} dimensions"
            yield BadConfig(node.place, reason, "choose the axis of the channels as ch_axis")


def _is_edge(key: object) -> bool:
    return isinstance(key, Edge) and isinstance(key.slot, str) and isinstance(key.index, int)


def _name_problems(mapping: QConfigMapping, modules: Collection[str]) -> Iterator[Problem]:
    names = [*mapping.module_names, *(name for name, _, _ in mapping.module_name_object_type_orders)]
    known = tuple(sorted(modules))
    for name in sorted(dict.fromkeys(names), key=str):
        if not isinstance(name, str):
            yield BadConfig(str(name), f"a module name must be a str, not {name!r}", "pass a path such as 'layer1.0'")
        elif name not in modules:
            yield UnknownName(name, "module", known)
    for form in sorted(mapping.object_types):
        if not form.removeprefix(".").replace(".", "").isidentifier():
            remedy = "pass a module class, a function that can be imported, or the name of a tensor method"
            yield BadConfig("object_type", f"{form} is no type of call", remedy)
    for selector in mapping.selections:
        if not callable(selector):
            remedy = "pass a function from a graph to the ids of its nodes, such as depthwise_convolutions"
            yield BadConfig("selections", f"{selector!r} is no function", remedy)


def _pattern_problems(mapping: QConfigMapping) -> Iterator[Problem]:
    texts = [text for text, _ in mapping.module_name_regexes]
    for text in (text for text, times in Counter(texts).items() if times > 1):
        yield BadConfig(str(text), "the regular expression stands there twice", "set it once: set_module_name_regex")
    for text in texts:
        try:
            re.compile(text)
        except (re.error, TypeError, OverflowError, RecursionError) as error:
            remedy = "pass a regular expression as a str, such as r'layer1\\..*'"
            yield BadConfig(str(text), f"not a regular expression: {error}", remedy)


def _choices(mapping: QConfigMapping) -> Iterator[tuple[str, Choice]]:
    """Every entry of a mapping that configures operators, with its place."""
    yield "global_qconfig", mapping.global_qconfig
    for name, table in tables(mapping):
        if name not in ("outputs", "edges"):
            for key in sorted(table, key=str):
                yield f"{name}[{key!r}]", table[key]
