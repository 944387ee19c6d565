"""What training does where models and settings are unusual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from returns.result import Failure
from torch import Tensor, nn

from qfunc import (
    CustomConfig,
    Prepared,
    Switches,
    absorb,
    convert,
    fuse,
    materialize,
    prepare_qat,
    switch,
    trace,
    unwrap,
)
from qfunc.backends.cpu import CPU
from qfunc.config.point import Edge
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.training import for_training
from qfunc.errors import BadConfig, BadFile, NonFinite, problems
from qfunc.numerics.fake_quantize import FakeQuantize, is_fixed
from qfunc.numerics.observers import Histogram, MovingAverageMinMax, MovingAveragePerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC, QuantSpec
from qfunc.numerics.unmeasured import KeepFloat
from qfunc.result import QuantException

X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def prepared_of(model: nn.Module, mapping: QConfigMapping | None = None, x: Any = X) -> Prepared:
    graph = unwrap(trace(model.train(), x).bind(lambda graph: fuse(graph, qat=True)))
    return unwrap(prepare_qat(graph, mapping))


@pytest.mark.parametrize("scale", [-1e-3, -0.5, -3.0, -1e3, -1e30])
def test_a_learned_scale_below_zero_gives_numbers_and_finite_gradients(scale: float) -> None:
    torch.manual_seed(0)
    mapping = for_training(CPU.qconfig_mapping, learned=True)
    module = unwrap(materialize(prepared_of(nn.Sequential(nn.Linear(4, 3)), mapping)))
    x = X.clone()
    x[0] = 0.0
    module(x)
    learned = dict(module.named_parameters())["activation_post_process_0.scale"]
    with torch.no_grad():
        learned.fill_(scale)
    given = module(x)
    given.sum().backward()
    assert given.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    assert (learned.grad != 0).all()


class Masked(nn.Module):
    """With an infinite buffer, as models with attention have, and a parameter named like the ranges of observers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.full((4,), -torch.inf).where(torch.arange(4) > 1, torch.zeros(4)))
        self.least_min_val = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layer(x) + self.least_min_val + self.mask, -1)


def test_a_mask_of_infinities_is_no_sign_of_divergence() -> None:
    prepared = prepared_of(Masked())
    module = unwrap(materialize(prepared))
    module(X)
    quantized = unwrap(absorb(prepared, module.eval()).bind(convert).bind(materialize))
    assert torch.allclose(quantized(X), module(X))


@pytest.mark.parametrize("name", ["mask", "least_min_val", "layer.weight"])
def test_what_has_become_infinite_in_training_is_told_whatever_its_name(name: str) -> None:
    prepared = prepared_of(Masked())
    module = unwrap(materialize(prepared))
    module(X)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    state[name].view(-1)[0] = torch.nan
    result = absorb(prepared, state)
    assert isinstance(result, Failure)
    assert [(type(problem), problem.node) for problem in problems(result.failure())] == [(NonFinite, name)]


TABLE = QConfig(
    KeepFloat(),
    FakeQuantize(MovingAveragePerChannelMinMax(QuantSpec("uint8", 0, 255, "per_channel_affine_float_qparams", 0), 1.0)),
)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_tables_with_sparse_gradients_are_refused_where_they_are_rounded(kind: Any) -> None:
    x = torch.randint(0, 10, (3, 2), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(kind(10, 4, sparse=True))
    graph = unwrap(trace(model, x).bind(lambda graph: fuse(graph, qat=True)))
    result = prepare_qat(graph, QConfigMapping().set_object_type(kind, TABLE))
    assert isinstance(result, Failure)
    assert [(type(problem), problem.node) for problem in problems(result.failure())] == [(BadConfig, "0")]
    floats = unwrap(materialize(unwrap(prepare_qat(graph, QConfigMapping()))))
    floats(x).sum().backward()
    assert floats.get_parameter("0.weight").grad.is_sparse
    prepared_of(nn.Sequential(kind(10, 4)), QConfigMapping().set_object_type(kind, TABLE), x)


class Untraced(nn.Module):
    """Whose way depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x)
        return normed if x.numel() else x


def test_norms_that_cannot_be_frozen_are_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), Untraced()).train()
    custom = CustomConfig(non_traceable_types=(Untraced,))
    graph = unwrap(trace(model, X, custom=custom).bind(lambda graph: fuse(graph, qat=True)))
    module = unwrap(prepare_qat(graph).bind(materialize))
    with pytest.raises(QuantException) as raised:
        switch(module, Switches(freeze_norms=True))
    assert [(type(problem), problem.node) for problem in problems(raised.value.error)] == [(BadConfig, "2.norm")]
    switch(module, Switches(freeze_norms=False, observe=False))
    switch(module.get_submodule("1"), Switches(freeze_norms=True))
    assert [module.get_submodule(path).training for path in ("1", "2.norm")] == [False, True]


@pytest.mark.parametrize("learned", [False, True])
def test_a_moving_average_of_the_users_stays_as_it_is_for_values_and_not_for_weights(learned: bool) -> None:
    average, of_weights = MovingAverageMinMax(averaging_constant=0.5), MovingAverageMinMax(INT8_SYMMETRIC, 0.5)
    chosen = QConfig(average, of_weights, average)
    mapping = QConfigMapping().set_global(chosen).set_edge(Edge("a", "input"), average).set_output("a", average)
    made = for_training(mapping, learned=learned)
    kept = FakeQuantize(average, learned=learned)
    weight = FakeQuantize(MovingAverageMinMax(INT8_SYMMETRIC, 1.0), learned=learned)
    assert made.global_qconfig == QConfig(kept, weight, kept)
    assert {*made.edges.values(), *made.outputs.values()} == {kept}


BOUNDED = (nn.Sigmoid, nn.Hardsigmoid)


@pytest.mark.parametrize("kind", BOUNDED)
def test_values_of_a_fixed_range_are_rounded_in_training_and_converted_alike(kind: Any) -> None:
    torch.manual_seed(0)
    prepared = prepared_of(nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 4)))
    fixed = [site.observer for site in prepared.sites.values() if is_fixed(site.observer)]
    module = unwrap(materialize(prepared))
    module(X)
    converted = unwrap(absorb(prepared, module.eval()).bind(convert).bind(materialize))
    assert [type(observer) for observer in fixed] == [FakeQuantize]
    assert torch.allclose(converted(X), module(X), atol=1e-6)


@pytest.mark.parametrize("kind", BOUNDED)
def test_a_fixed_range_that_is_not_rounded_in_training_needs_no_data(kind: Any) -> None:
    torch.manual_seed(0)
    plain = CPU.qconfig_mapping.global_qconfig
    mapping = for_training(CPU.qconfig_mapping).set_object_type(kind, plain)
    prepared = prepared_of(nn.Sequential(nn.Linear(4, 4), kind(), nn.Linear(4, 4)), mapping)
    module = unwrap(materialize(prepared))
    module(X)
    assert absorb(prepared, module).bind(convert).unwrap()


def test_an_observers_state_that_cannot_be_read_is_a_failure() -> None:
    mapping = QConfigMapping().set_global(QConfig(FakeQuantize(Histogram()), CPU.qconfig_mapping.global_qconfig.weight))
    prepared = prepared_of(nn.Sequential(nn.Linear(4, 4)), mapping)
    module = unwrap(materialize(prepared))
    module(X)
    state = dict(module.state_dict())
    state["activation_post_process_0.observer_state"] = torch.ones(7, dtype=torch.uint8)
    result = absorb(prepared, state)
    assert isinstance(result, Failure)
    assert {type(problem) for problem in problems(result.failure())} == {BadFile}
