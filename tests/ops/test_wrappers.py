"""The reference's wrapper modules, `FloatFunctional` and the stubs: understood by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc import CPU, X86, calibrate, convert, fuse, lower, materialize, prepare, trace, unwrap
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.ir import Graph
from qfunc.testing import same_bits

ao: Any = pytest.importorskip("torch.ao.quantization")
nnq: Any = pytest.importorskip("torch.ao.nn.quantized")


class Plain(nn.Module):
    """Every operator that `FloatFunctional` has, without it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = torch.relu(torch.add(self.second(y), y))
        y = F.relu(torch.add(y, z))
        y = torch.cat([torch.mul(y, z), y], dim=1)
        y = torch.matmul(y, torch.add(torch.mul(y, 0.5), 1.0).transpose(-1, -2))
        return self.last(y.flatten(2).transpose(1, 2)[:, :8])


class Wrapped(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        for name in ("sum", "sum_relu", "join", "scale", "shift", "product"):
            self.add_module(name, nnq.FloatFunctional())

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.quant(x))
        z = torch.relu(self.sum.add(self.second(y), y))
        y = self.sum_relu.add_relu(y, z)
        y = self.join.cat([self.product.mul(y, z), y], dim=1)
        y = self.product.matmul(y, self.shift.add_scalar(self.scale.mul_scalar(y, 0.5), 1.0).transpose(-1, -2))
        return self.dequant(self.last(y.flatten(2).transpose(1, 2)[:, :8]))


X = torch.randn(4, 3, 2, 8, generator=torch.Generator().manual_seed(1))


def kinds(graph: Graph) -> list[str]:
    return [node.kind for node in graph]


def models() -> tuple[nn.Module, nn.Module]:
    return Plain().eval(), Wrapped().eval()


@pytest.mark.parametrize("wrap", [lambda model: model, ao.QuantWrapper], ids=["model", "QuantWrapper"])
def test_nothing_is_left_of_them(wrap: Any) -> None:
    plain, wrapped = models()
    graph = unwrap(trace(wrap(wrapped).eval()))
    assert kinds(graph) == kinds(unwrap(trace(plain)))
    with torch.no_grad():
        assert same_bits(unwrap(materialize(graph))(X), plain(X))


@pytest.mark.parametrize("backend", [CPU, X86], ids=["cpu", "x86"])
def test_they_fuse_and_quantize_as_the_operators_do(backend: BackendConfig) -> None:
    found = []
    for model in models():
        fused = unwrap(fuse(unwrap(trace(model, (X,))), backend=backend))
        lowered = unwrap(lower(unwrap(convert(unwrap(calibrate(unwrap(prepare(fused, backend=backend)), [(X,)]))))))
        with torch.no_grad():
            found.append((fused, lowered.graph, unwrap(materialize(lowered))(X)))
    (plain, lowered_plain, wanted), (wrapped, lowered_wrapped, got) = found
    assert kinds(wrapped) == kinds(plain)
    assert kinds(lowered_wrapped) == kinds(lowered_plain)
    assert same_bits(got, wanted)


def test_one_that_is_observed_otherwise_is_kept() -> None:
    _, wrapped = models()
    wrapped.sum.activation_post_process.register_forward_hook(lambda module, inputs, output: None)
    wrapped.join.activation_post_process = nn.ReLU()
    graph = unwrap(trace(wrapped))
    assert graph["join_activation_post_process"].kind == "relu"
    with torch.no_grad():
        assert same_bits(unwrap(materialize(graph))(X), wrapped(X))


def test_one_that_the_user_names_is_kept() -> None:
    _, wrapped = models()
    name = "sum.activation_post_process"
    graph = unwrap(trace(wrapped, custom=CustomConfig(non_traceable_names=(name,))))
    assert [node.origin.module for node in graph if node.kind == "identity"] == [name]
