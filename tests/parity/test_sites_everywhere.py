"""On every model, with every backend's default, the sites, their observers and what shares one are torch.ao's."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from torch import nn

from qfunc.testing import oracle
from tests.parity import common_models
from tests.parity.structure import Quantized, Structure
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

COMMON = common_models.cases() if oracle.available() and common_models.available() else ()
BACKENDS = oracle.BACKENDS


@cache
def _built(case: Any) -> tuple[nn.Module, tuple[object, ...]]:
    return case.build()


def differences(ours: Quantized, theirs: Quantized) -> list[str]:
    """In words, a line for each."""
    return [
        *(f"only there: {sorted(group.values)} {tuple(group.observer)}" for group in theirs.groups - ours.groups),
        *(f"only here: {sorted(group.values)} {tuple(group.observer)}" for group in ours.groups - theirs.groups),
        *(f"only there: weight of {name} {tuple(observer)}" for name, observer in theirs.weights - ours.weights),
        *(f"only here: weight of {name} {tuple(observer)}" for name, observer in ours.weights - theirs.weights),
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_zoo(case, backend):
    sides = Structure(*_built(case), backend)
    assert not sorted(differences(sides.ours, sides.theirs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", COMMON, ids=str)
def test_common(case, backend):
    sides = Structure(*_built(case), backend)
    assert not sorted(differences(sides.ours, sides.theirs))
