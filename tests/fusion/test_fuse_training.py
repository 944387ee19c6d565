"""Fusion for training: the same steps as the model's, bit for bit, and errors for parts that cannot train together."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc import CustomConfig, explain_fusion, fuse, materialize, trace, unwrap
from qfunc.errors import CannotFuse, InTrainingMode, problems
from qfunc.ir import Graph
from qfunc.testing import same_bits
from tests.fusion.models import conv, image, kinds, model, norm, sequential

X = image(4)
VECTORS = X.mean((2, 3))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.weight, self.bias = conv(), nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.mean, self.var = nn.Buffer(torch.zeros(4)), nn.Buffer(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(F.batch_norm(self.c(x), self.mean, self.var, self.weight, self.bias, self.training))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor, list[str]]] = {
    "chain": (
        lambda: sequential(conv(), norm(), nn.ReLU(inplace=True), conv(), nn.Hardswish()),
        X,
        ["conv2d + batch_norm + relu", "conv2d + hardswish"],
    ),
    "dropout and identity": (
        lambda: sequential(conv(), norm(), nn.Identity(), nn.ReLU(), nn.Dropout(0.5), conv()),
        X,
        ["conv2d + batch_norm + relu", "dropout", "conv2d"],
    ),
    "dropout between": (
        lambda: sequential(conv(), norm(), nn.Dropout(0.5), nn.ReLU()),
        X,
        ["conv2d + batch_norm", "dropout", "relu"],
    ),
    "linear": (
        lambda: sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU()),
        VECTORS,
        ["linear + batch_norm + relu"],
    ),
    "cumulative average": (lambda: sequential(conv(), norm(momentum=None)), X, ["conv2d + batch_norm"]),
    "no running statistics": (
        lambda: sequential(conv(), norm(track_running_stats=False), nn.ReLU()),
        X,
        ["conv2d", "batch_norm + relu"],
    ),
    "two norms": (
        lambda: sequential(conv(), norm(), norm(), nn.ReLU()),
        X,
        ["conv2d + batch_norm", "batch_norm + relu"],
    ),
    "norms before": (lambda: sequential(norm(), conv(), nn.ReLU()), X, ["batch_norm", "conv2d + relu"]),
    "pool between": (lambda: sequential(conv(), nn.AvgPool2d(2), norm()), X, ["conv2d", "avg_pool2d", "batch_norm"]),
    "transposed": (
        lambda: sequential(nn.ConvTranspose2d(4, 4, 2), norm(), nn.ReLU()),
        X,
        ["conv_transpose2d + batch_norm + relu"],
    ),
    "shared by two sites": (
        lambda: model(lambda self, x: self.b(self.c(self.b(self.c(x)))), c=conv(), b=norm()),
        X,
        ["conv2d + batch_norm"] * 2,
    ),
    "residual": (
        lambda: model(lambda self, x: F.relu(self.b(self.c(x)) + x), c=conv(), b=norm()),
        X,
        ["conv2d + batch_norm + add + relu"],
    ),
    "functions": (Functional, X, ["conv2d + batch_norm + relu"]),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_trains_as_the_model_does(name: str, training: bool) -> None:
    torch.manual_seed(0)
    build, x, expected = MODELS[name]
    source = build().train(training)
    graph = unwrap(fuse(unwrap(trace(source, x)), qat=True))
    assert kinds(graph) == expected
    module, reference = unwrap(materialize(graph)), copy.deepcopy(source)
    assert module.training is training
    assert list(module.state_dict()) == list(reference.state_dict())
    optimizers = [torch.optim.SGD(made.parameters(), 0.1) for made in (module, reference)]
    for step in range(3):
        actual, wanted = (_step(made, x, step) for made in (module, reference))
        assert same_bits(actual, wanted)
        for optimizer in optimizers:
            optimizer.step()
        assert same_bits(dict(module.state_dict()), dict(reference.state_dict()))
    if name != "functions":  # which the trace has frozen in their mode
        assert same_bits(module.eval()(x), reference.eval()(x))


def _step(module: nn.Module, x: Tensor, seed: int) -> Any:
    torch.manual_seed(seed)
    module.zero_grad()
    output = module(x)
    output.square().sum().backward()
    return output, {name: parameter.grad for name, parameter in module.named_parameters()}


def test_training_the_fused_model_leaves_source_and_graph_alone() -> None:
    torch.manual_seed(0)
    source = sequential(conv(), norm(), nn.ReLU()).train()
    before = copy.deepcopy(source.state_dict())
    graph = unwrap(fuse(unwrap(trace(source, X)), qat=True))
    module = unwrap(materialize(graph, copy=True))
    _step(module, X, 0)
    assert same_bits(dict(source.state_dict()), dict(before))
    assert same_bits(dict(unwrap(materialize(graph, copy=True)).state_dict()), dict(before))


# Errors


def in_modes(**modes: bool) -> Graph:
    """conv a + norm b, conv c + norm d; those named train, or do not."""
    made = model(lambda self, x: self.d(self.c(self.b(self.a(x)))), a=conv(), b=norm(), c=conv(), d=norm()).train()
    for name, training in modes.items():
        getattr(made, name).train(training)
    return unwrap(trace(made, X))


LAYER_EVALUATES = "the layer is in evaluation mode, the batch norm in training mode"
LAYER_TRAINS = "the layer is in training mode, the batch norm in evaluation mode"


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        ({}, []),
        ({"a": False, "b": False}, []),
        ({"a": False}, [("a + b", LAYER_EVALUATES)]),
        ({"b": False}, [("a + b", LAYER_TRAINS)]),
        ({"a": False, "d": False}, [("a + b", LAYER_EVALUATES), ("c + d", LAYER_TRAINS)]),
    ],
)
def test_layers_and_norms_in_different_modes_are_told_at_once(
    modes: dict[str, bool], expected: list[tuple[str, str]]
) -> None:
    graph = in_modes(**modes)
    result = fuse(graph, qat=True)
    if not expected:
        assert kinds(unwrap(result)) == ["conv2d + batch_norm"] * 2
        return
    found = problems(result.failure())
    assert [(type(problem), problem.node, problem.reason) for problem in found] == [
        (CannotFuse, *row) for row in expected
    ]
    told = {row.place: row.reason for row in unwrap(explain_fusion(graph, qat=True)).unfused}
    for place, reason in expected:
        layer, batch_norm = place.split(" + ")
        assert told[layer] == f"{batch_norm}: {reason}"
    apart = CustomConfig(unfused_names=tuple(place.split(" + ")[1] for place, _ in expected))
    assert kinds(unwrap(fuse(graph, qat=True, custom=apart))).count("batch_norm") == len(expected)


def test_differing_features_are_told() -> None:
    graph = unwrap(trace(nn.Sequential(conv(), norm(5), conv(5, 6), norm(7)).train()))
    found = problems(fuse(graph, qat=True).failure())
    assert [(problem.node, problem.reason) for problem in found] == [
        ("0 + 1", "the batch norm has 5 features, the layer 4 output channels"),
        ("2 + 3", "the batch norm has 7 features, the layer 6 output channels"),
    ]
    assert kinds(unwrap(fuse(unwrap(trace(nn.Sequential(conv(), norm(5)).eval()))))) == ["conv2d", "batch_norm"]


def test_a_norm_of_another_axis_is_left_alone() -> None:
    x = torch.randn(3, 4, 6)
    made = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4), nn.ReLU()).train()
    assert kinds(unwrap(fuse(unwrap(trace(made, x)), qat=True))) == ["linear", "batch_norm + relu"]


def test_a_frozen_function_in_a_training_model_is_left_alone() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return F.batch_norm(self.c(x), self.mean, self.var)

    made = model(forward, c=conv(), mean=nn.Buffer(torch.zeros(4)), var=nn.Buffer(torch.ones(4))).train()
    assert kinds(unwrap(fuse(unwrap(trace(made, X)), qat=True))) == ["conv2d", "batch_norm"]


def test_a_training_model_is_not_fused_for_evaluation() -> None:
    graph = unwrap(trace(sequential(conv(), norm(), nn.ReLU()).train(), X))
    assert problems(fuse(graph).failure()) == (InTrainingMode("model"),)
    report = unwrap(explain_fusion(graph))
    assert report.fused == ()
    assert all("in training mode" in row.reason for row in report.unfused)
    assert [row.place for row in report.unfused] == ["0", "1"]


@pytest.mark.parametrize("training", ["1", "3"])
def test_each_part_that_trains_is_told(training: str) -> None:
    made = sequential(conv(), norm(), nn.ReLU(), nn.Dropout())
    made.get_submodule(training).train()
    assert problems(fuse(unwrap(trace(made, X))).failure()) == (InTrainingMode(training),)
