"""Rewriting configurations without changing what they mean."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

from pyrsistent import PMap, pmap

from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.ir import Graph


def reordered(mapping: QConfigMapping, graph: Graph) -> QConfigMapping:
    """The same configuration, its entries set in reverse, so that its tables are walked in another order.

    Regexes that match one and the same name keep their order.
    """
    entries = mapping.module_name_regexes
    names = {"", *graph.modules, *(node.origin.module for node in graph)}
    overlap = any(sum(bool(re.match(text, name)) for text, _ in entries) > 1 for name in names)
    others: dict[str, Any] = {field.name: getattr(mapping, field.name) for field in fields(mapping)}
    backwards: dict[str, Any] = {
        # A table is walked in an order that rests on its keys' hashes, and on the size it once had.
        name: pmap(dict(list(table.items())[::-1]), 3 * len(table) + 1)
        for name, table in others.items()
        if isinstance(table, PMap)
    }
    return replace(mapping, module_name_regexes=entries if overlap else entries[::-1], **backwards)
