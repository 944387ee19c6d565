"""Quantized models that write in place to what they are given, or to what they hold, compute what the float ones do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc import CPU, X86, annotate, materialize, quantize, trace, unwrap

BATCHES = tuple(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(4))

WRITES = {
    "augmented": "y = x\ny += 5.0\nreturn self.a(x)",
    "augmented by itself": "y = x\ny += y\nreturn self.a(x)",
    "augmented difference": "y = x\ny -= 5.0\nreturn self.b(self.a(x))",
    "method": "x.add_(5.0)\nreturn self.a(x)",
    "view": "x.view(-1).add_(5.0)\nreturn self.a(x)",
    "module on a view": "self.relu(x.view(-1))\nreturn self.a(x)",
    "item": "x[:, 0] = 7.0\nreturn self.a(x)",
    "item of a view": "x.t()[0] = 7.0\nreturn self.a(x)",
    "transpose": "x.t().add_(5.0)\nreturn self.a(x)",
    "attribute": "x.T.add_(5.0)\nreturn self.a(x)",
    "part": "x.chunk(2, 1)[1].mul_(-7.0)\nreturn self.a(x)",
    "dropout": "self.drop(x).add_(5.0)\nreturn self.a(x)",
    "out": "torch.add(x, 5.0, out=x)\nreturn self.a(x)",
    "between two readers": "p = self.a(x)\nx.view(-1).add_(5.0)\nreturn p + self.b(x)",
    "behind all readers": "p = self.b(self.a(x))\nx.view(-1).add_(5.0)\nreturn p",
    "concatenated": "x.view(-1).add_(5.0)\nreturn self.c(torch.cat((self.a(x), x), 1))",
    "added": "x.view(-1).add_(5.0)\nreturn self.b(self.a(x) + x)",
    "input returned": "x.view(-1).add_(5.0)\nreturn self.a(x), x",
    "computed value": "y = self.a(x)\ny.view(-1).add_(5.0)\nreturn self.b(y)",
    "computed value, base read": "y = self.a(x)\ny.t().mul_(-3.0)\nreturn self.b(y) + self.b(x)",
    "buffer": "self.count.view(-1).fill_(5.0)\nreturn self.a(x * self.count)",
    "weight": "with torch.no_grad():\n    self.b.weight.fill_(0.5)\nreturn self.b(self.a(x))",
    "view of a weight": "with torch.no_grad():\n    self.b.weight.view(-1).fill_(0.5)\nreturn self.b(self.a(x))",
    "weight of a function": "with torch.no_grad():\n    self.w.t().fill_(0.5)\nreturn F.linear(self.a(x), self.w)",
    "statistics of a norm": "self.norm.running_mean.fill_(5.0)\nreturn self.b(self.norm(self.a(x)))",
}  # fmt: skip


def model(lines: str) -> nn.Module:
    body = "\n".join("    " + line for line in lines.splitlines())
    scope = {"torch": torch, "F": F}
    exec(f"def forward(self, x):\n{body}", scope)
    made = type("Model", (nn.Module,), {"forward": scope["forward"]})()
    torch.manual_seed(0)
    made.a, made.b, made.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)
    made.relu, made.drop, made.norm = nn.ReLU(inplace=True), nn.Dropout(0.5), nn.BatchNorm1d(8)
    made.count, made.w = nn.Buffer(torch.ones(8)), nn.Parameter(torch.randn(8, 8))
    return made.eval()


def outputs(value: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


@pytest.mark.parametrize(("backend", "engine"), [(CPU, "onednn"), (X86, "quantized")], ids=["cpu", "x86"])
@pytest.mark.parametrize("name", WRITES)
def test_quantized_is_as_float(name, backend, engine):
    before = [batch.clone() for batch in BATCHES]
    made = unwrap(quantize(model(WRITES[name]), BATCHES, backend=backend, engine=engine, progress=False))
    assert all(map(torch.equal, before, BATCHES))
    module = unwrap(materialize(made))
    with torch.no_grad():
        for batch in BATCHES:
            wanted_input, our_input = batch.clone(), batch.clone()
            wanted, ours = outputs(model(WRITES[name])(wanted_input)), outputs(module(our_input))
            assert torch.equal(wanted_input, our_input)
            for one, other in zip(wanted, ours, strict=True):
                assert (one - other).abs().max() <= 0.06 * one.abs().max()


@pytest.mark.parametrize("name", ["augmented", "view"])
def test_an_input_written_to_is_marked(name):
    graph = unwrap(trace(model(WRITES[name]), BATCHES[0]))
    assert graph["x"].aliased
    assert not unwrap(annotate(graph)).inputs


def test_an_input_that_is_only_read_is_not_marked():
    graph = unwrap(trace(model("y = x * 2\ny.view(-1).add_(5.0)\nreturn self.a(x), y")))
    assert not graph["x"].aliased
    assert not graph["a"].aliased


def test_a_layer_whose_weight_is_written_to_is_as_written():
    graph = unwrap(trace(model(WRITES["weight"])))
    assert [node.id for node in graph if node.kind == "linear"] == ["a"]
    assert graph["b"].aliased
    assert not graph["a"].aliased
