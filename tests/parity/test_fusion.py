"""Fused float models compute what `fuse_fx`'s do."""

import pytest
import torch

from qfunc import materialize, unwrap
from qfunc.testing import max_abs_error, oracle, sqnr
from tests.parity.sides import CASES, TORCHVISION, Sides, generated, outputs, zoo_sides

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")


def check(sides):
    ours = outputs(unwrap(materialize(sides.fused)), sides.batches)
    theirs = outputs(oracle.fuse(sides.model), sides.batches)
    # or, where outputs are large or tens of layers were folded in float32 by torch.ao, as near as float32 allows
    assert max_abs_error(theirs, ours) <= 1e-5 or sqnr(theirs, ours) > 95


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zoo(case):
    check(zoo_sides(case))


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(torchvision_zoo, name):
    model, _ = torchvision_zoo.build(name)
    check(Sides(model, ((torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),),)))


@pytest.mark.parametrize("case", generated(40), ids=lambda case: str(case.program.seed))
def test_generated(case):
    check(Sides(case.module, case.batches(1)))
