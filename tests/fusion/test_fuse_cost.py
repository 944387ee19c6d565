"""Fusion reads no weight: it runs no operator of torch, and its cost does not depend on what the weights weigh."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qfunc import explain_fusion, fuse, trace, unwrap
from tests.fusion.models import kinds
from tests.zoo import ZOO, ZooCase

MEGABYTE = 2**20


class NoOperators(TorchDispatchMode):
    """Fails on any operator of torch."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} was called")


class Heavy(nn.Module):
    """A gigabyte of weights that nobody has touched."""

    def __init__(self, blocks: int = 8) -> None:
        super().__init__()
        width = 4096
        self.layers = nn.ModuleList(
            nn.utils.skip_init(nn.Conv2d, width, 2 * width, 1, bias=False) for _ in range(blocks)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(2 * width) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for layer, batch_norm in zip(self.layers, self.norms, strict=True):
            x = torch.relu(batch_norm(layer(x)))[:, ::2]
        return x


@pytest.mark.parametrize("qat", [False, True])
def test_a_gigabyte_of_weights_is_fused_in_a_few_megabytes(qat: bool) -> None:
    model = Heavy().eval()
    assert sum(tensor.nbytes for tensor in model.parameters()) >= 2**30
    graph = unwrap(trace(model))
    tracemalloc.start()
    try:
        with NoOperators():
            fused = unwrap(fuse(graph, qat=qat))
            unwrap(explain_fusion(graph, qat=qat))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    norm = "batch_norm + " if qat else ""
    assert kinds(fused).count(f"conv2d + {norm}relu") == 8
    assert peak < 10 * MEGABYTE


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("zoo", ZOO, ids=str)
def test_no_operator_runs_while_fusing(zoo: ZooCase, qat: bool) -> None:
    model, inputs = zoo.build()
    graph = unwrap(trace(model, inputs))
    with NoOperators():
        unwrap(fuse(graph, qat=qat))


def test_the_mode_notices_an_operator() -> None:
    x = torch.ones(2)
    with NoOperators(), pytest.raises(AssertionError, match="add"):
        x.add(1)
