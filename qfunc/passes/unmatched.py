"""Entries of a configuration that match no node of a graph, or change nothing in it, as notes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches

from qfunc.config.annotation import Annotations, SharedWith
from qfunc.config.qconfig_mapping import QConfigMapping, selector_name
from qfunc.config.resolve import ancestors, numbered, parts_of, relative, values_of
from qfunc.ir import Graph, Note
from qfunc.numerics.unmeasured import KeepFloat
from qfunc.passes.rules import Rules

MOST_HINTS = 5
"""To look for the name that was meant is slow: of many entries it is done for the first."""


def unmatched(mapping: QConfigMapping, rules: Sequence[Rules]) -> tuple[Note, ...]:
    """A note for each entry by type, selector, name, regex or order that names none of the nodes that `rules` decide.

    Whether or not a stronger one names it. The entries of default configurations are meant for any model: they are not
    told of. All of the `rules` are of this mapping, in the parts of one graph.
    """
    graph = rules[0].graph
    defaults = {selector for one in rules for selector in one.backend.qconfig_mapping.selections}
    unused = frozenset(rules[0].lookup.unused).intersection(*(one.lookup.unused for one in rules))
    idle = sorted({selector_name(selector) for selector in unused - defaults})
    selections = tuple(Note(f"selections[{name!r}]", "selects no node of this graph") for name in idle)
    names = _of_names(mapping, rules) if mapping.module_names else ()
    if not (mapping.object_types or mapping.module_name_regexes or mapping.module_name_object_type_orders):
        return (*selections, *names)
    calls = [
        (node, key, relative(node.origin.module, one.base))
        for one in rules
        for node, key in numbered(graph, one.base, one.own)
        if node.kind not in _PLUMBING
    ]
    paths = dict.fromkeys(path for _, _, path in calls)
    # A function or a method is configured by its own name, and by the type of the module that contains it.
    forms = dict.fromkeys(name for node, (_, form, _), _ in calls for name in (form, node.origin.type))
    keys = dict.fromkeys(key for _, key, _ in calls)
    types = [
        form
        for form, choice in mapping.object_types.items()
        if form not in forms and not any(one.is_default(form, choice) for one in rules)
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


def has_kept_places(mapping: QConfigMapping) -> bool:
    """Whether some entry of a value or a use keeps it float."""
    return any(isinstance(way, KeepFloat) for way in (*mapping.outputs.values(), *mapping.edges.values()))


def without_effect(mapping: QConfigMapping, rules: Sequence[Rules], bare: Annotations) -> Iterator[Note]:
    """A note for each entry of a value or a use that keeps float what nothing would have quantized.

    `bare` is what is quantized without such entries. All of the `rules` are of this mapping.
    """
    outputs = {id for id, way in mapping.outputs.items() if isinstance(way, KeepFloat)}
    edges = {edge for edge, way in mapping.edges.items() if isinstance(way, KeepFloat)}
    if not (outputs or edges):
        return
    graph, own = rules[0].graph, frozenset[str]().union(*(one.own for one in rules))
    read = values_of((edge for edge in bare.inputs if edge.user in own), graph)
    idle = outputs.difference(bare.outputs, read.values())
    for id in (id for id in graph.order if id in idle):
        yield Note(f"outputs[{id!r}]", "changes nothing; no operator that is quantized here makes or reads this value")
    rounded, carried = {*bare.outputs, *mapping.outputs} - outputs, values_of(edges, graph)
    for edge in sorted(edges, key=lambda edge: (edge.user, edge.slot, edge.index)):
        value = carried[edge]
        if edge not in bare.inputs and value not in rounded and bare.outputs.get(edge.user) != SharedWith(value):
            yield Note(f"edges[{edge}]", "changes nothing; the use is not quantized")


_PLUMBING = ("placeholder", "get_attr", "output")


def _of_types(forms: Iterable[str], graph: Graph, known: Iterable[str]) -> Iterator[Note]:
    fused = {post.origin.type for node in graph for post in node.post if post.origin.type}
    modules = {fact.type for fact in graph.modules.values()}
    for position, form in enumerate(forms):
        if form in fused:
            hint = "the graph's are fused behind other operators, whose type or name to configure instead"
        elif form in modules:
            hint = "the model's are folded into other operators, removed, or never called on their own"
        else:
            hint = _hint(position, form, known)
        yield Note(f"object_types[{form!r}]", _told("matches no operator", hint))


def _of_names(mapping: QConfigMapping, held: Sequence[Rules]) -> tuple[Note, ...]:
    """Modules that there are, and that no operator or part of one is in."""
    graph = held[0].graph
    nodes = ((graph[id], one.base) for one in held for id in one.own if graph[id].kind not in _PLUMBING)
    found = ((o.module, base) for node, base in nodes for o in (node.origin, *parts_of(node, graph)))
    known = {name for path, base in dict.fromkeys(found) for name in ancestors(relative(path, base))}
    reason = "names a module without an operator: what it does is removed, or is never called on its own"
    return tuple(Note(f"module_names[{name!r}]", reason) for name in sorted(set(mapping.module_names) - known))


def _of_regexes(texts: Iterable[str], paths: Iterable[str]) -> Iterator[Note]:
    for position, text in enumerate(texts):
        plain = re.sub(r"[^\w.]|\\.|\.[*+]", lambda found: "." if found[0] == r"\." else "", text)
        hint = _hint(position, plain, paths)
        yield Note(f"module_name_regexes[{text!r}]", _told("matches the path of no module with an operator", hint))


def _of_orders(orders: Iterable[tuple[str, str, int]], known: Iterable[tuple[str, str, int]]) -> Iterator[Note]:
    counts: dict[str, dict[str, int]] = {}
    for name, form, _ in known:
        of_module = counts.setdefault(name, {})
        of_module[form] = of_module.get(form, 0) + 1
    for position, (name, form, index) in enumerate(orders):
        entry = f"module_name_object_type_orders[{name!r}, {form!r}, {index}]"
        found, who = counts.get(name, {}), repr(name) if name else "the model"
        if form in found:
            times = "once" if found[form] == 1 else f"{found[form]} times"
            hint = f"{who} calls it {times}, counted from 0"
        elif found:
            closest = _hint(position, form, found)
            hint = closest and f"of what {who} itself calls, {closest}"
        else:
            hint = f"{who} itself calls none"
        yield Note(entry, _told("matches no call", hint))


def _told(what: str, hint: str) -> str:
    return f"{what}; {hint}" if hint else what


def _hint(position: int, text: str, known: Iterable[str]) -> str:
    """What may be meant by the first entries; nothing for the others."""
    return _closest(text, known) if position < MOST_HINTS else ""


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
