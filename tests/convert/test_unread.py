"""No quantization of what nobody reads quantized is left in the reference form."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from qfunc import (
    CPU,
    EXECUTORCH,
    FBGEMM,
    ONEDNN,
    QNNPACK,
    X86,
    CustomConfig,
    QConfig,
    QConfigMapping,
    calibrate,
    convert,
    fuse,
    lower,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.ir import users
from qfunc.numerics.observers import MinMax, PerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC_PER_CHANNEL, UINT8, UINT8_REDUCED, QuantSpec
from qfunc.testing import build, write_program
from tests.zoo import ZOO

BACKENDS = [CPU, X86, FBGEMM, QNNPACK, ONEDNN, EXECUTORCH]
NOTHING = CustomConfig()
INSERTED = ("quantize", "dequantize", "quantize_dynamically", "cast")


def converted_of(model, batches, backend, mapping=None, custom=NOTHING):
    graph = unwrap(fuse(unwrap(trace(model, batches[0], custom=custom)), backend=backend, custom=custom))
    prepared = unwrap(prepare(graph, mapping, backend=backend, custom=custom))
    return unwrap(convert(unwrap(calibrate(prepared, batches, progress=False))))


def unread(graph):
    by = users(graph)
    return [id for id in graph.order if graph[id].kind in INSERTED and not by[id]]


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_of_models(backend):
    for case in ZOO[::3]:
        model, _ = case.build()
        assert not unread(converted_of(model, list(case.batches()), backend).graph), case.name


@pytest.mark.parametrize("seed", range(12))
def test_of_generated_models(seed):
    case = build(write_program(random.Random(seed).choice, max_nodes=8))
    backend = BACKENDS[seed % len(BACKENDS)]
    graph = trace(case.module, case.example_inputs).bind(lambda traced: fuse(traced, backend=backend))
    prepared = graph.bind(lambda fused: prepare(fused, backend=backend))
    calibrated = prepared.bind(lambda stage: calibrate(stage, case.batches(2), progress=False))
    found = calibrated.bind(convert)
    assert found.map(lambda converted: unread(converted.graph)).value_or([]) == []


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(F.relu(self.a(x)))


class Both(Chain):
    def forward(self, x):
        y = F.relu(self.a(x))
        return self.b(y), y + 1


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
UINT8_NARROW = QuantSpec(quant_max=200)
WEIGHT = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)


@pytest.mark.parametrize("spec", [UINT8_REDUCED, UINT8_NARROW], ids=str)
def test_a_value_whose_only_use_has_another_spec_is_quantized_once(spec):
    mapping = QConfigMapping().set_global(QConfig(MinMax(UINT8), WEIGHT))
    mapping = mapping.set_module_name("b", QConfig(MinMax(spec), WEIGHT))
    for model, count in ((Chain(), 1), (Both(), 2)):
        graph = converted_of(model.eval(), [X], X86, mapping).graph
        behind = [node for node in graph if node.kind == "quantize" and next(node.uses()) == "relu"]
        assert len(behind) == count
        assert any(node.get("output").expected == (spec.quant_min, spec.quant_max) for node in behind)
        assert not unread(graph)


def test_the_layer_before_then_gives_the_codes_of_that_use():
    mapping = CPU.qconfig_mapping.set_module_name("b", QConfig(MinMax(UINT8_REDUCED), WEIGHT))
    converted = converted_of(Chain().eval(), [X], CPU, mapping)
    lowered = unwrap(lower(converted))
    entries = {entry.module: (entry.kernel, entry.output) for entry in lowered.certificate.entries}
    assert entries["a"] == ("onednn.linear", "uint8")
    error = unwrap(materialize(lowered))(X) - unwrap(materialize(converted))(X)
    assert error.abs().max() < 0.05


def test_codes_that_a_model_takes_and_gives_stay():
    custom = CustomConfig(input_quantized_indexes=(0,), output_quantized_indexes=(0,))
    converted = converted_of(Chain().eval(), [X], X86, custom=custom)
    assert not unread(converted.graph)
    kinds = [node.kind for node in converted.graph]
    assert kinds[0] == "placeholder"
    assert kinds.count("dequantize") == kinds.count("quantize") == 2
    assert converted.graph[next(converted.graph["output"].uses())].kind == "quantize"


class Unread(nn.Module):
    """Layers, and a call whose result nobody reads."""

    def __init__(self, call) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.call, self.a, self.b = call, nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x):
        y = self.a(x)
        self.call(y, self.mean, self.var)
        return self.b(y)


def _norm(function, **options):
    return lambda y, mean, var: function(y.unsqueeze(2).expand(-1, -1, 3), mean, var, **options)


def _attention(**options):
    return lambda y, mean, var: F.scaled_dot_product_attention(y, y, y, **options)


DOING_MORE = {
    "instance norm": _norm(F.instance_norm),
    "attention": _attention(dropout_p=0.5),
}
COMPUTING = {
    "instance norm": _norm(F.instance_norm, use_input_stats=False),
    "instance norm of the input": lambda y, mean, var: F.instance_norm(y.unsqueeze(0)),
    "batch norm": _norm(F.batch_norm),
    "attention": _attention(),
    "dropout": lambda y, mean, var: F.dropout(y, 0.5, training=False),
}


def _left_by(model):
    """What a call leaves behind: the state of random numbers, and the buffers."""
    torch.manual_seed(1)
    with torch.no_grad():
        model(X)
    return torch.rand(3), model.mean.clone(), model.var.clone()


@pytest.mark.parametrize("name", DOING_MORE)
def test_what_does_more_than_compute_is_done_though_nobody_reads_it(name):
    model = Unread(DOING_MORE[name]).eval()
    made = unwrap(materialize(converted_of(model, [X], X86), copy=True))
    torch.manual_seed(1)
    untouched = torch.rand(3), model.mean.clone(), model.var.clone()
    expected, found = _left_by(model), _left_by(made)
    assert not all(map(torch.equal, expected, untouched))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", COMPUTING)
def test_what_only_computes_is_not_done_where_nobody_reads_it(name):
    graph = converted_of(Unread(COMPUTING[name]).eval(), [X], X86).graph
    assert [node.kind for node in graph if node.kind in ("instance_norm", "batch_norm", "attention", "dropout")] == []
