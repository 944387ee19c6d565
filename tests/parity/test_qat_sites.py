"""In training, what is rounded, to what, and what shares one range are as in torch.ao, with the defaults for that."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from qfunc.testing import oracle
from tests.parity.exceptions import CAUSES, Cause
from tests.parity.structure import Quantized, Structure, Traced
from tests.parity.test_sites_everywhere import differences
from tests.parity.training_sides import BACKENDS, TrainingStructure
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

UNPREPARED = {
    ("resnet", "onednn"): "a convolution with batch norm into a sum, which it fuses, cannot be prepared for training",
    (
        "mobilenet",
        "onednn",
    ): "a convolution with batch norm into a sum, which it fuses, cannot be prepared for training",
}
"""What torch.ao cannot prepare for training by a backend's own configuration."""


def _transposed_rounded(sides: Structure, theirs: Quantized) -> Quantized:
    """The weights of transposed convolutions are rounded while they train."""
    transposed = {id for id in sides.prepared.weights if sides.prepared.graph[id].kind.startswith("conv_transpose")}
    names = {sides.chain(id)[0] for id in transposed}
    return theirs._replace(weights=theirs.weights | {weight for weight in sides.ours.weights if weight[0] in names})


TRAINING_CAUSES = {
    **CAUSES,
    "transposed convolutions train with float weights": Cause(
        "There is no module for training of a transposed convolution: its weight is rounded only when it is converted.",
        _transposed_rounded,
        frozenset({"unet"}),
    ),
}
"""Where our sites in training differ from torch.ao's on purpose."""


@cache
def _built(case: Any) -> Traced:
    model, inputs = case.build()
    return Traced(model.train(), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_zoo(case, backend):
    sides = TrainingStructure(_built(case), backend)
    if (case.name, backend) in UNPREPARED:
        assert sides.prepared.sites
        with pytest.raises(NotImplementedError, match="Cannot fuse train modules"):
            sides.their_prepared  # noqa: B018 - fails
        return
    theirs, found = sides.theirs, set[str]()
    for cause, (_, mended, *_) in TRAINING_CAUSES.items():
        before, theirs = theirs, mended(sides, theirs)
        found |= {cause} if theirs != before else set()
    assert not sorted(differences(sides.ours, theirs))
    assert found == {cause for cause, row in TRAINING_CAUSES.items() if row.concerns(case.name, backend)}


@pytest.mark.parametrize("version", [0, 1])
def test_everything_is_rounded_in_training(version):
    """What is compared says so: no observer among it only measures."""
    sides = TrainingStructure(_built(next(case for case in ZOO if case.name == "shufflenet")), "x86", version)
    for side in (sides.ours, sides.theirs):
        observers = [*(group.observer for group in side.groups), *(observer for _, observer in side.weights)]
        assert {observer.name for observer in observers} == {
            "FakeQuantize MovingAverageMinMax 0.01",
            "FakeQuantize MovingAveragePerChannelMinMax 0.01",
        }
