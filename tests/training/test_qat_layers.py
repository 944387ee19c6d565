"""Layers that train with rounded weights are torch.ao's: outputs, gradients, statistics and qparams, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc import FBGEMM, QConfig, QConfigMapping, Switches, fuse, materialize, prepare_qat, switch, trace, unwrap
from qfunc.backends import qconfigs
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import MovingAverageMinMax, MovingAveragePerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, qparams_of_range
from qfunc.testing import oracle, oracle_training
from tests.parity.observer_meaning import meaning
from tests.training.comparing import assert_close, gradients

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """The model in training, its norms as if it had trained: gammas of both signs, far from their beginning."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, tuple(NORM.values())):
                count = part.num_features
                sign = torch.randint(0, 2, (count,), generator=random) * 2 - 1
                part.weight.copy_((torch.rand(count, generator=random) + 0.3) * sign)
                part.bias.copy_(torch.randn(count, generator=random))
                part.running_mean.copy_(torch.randn(count, generator=random) / 2)
                part.running_var.copy_(torch.rand(count, generator=random) + 0.2)
    return model.train()


def ours_of(model: nn.Module, x: Tensor, qconfig: QConfig | None = None, *, folding: Any = "approximate") -> Any:
    mapping = QConfigMapping().set_global(qconfig or qconfigs.DEFAULT_QAT)
    graph = unwrap(fuse(unwrap(trace(model, (x,))), qat=True, backend=FBGEMM))
    return unwrap(materialize(unwrap(prepare_qat(graph, mapping, backend=FBGEMM, folding=folding))))


def only_weights_rounded(module: Any) -> Any:
    for name, part in module.named_modules():
        if name.startswith("activation_post_process"):
            switch(part, Switches(observe=False, fake_quantize=False))
    return module


@dataclass
class Sides:
    """One model as it trains here and there, with only weights rounded: activations may go either way at a half."""

    ours: Any
    theirs: Any
    of_nothing: str | None = None
    """The parameter that the output does not depend on."""

    @classmethod
    def of(cls, model: nn.Module, x: Tensor, weight: str, *, exact: bool = False, frozen: bool = False) -> Sides:
        names = oracle_training.named_fake_quantizers()
        theirs_of = oracle_training.qconfig(names["default_fake_quant"], names[weight])
        their_mapping = oracle.default_mapping("fbgemm", qat=True, version=0).set_global(theirs_of)
        their_mapping.object_type_qconfigs.clear()
        theirs = oracle_training.prepare_qat(
            model, (x,), their_mapping, exact=exact, frozen=frozen, backend_config=oracle.backend_config("fbgemm")
        )
        qconfig = QConfig(meaning(names["default_fake_quant"]), meaning(names[weight]))
        ours = ours_of(model, x, qconfig, folding="exact" if exact else "approximate")
        switch(ours, Switches(freeze_norms=frozen))
        layers: Any = list(model)
        normed = len(layers) > 1 and isinstance(layers[1], tuple(NORM.values())) and not frozen
        of_nothing = "0.bias" if normed and layers[0].bias is not None else None
        return cls(only_weights_rounded(ours), oracle_training.only_weights_rounded(theirs), of_nothing)

    def their_name(self, name: str) -> str:
        """A fused module has the norm within the layer: `0.bn` is what `1` is here."""
        layer, _, leaf = name.rpartition(".")
        fused = hasattr(dict(self.theirs.named_modules()).get("0"), "bn")
        return f"0.bn.{leaf}" if fused and layer == "1" else name

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What both have: parameters, running statistics, and the state of the weights' fake quantizers."""
        theirs = dict(self.theirs.state_dict())
        found, expected = {}, {}
        for name, value in self.ours.state_dict().items():
            key = self.their_name(name)
            if key.endswith(("min_val", "max_val")):
                key = key.replace("fake_quant.", "fake_quant.activation_post_process.")
            if key in theirs and not name.startswith("activation_post_process") and "enabled" not in name:
                found[name], expected[name] = value.float(), theirs[key].float().view(value.shape)
        assert {name for name, _ in self.ours.named_parameters()} <= found.keys()
        return found, expected

    def step(self, x: Tensor, seed: int, rate: float = 0.005) -> None:
        """One step of both, from the same state.

        Small enough that the ranges of weights keep up: what is clipped away, exact folding computes and takes back.
        """
        self.match()
        results = []
        for side in (self.ours, self.theirs):
            given = x.clone().requires_grad_(x.is_floating_point())
            y = side(given)
            of = dict(side.named_parameters()) | ({"input": given} if given.requires_grad else {})
            results.append({"output": y.detach(), **gradients(y, of, seed)})
            with torch.no_grad():
                for name, parameter in side.named_parameters():
                    parameter -= rate * results[-1][name] * (name != self.of_nothing)
        expected = {name: results[1][self.their_name(name)] for name in results[0]}
        if self.of_nothing is not None:  # a bias that the norm takes away again has none, up to rounding errors
            assert max(side.pop(self.of_nothing).abs().max().item() for side in (results[0], expected)) < 1e-3
        assert_close(results[0], expected)
        assert_close(*self.state())

    def match(self) -> None:
        """Give ours the parameters and running statistics of theirs, so that no rounding error adds up."""
        theirs = dict(self.theirs.state_dict())
        with torch.no_grad():
            for name, value in self.ours.state_dict().items():
                if self.their_name(name) in theirs and "fake_quant" not in name and "activation" not in name:
                    value.copy_(theirs[self.their_name(name)])


def run(sides: Sides, draw: Callable[[torch.Generator], Tensor], steps: int = 3) -> None:
    random = torch.Generator().manual_seed(1)
    for index in range(steps):
        sides.step(draw(random), index)


WEIGHTS = ("default_weight_fake_quant", "default_per_channel_weight_fake_quant")
LAYERS = (
    {"padding": 1},
    {"padding": 1, "bias": False},
    {"groups": 2, "stride": 2, "padding": 2, "dilation": 2},
    {"groups": 4, "padding": 1, "padding_mode": "circular"},
    {"padding": 1, "padding_mode": "reflect", "bias": False},
    {"padding": 2, "padding_mode": "replicate"},
)


def images(rank: int) -> Callable[[torch.Generator], Tensor]:
    return lambda random: torch.randn(3, 4, *[{1: 12, 2: 6, 3: 5}[rank]] * rank, generator=random)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_convolution_and_norm(rank, relu, exact, frozen, weight):
    index = rank + 2 * relu + exact + 3 * frozen
    for options in (LAYERS[index % 6], LAYERS[(index + 1) % 6]):
        norm = NORM[rank](8, eps=1e-3, momentum=0.3)
        parts = [CONV[rank](4, 8, 3, **options), norm, *([nn.ReLU()] if relu else [])]
        draw = images(rank)
        model = drawn(nn.Sequential(*parts), index)
        run(Sides.of(model, draw(torch.Generator()), weight, exact=exact, frozen=frozen), draw)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_exact_folding_of_norms_that_are_zero(exact, frozen, bias):
    """Approximate, torch.ao divides by zero; both of ours give what a layer that is not rounded gives there."""
    draw = images(2)
    model = drawn(nn.Sequential(nn.Conv2d(4, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU()), 5)
    with torch.no_grad():
        model[1].weight[::2] = 0
    x = draw(torch.Generator().manual_seed(2))
    if exact:
        run(Sides.of(model, x, WEIGHTS[1], exact=True, frozen=frozen), draw)
        return
    module = only_weights_rounded(ours_of(model, x, QConfig(qconfigs.DEFAULT_QAT.activation, _PER_CHANNEL)))
    switch(module, Switches(freeze_norms=frozen))
    given = model[:2]
    if frozen:
        given[1].eval()
    expected, found = torch.relu(given(x)), module(x)
    assert torch.allclose(found[:, ::2], expected[:, ::2], atol=1e-6)
    of_ours, of_float = (
        gradients(found, dict(module.named_parameters())),
        gradients(expected, dict(given.named_parameters())),
    )
    assert all(gradient.isfinite().all() for gradient in of_ours.values())
    assert_close(
        {name: of_ours[name][::2] for name in ("0.weight", "1.weight", "1.bias")},
        {name: of_float[name][::2] for name in ("0.weight", "1.weight", "1.bias")},
    )


_PER_CHANNEL = FakeQuantize(MovingAveragePerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL))
_PER_TENSOR = FakeQuantize(MovingAverageMinMax(INT8_SYMMETRIC))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear_and_norm(weight, bias, frozen):
    model = drawn(nn.Sequential(nn.Linear(6, 5, bias=bias), nn.BatchNorm1d(5)), 2)
    draw = lambda random: torch.randn(9, 6, generator=random)  # noqa: E731
    run(Sides.of(model, draw(torch.Generator()), weight, frozen=frozen), draw)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("options", LAYERS, ids=str)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolution(rank, options, relu):
    draw = images(rank)
    torch.manual_seed(rank)
    model = nn.Sequential(CONV[rank](4, 8, 3, **options), *([nn.ReLU()] if relu else [])).train()
    run(Sides.of(model, draw(torch.Generator()), WEIGHTS[rank % 2]), draw)


@pytest.mark.parametrize("shape", [(7, 6), (6,), (2, 3, 6)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_linear(weight, relu, shape):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=len(shape) > 1), *([nn.ReLU()] if relu else [])).train()
    draw = lambda random: torch.randn(shape, generator=random)  # noqa: E731
    run(Sides.of(model, draw(torch.Generator()), weight), draw)


# Where torch.ao has nothing: the float meaning with rounding off, and the formulas with it on ----------------------


def float_step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return {"output": y.detach(), **gradients(y, {"input": x, **dict(model.named_parameters())})}


def fake(weight: Tensor, spec: Any, axis: int | None) -> Tensor:
    """A weight rounded for the range it has now, by torch's own operators."""
    if axis is None:
        low, high = torch.aminmax(weight.detach())
        grid = qparams_of_range(low, high, spec)
        return torch.fake_quantize_per_tensor_affine(
            weight, grid.scale, grid.zero_point.int(), spec.quant_min, spec.quant_max
        )
    others = [each for each in range(weight.dim()) if each != axis]
    grid = qparams_of_range(weight.detach().amin(others), weight.detach().amax(others), spec)
    return torch.fake_quantize_per_channel_affine(
        weight, grid.scale, grid.zero_point.int(), axis, spec.quant_min, spec.quant_max
    )


FLOATS = {
    "same and replicate": nn.Sequential(nn.Conv2d(4, 8, 3, padding="same", padding_mode="replicate"), nn.ReLU()),
    "same, reflect and norm": nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect"), nn.BatchNorm2d(8)
    ),
    "transposed": nn.Sequential(nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1)),
    "transposed, of groups, and norm": nn.Sequential(
        nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8), nn.ReLU()
    ),
    "transposed in one dimension": nn.Sequential(nn.ConvTranspose2d(4, 6, (1, 3), bias=False), nn.BatchNorm2d(6)),
}


@pytest.mark.parametrize("folding", ["approximate", "exact"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", FLOATS)
def test_with_rounding_off_it_is_the_float_model(name, frozen, folding):
    draw = images(2)
    model = drawn(copy.deepcopy(FLOATS[name]), 3)
    x = draw(torch.Generator().manual_seed(4))
    weight = _PER_TENSOR if name.startswith("transposed") else _PER_CHANNEL
    module = ours_of(model, x, QConfig(qconfigs.DEFAULT_QAT.activation, weight), folding=folding)
    switch(module, Switches(fake_quantize=False, freeze_norms=frozen))
    if frozen:
        for part in model:
            part.train(not isinstance(part, nn.BatchNorm2d))
    for _ in range(3):
        found, expected = float_step(module, x), float_step(model, x)
        expected = {key: expected[key] for key in found}
        if not frozen and "norm" in name:
            assert max(side.pop("0.bias").abs().max() for side in (found, expected) if "0.bias" in side) < 1e-3
        assert_close(found, expected, within=2e-5)
        for key, value in model.state_dict().items():
            assert_close({key: module.state_dict()[key].float()}, {key: value.float()})


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("per_channel", [False, True])
def test_transposed_convolution(rank, groups, per_channel):
    """Its output channels are axis 1 of the weight."""
    axis = 1 if per_channel else None
    observer = MovingAveragePerChannelMinMax if per_channel else MovingAverageMinMax
    spec = replace(INT8_SYMMETRIC_PER_CHANNEL, ch_axis=1) if per_channel else INT8_SYMMETRIC
    torch.manual_seed(rank)
    layer = TRANSPOSED[rank](4, 6, 3, stride=2, groups=groups)
    x = images(rank)(torch.Generator().manual_seed(1))
    activation = qconfigs.DEFAULT_QAT.activation
    module = only_weights_rounded(
        ours_of(nn.Sequential(layer).train(), x, QConfig(activation, FakeQuantize(observer(spec))))
    )

    class Formula(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", copy.deepcopy(layer))

        def forward(self, x):
            held: Any = self.get_submodule("0")
            function = getattr(F, f"conv_transpose{rank}d")
            return function(x, fake(held.weight, spec, axis), held.bias, 2, 0, 0, groups)

    assert_close(float_step(module, x), float_step(Formula(), x))


# Tables, and functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", [None, "sum", "mean"])
@pytest.mark.parametrize("options", [{}, {"padding_idx": 1}], ids=str)
def test_tables(mode, options, bits):
    """Their zero points are floats."""
    name = "default_embedding_fake_quant" + ("_4bit" if bits == 4 else "")
    constructor = oracle_training.named_fake_quantizers()[name]
    torch.manual_seed(bits)
    layer = nn.Embedding(9, 6, **options) if mode is None else nn.EmbeddingBag(9, 6, mode=mode, **options)
    model = nn.Sequential(layer).train()
    draw = lambda random: torch.randint(0, 9, (4, 5), generator=random)  # noqa: E731
    x = draw(torch.Generator())
    theirs = oracle_training.prepare_qat(
        model,
        (x,),
        oracle.default_mapping("fbgemm", qat=True, version=0).set_object_type(
            type(layer), oracle_training.qconfig(None, constructor)
        ),
        backend_config=oracle.backend_config("fbgemm"),
    )
    qconfig = qconfigs.DEFAULT_EMBEDDING_QAT_4BIT if bits == 4 else qconfigs.DEFAULT_EMBEDDING_QAT
    run(Sides(only_weights_rounded(ours_of(model, x, qconfig)), oracle_training.only_weights_rounded(theirs)), draw, 4)


class Functions(nn.Module):
    def __init__(self, kind: str, relu: bool):
        super().__init__()
        self.kind, self.relu = kind, relu
        shapes = {"linear": (5, 6), "conv1d": (5, 4, 3), "conv2d": (5, 4, 3, 3), "conv3d": (5, 4, 3, 3, 3)}
        self.weight, self.bias = nn.Parameter(torch.randn(shapes[kind]) / 4), nn.Parameter(torch.randn(5))

    def forward(self, x):
        y = getattr(F, self.kind)(x, self.weight, self.bias)
        return F.relu(y) if self.relu else y


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d"])
def test_functions(kind, relu):
    """Everything is rounded here, by the formulas: torch.ao rounds such a weight as an activation of its own."""
    torch.manual_seed(7)
    model = Functions(kind, relu).train()
    x = torch.randn(7, 6) if kind == "linear" else images(int(kind[4]))(torch.Generator().manual_seed(2))
    module = only_weights_rounded(ours_of(model, x, QConfig(qconfigs.DEFAULT_QAT.activation, _PER_TENSOR)))

    class Formula(Functions):
        def forward(self, x):
            y = getattr(F, kind)(x, fake(self.weight, INT8_SYMMETRIC, None), self.bias)
            return F.relu(y) if relu else y

    formula = Formula(kind, relu)
    formula.load_state_dict(model.state_dict())
    assert_close(float_step(module, x), float_step(formula, x))
