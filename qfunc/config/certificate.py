"""The certificate of a lowering: which kernel each operator got, and why not where there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, TypeAlias

from qfunc.config.certificate_diff import CertificateDiff, difference
from qfunc.config.columns import aligned
from qfunc.config.host_report import Verdict
from qfunc.ir import Note

Form: TypeAlias = Literal["integer", "moves", "weights", "island", "float"]
"""How an operator is computed: by a kernel on integers; by moving codes, which changes none; in float, with a weight of
integers or smaller floats; in float, but by a kernel that takes or gives codes; in float."""

_FORMS: Mapping[Form, str] = MappingProxyType(
    {
        "integer": "integer kernel",
        "moves": "moves codes",
        "weights": "smaller weight",
        "island": "float island",
        "float": "float",
    }
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One operator: its node and module, what it computes and how.

    `kernel` is empty where it stays float, and `reason` says why; of one that got a kernel, `reason` names those that
    were tried before it and fail their contracts.
    """

    node: str
    module: str
    operator: str
    form: Form
    kernel: str
    output: str
    """The dtype of the result."""
    reason: str = ""
    intended: bool = True
    """Whether the configuration meant it to run on integers."""
    inputs: tuple[str, ...] = ()
    """The dtypes of the activations it takes."""
    weight: str = ""
    """The dtype of its weight; empty where it has none."""
    engine: str = "aten"
    """Whose code runs it: `onednn`, an engine of torch's such as `quantized.x86`, `aten`, or `own` for the user's."""
    contracts: tuple[Verdict, ...] = ()
    """The verdicts that decided: those that its kernel keeps, and those that kernels tried before it fail."""
    multiply_adds: int | None = 0
    """On the example inputs; None where their shapes, or what the operator does, are unknown."""

    @property
    def on_integers(self) -> bool:
        """Whether it computes on codes, and never on floats."""
        return self.form in ("integer", "moves")

    @property
    def fallback(self) -> bool:
        """Whether it was meant to run on integers and stays float; an island and a smaller weight are none."""
        return self.intended and self.form == "float"

    @property
    def broken(self) -> tuple[Verdict, ...]:
        """The contracts that kernels tried for it fail."""
        return tuple(verdict for verdict in self.contracts if not verdict.ok)

    @property
    def verdict(self) -> str:
        """What vouches for its kernel, in words.

        >>> Entry("y", "", "relu", "integer", "codes.table", "uint8", contracts=(Verdict("table", True),)).verdict
        'keeps table'
        """
        kept = [verdict.kernel for verdict in self.contracts if verdict.ok]
        if self.form == "float":
            return ""
        if self.form in ("moves", "island"):
            return "exact by construction"
        return f"keeps {', '.join(kept)}" if kept else "not checked"


@dataclass(frozen=True, slots=True)
class Certificate:
    """What `lower` did, operator by operator; prints as a table.

    >>> entry = Entry("y", "fc", "linear", "integer", "onednn.linear", "uint8")
    >>> print(Certificate("onednn", "AVX2", (entry,), 1))
    engine onednn on AVX2: 1 of 1 operators on integers, 1 conversion between float and integers left
    node  module  operator  kernel         output  why not
    y     fc      linear    onednn.linear  uint8
    """

    engine: str
    host: str
    entries: tuple[Entry, ...]
    conversions: int
    """How many nodes are left that turn floats into codes or back; an island's borders are within its kernel."""
    limited: bool = False
    """Whether weights are limited, because this host's kernels add two products in 16 bits (`numerics.saturation`)."""
    notes: tuple[Note, ...] = field(default=(), compare=False)
    """What `prepare` and `lower` had to tell."""
    requantizations: int = 0
    """How many nodes turn codes of one scale into codes of another."""
    weight_bytes: int = 0
    """What all parameters take, with the scales of integer ones; packed forms that kernels keep are not counted."""
    float_weight_bytes: int = 0
    """What they take in the float model; those of custom and of fused modules of the user's are in neither."""

    @property
    def total(self) -> int:
        """How many operators there are."""
        return len(self.entries)

    @property
    def in_int8(self) -> int:
        """How many of them compute on integers."""
        return sum(entry.on_integers for entry in self.entries)

    @property
    def on_weights(self) -> int:
        """How many compute in float with weights of integers or smaller floats."""
        return sum(entry.form == "weights" for entry in self.entries)

    @property
    def islands(self) -> int:
        """How many compute in float between codes."""
        return sum(entry.form == "island" for entry in self.entries)

    @property
    def fallbacks(self) -> tuple[Entry, ...]:
        """The operators that were meant to run on integers and stay float."""
        return tuple(entry for entry in self.entries if entry.fallback)

    @property
    def refused(self) -> tuple[Entry, ...]:
        """What `strict` refuses: the fallbacks, and operators of which a kernel fails its contract."""
        return tuple(entry for entry in self.entries if entry.fallback or entry.broken)

    @property
    def multiply_adds(self) -> int | None:
        """All multiply-adds on the example inputs; None, and a note says why, where one operator's are unknown."""
        counts = [entry.multiply_adds for entry in self.entries if entry.multiply_adds is not None]
        return sum(counts) if len(counts) == len(self.entries) else None

    @property
    def int8_share(self) -> float | None:
        """The part of the multiply-adds that is done by integer kernels; None where unknown, or there are none."""
        done = sum(entry.multiply_adds or 0 for entry in self.entries if entry.form == "integer")
        return done / self.multiply_adds if self.multiply_adds else None

    def diff(self, other: Certificate) -> CertificateDiff:
        """What changed from this certificate to another: of an engine, host, version or configuration of its own."""
        return difference(self, other)

    def table(self, *, wide: bool = False) -> str:
        """The certificate as text; the `wide` one has all that is known of each operator, and all totals."""
        cells = _wide if wide else _short
        rows = [_WIDE if wide else _SHORT, *map(cells, self.entries)]
        return "\n".join([*self._head(), *(self._totals() if wide else []), *aligned(rows), *map(str, self.notes)])

    def _head(self) -> list[str]:
        plural = "" if self.conversions == 1 else "s"
        weights = f", {self.on_weights} in float on smaller weights" * bool(self.on_weights)
        islands = f", {self.islands} in {'a float island' if self.islands == 1 else 'float islands'}" * bool(
            self.islands
        )
        head = (
            f"engine {self.engine} on {self.host}: {self.in_int8} of {self.total} operators on integers"
            f"{weights}{islands}, {self.conversions} conversion{plural} between float and integers left"
        )
        limited = "weights are limited so that two products fit 16 bits, where kernels of this host add them there"
        return [head, *([limited] if self.limited else [])]

    def _totals(self) -> list[str]:
        work = "of an unknown number"
        if self.multiply_adds is not None:
            work = f"{self.int8_share or 0:.2%} of {self.multiply_adds:,}"
        return [
            f"multiply-adds in int8: {work}",
            f"bytes of weights: {self.weight_bytes:,} instead of {self.float_weight_bytes:,}",
            f"changes of scale: {self.requantizations:,}",
        ]

    def __str__(self) -> str:
        return self.table()


_SHORT: tuple[str, ...] = ("node", "module", "operator", "kernel", "output", "why not")
_WIDE: tuple[str, ...] = (
    *("node", "module", "operator", "form", "kernel", "engine", "inputs", "weight", "output"),
    *("contract", "multiply-adds", "why not"),
)


def _short(entry: Entry) -> tuple[str, ...]:
    return entry.node, entry.module, entry.operator, entry.kernel or "-", entry.output, entry.reason


def _wide(entry: Entry) -> tuple[str, ...]:
    work = "?" if entry.multiply_adds is None else f"{entry.multiply_adds:,}"
    return (
        *(entry.node, entry.module, entry.operator, _FORMS[entry.form], entry.kernel or "-", entry.engine),
        *(", ".join(entry.inputs), entry.weight, entry.output, entry.verdict, work, entry.reason),
    )
