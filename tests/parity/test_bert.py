"""A plain BERT encoder: traced with its slices, quantized, and near to float at sizes that calibration did not see.

torch.ao cannot trace it: a slice of a buffer up to the length of the input.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from qfunc import QConfigMapping, calibrate, check_host, convert, fuse, lower, materialize, prepare, trace, unwrap
from qfunc.backends.qconfigs import PER_CHANNEL_DYNAMIC
from qfunc.testing import oracle
from qfunc.testing.metrics import same_bits
from tests.parity.bert import OUTLIERS, WIDTH, batch, bert

BATCHES = [batch(4, 24, seed) for seed in range(5)]
SIZES = ((4, 24), (1, 7), (9, 40))
"""Those of calibration, and others."""
ENGINES = ("onednn", "quantized", "reference")
MAPPINGS = {
    "default": None,
    "dynamic": QConfigMapping().set_object_type(nn.Linear, PER_CHANNEL_DYNAMIC),
}


@cache
def float_model():
    return bert()


@cache
def converted(mapping, example):
    return unwrap(
        trace(float_model(), BATCHES[0] if example else None)
        .bind(fuse)
        .bind(lambda graph: prepare(graph, MAPPINGS[mapping]))
        .bind(lambda prepared: calibrate(prepared, BATCHES, progress=False))
        .bind(convert)
    )


def lowered(mapping, example, engine):
    if engine not in (*check_host().engines, "reference"):
        pytest.skip(f"this host has no engine {engine}")
    return unwrap(lower(converted(mapping, example), engine=engine))


def hidden(module, inputs):
    """The last hidden states of the tokens that the mask lets through: (tokens, width)."""
    with torch.no_grad():
        return module(*inputs)[0][inputs[1].bool()]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("example", [False, True], ids=["without_example", "with_example"])
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_last_hidden_state(mapping, example, engine, size):
    module, inputs = unwrap(materialize(lowered(mapping, example, engine))), batch(*size, seed=99)
    expected, actual = hidden(float_model(), inputs), hidden(module, inputs)
    assert F.cosine_similarity(expected.flatten(), actual.flatten(), 0) >= 0.98
    assert F.cosine_similarity(expected, actual).min() >= 0.98  # of each token
    # The outliers alone would nearly decide it.
    usual = [channel for channel in range(WIDTH) if channel not in dict(OUTLIERS)]
    assert F.cosine_similarity(expected[:, usual], actual[:, usual]).min() >= 0.97


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_an_example_changes_nothing(mapping):
    modules = [unwrap(materialize(lowered(mapping, example, "reference"))) for example in (False, True)]
    with torch.no_grad():
        assert same_bits(*(module(*batch(3, 11, 5)) for module in modules))


def test_all_linear_layers_run_on_integers():
    entries = lowered("default", False, "onednn").certificate.entries
    layers = [entry for entry in entries if entry.operator.startswith("linear")]
    assert len(layers) == 14
    assert all(entry.kernel for entry in layers)


def test_tied_weight_is_read_in_float_by_the_embedding():
    module, model = unwrap(materialize(lowered("default", False, "onednn"))), float_model()
    weight = module.state_dict()["embeddings.word_embeddings.weight"]
    assert same_bits(weight, model.embeddings.word_embeddings.weight.detach())
    assert module.state_dict()["decoder.weight"].dtype is torch.int8


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
def test_torch_ao_cannot_trace_it():
    with pytest.raises(TypeError, match="slice indices must be integers"):
        oracle.quantize(float_model(), BATCHES)


class OwnSoftmax(nn.Module):
    """What some write in place of a function; torch.fx cannot trace a module that is not registered."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("positions", torch.randn(1, 9))

    def forward(self, x):
        x = x + self.positions[:, : x.size(1)]
        return nn.Softmax(dim=-1)(self.fc(x))


def test_error_names_what_cannot_be_traced():
    problem = trace(OwnSoftmax().eval()).failure()
    assert "nn.Softmax(dim=-1)" in problem.reason
