"""Rewriting configurations without changing what they mean."""

from __future__ import annotations

import re
from typing import TypeVar

from pyrsistent import PMap, pmap

from qfunc.config.qconfig import Choice, QConfigMapping
from qfunc.ir import Graph

KeyT = TypeVar("KeyT")


def reordered(mapping: QConfigMapping, graph: Graph) -> QConfigMapping:
    """The same configuration, its entries set in reverse; regexes that match one and the same name keep their order."""
    entries = mapping.module_name_regexes
    names = {"", *graph.modules, *(node.origin.module for node in graph)}
    overlap = any(sum(bool(re.match(text, name)) for text, _ in entries) > 1 for name in names)
    return QConfigMapping(
        mapping.global_qconfig,
        pmap(dict(_backwards(mapping.object_types))),
        entries if overlap else entries[::-1],
        pmap(dict(_backwards(mapping.module_names))),
        pmap(dict(_backwards(mapping.module_name_object_type_orders))),
    )


def _backwards(table: PMap[KeyT, Choice]) -> list[tuple[KeyT, Choice]]:
    return list(table.items())[::-1]
