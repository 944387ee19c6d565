"""What a backend can fuse and run, as tables of frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from qfunc.config.custom_fusion import CustomFusion
from qfunc.config.qconfig import QConfigMapping
from qfunc.ir import Node
from qfunc.match import Pattern, form_of
from qfunc.numerics.observers import Observer


class Observation(Enum):
    """How the output of an operator is quantized."""

    OWN = "own"
    """With qparams of its own."""
    SHARED = "shared"
    """With the qparams of its inputs, which all become the same."""
    BY_TENSORS = "by tensors"
    """With its own where two operands are tensors, with its input's where one is a number."""


@dataclass(frozen=True, slots=True)
class DTypeConfig:
    """Integer types an operator takes: names of dtypes of its activations and of its weight."""

    activation: tuple[str, ...] = ("uint8",)
    weight: tuple[str, ...] = ("int8",)


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """One operator (or several alike) of a backend.

    `forms` restricts it to some ways of writing it; `fixed` gives the output the qparams of the function's range;
    `float_output` says that its kernel can also write float32.
    """

    kinds: tuple[str, ...]
    observation: Observation
    dtypes: DTypeConfig = DTypeConfig()
    forms: frozenset[str] = frozenset()
    fixed: Observer[Any] | None = None
    float_output: bool = False


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
