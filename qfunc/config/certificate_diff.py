"""What changed from one certificate to another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qfunc.config.columns import aligned

if TYPE_CHECKING:
    from qfunc.config.certificate import Certificate, Entry


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that differs: of the node called `node`, or of all where that is empty."""

    node: str
    module: str
    what: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class CertificateDiff:
    """What differs between two certificates, operator by operator and in the totals; prints as a table.

    Operators are the same that have the same node id. It is true where anything differs.
    """

    changes: tuple[Change, ...] = ()
    lost: tuple[str, ...] = ()
    """The nodes that computed on integers and do so no more, or that are float now and were not."""
    gained: tuple[str, ...] = ()
    """The same the other way round."""

    def __bool__(self) -> bool:
        return bool(self.changes)

    def __str__(self) -> str:
        rows = [(c.node or "(all)", c.module, c.what, c.before or "-", c.after or "-") for c in self.changes]
        return "\n".join(aligned([("node", "module", "what", "before", "after"), *rows])) if rows else "no difference"


_ENTRY = ("operator", "form", "kernel", "engine", "inputs", "weight", "output", "intended", "contracts")
_TOTALS = (
    *("engine", "host", "in_int8", "on_weights", "islands", "total", "conversions", "requantizations", "limited"),
    *("multiply_adds", "int8_share", "weight_bytes", "float_weight_bytes"),
)
_RANK = {"float": 0, "weights": 1, "island": 1, "moves": 2, "integer": 2}


def difference(first: Certificate, second: Certificate) -> CertificateDiff:
    """What changed from the first to the second, in the order of the first's operators."""
    before, after = ({entry.node: entry for entry in certificate.entries} for certificate in (first, second))
    changes = [
        *(Change("", "", name, *pair) for name in _TOTALS if (pair := _pair(first, second, name))),
        *(c for node in dict.fromkeys((*before, *after)) for c in _changes(before.get(node), after.get(node))),
    ]
    both = [node for node in before if node in after]
    ranks = {node: _RANK[after[node].form] - _RANK[before[node].form] for node in both}
    lost, gained = (tuple(node for node in both if sign * ranks[node] > 0) for sign in (-1, 1))
    return CertificateDiff(tuple(changes), lost, gained)


def _changes(before: Entry | None, after: Entry | None) -> Iterator[Change]:
    one = after if before is None else before
    assert one is not None
    if before is None or after is None:
        words = ("" if before is None else _summary(before), "" if after is None else _summary(after))
        yield Change(one.node, one.module, "operator", *words)
        return
    names = [name for name in _ENTRY if getattr(before, name) != getattr(after, name)]
    moved = before.multiply_adds != after.multiply_adds
    for name in [*names, *(["multiply_adds"] if moved else []), *(["reason"] if before.reason != after.reason else [])]:
        yield Change(one.node, one.module, name, _text(getattr(before, name)), _text(getattr(after, name)))


def _summary(entry: Entry) -> str:
    return f"{entry.operator} ({entry.kernel or 'float'})"


def _pair(first: Certificate, second: Certificate, name: str) -> tuple[str, str] | None:
    before, after = getattr(first, name), getattr(second, name)
    return None if before == after else (_text(before), _text(after))


def _text(value: Any) -> str:
    match value:
        case None:
            return "unknown"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.2%}"
        case int():
            return f"{value:,}"
        case tuple():
            return ", ".join(v if isinstance(v, str) else v.kernel + ("" if v.ok else " (fails)") for v in value)
        case _:
            return str(value)
