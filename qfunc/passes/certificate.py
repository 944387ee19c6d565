"""The certificate of a lowering: which kernel each operator got, and why not where there is none."""

from __future__ import annotations

from dataclasses import dataclass, field

from qfunc.config.columns import aligned
from qfunc.ir import Note


@dataclass(frozen=True, slots=True)
class Entry:
    """One operator: its node and module, what it computes, and its kernel, or the reason that it stays float.

    `intended` says that the configuration meant it to run on integers.
    """

    node: str
    module: str
    operator: str
    kernel: str
    output: str
    reason: str = ""
    intended: bool = True


@dataclass(frozen=True, slots=True)
class Certificate:
    """What `lower` did, operator by operator; prints as a table.

    >>> print(Certificate("onednn", "AVX2", (Entry("y", "fc", "linear", "onednn.linear", "uint8"),), 1))
    engine onednn on AVX2: 1 of 1 operators on integers, 1 conversion between float and integers left
    node  module  operator  kernel         output  why not
    y     fc      linear    onednn.linear  uint8
    """

    engine: str
    host: str
    entries: tuple[Entry, ...]
    conversions: int
    limited: bool = False
    """Whether weights are limited, because this host's kernels add two products in 16 bits (`numerics.saturation`)."""
    notes: tuple[Note, ...] = field(default=(), compare=False)
    """What `prepare` had to tell."""

    @property
    def total(self) -> int:
        """How many operators there are."""
        return len(self.entries)

    @property
    def in_int8(self) -> int:
        """How many of them have a kernel on integers."""
        return sum(bool(entry.kernel) for entry in self.entries)

    @property
    def fallbacks(self) -> tuple[Entry, ...]:
        """The operators that were meant to run on integers and do not."""
        return tuple(entry for entry in self.entries if entry.intended and not entry.kernel)

    def __str__(self) -> str:
        plural = "" if self.conversions == 1 else "s"
        head = (
            f"engine {self.engine} on {self.host}: {self.in_int8} of {self.total} operators on integers, "
            f"{self.conversions} conversion{plural} between float and integers left"
        )
        if self.limited:
            head += "\nweights are limited so that two products fit 16 bits, where kernels of this host add them there"
        titles = ("node", "module", "operator", "kernel", "output", "why not")
        rows = [(e.node, e.module, e.operator, e.kernel or "-", e.output, e.reason) for e in self.entries]
        return "\n".join([head, *aligned([titles, *rows]), *map(str, self.notes)])
