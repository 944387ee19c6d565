"""The reference form of weights and biases: weights alone, casts, tables, recurrent layers."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from pyrsistent import pmap
from torch import nn

from qfunc import (
    MinMax,
    PerChannelMinMax,
    QuantSpec,
    calibrate,
    convert,
    fuse,
    lower,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.config.point import Edge
from qfunc.errors import BadConfig, NonFinite, NotLowered, StaleSource, problems
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT4_FLOAT_QPARAMS, UINT8_FLOAT_QPARAMS
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.testing.metrics import same_bits, sqnr
from tests.convert.forms import annotations, converted_of, lowered_of, on_range, per_row, reference_of, rounded, run

IDS = torch.randint(0, 20, (3, 5), generator=torch.Generator().manual_seed(0))
X = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(1))
ENGINES = ("reference", "onednn", "quantized")


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.bag = nn.Embedding(20, 6), nn.EmbeddingBag(20, 6, mode="sum")
        self.head = nn.Linear(6, 3)
        with torch.no_grad():
            self.table.weight.mul_(torch.arange(1.0, 21.0).view(-1, 1)).add_(3.0)

    def forward(self, ids):
        return self.head(self.table(ids).sum(1) + self.bag(ids))


def on_rows(weight, low: int, high: int):
    """Each row on the grid of its own range, whose zero point is no integer."""
    least, largest = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    scale = (largest - least) / (high - low)
    scale = torch.where(scale > 2.0**-23, scale, torch.ones_like(scale))
    return rounded(weight, scale, -least / scale, low, high)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("spec", "low", "high"), [(UINT8_FLOAT_QPARAMS, 0, 255), (UINT4_FLOAT_QPARAMS, 0, 15)], ids=lambda each: str(each)
)
def test_weights_alone_of_tables(spec, low, high, engine):
    model = Words()
    weights = {"table": PerChannelMinMax(spec), "bag": PerChannelMinMax(spec)}
    converted = converted_of(model, IDS, annotations(weights=weights), [])
    expected = copy.deepcopy(model)
    expected.table.weight.data = on_rows(model.table.weight.data, low, high)
    expected.bag.weight.data = on_rows(model.bag.weight.data, low, high)
    lowered = lowered_of(converted, engine)
    for stage in (converted, lowered):
        torch.testing.assert_close(run(unwrap(materialize(stage)), IDS), run(expected, IDS), rtol=1e-6, atol=1e-5)
    found = [entry.kernel or entry.reason for entry in lowered.certificate.entries if entry.node in weights]
    assert len(found) == 2
    assert all(found)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.up, self.fc = nn.Conv1d(2, 4, 1), nn.ConvTranspose1d(4, 2, 1), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.fc(self.up(self.conv(x)))


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("int8", -128, 127), ("int4", -8, 7), ("int16", -999, 999), ("int8", -2, 1)]
)
def test_weights_alone_of_layers(dtype, low, high):
    model = Layers()
    specs = [QuantSpec(dtype, low, high, "per_channel_symmetric", axis) for axis in (0, 1)]
    observers = {"conv": PerChannelMinMax(specs[0]), "up": PerChannelMinMax(specs[1]), "fc": PerChannelMinMax(specs[0])}
    converted = converted_of(model, X, annotations(weights=observers), [])
    expected = copy.deepcopy(model)
    for name, axis in (("conv", 0), ("up", 1), ("fc", 0)):
        layer = expected.get_submodule(name)
        layer.weight.data = per_row(layer.weight.data, low, high, axis)
    module = unwrap(materialize(converted))
    torch.testing.assert_close(run(module, X), run(expected, X), rtol=1e-6, atol=1e-6)
    assert module.state_dict().keys() == model.state_dict().keys()
    lowered = unwrap(materialize(unwrap(lower(converted, strict=True))))
    torch.testing.assert_close(run(lowered, X), run(module, X), rtol=1e-6, atol=1e-6)
    none = lower(converted, engine="reference", strict=True)
    assert all(isinstance(problem, NotLowered) for problem in problems(none.failure()))


def test_a_float16_weight_overflows_to_infinity():
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.constant_(model[0].weight, 7e4)
    found = reference_of(model, torch.ones(1, 1), annotations(weights={"_0": Cast("float16")}), [])
    assert run(found, torch.ones(1, 1)).item() == float("inf")


def test_an_axis_that_a_weight_does_not_have_is_told():
    model = nn.Sequential(nn.Linear(4, 3))
    spec = QuantSpec("int8", -128, 127, "per_channel_symmetric", 2)
    converted = converted_of(model, X, annotations(weights={"_0": PerChannelMinMax(spec)}), [])
    (problem,) = problems(materialize(converted).failure())
    assert isinstance(problem, BadConfig)
    assert (problem.node, problem.reason) == ("0.weight", "ch_axis 2 is no axis of its shape (3, 4)")


# Recurrent layers -------------------------------------------------------------------------------------------------


class Sequence(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


SEQUENCES = {
    "LSTM": lambda: nn.LSTM(4, 3, num_layers=2, bidirectional=True),
    "projected": lambda: nn.LSTM(4, 3, proj_size=2),
    "GRU": lambda: nn.GRU(4, 3),
    "RNN": lambda: nn.RNN(4, 3, bias=False),
    "LSTMCell": lambda: nn.LSTMCell(4, 3),
    "GRUCell": lambda: nn.GRUCell(4, 3),
    "RNNCell": lambda: nn.RNNCell(4, 3),
}


def with_weights(model, given, how, node="layer"):
    """A prepared stage whose node has its weights quantized, and its input as the model runs."""
    graph = unwrap(fuse(unwrap(trace(model.eval(), given))))
    inputs = {Edge(node, "0"): Dynamic() if not isinstance(how, Cast) else Cast(how.dtype, dynamic=True)}
    prepared = unwrap(prepare(graph, annotations(inputs=inputs)))
    return replace(prepared, weights=pmap({node: how}))


def result(value):
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("how", [MinMax(INT8_SYMMETRIC), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL), Cast()], ids=str)
@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_recurrent_layers(name, how):
    torch.manual_seed(0)
    layer = SEQUENCES[name]()
    given = X[0] if name.endswith("Cell") else X
    prepared = with_weights(Sequence(layer), given, how)
    converted = unwrap(convert(unwrap(calibrate(prepared, [], progress=False))))
    module = unwrap(materialize(converted))
    expected = copy.deepcopy(layer)
    for part, tensor in expected.named_parameters():
        if part.startswith("weight"):
            tensor.data = {
                MinMax: lambda w: on_range(w, -128, 127, middle=0),
                PerChannelMinMax: lambda w: per_row(w, -128, 127),
                Cast: lambda w: w.half().float(),
            }[type(how)](tensor.data)
    x = given.half().float() if isinstance(how, Cast) else on_range(given, 0, 255)
    torch.testing.assert_close(result(run(module, given)), result(run(expected, x)), rtol=1e-6, atol=1e-6)
    assert module.state_dict().keys() == Sequence(layer).state_dict().keys()
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same_bits(run(other, given), run(module, given))
    loaded = unwrap(materialize(converted))
    loaded.load_state_dict(module.state_dict())
    assert same_bits(run(loaded, given), run(module, given))
    for engine in ENGINES:
        lowered = lowered_of(converted, engine)
        (entry,) = (entry for entry in lowered.certificate.entries if entry.node == "layer")
        assert entry.intended
        assert entry.reason or entry.kernel
        actual = run(unwrap(materialize(lowered)), given)
        # a kernel of codes rounds the state at each step, too
        assert sqnr(run(module, given), actual) > 30 if entry.kernel else same_bits(actual, run(module, given))


def test_a_recurrent_layer_leaves_the_model_as_it_is():
    torch.manual_seed(0)
    model = Sequence(nn.LSTM(4, 3)).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prepared = with_weights(model, X, MinMax(INT8_SYMMETRIC))
    converted = unwrap(convert(unwrap(calibrate(prepared, []))))
    module = unwrap(materialize(converted))
    module.layer.bias_ih_l0.data.add_(1.0)
    module.half()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        model.layer.weight_hh_l0.add_(1.0)
    assert [type(problem) for problem in problems(materialize(converted).failure())] == [StaleSource]


class Twice(nn.Module):
    """One layer, called quantized and as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.GRU(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x)[0])[0]


def test_a_layer_called_twice_may_be_quantized_once():
    model = Twice()
    converted = unwrap(convert(unwrap(calibrate(with_weights(model, X, MinMax(INT8_SYMMETRIC)), []))))
    module = unwrap(materialize(converted))
    changed = copy.deepcopy(model.layer)
    for name, tensor in changed.named_parameters():
        tensor.data = on_range(tensor.data, -128, 127, middle=0) if name.startswith("weight") else tensor.data
    expected = run(model.layer, run(changed, on_range(X, 0, 255))[0])[0]
    torch.testing.assert_close(run(module, X), expected, rtol=1e-6, atol=1e-6)


def test_weights_that_cannot_be_quantized_are_told():
    norm = nn.utils.parametrizations.spectral_norm
    hooked = nn.GRUCell(4, 3)
    hooked.register_forward_hook(lambda module, args, output: output)
    for cell, reason in ((norm(nn.GRUCell(4, 3), "weight_hh"), "no parameter called 'weight'"), (hooked, "hook")):
        calibrated = unwrap(calibrate(with_weights(Sequence(cell), X[0], MinMax(INT8_SYMMETRIC)), []))
        (problem,) = problems(convert(calibrated).failure())
        assert (type(problem), problem.node) == (BadConfig, "layer")
        assert reason in problem.reason
    broken = Sequence(nn.GRU(4, 3))
    broken.layer.weight_ih_l0.data[0, 0] = float("nan")
    (problem,) = problems(calibrate(with_weights(broken, X, MinMax(INT8_SYMMETRIC)), []).failure())
    assert (type(problem), problem.node) == (NonFinite, "layer")


def test_what_has_no_weight_is_told():
    graph = unwrap(trace(nn.Sequential(nn.Softmax(-1)).eval(), X))
    prepared = replace(unwrap(prepare(graph, annotations())), weights=pmap({"_0": MinMax(INT8_SYMMETRIC)}))
    (problem,) = problems(convert(unwrap(calibrate(prepared, []))).failure())
    assert (type(problem), problem.node) == (BadConfig, "0")
