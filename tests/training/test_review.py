"""What training does where models and settings are unusual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfunc import Prepared, fuse, materialize, prepare_qat, trace, unwrap
from qfunc.backends.cpu import CPU
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.training import for_training

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
