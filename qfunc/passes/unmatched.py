"""Entries of a configuration that match no node of a graph, or change nothing in it, as notes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from qfunc.config.point import used
from qfunc.config.qconfig_mapping import QConfigMapping, selector_name
from qfunc.config.resolve import ancestors, numbered, parts_of, relative
from qfunc.ir import Graph, Note
from qfunc.numerics.unmeasured import KeepFloat
from qfunc.passes.rules import Rules


def unmatched(mapping: QConfigMapping, held: Sequence[Rules]) -> tuple[Note, ...]:
    """A note for each entry by type, selector, name, regex or order that names none of the nodes that `held` decide.

    Whether or not a stronger one names it. The entries of default configurations are meant for any model: they are not
    told of.
    """
    rules = held[0]
    graph, default = rules.graph, rules.backend.qconfig_mapping
    names = _of_names(mapping, held) if mapping.module_names else ()
    idle = sorted({selector_name(selector) for selector in rules.unused if selector not in default.selections})
    selections = tuple(Note(f"selections[{name!r}]", "selects no node of this graph") for name in idle)
    if not (mapping.object_types or mapping.module_name_regexes or mapping.module_name_object_type_orders):
        return (*selections, *names)
    decided = {id for one in held for id in one.own}
    own = [id for id in graph.order if id in decided]
    calls = [(node, key) for node, key in numbered(graph, rules.base, own) if node.kind not in _PLUMBING]
    paths = dict.fromkeys(relative(node.origin.module, rules.base) for node, _ in calls)
    # A function or a method is configured by its own name, and by the type of the module that contains it.
    forms = dict.fromkeys(name for node, (_, form, _) in calls for name in (form, node.origin.type))
    keys = dict.fromkeys(key for _, key in calls)
    types = [
        form
        for form in mapping.object_types
        if form not in forms and not rules.is_default(form, mapping.object_types[form])
    ]
    regexes = [text for text, _ in mapping.module_name_regexes if not any(map(re.compile(text).match, paths))]
    orders = [key for key in mapping.module_name_object_type_orders if key not in keys]
    return (
        *_of_types(sorted(types), graph, forms),
        *selections,
        *names,
        *_of_regexes(regexes, paths),
        *_of_orders(sorted(orders), keys),
    )


def without_effect(mapping: QConfigMapping, rules: Rules) -> Iterator[Note]:
    """A note for each entry of a value or a use that keeps float what nothing would have quantized."""
    outputs = {id for id, way in mapping.outputs.items() if isinstance(way, KeepFloat) and id in rules.own}
    edges = {edge for edge, way in mapping.edges.items() if isinstance(way, KeepFloat) and edge.user in rules.own}
    if not (outputs or edges):
        return
    graph, bare = rules.graph, rules.without_places()
    quantized = {*bare.outputs, *(used(graph[edge.user], edge) for edge in bare.inputs)}
    for id in (id for id in graph.order if id in outputs - quantized):
        yield Note(f"outputs[{id!r}]", "changes nothing; no operator that is quantized here makes or reads this value")
    floats = {id for id, way in mapping.outputs.items() if isinstance(way, KeepFloat)}
    rounded = {*bare.outputs, *mapping.outputs} - floats
    for edge in sorted(edges, key=lambda edge: (edge.user, edge.slot, edge.index)):
        value = used(graph[edge.user], edge)
        if edge in bare.inputs and value in rounded:
            yield Note(
                f"edges[{edge}]",
                f"changes nothing; {value!r} is quantized for all its uses; "
                f"to read it unrounded, keep it float for them all: set_output({value!r}, None)",
            )
        elif edge not in bare.inputs:
            hint = f"to read {value!r} unrounded, keep it float for all uses: set_output({value!r}, None)"
            yield Note(
                f"edges[{edge}]",
                f"changes nothing; the use is not quantized{f'; {hint}' if value in bare.outputs else ''}",
            )


_PLUMBING = ("placeholder", "get_attr", "output")


def _of_types(forms: Iterable[str], graph: Graph, known: Iterable[str]) -> Iterator[Note]:
    fused = {post.origin.type for node in graph for post in node.post if post.origin.type}
    modules = {fact.type for fact in graph.modules.values()}
    for form in forms:
        if form in fused:
            hint = "the graph's are fused behind other operators, whose type or name to configure instead"
        elif form in modules:
            hint = "the model's are folded into other operators, removed, or never called on their own"
        else:
            hint = _closest(form, known)
        yield Note(f"object_types[{form!r}]", f"matches no operator; {hint}")


def _of_names(mapping: QConfigMapping, held: Sequence[Rules]) -> tuple[Note, ...]:
    """Modules that there are, and that no operator or part of one is in."""
    graph, base = held[0].graph, held[0].base
    nodes = (graph[id] for one in held for id in one.own if graph[id].kind not in _PLUMBING)
    paths = {origin.module for node in nodes for origin in (node.origin, *parts_of(node, graph))}
    known = {name for path in paths for name in ancestors(relative(path, base))}
    reason = "names a module without an operator: what it does is removed, or is never called on its own"
    return tuple(Note(f"module_names[{name!r}]", reason) for name in sorted(set(mapping.module_names) - known))


def _of_regexes(texts: Iterable[str], paths: Iterable[str]) -> Iterator[Note]:
    for text in texts:
        plain = re.sub(r"[^\w.]|\\.|\.[*+]", lambda found: "." if found[0] == r"\." else "", text)
        hint = _closest(plain, paths)
        yield Note(f"module_name_regexes[{text!r}]", f"matches the path of no module with an operator; {hint}")


def _of_orders(orders: Iterable[tuple[str, str, int]], known: Iterable[tuple[str, str, int]]) -> Iterator[Note]:
    counts: dict[str, dict[str, int]] = {}
    for name, form, _ in known:
        of_module = counts.setdefault(name, {})
        of_module[form] = of_module.get(form, 0) + 1
    for name, form, index in orders:
        entry = f"module_name_object_type_orders[{name!r}, {form!r}, {index}]"
        found, who = counts.get(name, {}), repr(name) if name else "the model"
        if form in found:
            times = "once" if found[form] == 1 else f"{found[form]} times"
            hint = f"{who} calls it {times}, counted from 0"
        else:
            hint = f"of what {who} itself calls, {_closest(form, found)}" if found else f"{who} itself calls none"
        yield Note(entry, f"matches no call; {hint}")


def _closest(text: str, known: Iterable[str]) -> str:
    """The names that may be meant, or those that there are."""
    names = [name for name in known if name]
    last = {name.rpartition(".")[2].lower(): name for name in reversed(names)}
    wanted = text.rpartition(".")[2].lower()
    close = [
        *get_close_matches(text, names, n=2, cutoff=0.85),
        *(last[key] for key in get_close_matches(wanted, list(last), n=2)),
    ]
    if close:
        return f"the closest there: {' and '.join(dict.fromkeys(close[:2]))}"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"there are {', '.join(sorted(names)[:8])}{more}" if names else "there is none at all"
