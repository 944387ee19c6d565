"""Hypothesis strategies for random fx-traceable models with inputs they run on.

A failing example shrinks towards few operators, written as plain modules with plain arguments, and prints as an
expression that builds it again:

    from hypothesis import given
    from qfunc.testing import models

    @given(models(families=("conv", "norm", "activation")))
    def test_mine(case):
        case.module(*case.example_inputs)
"""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from qfunc.testing.draft import T
from qfunc.testing.operations import FAMILIES
from qfunc.testing.program import ModelCase, Program, build
from qfunc.testing.write import write_program


@st.composite
def programs(
    draw: st.DrawFn, *, max_nodes: int = 12, families: Sequence[str] = FAMILIES, aliasing: bool = False
) -> Program:
    """Programs as `write_program` writes them, every choice drawn.

    `max_nodes` bounds the number of steps, `families` says which operators may occur, and with `aliasing` in-place
    operators may write to memory that other values still read.
    """

    def pick(options: Sequence[T], /) -> T:
        return options[0] if len(options) == 1 else draw(st.sampled_from(options))

    return write_program(pick, max_nodes=max_nodes, families=families, aliasing=aliasing)


def models(
    *, max_nodes: int = 12, families: Sequence[str] = FAMILIES, aliasing: bool = False
) -> st.SearchStrategy[ModelCase]:
    """Models in eval mode with example inputs; the parameters are those of `programs`."""
    return programs(max_nodes=max_nodes, families=families, aliasing=aliasing).map(build)
