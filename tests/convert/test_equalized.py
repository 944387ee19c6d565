"""Equalization applied: the float meaning stays, the weights of the model stay, and int8 is nearer to float."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from pyrsistent import pmap
from torch import nn

from qfunc import (
    CPU,
    X86,
    QConfig,
    QConfigMapping,
    calibrate,
    convert,
    fuse,
    interpret,
    layers,
    lower,
    materialize,
    prepare,
    reuse,
    trace,
    unwrap,
)
from qfunc.config.annotation import Annotations, Derived
from qfunc.config.point import Edge
from qfunc.edge.evaluate import Evaluator
from qfunc.errors import BadConfig, Unobserved, problems
from qfunc.ir import Draft, Graph
from qfunc.numerics.equalization import column_range, equalization_scale, scaled_range
from qfunc.numerics.observers import FixedQParams, MinMax, PerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8, UINT8_REDUCED, QParams, QuantSpec
from qfunc.numerics.statistic import MinMaxStatistic, RangeState
from qfunc.params import DequantizeWeight, DivideColumns, MultiplyRows, QuantizeWeight
from qfunc.passes.stages import Calibrated, Converted
from qfunc.passes.statistics import Measured
from qfunc.testing import oracle, sqnr
from qfunc.testing.walk import fingerprint

INT32 = QuantSpec("int32", -(2**31), 2**31 - 1, "per_tensor_symmetric")


def spread(channels: int, by: float = 30.0) -> torch.Tensor:
    """Factors of channels from 1 / by to by, in an order of no meaning."""
    return torch.logspace(-1, 1, channels, base=by)[torch.randperm(channels)]


def steps(channels: int) -> torch.Tensor:
    """Factors of the channels of inputs."""
    return torch.logspace(-1, 1, channels, base=20.0)


def seeded(*layers_made: nn.Module) -> None:
    """Chains of layers whose channels between them have very different ranges."""
    for layer, behind in pairwise(layers_made):
        with torch.no_grad():
            factor = spread(layer.weight.shape[0])
            layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)))
            if layer.bias is not None:
                layer.bias.mul_(factor)
            groups = getattr(behind, "groups", 1)
            blocks = behind.weight.view(groups, -1, *behind.weight.shape[1:])
            blocks.div_(factor.view(groups, 1, -1, *[1] * (behind.weight.dim() - 2)))


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 12), nn.Linear(12, 12, bias=False), nn.Linear(12, 4)
        seeded(self.a, self.b, self.c)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Convs(nn.Module):
    """Convolutions of one rank, grouped and depthwise, pools between them, and a residual sum."""

    def __init__(self, rank: int, *, norm: bool = True) -> None:
        super().__init__()
        conv = getattr(nn, f"Conv{rank}d")
        self.a, self.b = conv(4, 8, 3, padding=1), conv(8, 8, 3, padding=1, groups=2)
        self.c, self.d = conv(8, 8, 1, groups=8), conv(8, 4, 1)
        self.pool = getattr(nn, f"MaxPool{rank}d")(2)
        self.norm = getattr(nn, f"BatchNorm{rank}d")(8) if norm else nn.Identity()
        if norm:
            self.norm.running_var.uniform_(0.5, 2.0)
        seeded(self.a, self.b, self.c, self.d)

    def forward(self, x):
        y = self.pool(F.relu(self.a(x)))
        y = F.relu(self.norm(self.b(y)))
        return self.d(F.relu(self.c(y)) + y)


class Chain(nn.Module):
    """Convolutions, one behind the other, as torch.ao can equalize them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1)
        seeded(self.a, self.b, self.c)

    def forward(self, x):
        return self.c(F.relu(self.b(F.relu(self.a(x)))))


class Functional(nn.Module):
    """Layers written as functions, one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 4, 3, 3) / 3), nn.Parameter(torch.randn(5, 6) / 3)
        self.bias = nn.Parameter(torch.randn(6))
        with torch.no_grad():
            self.first.div_(steps(4).view(-1, 1, 1))

    def forward(self, x):
        y = F.relu(F.conv2d(x, self.first, self.bias, padding=1)).mean((2, 3))
        return F.linear(y, self.second), F.linear(F.relu(y), self.second)


class Branches(nn.Module):
    """Two layers read one value, which a sum reads as well; a third reads a value of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.only, self.last = nn.Conv2d(6, 6, 1, bias=False), nn.Conv2d(6, 3, 1)
        seeded(self.stem, self.left)
        seeded(self.only, self.last)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.last(self.only(F.relu(self.left(x)) + F.relu(self.right(x)) + x))


def inputs_of(shape: tuple[int, ...], count: int = 3, channel: int = 1):
    generator = torch.Generator().manual_seed(1)
    factor = steps(shape[channel]).view(-1, *[1] * (len(shape) - 1 - channel))
    return [torch.randn(shape, generator=generator) * factor for _ in range(count)]


MODELS: dict[str, Any] = {
    "linears": (Linears, inputs_of((16, 8))),
    "linears on a third axis": (Linears, inputs_of((3, 5, 8), channel=2)),
    "conv1d": (lambda: Convs(1), inputs_of((2, 4, 12))),
    "conv2d": (lambda: Convs(2), inputs_of((2, 4, 8, 8))),
    "conv2d without batch": (lambda: Convs(2, norm=False), inputs_of((4, 8, 8), channel=0)),
    "chain": (Chain, inputs_of((2, 4, 8, 8))),
    "conv3d": (lambda: Convs(3), inputs_of((2, 4, 4, 4, 4))),
    "functional": (Functional, inputs_of((2, 4, 8, 8))),
    "branches": (Branches, inputs_of((2, 4, 8, 8))),
}
each_model = pytest.mark.parametrize("name", MODELS)
each_backend = pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)


def made(name: str) -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(0)
    build, batches = MODELS[name]
    return build().eval(), batches


def calibrated_of(model, batches, mapping=None, *, backend=CPU, equalize=layers) -> Calibrated:
    graph = unwrap(fuse(unwrap(trace(model, batches[0])), backend=backend))
    prepared = unwrap(prepare(graph, mapping, backend=backend, equalize=equalize))
    return unwrap(calibrate(prepared, batches, progress=False))


def run(stage, inputs):
    with torch.no_grad():
        found = unwrap(materialize(stage))(inputs)
    return found if isinstance(found, tuple) else (found,)


def unquantized(graph: Graph) -> Graph:
    """A reference graph with everything quantized left out."""
    draft = Draft(graph)
    for node in graph:
        codes = graph[next(node.uses())] if node.kind == "dequantize" else None
        if codes is not None:
            assert codes.kind == "quantize"
            draft.redirect(node.id, next(codes.uses()))
            draft.erase([node.id, codes.id])
        elif node.has("weight") and isinstance(node.get("weight"), DequantizeWeight):
            draft.put(node.with_args(weight=node.get("weight").value.value))
    return draft.commit()


def quality(converted: Converted, model, batches) -> float:
    with torch.no_grad():
        expected = model(batches[0])
    expected = expected if isinstance(expected, tuple) else (expected,)
    return min(sqnr(a, b) for a, b in zip(expected, run(converted, batches[0]), strict=True))


@each_model
@each_backend
def test_the_float_meaning_stays(name, backend):
    model, batches = made(name)
    converted = unwrap(convert(calibrated_of(model, batches, backend=backend)))
    found = run(unquantized(converted.graph), batches[0])
    expected = run(calibrated_of(model, batches, backend=backend, equalize=None).graph, batches[0])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


@each_model
@each_backend
def test_int8_is_nearer_to_float_than_without(name, backend):
    model, batches = made(name)
    plain, scaled = (
        unwrap(convert(calibrated_of(model, batches, backend=backend, equalize=equalize)))
        for equalize in (None, layers)
    )
    assert quality(scaled, model, batches) > quality(plain, model, batches) + 3


@each_model
def test_equalized_layers_run_on_integers(name):
    model, batches = made(name)
    plain, scaled = (
        unwrap(convert(calibrated_of(model, batches, equalize=equalize)).bind(lower)) for equalize in (None, layers)
    )
    layers_in_int8 = [{e.node for e in stage.certificate.entries if e.kernel.split(".")[-1][:4] in ("conv", "line")}
                      for stage in (plain, scaled)]  # fmt: skip
    assert layers_in_int8[0] == layers_in_int8[1] != set()
    reference = unwrap(convert(calibrated_of(model, batches)))
    for a, b in zip(run(scaled, batches[0]), run(reference, batches[0]), strict=True):
        assert sqnr(b, a) > 30


@each_model
def test_the_model_and_the_stage_stay_as_they_are(name):
    model, batches = made(name)
    kept = copy.deepcopy(model.state_dict())
    calibrated = calibrated_of(model, batches)
    held = fingerprint(calibrated)
    first, second = unwrap(convert(calibrated)), unwrap(convert(calibrated))
    assert first == second
    assert fingerprint(calibrated) == held
    run(first, batches[0])
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["linears", "conv2d", "branches"])
def test_the_range_of_a_scaled_input_is_that_of_the_scaled_values(name):
    """Between layers as well, where the reference keeps the range of the values before they were scaled."""
    model, batches = made(name)
    weight = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
    converted = unwrap(
        convert(calibrated_of(model, batches, QConfigMapping().set_global(QConfig(MinMax(UINT8), weight))))
    )
    bare = unquantized(converted.graph)
    seen: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        unwrap(interpret(bare, batch, lambda id, value: seen.setdefault(id, []).append(value)))
    scaled = [node for node in converted.graph if node.kind == "quantize" and _feeds_a_layer(node, converted.graph)]
    assert len(scaled) >= 3
    for node in scaled:
        affine, values = node.get("output"), torch.cat([v.flatten() for v in seen[next(node.uses())]])
        low, high = min(values.min().item(), 0), max(values.max().item(), 0)
        assert affine.scale == pytest.approx((high - low) / 255, rel=1e-3), node.id


def _feeds_a_layer(node, graph):
    found = {user.kind for user in graph for use in user.uses() if use in _floats_of(node, graph)}
    return found & {"linear", "conv2d"}


def _floats_of(node, graph):
    return {user.id for user in graph if user.kind == "dequantize" and node.id in user.uses()}


def scales_of(converted: Converted) -> dict[str, tuple[float, ...]]:
    return {node.id: node.get("value").values for node in converted.graph
            if node.kind == "get_attr" and node.id.endswith("_equalization_scale")}  # fmt: skip


def test_a_layer_takes_the_scale_of_what_only_equalized_layers_read():
    model, batches = made("branches")
    converted = unwrap(convert(calibrated_of(model, batches)))
    assert scales_of(converted).keys() == {"x_equalization_scale", "relu_equalization_scale", *_sums(converted)}
    rows = {node.id for node in converted.graph if node.has("weight") and _is_scaled(node)}
    assert rows == {"only"}


def _sums(converted):
    """The sum is fused behind a convolution, whose other operand is not scaled."""
    return {id for id in scales_of(converted) if id.startswith(("add", "relu_1", "relu_2"))}


def _is_scaled(node):
    weight = node.get("weight")
    inner = weight.value.value if isinstance(weight, DequantizeWeight) else weight
    return isinstance(inner, MultiplyRows)


def test_the_codes_of_a_layer_that_takes_a_scale_stay():
    """Its rows have scales of their own: but for rounding where an input scale falls, its codes are those of before."""
    model, batches = made("linears")
    weights = []
    for equalize in (None, lambda graph: [id for id in layers(graph) if id == "c"]):
        module = unwrap(convert(calibrated_of(model, batches, equalize=equalize)).bind(lower))
        (node,) = (node for node in module.graph if node.kind.endswith("linear") and node.origin.module == "b")
        codes = next(value for _, value in node.args if isinstance(value, QuantizeWeight))
        weights.append(Evaluator(module.graph.sources).quantized(codes).values)
    assert torch.equal(*weights)


def test_a_weight_of_one_scale_is_multiplied_behind():
    """Its rows would have to share the scale of the largest."""
    model, batches = made("linears")
    mapping = QConfigMapping().set_global(QConfig(MinMax(UINT8), MinMax(INT8_SYMMETRIC)))
    converted = unwrap(convert(calibrated_of(model, batches, mapping)))
    assert len(scales_of(converted)) == 3
    plain = unwrap(convert(calibrated_of(model, batches, mapping, equalize=None)))
    assert quality(converted, model, batches) > quality(plain, model, batches)


def test_uses_of_other_specs_have_sites_of_their_own():
    model, batches = made("branches")
    weight = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
    mapping = QConfigMapping().set_global(QConfig(MinMax(UINT8), weight))
    mapping = mapping.set_module_name("right", QConfig(MinMax(UINT8_REDUCED), weight))
    converted = unwrap(convert(calibrated_of(model, batches, mapping)))
    read = {}
    for node in converted.graph:
        if node.origin.module in ("left", "right"):
            (first, *_) = node.uses()
            read[node.origin.module] = converted.graph[first].get("input")
    assert read["left"].expected == (0, 255)
    assert read["right"].expected == (0, 127)
    assert read["right"].scale == pytest.approx(read["left"].scale * 255 / 127, rel=1e-6)


def test_statistics_are_used_again_and_give_the_same():
    model, batches = made("conv2d")
    calibrated = calibrated_of(model, batches)
    reused = unwrap(reuse(calibrated.prepared, calibrated.statistics))
    assert unwrap(convert(reused)) == unwrap(convert(calibrated))


def test_what_is_missing_is_told():
    model, batches = made("linears")
    calibrated = calibrated_of(model, batches)
    found = problems(convert(Calibrated(calibrated.prepared, calibrated.statistics)).failure())
    assert [(type(p), p.node) for p in found] == [(Unobserved, "a"), (Unobserved, "b"), (Unobserved, "c")]
    assert all("range of its weights" in problem.reason for problem in found)
    kept = {key: entry for key, entry in calibrated.statistics.measured.items() if key[1] != MinMaxStatistic(1)}
    assert len(kept) == 3
    lacking = replace(calibrated, statistics=replace(calibrated.statistics, measured=pmap(kept)))
    assert {type(problem) for problem in problems(convert(lacking).failure())} == {Unobserved}


def test_statistics_of_other_channels_are_an_error():
    model, batches = made("conv2d")
    graph = unwrap(fuse(unwrap(trace(model))))
    prepared = unwrap(prepare(graph, equalize=layers))
    calibrated = unwrap(calibrate(prepared, batches, progress=False))
    assert isinstance(unwrap(convert(calibrated)), Converted)
    three = RangeState(torch.zeros(3), torch.ones(3))
    wrong = {key: Measured(three, 1) if key[1] == MinMaxStatistic(1) else entry
             for key, entry in calibrated.statistics.measured.items()}  # fmt: skip
    given = replace(calibrated, statistics=replace(calibrated.statistics, measured=pmap(wrong)))
    assert "input channels, the statistics have 3" in repr(convert(given).failure())


def test_shared_and_per_channel_inputs_are_not_equalized():
    model, batches = made("linears")
    graph = unwrap(fuse(unwrap(trace(model, batches[0]))))
    weight, first, second = MinMax(INT8_SYMMETRIC), Edge("relu", "input"), Edge("c", "input")
    per_channel = PerChannelMinMax(QuantSpec(qscheme="per_channel_affine", ch_axis=1))
    given = Annotations(pmap({first: MinMax(), second: MinMax()}), weights=pmap({"relu": weight, "c": weight}))
    for annotated, reason in (
        (replace(given, groups=frozenset({(first, second)})), "shares its qparams"),
        (replace(given, inputs=given.inputs.set(first, per_channel)), "qparams for each channel already"),
    ):
        prepared = unwrap(prepare(graph, annotated, equalize=layers))
        assert any(reason in note.text for note in prepared.notes), reason
    assert len(unwrap(prepare(graph, given, equalize=layers)).equalizations) == 2


def test_a_bias_that_derives_its_qparams_has_those_of_the_scaled_input():
    model, batches = made("linears")
    graph = unwrap(fuse(unwrap(trace(model, batches[0]))))

    def product(given: tuple[QParams, ...]) -> QParams:
        scale = given[0].scale * given[1].scale.max()
        return QParams(scale, torch.zeros((), dtype=torch.int64), INT32)

    points = (Edge("c", "input"), Edge("c", "weight"))
    weight = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
    given = Annotations(
        pmap({points[0]: MinMax()}), weights=pmap({"c": weight}), biases=pmap({"c": Derived(points, product, INT32)})
    )
    prepared = unwrap(prepare(graph, given, equalize=lambda _: ["c"]))
    converted = unwrap(convert(unwrap(calibrate(prepared, batches, progress=False))))
    layer = converted.graph["c"]
    known, found = layer.get("bias").value.observer.of
    assert known.scale == (converted.graph[next(layer.uses())].get("input").scale,)
    assert isinstance(found.value, DivideColumns)
    assert quality(converted, model, batches) > 35


def test_values_between_a_layer_and_those_that_are_equalized_share_the_range():
    """The pool moves the codes of the layer before it, which are scaled already."""
    model, batches = made("conv2d")
    lowered = unwrap(convert(calibrated_of(model, batches)).bind(lower))
    kinds = {entry.operator: entry.output for entry in lowered.certificate.entries}
    assert kinds["max_pool2d"] == "uint8"
    converted = unwrap(convert(calibrated_of(model, batches)))
    of = {next(node.uses()): node.get("output") for node in converted.graph if node.kind == "quantize"}
    assert of["relu"] == of["pool"]
    assert _is_scaled(converted.graph["relu"])


def test_a_use_between_them_with_a_site_of_its_own_has_the_scaled_range_too():
    """The layer is float and its value is quantized for the pool alone."""
    model, batches = made("conv2d")
    mapping = QConfigMapping().set_global(QConfig(MinMax(UINT8), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)))
    calibrated = calibrated_of(model, batches, mapping.set_module_name("a", None))
    assert Edge("pool", "input") in calibrated.prepared.inputs
    converted = unwrap(convert(calibrated))
    assert isinstance(converted.graph["relu"].get("weight"), MultiplyRows)
    of = {next(node.uses()): node.get("output") for node in converted.graph if node.kind == "quantize"}
    assert of["relu"] == of["pool"]
    assert quality(converted, model, batches) > 20


def test_a_known_range_between_them_is_kept():
    model, batches = made("conv2d")
    mapping = CPU.qconfig_mapping.set_output("relu", FixedQParams(UINT8, 0.5, 0))
    converted = unwrap(convert(calibrated_of(model, batches, mapping)))
    of = {next(node.uses()): node.get("output") for node in converted.graph if node.kind == "quantize"}
    assert of["relu"].scale == 0.5
    assert not _is_scaled(converted.graph["relu"])


def test_a_scale_has_a_name_that_the_model_does_not_use():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.x_equalization_scale = nn.Linear(8, 4), nn.Parameter(torch.ones(4))

        def forward(self, x):
            return self.fc(x) * self.x_equalization_scale

    torch.manual_seed(0)
    model, batches = Named().eval(), inputs_of((16, 8))
    module = unwrap(materialize(unwrap(convert(calibrated_of(model, batches)))))
    assert torch.equal(module.x_equalization_scale, model.x_equalization_scale)
    assert module.x_equalization_scale_1.shape == (8,)
    assert sqnr(model(batches[0]), module(batches[0])) > 30


@pytest.mark.parametrize("seed", range(5))
def test_scaled_channels_have_the_range_of_their_weights(seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = -torch.rand(6, generator=generator), torch.rand(6, generator=generator) * 9
    inputs, weights = RangeState(low, high), RangeState(low * 3, high.flip(0))
    scale = equalization_scale(inputs, weights)
    scaled = (inputs.maximum - inputs.minimum) * scale
    torch.testing.assert_close(scaled, (weights.maximum - weights.minimum) / scale)
    whole = scaled_range(inputs, scale)
    assert (whole.minimum, whole.maximum) == ((low * scale).min(), (high * scale).max())


def test_weights_of_no_use_and_constant_channels_are_borne():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] = 0
        model[1].weight[:, 1] = 0
    x = torch.randn(8, 4)
    x[:, 2], x[:, 3] = 0, 1e-30
    converted = unwrap(convert(calibrated_of(model, [x])))
    assert all(0 < s < float("inf") for scale in scales_of(converted).values() for s in scale)
    torch.testing.assert_close(run(unquantized(converted.graph), x)[0], model(x), rtol=1e-4, atol=1e-5)
    assert quality(converted, model, [x]) > 30


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_column_ranges_of_groups(groups):
    weight = torch.randn(8, 8 // groups, 3, 3, generator=torch.Generator().manual_seed(0))
    found = column_range(weight, groups)
    for channel in range(8):
        group, column = divmod(channel, 8 // groups)
        read = weight[group * (8 // groups) : (group + 1) * (8 // groups), column]
        assert (found.minimum[channel], found.maximum[channel]) == (read.min(), read.max())


def test_a_nearly_constant_channel_does_not_blow_up():
    """By its own width alone, without zero, its scale would be huge, and ruin all others."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(64, 4)
    x[:, 0] = 1 + 1e-5 * x[:, 0]
    assert quality(unwrap(convert(calibrated_of(model, [x]))), model, [x]) > 35


def test_fixed_ranges_of_values_are_not_those_of_scaled_inputs():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(torch.sigmoid(self.a(x)))

    torch.manual_seed(0)
    model, batches = Gate().eval(), inputs_of((32, 4))
    converted = unwrap(convert(calibrated_of(model, batches, backend=X86)))
    prepared = calibrated_of(model, batches, backend=X86).prepared
    assert any(isinstance(getattr(s.observer, "observer", s.observer), FixedQParams) for s in prepared.sites.values())
    with torch.no_grad():
        expected = model(batches[0])
    assert sqnr(expected, run(converted, batches[0])[0]) > 25


# torch.ao -------------------------------------------------------------------------------------------------------------

needs_oracle = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")


def theirs(model, batches):
    """torch.ao's reference form with its default equalization, ranges from least to largest."""
    from torch.ao import quantization as ao
    from torch.ao.quantization.fx._equalize import default_equalization_qconfig

    per_channel = ao.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    qconfig = ao.QConfig(ao.MinMaxObserver.with_args(dtype=torch.quint8), per_channel)
    equalization = ao.QConfigMapping().set_global(default_equalization_qconfig)
    prepared = oracle.prepare(
        model, (batches[0],), ao.QConfigMapping().set_global(qconfig), _equalization_config=equalization
    )
    return oracle.reference(oracle.calibrate(prepared, [(batch,) for batch in batches]))


def ours(model, batches):
    qconfig = QConfig(MinMax(UINT8), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL))
    return calibrated_of(model, batches, QConfigMapping().set_global(qconfig), backend=X86)


SINGLE = {
    "linear": (lambda: nn.Sequential(nn.Linear(8, 64)), inputs_of((16, 8))),
    "linear + relu": (lambda: nn.Sequential(nn.Linear(8, 64), nn.ReLU()), inputs_of((16, 8))),
    "conv2d": (lambda: nn.Sequential(nn.Conv2d(4, 16, 3, stride=2)), inputs_of((2, 4, 8, 8))),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(4, 16, 3)), inputs_of((2, 4, 8))),
}


@needs_oracle
@pytest.mark.parametrize("name", SINGLE)
def test_one_layer_is_equalized_as_by_torch_ao(name):
    torch.manual_seed(0)
    build, batches = SINGLE[name]
    model = build().eval()
    reference, converted = theirs(model, batches), unwrap(convert(ours(model, batches)))
    (scale,) = (getattr(reference, n.target) for n in reference.graph.nodes
                if n.op == "get_attr" and "equalization_scale" in str(n.target))  # fmt: skip
    (found,) = scales_of(converted).values()
    torch.testing.assert_close(torch.tensor(found), scale.flatten(), rtol=1e-5, atol=0)
    with torch.no_grad():
        expected = reference(batches[0])
    made_here = run(converted, batches[0])[0]
    assert torch.isclose(made_here, expected, rtol=0, atol=1e-5 * expected.abs().max().item()).float().mean() > 0.97
    assert (made_here - expected).abs().max() < 0.02 * expected.abs().max()


@needs_oracle
@pytest.mark.parametrize("name", ["linears", "chain"])
def test_between_layers_float_judges(name):
    """The reference keeps the unscaled range there."""
    model, batches = made(name)
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected, reference = model(batches[0]), theirs(model, batches)(batches[0])
    converted = unwrap(convert(ours(model, batches)))
    assert quality(converted, model, batches) > sqnr(expected, reference) + 6
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


def test_a_stage_of_annotations_is_equalized_as_well():
    model, batches = made("linears")
    graph = unwrap(fuse(unwrap(trace(model, batches[0]))))
    weight = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
    given = Annotations(pmap({Edge("c", "input"): MinMax()}), weights=pmap({"c": weight}))
    prepared = unwrap(prepare(graph, given, equalize=lambda _: ["c"]))
    converted = unwrap(convert(unwrap(calibrate(prepared, batches, progress=False))))
    assert quality(converted, model, batches) > 35
    assert isinstance(prepare(graph, given, equalize=3).failure(), BadConfig)
