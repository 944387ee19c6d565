"""The decomposed form computes what the reference form does, in torch's operators, or says which of it has none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn

import qfunc
from qfunc import CPU, CustomConfig, MinMax, PerChannelMinMax, QuantSpec, lower, materialize, unwrap
from qfunc.config.annotation import Derived
from qfunc.config.point import Edge
from qfunc.edge.decomposed import has_decomposed
from qfunc.errors import UnsupportedDType, UserFunctionFailed, problems
from qfunc.ir import verify
from qfunc.numerics.observers import RangeState
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, QParams
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.passes.stages import Converted
from qfunc.testing.metrics import same_bits
from qfunc.testing.strategies import cases
from qfunc.testing.walk import Case, made, run, walk
from tests.convert.forms import annotations, converted_of
from tests.zoo import ZOO, ZooCase

pytestmark = pytest.mark.skipif(not has_decomposed(), reason="this torch has no decomposed operators")

VECTORS = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
PREFIX = "quantized_decomposed."


def decomposed(converted: Converted) -> fx.GraphModule:
    stage = unwrap(lower(converted, engine="decomposed"))
    unwrap(verify(stage.graph))
    return unwrap(materialize(stage))


def operators(module: fx.GraphModule) -> set[str]:
    targets = (str(node.target) for node in module.graph.nodes if node.op == "call_function")
    return {target.removeprefix(PREFIX) for target in targets if target.startswith(PREFIX)}


def same_as_reference(converted: Converted, *inputs: object) -> fx.GraphModule:
    """The decomposed module, which computes what the reference form does, bit for bit."""
    module = decomposed(converted)
    assert same_bits(run(module, inputs), run(unwrap(materialize(converted)), inputs))
    return module


# What it computes -----------------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(case=cases(engines=["decomposed"]))
def test_random_models_compute_the_reference_form(case: Case) -> None:
    _check(case)


@settings(max_examples=25)
@given(case=cases(engines=["decomposed"], configured=True))
def test_random_configurations_compute_the_reference_form(case: Case) -> None:
    _check(case)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_the_zoo_computes_the_reference_form(case: ZooCase) -> None:
    model, example = case.build()
    _check(Case(model, example, tuple(case.batches(2)), CPU, "decomposed"))


def _check(case: Case) -> None:
    way = walk(case)
    if way.converted is None or way.lowered is None:
        return
    unwrap(verify(way.lowered.graph))
    assert all(not entry.kernel and (entry.reason or not entry.intended) for entry in way.lowered.certificate.entries)
    reference, module = made(way.converted), made(way.lowered)
    modules = {type(part) for part in module.modules()}
    assert not any(kind.__module__.startswith("qfunc.edge.kernels") for kind in modules)
    for inputs in way.inputs():
        assert same_bits(run(module, inputs), run(reference, inputs))


RANGES = (
    ("uint8", 0, 255),
    ("int8", -128, 127),
    ("uint8", 0, 127),
    ("uint8", 0, 100),
    ("int8", -7, 100),
    ("int16", -(2**15), 2**15 - 1),
    ("int16", -2000, 5),
    ("uint16", 0, 2**16 - 1),
    ("uint4", 0, 15),
    ("int4", -8, 7),
    ("uint4", 0, 7),
    ("int4", -4, 3),
)


def layer() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


INPUT, LAYER = Edge("_0", "input"), "_0"


@pytest.mark.parametrize(("dtype", "low", "high"), RANGES)
def test_every_integer_type_of_activations(dtype: str, low: int, high: int) -> None:
    spec = QuantSpec(dtype, low, high)
    converted = converted_of(layer(), VECTORS / 2, annotations(inputs={INPUT: MinMax(spec)}), [VECTORS / 2])
    module = same_as_reference(converted, VECTORS)
    assert operators(module) == {"quantize_per_tensor.default", "dequantize_per_tensor.default"}
    dynamic = converted_of(layer(), VECTORS, annotations(inputs={INPUT: Dynamic(spec)}), [])
    chosen = same_as_reference(dynamic, VECTORS + 9)
    for x in (VECTORS, -VECTORS.abs(), VECTORS[:0], VECTORS[0], torch.zeros(2, 4)):
        assert same_bits(run(chosen, (x,)), run(unwrap(materialize(dynamic)), (x,)))
    names = {"choose_qparams.tensor", "quantize_per_tensor.tensor", "dequantize_per_tensor.tensor"}
    assert operators(chosen) == names


@pytest.mark.parametrize(("dtype", "low", "high"), [each for each in RANGES if each[0] != "uint16"])
def test_every_integer_type_per_channel(dtype: str, low: int, high: int) -> None:
    spec = QuantSpec(dtype, low, high, "per_channel_affine", 1)
    inputs, weights = {INPUT: PerChannelMinMax(spec)}, {LAYER: PerChannelMinMax(replace(spec, ch_axis=0))}
    converted = converted_of(layer(), VECTORS, annotations(inputs=inputs, weights=weights))
    module = same_as_reference(converted, VECTORS * 2)
    assert operators(module) == {"quantize_per_channel.default", "dequantize_per_channel.default"}
    assert module.get_buffer("0.weight").dtype == spec.torch_dtype
    assert module.get_buffer("input_1_q_scale").shape == (4,)


@pytest.mark.parametrize(("dtype", "low", "high"), [("int8", -128, 127), ("int16", -999, 999), ("uint8", 0, 255)])
def test_symmetric_qparams_chosen_when_the_model_runs(dtype: str, low: int, high: int) -> None:
    spec = QuantSpec(dtype, low, high, "per_tensor_symmetric")
    converted = converted_of(layer(), VECTORS, annotations(inputs={INPUT: Dynamic(spec)}), [])
    assert "choose_qparams_symmetric.tensor" in operators(same_as_reference(converted, VECTORS + 1))


def test_codes_of_32_bits_are_near_the_reference_and_do_not_overflow() -> None:
    spec = QuantSpec("int32", -(2**31), 2**31 - 1, "per_tensor_symmetric")
    converted = converted_of(layer(), VECTORS, annotations(inputs={INPUT: MinMax(spec)}))
    for x in (VECTORS, VECTORS * 9):
        expected = run(unwrap(materialize(converted)), (x,))
        torch.testing.assert_close(run(decomposed(converted), (x,)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn"])
def test_casts(dtype: str) -> None:
    given = annotations(inputs={INPUT: Cast(dtype, dynamic=True)}, weights={LAYER: Cast(dtype)})
    module = same_as_reference(converted_of(layer(), VECTORS, given, []), VECTORS)
    assert operators(module) == {"convert_element_type.no_fuse"}
    assert module.get_buffer("0.weight").dtype == getattr(torch, dtype)


@pytest.mark.parametrize("observer", ["codes", "cast"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_floats_keep_their_type(dtype: torch.dtype, observer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4)).to(dtype).eval()
    rows = QuantSpec("int8", -128, 127, "per_channel_symmetric", 0)
    given = annotations(weights={LAYER: PerChannelMinMax(rows) if observer == "codes" else Cast("float8_e5m2")})
    prepared = unwrap(qfunc.prepare(unwrap(qfunc.fuse(unwrap(qfunc.trace(model)))), given))
    converted = unwrap(qfunc.convert(unwrap(qfunc.calibrate(prepared, []))))
    module = same_as_reference(converted, torch.arange(9))
    assert run(module, (torch.arange(9),)).dtype is dtype


def test_tables_have_float_zero_points() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.bag = nn.Embedding(20, 6), nn.EmbeddingBag(20, 6, mode="sum")

        def forward(self, ids: Tensor) -> Tensor:
            return self.table(ids).sum(1) + self.bag(ids)

    ids = torch.arange(15).view(3, 5)
    specs = [QuantSpec(dtype, 0, high, "per_channel_affine_float_qparams", 0) for dtype, high in NIBBLES]
    weights = dict(zip(("table", "bag"), map(PerChannelMinMax, specs), strict=True))
    module = same_as_reference(converted_of(Words(), ids, annotations(weights=weights), []), ids)
    state = module.state_dict()
    assert state["table.weight"].dtype is state["bag.weight"].dtype is torch.uint8
    assert state["table.weight"].max() == 255
    assert state["bag.weight"].max() == 15
    assert state["bag.weight_zero_point"].dtype is torch.float32


NIBBLES = (("uint8", 255), ("uint4", 15))


INT32 = QuantSpec("int32", -(2**31), 2**31 - 1, "per_channel_symmetric", 0)
INT32_TENSOR = replace(INT32, qscheme="per_tensor_symmetric", ch_axis=None)


def product(of: tuple[QParams, ...]) -> QParams:
    scale = of[0].scale * of[1].scale
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int64), INT32 if scale.dim() else INT32_TENSOR)


def of_weight(of: tuple[QParams, ...]) -> QParams:
    return QParams(of[0].scale * 3, of[0].zero_point, of[0].spec)


@pytest.mark.parametrize("per_channel", [True, False])
def test_qparams_that_are_made_of_others(per_channel: bool) -> None:
    """Of a bias by those of what the sums are made of; of a result by the weight's, which are known with that."""
    observer = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL) if per_channel else MinMax(INT8_SYMMETRIC)
    weight = Edge("_0", "weight")
    of_sums = Derived((INPUT, weight), product, INT32 if per_channel else INT32_TENSOR)
    outputs = {} if per_channel else {"_0": Derived((weight,), of_weight, INT8_SYMMETRIC)}
    given = annotations(inputs={INPUT: MinMax()}, weights={LAYER: observer}, biases={LAYER: of_sums}, outputs=outputs)
    module = same_as_reference(converted_of(layer(), VECTORS, given), VECTORS)
    state = module.state_dict()
    assert state["0.bias"].dtype is torch.int32
    assert state["0.bias_scale"].shape == state["0.weight_scale"].shape == ((3,) if per_channel else ())
    assert ("quantize_per_tensor.tensor" in operators(module)) == (not per_channel)


def test_headroom_of_derived_qparams() -> None:
    """Codes of 7 bits go on to the end of the dtype, as those of known qparams do."""
    seven = QuantSpec("int8", -64, 63, "per_tensor_symmetric")
    weight = Edge("_0", "weight")
    given = annotations(inputs={INPUT: Derived((weight,), of_weight, seven)}, weights={LAYER: MinMax(seven)})
    same_as_reference(converted_of(layer(), VECTORS, given), VECTORS * 10)


class Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.cell, self.head = nn.LSTM(4, 3, num_layers=2), nn.GRUCell(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(self.lstm(x)[0][-1]))


def test_recurrent_layers_stay_modules_and_the_certificate_says_so() -> None:
    observers = {"lstm": "per row", "cell": "per row", "head": "per row"}
    given = annotations(weights=dict.fromkeys(observers, PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)))
    x = torch.randn(5, 2, 4, generator=torch.Generator().manual_seed(0))
    converted = converted_of(Sequence(), x, given, [])
    module = same_as_reference(converted, x)
    kept = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    assert kept == {"lstm", "cell"}
    assert module.get_parameter("lstm.weight_ih_l0").dtype is torch.float32
    assert module.get_buffer("head.weight").dtype is torch.int8
    reasons = {e.node: e.reason for e in unwrap(lower(converted, engine="decomposed")).certificate.entries}
    assert all("its module stays" in reasons[name] for name in ("lstm", "cell"))
    assert "its module stays" not in reasons["head"]


@pytest.mark.parametrize("name", ["zeros", "reflect", "same"])
def test_layers_with_every_option(name: str) -> None:
    torch.manual_seed(0)
    options = {"padding": "same"} if name == "same" else {"padding": 1, "padding_mode": name}
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, **options), nn.ConvTranspose2d(6, 4, 3, stride=2, bias=False))
    x = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    weights = {"_0": PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL), "_1": MinMax(INT8_SYMMETRIC)}
    module = same_as_reference(converted_of(model, x, annotations(weights=weights), []), x)
    assert not [node for node in module.graph.nodes if node.op == "call_module"]


def test_a_weight_of_several_layers_is_held_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    observer = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
    given = annotations(weights={"layer": observer, "layer_1": observer})
    module = same_as_reference(converted_of(Twice(), VECTORS, given, []), VECTORS)
    assert sorted(module.state_dict()) == [f"layer.{name}" for name in ("bias", *PARTS)]


PARTS = ("weight", "weight_scale", "weight_zero_point")


def test_a_layer_that_is_called_in_float_as_well_keeps_its_floats() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.relu(self.layer(x)))

    given = annotations(weights={"relu": PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)})
    module = same_as_reference(converted_of(Both(), VECTORS, given, []), VECTORS)
    assert module.get_parameter("layer.weight").dtype is torch.float32
    assert [buffer.dtype for _, buffer in module.named_buffers()].count(torch.int8) == 1


def test_models_that_take_and_give_codes() -> None:
    codes = CustomConfig(input_quantized_indexes=(0,), output_quantized_indexes=(0,))
    prepared = qfunc.prepare(unwrap(qfunc.fuse(unwrap(qfunc.trace(layer().eval(), VECTORS)))), custom=codes)
    converted = unwrap(qfunc.convert(unwrap(qfunc.calibrate(unwrap(prepared), [VECTORS], progress=False))))
    x = torch.arange(24, dtype=torch.uint8).view(6, 4)
    module = same_as_reference(converted, x)
    assert run(module, (x,)).dtype is torch.uint8
    lowered = unwrap(lower(converted, engine="decomposed"))
    assert (lowered.input_qparams, lowered.output_qparams) == (converted.input_qparams, converted.output_qparams)


# What torch's operators cannot say ------------------------------------------------------------------------------------

FLOAT_QPARAMS = QuantSpec("uint8", 0, 255, "per_channel_affine_float_qparams", 1)
CHANNELS16 = QuantSpec("uint16", 0, 2**16 - 1, "per_channel_affine", 1)
REFUSED = {
    "uint32": (MinMax(QuantSpec("uint32", 0, 2**32 - 1)), "have no uint32"),
    "uint16 per channel": (PerChannelMinMax(CHANNELS16), "have no uint16 with scales per channel"),
    "float zero points": (PerChannelMinMax(FLOAT_QPARAMS), "round before they add a zero point"),
    "dynamic per channel": (Dynamic(QuantSpec("int8", -128, 127, "per_channel_affine", 1)), "one scale for a tensor"),
    "dynamic symmetric part": (Dynamic(QuantSpec("uint8", 0, 127, "per_tensor_symmetric")), "choose 128"),
    "dynamic symmetric uint4": (Dynamic(QuantSpec("uint4", 0, 15, "per_tensor_symmetric")), "choose 128"),
    "dynamic int32": (Dynamic(QuantSpec("int32", -(2**31), 2**31 - 1)), "overflow"),
    "dynamic uint32": (Dynamic(QuantSpec("uint32", 0, 2**32 - 1)), "have no uint32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_operator_is_told(name: str) -> None:
    observer, reason = REFUSED[name]
    converted = converted_of(layer(), VECTORS, annotations(inputs={INPUT: observer}))
    (problem,) = problems(lower(converted, engine="decomposed").failure())
    assert isinstance(problem, UnsupportedDType)
    assert problem.node == "input 'input'"
    assert reason in problem.reason
    assert "engine='reference'" in problem.remedy


def test_all_that_has_no_operator_is_told_at_once() -> None:
    weight = PerChannelMinMax(replace(CHANNELS16, ch_axis=0))
    given = annotations(inputs={INPUT: MinMax(QuantSpec("uint32", 0, 9))}, weights={LAYER: weight})
    failure = lower(converted_of(layer(), VECTORS, given), engine="decomposed").failure()
    assert [problem.node for problem in problems(failure)] == ["input 'input'", "0"]


@dataclass(frozen=True)
class Contrary(MinMax):
    """An observer that says one dtype and gives qparams for another."""

    def finish(self, state: RangeState) -> QParams | None:
        found = super().finish(state)
        return None if found is None else replace(found, spec=QuantSpec("int16", -128, 127, found.spec.qscheme))


def test_an_observer_that_gives_other_qparams_than_it_says_is_told() -> None:
    given = annotations(weights={LAYER: Contrary(INT8_SYMMETRIC)})
    stage = unwrap(lower(converted_of(layer(), VECTORS, given, []), engine="decomposed"))
    (problem,) = problems(materialize(stage).failure())
    assert isinstance(problem, UserFunctionFailed)
    assert problem.node == "0.weight"
    assert "its observer is for int8 per_tensor_symmetric, and gives qparams for int16" in problem.reason
