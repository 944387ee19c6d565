"""`prepare_qat`: what it refuses, all at once and typed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from returns.result import Failure
from torch import Tensor, nn

from qfunc import (
    CPU,
    MinMax,
    QConfig,
    QConfigMapping,
    calibrate,
    convert,
    fuse,
    materialize,
    prepare_qat,
    trace,
    unwrap,
)
from qfunc.errors import BadConfig, WrongStage, problems
from qfunc.ir import Graph
from qfunc.numerics.qparams import INT8_SYMMETRIC
from qfunc.testing import same_bits

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def fused(model: nn.Module, *, qat: bool = True) -> Graph:
    return unwrap(trace(model, X).bind(lambda graph: fuse(graph, qat=qat)))


def told(result: Any) -> list[tuple[type, str]]:
    assert isinstance(result, Failure)
    return [(type(problem), problem.node) for problem in problems(result.failure())]


@pytest.mark.parametrize("given", [None, 3, nn.Linear(3, 3)])
def test_only_graphs_are_prepared(given: Any) -> None:
    result = prepare_qat(given)
    assert isinstance(result, Failure)
    assert isinstance(result.failure(), WrongStage)


def test_what_was_fused_for_evaluation_cannot_train() -> None:
    assert told(prepare_qat(fused(layers().eval(), qat=False))) == [(BadConfig, "0")]


def test_a_configuration_that_rounds_nothing_is_refused_with_all_else() -> None:
    mapping = QConfigMapping().set_global(QConfig(MinMax(), MinMax(INT8_SYMMETRIC)))
    assert told(prepare_qat(fused(layers()), mapping)) == [(BadConfig, "qconfig_mapping")]
    both = told(prepare_qat(fused(layers().eval(), qat=False), mapping))
    assert both == [(BadConfig, "0"), (BadConfig, "qconfig_mapping")]
    nothing = unwrap(prepare_qat(fused(layers()), QConfigMapping()))
    assert not nothing.sites


def test_wrong_arguments_are_told_together() -> None:
    wrong: Any = 3
    found = told(prepare_qat(fused(layers()), backend=wrong, folding=wrong))
    assert len(found) == 2
    assert (BadConfig, "folding") in found


class Functional(nn.Module):
    """A batch norm and dropout that are functions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.c = nn.Conv2d(3, 4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(self.c(x), self.mean, self.var, None, None, self.training)
        return F.dropout(x, 0.5, self.training)


def test_functional_norms_are_not_folded_exactly() -> None:
    assert told(prepare_qat(fused(Functional()), folding="exact")) == [(BadConfig, "c")]


def test_functions_follow_the_mode() -> None:
    module = unwrap(prepare_qat(fused(Functional())).bind(materialize))
    before = module.state_dict()["mean"].clone()
    assert (module.train()(X) == 0).float().mean() > 0.3
    after = module.state_dict()["mean"].clone()
    assert not same_bits(before, after)
    assert (module.eval()(X) == 0).float().mean() < 0.3
    assert same_bits(module.state_dict()["mean"], after)


def test_what_was_only_calibrated_converts() -> None:
    model = layers()
    prepared = unwrap(prepare_qat(fused(model), backend=CPU))
    calibrated = unwrap(calibrate(prepared, [X], progress=False))
    quantized = unwrap(convert(calibrated).bind(materialize))
    expected = model.eval()(X)
    assert (quantized(X) - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_layer_called_twice_has_one_fake_quantizer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.c(x).relu())

    module = unwrap(prepare_qat(fused(Twice())).bind(materialize))
    names = {name.rpartition(".")[0] for name in module.state_dict() if "weight_fake_quant" in name}
    assert names == {"c.weight_fake_quant"}
