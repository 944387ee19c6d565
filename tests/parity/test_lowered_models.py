"""Every model is quantized, lowered and run, by default and at parity; the default is nearer to float than torch.ao.

Both calibrate on the same data, on which the noise is measured as well. Nearly all multiplications of convolutions and
linear layers run on integers.
"""

from __future__ import annotations

import math
import os
from statistics import mean

import pytest

from qfunc.errors import problems
from qfunc.testing import oracle
from tests.parity.lowered_models import (
    CHAOTIC,
    COMMON_CASES,
    LEAST_SHARE,
    THEIRS_FAIL,
    TORCHVISION_CASES,
    UNTRACEABLE,
    ZOO_CASES,
    Measured,
    sides,
)
from tests.parity.lowered_sides import SIDES

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
OFTEN = ("resnet18", "squeezenet1_1")
"""The others of torchvision are measured in the deep profile."""

SLACK = 0.1
"""Decibels by which the default may be behind torch.ao."""
PARITY_SLACK = 1.0
"""The same at parity: a norm is folded in other precision, and what ties of rounding that decides grows with depth."""

needs_oracle = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")


def _is_measured(case: Measured) -> bool:
    """All in the deep profile; else not what repeats others: annotated twins, and 30 of 32 sums that differ little."""
    sums = case.name.startswith("ConvBnAddReluModel") and case.name.count("=True") not in (0, 5)
    return DEEP or not (sums or case.name.startswith("Annotated"))


SMALL = [case for case in (*ZOO_CASES, *COMMON_CASES) if _is_measured(case) and case.name not in UNTRACEABLE]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case):
    _runs(case)
    if oracle.available() and case.name not in {*CHAOTIC, *THEIRS_FAIL}:
        _compare(case)
    _has_its_share(case)


def _runs(case):
    for side in SIDES:
        noise = sides(case).noise(side)
        assert noise > 19 or (case.name in CHAOTIC and not math.isnan(noise)), side


def _compare(case):
    measured = sides(case)
    assert measured.noise("default") >= measured.their_noise - SLACK
    for side in ("x86 on onednn", "x86 on quantized"):
        assert measured.noise(side) >= measured.their_noise - PARITY_SLACK, side


@needs_oracle
def test_on_average():
    """Also where all of a model is quantized."""
    cases = [case for case in SMALL if case.name not in {*CHAOTIC, *THEIRS_FAIL, *LEAST_SHARE}][::8]
    gains = [sides(case).noise("default") - sides(case).their_noise for case in cases]
    assert mean(gain for gain in gains if math.isfinite(gain)) > 5


@needs_oracle
@pytest.mark.parametrize("case", [c for c in (*ZOO_CASES, *COMMON_CASES) if c.name in THEIRS_FAIL], ids=str)
def test_where_torch_ao_fails(case):
    """When it no longer does, it is to be compared with."""
    error, message = THEIRS_FAIL[case.name]
    with pytest.raises(error, match=message):
        sides(case).their_noise  # noqa: B018 - fails


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", [case for case in COMMON_CASES if case.name in UNTRACEABLE], ids=str)
def test_what_fails_names_its_node(case, side):
    found = problems(sides(case).lowered(side).failure())
    assert [type(problem).__name__ for problem in found] == [UNTRACEABLE[case.name][0]]
    assert UNTRACEABLE[case.name][1] in found[0].node
    assert UNTRACEABLE[case.name][2] in found[0].reason


def _has_its_share(case):
    share, (least, _) = sides(case).share_in_int8(), LEAST_SHARE.get(case.name, (0.995, ""))
    assert math.isnan(share) or share >= least
    assert case.name not in LEAST_SHARE or share < least + 0.02, "it is more than the table says"


@needs_oracle
@pytest.mark.parametrize("case", TORCHVISION_CASES, ids=str)
def test_torchvision(torchvision_zoo, case):
    if not (DEEP or case.name in OFTEN):
        pytest.skip("in the deep profile")
    _compare(case)
    _has_its_share(case)


def test_all_torchvision_models_are_measured(torchvision_zoo):
    assert {case.name for case in TORCHVISION_CASES} == set(torchvision_zoo.NAMES)


def test_tables_name_models():
    names = {case.name for case in (*ZOO_CASES, *COMMON_CASES, *TORCHVISION_CASES)}
    tables = (UNTRACEABLE, CHAOTIC, THEIRS_FAIL, LEAST_SHARE)
    assert not COMMON_CASES or all(name in names for table in tables for name in table)
