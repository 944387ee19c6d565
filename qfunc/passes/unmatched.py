"""Entries of a configuration that match no node of a graph, as notes."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator
from difflib import get_close_matches

from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.resolve import numbered, relative
from qfunc.ir import Graph, Note


def unmatched(
    mapping: QConfigMapping, graph: Graph, default: QConfigMapping, *, base: str = "", own: Container[str] | None = None
) -> tuple[Note, ...]:
    """A note for each entry by type, by regex or by order that names no node, whether or not a stronger one names it.

    The entries of `default`, the backend's own configuration, are meant for any model: they are not told of. A mapping
    whose names are relative to `base` is for the nodes `own` alone.
    """
    if not (mapping.object_types or mapping.module_name_regexes or mapping.module_name_object_type_orders):
        return ()
    calls = [(node, key) for node, key in numbered(graph, base, own) if node.kind not in _PLUMBING]
    paths = dict.fromkeys(relative(node.origin.module, base) for node, _ in calls)
    # A function or a method is configured by its own name, and by the type of the module that contains it.
    forms = dict.fromkeys(name for node, (_, form, _) in calls for name in (form, node.origin.type))
    keys = dict.fromkeys(key for _, key in calls)
    types = [form for form in mapping.object_types if form not in forms and not _same(mapping, default, form)]
    regexes = [text for text, _ in mapping.module_name_regexes if not any(map(re.compile(text).match, paths))]
    orders = [key for key in mapping.module_name_object_type_orders if key not in keys]
    return (
        *_of_types(sorted(types), graph, forms),
        *_of_regexes(regexes, paths),
        *_of_orders(sorted(orders), keys),
    )


_PLUMBING = ("placeholder", "get_attr", "output")


def _same(mapping: QConfigMapping, default: QConfigMapping, form: str) -> bool:
    return form in default.object_types and default.object_types[form] == mapping.object_types[form]


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
