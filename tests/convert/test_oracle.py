"""The reference form is that of torch.ao, where it has one: dynamic, float16, and weights alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from qfunc import X86, QConfigMapping
from qfunc.backends import qconfigs
from qfunc.testing import oracle
from tests.convert.forms import reference_of, run

ao: Any = pytest.importorskip("torch.ao.quantization")

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0)) * 2
IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
TABLES = (nn.Embedding, nn.EmbeddingBag)


class Linears(nn.Module):
    """Modules and a function, one of them with a ReLU behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return self.second(F.linear(torch.relu(self.first(x)), self.weight))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.bag = nn.Embedding(20, 6), nn.EmbeddingBag(20, 6, mode="sum")

    def forward(self, ids):
        return self.table(ids).sum(1) + self.bag(ids)


def both(model, inputs, their_qconfig, qconfig, types=()):
    """What their reference model and ours compute of the inputs."""
    theirs, ours = ao.QConfigMapping(), QConfigMapping()
    for kind in types:
        theirs, ours = theirs.set_object_type(kind, their_qconfig), ours.set_object_type(kind, qconfig)
    if not types:
        theirs, ours = theirs.set_global(their_qconfig), ours.set_global(qconfig)
    prepared = oracle.prepare(model.eval(), (inputs,), theirs)
    reference = oracle.reference(oracle.calibrate(prepared, [(inputs,)]))
    found = reference_of(model, inputs, ours, backend=X86)
    return run(reference, inputs), run(found, inputs)


DYNAMIC = (("default_dynamic_qconfig", "DEFAULT_DYNAMIC"), ("per_channel_dynamic_qconfig", "PER_CHANNEL_DYNAMIC"))


@pytest.mark.parametrize(("their_name", "name"), DYNAMIC)
def test_dynamic_linear_layers(their_name, name):
    expected, found = both(Linears(), X, getattr(ao.qconfig, their_name), getattr(qconfigs, name))
    # Their zero points are chosen by the smaller error of two, and may be a step away.
    assert (expected - found).abs().max() < 0.02 * expected.abs().max()
    assert (run(Linears(), X) - found).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("their_name", "name"),
    [("float16_dynamic_qconfig", "FLOAT16_DYNAMIC"), ("float16_static_qconfig", "FLOAT16_STATIC")],
)
def test_float16_linear_layers(their_name, name):
    expected, found = both(Linears(), X, getattr(ao.qconfig, their_name), getattr(qconfigs, name))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, run(Linears(), X))


TABLE_QCONFIGS = (
    ("float_qparams_weight_only_qconfig", "FLOAT_QPARAMS_WEIGHT_ONLY"),
    ("float_qparams_weight_only_qconfig_4bit", "FLOAT_QPARAMS_WEIGHT_ONLY_4BIT"),
)


@pytest.mark.parametrize(("their_name", "name"), TABLE_QCONFIGS)
def test_weights_alone_of_tables(their_name, name):
    expected, found = both(Words(), IDS, getattr(ao.qconfig, their_name), getattr(qconfigs, name), TABLES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(found, run(Words(), IDS))


def test_weights_with_a_scale_per_channel():
    expected, found = both(Linears(), X, ao.qconfig.per_channel_dynamic_qconfig, qconfigs.PER_CHANNEL_DYNAMIC)
    coarse, _ = both(Linears(), X, ao.qconfig.default_dynamic_qconfig, qconfigs.DEFAULT_DYNAMIC)
    assert (found - expected).abs().max() < (found - coarse).abs().max()
