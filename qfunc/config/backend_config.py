"""What a backend can fuse and run, as tables of frozen values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from textwrap import fill
from typing import Any

from qfunc.config.columns import aligned
from qfunc.config.custom_fusion import CustomFusion, wrong_fusion
from qfunc.config.dtype_config import DTypeConfig, wrong_dtypes
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.errors import BadConfig, Problem
from qfunc.ir import Node
from qfunc.match import Pattern, Step, form_of
from qfunc.numerics.observers import Observer, validate_observer


class Observation(Enum):
    """How the output of an operator is quantized."""

    OWN = "own"
    """With qparams of its own."""
    SHARED = "shared"
    """With the qparams of its inputs, which all become the same."""
    NOT_OBSERVED = "not observed"
    """Not at all, nor are its inputs: it only asks for sizes, say."""


PARAMETERS = "parameters"
"""Stands for the matrices among the parameters of a module that is called, which are no arguments of the call."""


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """One operator (or several alike) of a backend.

    `dtypes` are the combinations it takes. `forms` restricts it to some ways of writing it; `by_tensor_count` says how
    the output is quantized where so many operands are tensors, and not numbers. `fixed` gives the output the qparams of
    the function's range; `float_output` says that its kernel can also write float32; `narrows` that its result has a
    narrower range than its operand, so that in a lazy backend a float operand is not quantized before it. `inputs`,
    `weight` and `bias` name its arguments, where those of the vocabulary are not meant or the vocabulary does not know
    the operator (whose arguments are called by their positions or keywords, as in "0", "dim"); a recurrent layer's
    weight is `PARAMETERS`.
    """

    kinds: tuple[str, ...]
    observation: Observation
    dtypes: tuple[DTypeConfig, ...] = (DTypeConfig(),)
    forms: frozenset[str] = frozenset()
    by_tensor_count: tuple[tuple[int, Observation], ...] = ()
    fixed: Observer[Any] | None = None
    float_output: bool = False
    narrows: bool = False
    inputs: tuple[str, ...] | None = None
    weight: str | None = None
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class BackendConfig:
    """A backend: the chains it fuses, the operators it runs quantized, and its default configuration.

    Of fusions the longest that matches is taken, but those with a fuser of the user's first. `lazy` leaves a value
    float where no quantized operator reads it, and leaves rearrangements float whose result nobody reads quantized;
    `observe_shared_outputs` feeds a shared observer with the output as well. `drop_identities` removes dropout and
    identity when fusing for evaluation; `move_norms` folds a batch norm also into the layer behind it, and before the
    average pool that it follows, where that is exact.
    """

    name: str
    fusions: tuple[Pattern | CustomFusion, ...]
    operators: tuple[OperatorConfig, ...]
    qconfig_mapping: QConfigMapping
    lazy: bool = False
    observe_shared_outputs: bool = True
    drop_identities: bool = False
    move_norms: bool = False

    def operator(self, node: Node) -> OperatorConfig | None:
        """The first row for the node's kind and form."""
        for row in self.operators:
            if node.kind in row.kinds and (not row.forms or form_of(node) in row.forms):
                return row
        return None

    def __str__(self) -> str:
        rows = [
            (" or ".join(dict.fromkeys(map(str, row.dtypes))), _result(row), ", ".join(row.kinds))
            for row in self.operators
        ]
        operators = aligned([("dtypes", "result", "operators"), *rows]) if rows else []
        fusions = [fill("fuses " + "; ".join(fusion.name for fusion in self.fusions), 120, break_on_hyphens=False)]
        return "\n".join([self.name, *operators, *(fusions if self.fusions else []), str(self.qconfig_mapping)])


def _result(row: OperatorConfig) -> str:
    if row.fixed is not None:
        return "a fixed range"
    others = (f"{_RESULTS[how]} with {count} tensors" for count, how in row.by_tensor_count)
    return ", ".join((_RESULTS[row.observation], *others))


_RESULTS = {
    Observation.OWN: "a range of its own",
    Observation.SHARED: "the range of its inputs",
    Observation.NOT_OBSERVED: "not observed",
}


def wrong_backend(backend: BackendConfig) -> Iterator[Problem]:
    """What is wrong with a backend as a configuration: patterns that cannot be matched, impossible fixed ranges."""
    for index, fusion in enumerate(backend.fusions):
        match fusion:
            case CustomFusion():
                yield from wrong_fusion(fusion)
            case Pattern(name, steps):
                yield from _wrong_steps(name, steps)
            case _:
                reason = f"expected a Pattern or a CustomFusion, got a {type(fusion).__name__}"
                yield BadConfig(
                    f"fusions[{index}]", reason, "pass Pattern(name, steps), or CustomFusion(fuser, pattern)"
                )
    for index, row in enumerate(backend.operators):
        if not isinstance(row, OperatorConfig):
            reason = f"expected an OperatorConfig, got a {type(row).__name__}"
            yield BadConfig(f"operators[{index}]", reason, "pass OperatorConfig(kinds, observation)")
            continue
        for dtypes in row.dtypes:
            yield from wrong_dtypes(dtypes)
        if row.fixed is not None:
            yield from validate_observer(row.fixed)


def _wrong_steps(name: str, steps: tuple[Step, ...]) -> Iterator[Problem]:
    if len(steps) < 2:
        yield BadConfig(name, f"a pattern of {len(steps)} steps fuses nothing", "give it two or more")
    for step in steps:
        for take in step.takes:
            if take.startswith("#") and not (take[1:].isascii() and take[1:].isdigit()):
                yield BadConfig(name, f"{take!r} is no position", "write '#0' for the first argument, or a name")
        for position, side in step.sides:
            if position < 0:
                yield BadConfig(name, f"{position} is no position", "count the arguments as written from 0")
            if isinstance(side, tuple):
                reason = f"its argument {position} is a chain of its own, which only a function of the user's can fuse"
                yield BadConfig(name, reason, "use CustomFusion with a complex_pattern, or Anything() at that side")
