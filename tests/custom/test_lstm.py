"""`nn.LSTM` as a custom module: the same in float, integer weights, and accuracy against float and torch.ao."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qfunc import (
    CPU,
    QNNPACK,
    QUANTIZABLE_LSTM,
    X86,
    BackendConfig,
    Calibrated,
    Cast,
    CustomConfig,
    KeepFloat,
    MinMax,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    calibrate,
    convert,
    fuse,
    lower,
    materialize,
    observed_lstm,
    prepare,
    quantize,
    quantized_lstm,
    trace,
    unwrap,
)
from qfunc.errors import UserFunctionFailed
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL, INT8_SYMMETRIC
from qfunc.testing import oracle, same_bits, sqnr
from qfunc.testing.walk import fingerprint
from tests.fusion.models import run

CUSTOM = CustomConfig(custom_modules=(QUANTIZABLE_LSTM,))
QCONFIG = QConfig(MinMax(), PerChannelMinMax(INT8_NARROW_PER_CHANNEL))


class Net(nn.Module):
    """A linear layer, an LSTM with given states, and a linear layer on its last step."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 16, **options)
        self.last = nn.Linear(32 if self.lstm.bidirectional else 16, 4)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        y, (_, cells) = self.lstm(self.first(x), (h, c))
        return self.last(y), cells


class Plain(nn.Module):
    """No states are given, and the output is handed on as it is."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm = nn.LSTM(8, 16, **options)

    def forward(self, x: Tensor) -> Any:
        return self.lstm(x)


def batch(model: Net, seed: int, length: int = 6, size: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    count = model.lstm.num_layers * (2 if model.lstm.bidirectional else 1)
    x = torch.randn((size, length, 8) if model.lstm.batch_first else (length, size, 8), generator=generator)
    return x, *(torch.randn(count, size, 16, generator=generator) * 0.3 for _ in range(2))


def quantized(model: nn.Module, batches: list[Any], backend: BackendConfig = CPU) -> nn.Module:
    return unwrap(materialize(unwrap(quantize(model, batches, backend=backend, custom=CUSTOM, progress=False))))


def flat(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for item in output for tensor in flat(item)]


@dataclass(frozen=True)
class Case:
    lstm: nn.LSTM
    inputs: tuple[Any, ...]


@st.composite
def lstms(draw: st.DrawFn) -> Case:
    """An LSTM of any shape, and what it is called with: with a batch axis or without, with states or without."""
    options = {name: draw(st.booleans()) for name in ("bias", "batch_first", "bidirectional")}
    layers, hidden, features = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 5))
    length, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 9)))
    lstm = nn.LSTM(features, hidden, layers, dropout=draw(st.sampled_from([0.0, 0.5])), **options).eval()
    batched = draw(st.booleans())
    rows = (size, length) if lstm.batch_first else (length, size)
    x = torch.randn(*(rows if batched else (length,)), features)
    count = layers * (2 if lstm.bidirectional else 1)
    states = [torch.randn(count, *((size,) if batched else ()), hidden) for _ in range(2)]
    return Case(lstm, (x, tuple(states)) if draw(st.booleans()) else (x,))


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@settings(deadline=None)
@given(case=lstms())
def test_the_observed_module_computes_what_the_lstm_does(case: Case) -> None:
    before = fingerprint(case.lstm)
    expected, actual = flat(run(case.lstm, case.inputs)), flat(run(observed_lstm(case.lstm, QCONFIG), case.inputs))
    for a, b in zip(expected, actual, strict=True):
        assert a.shape == b.shape and torch.allclose(a, b, atol=1e-6)
    assert fingerprint(case.lstm) == before


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
@settings(deadline=None, max_examples=30)
@given(case=lstms())
def test_the_quantized_module_is_near_and_its_weights_are_integers(case: Case) -> None:
    observed = observed_lstm(case.lstm, QCONFIG)
    expected = flat(run(observed, case.inputs))
    made = quantized_lstm(observed)
    for a, b in zip(expected, flat(run(made, case.inputs)), strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 0.1 * max(1.0, float(a.abs().max()))
    weights = [name for name in made.state_dict() if name.endswith(".weight")]
    assert len(weights) == 2 * len(made.cells)
    assert {made.state_dict()[name].dtype for name in weights} == {torch.int8}
    assert not list(made.parameters())


# In a model

SHAPES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "both directions": {"bidirectional": True, "num_layers": 2},
}


@pytest.mark.parametrize("backend", [CPU, X86, QNNPACK], ids=lambda backend: backend.name)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_with_an_lstm_is_quantized_through_it(shape: str, backend: BackendConfig) -> None:
    model = Net(**SHAPES[shape]).eval()
    before = fingerprint(model)
    made = quantized(model, [batch(model, seed) for seed in range(3)], backend)
    example = batch(model, 9)
    for expected, actual in zip(run(model, example), run(made, example), strict=True):
        assert sqnr(expected, actual) > 20
    assert made.lstm.cells[0].input.weight.dtype == torch.int8
    assert fingerprint(model) == before


@pytest.mark.filterwarnings("ignore:All inputs of this cat operator must share")
@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
@pytest.mark.parametrize(("name", "backend"), [("x86", X86), ("qnnpack", QNNPACK)])
@pytest.mark.parametrize("shape", ["one layer", "two layers", "batch first", "both directions"])
def test_it_is_no_less_accurate_than_the_references(shape: str, name: str, backend: BackendConfig) -> None:
    import torch.ao.nn.quantizable as quantizable
    import torch.ao.nn.quantized as nnq
    from torch.ao.quantization.fx.custom_config import ConvertCustomConfig, PrepareCustomConfig

    if name not in oracle.engines():
        pytest.skip(f"this machine has no {name} engine")
    model = Net(**SHAPES[shape]).eval()
    batches = [batch(model, seed, length=12, size=8) for seed in range(4)]
    observing = PrepareCustomConfig().set_float_to_observed_mapping(nn.LSTM, quantizable.LSTM)
    converting = ConvertCustomConfig().set_observed_to_quantized_mapping(quantizable.LSTM, nnq.LSTM)
    prepared = oracle.prepare(model, batches[0], name, prepare_custom_config=observing)
    theirs = oracle.convert(oracle.calibrate(prepared, batches), name, convert_custom_config=converting)
    ours = quantized(model, batches, backend)
    example = batch(model, 9, length=12, size=8)
    with oracle.engine(name):
        found = run(theirs, example)[0]
    expected = run(model, example)[0]
    assert sqnr(expected, run(ours, example)[0]) > sqnr(expected, found) - 1


@pytest.mark.parametrize("shape", ["one layer", "both directions"])
def test_without_states_and_with_its_whole_output_handed_on(shape: str) -> None:
    model = Plain(**SHAPES[shape]).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(6, 3, 8, generator=generator) for _ in range(3)]
    made = quantized(model, batches)
    for expected, actual in zip(flat(run(model, (batches[0],))), flat(run(made, (batches[0],))), strict=True):
        assert expected.shape == actual.shape and sqnr(expected, actual) > 20
    longer = torch.randn(11, 2, 8, generator=generator)
    assert sqnr(run(model, (longer,))[0], run(made, (longer,))[0]) > 20
    graph = unwrap(trace(model, custom=CUSTOM))
    stage = unwrap(prepare(unwrap(fuse(graph, backend=X86)), backend=X86, custom=CUSTOM))
    assert stage.swapped and not stage.outputs
    assert isinstance(unwrap(calibrate(stage, batches, progress=False)), Calibrated)


def test_the_kernels_on_quantized_tensors_go_with_it() -> None:
    model = Net().eval()
    lowered = unwrap(quantize(model, [batch(model, 0)], engine="quantized", custom=CUSTOM, progress=False))
    example = batch(model, 1)
    assert sqnr(run(model, example)[0], run(unwrap(materialize(lowered)), example)[0]) > 20


def test_the_materialized_module_is_an_ordinary_one() -> None:
    model = Net().eval()
    made = quantized(model, [batch(model, 0)])
    example = batch(model, 1)
    expected = run(made, example)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert all(map(same_bits, run(copied, example), expected))
    loaded = quantized(model, [batch(model, 0)])
    loaded.load_state_dict(made.state_dict())
    halved = copy.deepcopy(made).half()
    assert same_bits(halved.lstm.cells[0].input.weight_scale, made.lstm.cells[0].input.weight_scale)
    assert all(map(same_bits, run(halved, example), expected))


def test_a_configuration_may_leave_it_float_or_quantize_the_weights_alone() -> None:
    model = Net().eval()
    batches, example = [batch(model, 0), batch(model, 1)], batch(model, 2)
    mapping = CPU.qconfig_mapping.set_object_type(nn.LSTM, None)
    lowered = unwrap(quantize(model, batches, qconfig_mapping=mapping, custom=CUSTOM, progress=False))
    assert type(unwrap(materialize(lowered)).lstm) is nn.LSTM
    results = {}
    for name, qconfig in {
        "weights": QConfig(KeepFloat(), PerChannelMinMax(INT8_NARROW_PER_CHANNEL)),
        "activations": QConfig(MinMax(), KeepFloat()),
        "per tensor": QConfig(MinMax(QuantSpec("int8", -128, 127)), MinMax(INT8_SYMMETRIC)),
    }.items():
        only = QConfigMapping().set_object_type(nn.LSTM, qconfig)
        stage = unwrap(prepare(unwrap(trace(model, batches[0], custom=CUSTOM)), only, custom=CUSTOM))
        done = unwrap(calibrate(stage, batches, progress=False))
        made = unwrap(materialize(unwrap(lower(unwrap(convert(done))))))
        results[name] = sqnr(run(model, example)[0], run(made, example)[0])
        assert made.lstm.cells[0].hidden.weight.dtype == (torch.float32 if name == "activations" else torch.int8)
    assert results["weights"] > results["per tensor"] > 20
    assert results["activations"] > 20


# What goes wrong


def failing(model: nn.Module, inputs: Any, qconfig: QConfig = QCONFIG) -> Any:
    graph = unwrap(trace(model, custom=CUSTOM))
    stage = unwrap(prepare(graph, QConfigMapping().set_global(qconfig), custom=CUSTOM))
    return calibrate(stage, [inputs], progress=False).bind(convert).bind(materialize).failure()


def test_what_is_not_supported_is_told_of() -> None:
    x = torch.randn(4, 2, 8)
    projected = failing(Plain(proj_size=4).eval(), x)
    assert isinstance(projected, UserFunctionFailed) and projected.node == "lstm"
    assert "proj_size" in projected.reason
    for activation, said in ((Cast("float16"), "Cast"), (MinMax(QuantSpec("int16", -99, 99)), "int16")):
        failure = failing(Plain().eval(), x, QConfig(activation, QCONFIG.weight))
        assert isinstance(failure, UserFunctionFailed) and said in failure.reason
    double = failing(Plain().eval().double(), x.double())
    assert isinstance(double, UserFunctionFailed) and "convert the model with .float()" in double.reason
    cast_weight = failing(Plain().eval(), x, QConfig(MinMax(), Cast("float16")))
    assert isinstance(cast_weight, UserFunctionFailed) and "Cast" in cast_weight.reason


def test_weights_and_values_that_are_not_finite_are_told_of() -> None:
    model = Plain().eval()
    with torch.no_grad():
        model.lstm.weight_hh_l0[0, 0] = torch.nan
    failure = failing(model, torch.randn(4, 2, 8))
    assert failure.node == "lstm" and "NaN" in failure.reason


def test_an_lstm_that_no_data_reached_is_told_of() -> None:
    class Emptied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Any:
            return self.lstm(x[:, :0])

    failure = failing(Emptied().eval(), torch.randn(4, 2, 8))
    assert failure.node == "lstm: the input of l0" and "no data reached" in failure.reason


def test_an_observer_of_the_users_that_fails_is_told_of() -> None:
    class Broken(MinMax):
        __slots__ = ()

        def update(self, state: Any, tensor: Tensor) -> Any:
            raise ZeroDivisionError("mine")

    failure = failing(Plain().eval(), torch.randn(4, 2, 8), QConfig(Broken(), QCONFIG.weight))
    assert isinstance(failure, UserFunctionFailed) and "mine" in failure.reason


def test_a_packed_sequence_is_refused() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 8)])
    with pytest.raises(TypeError, match="padded tensor, not a PackedSequence"):
        observed_lstm(Plain().lstm, QCONFIG)(packed)
