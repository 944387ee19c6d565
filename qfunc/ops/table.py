"""The vocabulary: every kind of operator that qfunc knows by meaning, and every way of writing it.

A form that this table does not list keeps the kind of its own name, and stays float.
"""

from __future__ import annotations

from qfunc.ops.elementwise import ELEMENTWISE
from qfunc.ops.kind import Kind
from qfunc.ops.layers import LAYERS
from qfunc.ops.shapes import SHAPES
from qfunc.ops.spatial import SPATIAL

KINDS: tuple[Kind, ...] = (*LAYERS, *ELEMENTWISE, *SPATIAL, *SHAPES)
"""Every row of the vocabulary."""

WEIGHTED = frozenset(
    row.name for row in KINDS if "weight" in row.weights and row.name.startswith(("conv", "linear", "embedding"))
)
"""The layers whose weight is quantized; a norm's and a PReLU's are factors of single channels or elements."""
