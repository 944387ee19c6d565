"""The reference form is that of torch.ao, where it has one: dynamic, float16, and weights alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from qfunc import X86, QConfigMapping
from qfunc.backends import qconfigs
from qfunc.config.backend_config import Observation, OperatorConfig
from qfunc.config.dtype_config import DTypeConfig
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


def both(model, inputs, their_qconfig, qconfig, types=(), **backends):
    """What their reference model and ours compute of the inputs."""
    theirs, ours = ao.QConfigMapping(), QConfigMapping()
    for kind in types:
        theirs, ours = theirs.set_object_type(kind, their_qconfig), ours.set_object_type(kind, qconfig)
    if not types:
        theirs, ours = theirs.set_global(their_qconfig), ours.set_global(qconfig)
    options = {"backend_config": backends["theirs"]} if backends else {}
    with oracle.engine("qnnpack"):  # with others, dynamic ranges have 7 bits
        prepared = oracle.prepare(model.eval(), (inputs,), theirs, **options)
        reference = oracle.reference(oracle.calibrate(prepared, [(inputs,)]), **options)
    found = reference_of(model, inputs, ours, backend=backends.get("ours", X86))
    return run(reference, inputs), run(found, inputs)


DYNAMIC = (("default_dynamic_qconfig", "DEFAULT_DYNAMIC"), ("per_channel_dynamic_qconfig", "PER_CHANNEL_DYNAMIC"))


@pytest.mark.skipif("qnnpack" not in oracle.engines(), reason="this torch has no qnnpack")
@pytest.mark.parametrize(("their_name", "name"), DYNAMIC)
def test_dynamic_linear_layers(their_name, name):
    expected, found = both(Linears(), X, getattr(ao.qconfig, their_name), getattr(qconfigs, name))
    # A zero point that falls between two integers is chosen otherwise there, and may be a step away.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert torch.isclose(found, expected, rtol=0, atol=1e-6).float().mean() > 0.8
    assert (found - run(Linears(), X)).abs().max() > 1e-3


class Recurrent(nn.Module):
    """A sequence, and a cell on its last step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sequence, self.cell = nn.LSTM(8, 4, num_layers=2, bidirectional=True), nn.GRUCell(8, 4)

    def forward(self, x):
        return self.cell(self.sequence(x)[0][-1])


@pytest.mark.skipif("qnnpack" not in oracle.engines(), reason="this torch has no qnnpack")
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_dynamic_recurrent_layers():
    x = X.view(8, 2, 8)
    expected, found = both(Recurrent(), x, ao.qconfig.default_dynamic_qconfig, qconfigs.DEFAULT_DYNAMIC)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert (found - run(Recurrent(), x)).abs().max() > 1e-4


def halved() -> Linears:
    """Of weights that float16 holds: the reference leaves those of modules as they are."""
    return Linears().half().float()


def test_float16_dynamic_linear_layers():
    expected, found = both(halved(), X, ao.qconfig.float16_dynamic_qconfig, qconfigs.FLOAT16_DYNAMIC)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(found, run(halved(), X))


def test_float16_static_linear_layers():
    backend: Any = pytest.importorskip("torch.ao.quantization.backend_config")
    modules: Any = pytest.importorskip("torch.ao.nn.quantized.reference")
    half = torch.float16
    kinds = backend.ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
    row = backend.BackendPatternConfig(nn.Linear).set_observation_type(kinds).set_root_module(nn.Linear)
    row = row.set_reference_quantized_module(modules.Linear).add_dtype_config(
        backend.DTypeConfig(input_dtype=half, output_dtype=half, weight_dtype=half, bias_dtype=half)
    )
    linear = OperatorConfig(("linear",), Observation.OWN, (DTypeConfig("float16", "float16", "float16", "float16"),))
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).half().float()
    expected, found = both(
        model,
        X,
        ao.qconfig.float16_static_qconfig,
        qconfigs.FLOAT16_STATIC,
        theirs=backend.BackendConfig("half").set_backend_pattern_config(row),
        ours=replace(X86, operators=(linear,)),
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, found.half().float())


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
    """Static: all but the rounding of sums, which may fall to either side, is the same."""
    mapping = ao.get_default_qconfig_mapping("x86")
    prepared = oracle.prepare(Linears().eval(), (X,), mapping)
    expected = run(oracle.reference(oracle.calibrate(prepared, [(X,)])), X)
    found = run(reference_of(Linears(), X, None, backend=X86), X)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    assert torch.isclose(found, expected, rtol=0, atol=1e-6).float().mean() > 0.9
