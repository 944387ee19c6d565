"""Writing the certificate of a lowering."""

from __future__ import annotations

from collections.abc import Iterator

from qfunc.config.certificate import Certificate, Entry
from qfunc.ir import Graph, Node, Note
from qfunc.params import QuantizeWeight
from qfunc.passes.work import weight_bytes

__all__ = ["Certificate", "Entry", "certified", "quantized_weights"]

CHANGES_OF_SCALE = frozenset({"requantize"})


def certified(
    entries: tuple[Entry, ...],
    graph: Graph,
    *,
    engine: str,
    host: str,
    conversions: int,
    notes: tuple[Note, ...],
) -> Certificate:
    """The certificate of a lowered graph; `conversions` is how many nodes turn floats into codes or back."""
    limited = any(weight.pairs != "none" for node in graph for weight in quantized_weights(node))
    kept, floats = weight_bytes(graph)
    return Certificate(
        engine,
        host,
        entries,
        conversions,
        limited,
        (*notes, *_uncounted(entries)),
        sum(node.kind in CHANGES_OF_SCALE for node in graph),
        kept,
        floats,
    )


def quantized_weights(node: Node) -> Iterator[QuantizeWeight]:
    """The integer weights of a kernel node."""
    yield from (value for _, value in node.args if isinstance(value, QuantizeWeight))


def _uncounted(entries: tuple[Entry, ...]) -> Iterator[Note]:
    """What keeps multiply-adds from being counted."""
    names = [entry.node for entry in entries if entry.multiply_adds is None]
    if names:
        more = f", nor are {len(names) - 1} more" if len(names) > 1 else ""
        reason = "its shapes, which trace learns from example_inputs, or what it computes are unknown"
        yield Note(names[0], f"is not counted in multiply-adds{more}: {reason}")
