"""`torch.compile` of what trains with fake quantization: the same numbers, and no graph breaks.

Compiling takes seconds, and with inductor most of a minute: `HYPOTHESIS_PROFILE=deep` does more of it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfunc import Switches, absorb, convert, materialize, switch, unwrap
from tests.training.models import differing, gradients, inputs, loss, tensors, training

DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"
BACKENDS = ["eager", "aot_eager", "inductor"] if DEEP else ["aot_eager"]
FORMS = {
    "approximate": {},
    **({"exact": {"folding": "exact"}} if DEEP else {}),
    "learned": {"learned": True},
}

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of what its compiler calls


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.bn(self.conv(x))).mean((2, 3)))


def small(**options: Any) -> Any:
    torch.manual_seed(0)
    return training(model=Small(), **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_it_trains_as_it_does(backend: str, form: str) -> None:
    """From the second step on without any break; in the first, learned qparams begin with what is measured."""
    stage, module = small(**FORMS[form])
    plain = copy.deepcopy(module)
    for side in (module, plain):
        side(inputs())
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    optimizers = [torch.optim.SGD(side.parameters(), 0.05, momentum=0.9) for side in (module, plain)]
    for seed in range(3):
        for side, optimizer in zip((compiled, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss(side, inputs(seed)).backward()
            optimizer.step()
        assert not differing(gradients(module), gradients(plain), 1e-5)
        assert not differing(tensors(module), tensors(plain), 1e-5)
    compiled.eval()
    torch.testing.assert_close(compiled(inputs(5)), plain.eval()(inputs(5)), rtol=0, atol=1e-5)
    for given in (compiled, compiled.state_dict()):
        found = unwrap(absorb(stage, given).bind(convert).bind(materialize)).eval()(inputs(5))
        torch.testing.assert_close(found, plain(inputs(5)), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not DEEP, reason="the deep profile compiles more")
@pytest.mark.parametrize("form", FORMS)
def test_compiled_before_anything_was_measured(form: str) -> None:
    _, module = small(**FORMS[form])
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        for side in (compiled, plain):
            loss(side, inputs(seed)).backward()
    assert not differing(tensors(module), tensors(plain), 1e-5)
    assert not differing(gradients(module), gradients(plain), 1e-5)


def test_no_graph_breaks() -> None:
    _, module = small()
    explained = torch._dynamo.explain(module)(inputs())
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


@pytest.mark.skipif(not DEEP, reason="the deep profile compiles more")
def test_switches_are_seen_by_what_is_compiled() -> None:
    _, module = small()
    module(inputs())
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    compiled(inputs())
    off = Switches(observe=False, fake_quantize=False, freeze_norms=True)
    plain = switch(copy.deepcopy(module), off)
    switch(module, off)
    before = tensors(module)
    torch.testing.assert_close(compiled(inputs(1)), plain(inputs(1)), rtol=0, atol=1e-6)
    assert not differing(tensors(module), before)


def test_parts_are_compiled() -> None:
    stage, module = small()
    module(inputs())
    plain = copy.deepcopy(module)
    module.conv = torch.compile(module.conv, backend="aot_eager", fullgraph=True)
    for side in (module, plain):
        loss(side, inputs()).backward()
    assert any("_orig_mod" in name for name in module.state_dict())
    found = unwrap(absorb(stage, module).bind(convert).bind(materialize)).eval()(inputs(5))
    torch.testing.assert_close(found, plain.eval()(inputs(5)), rtol=1e-4, atol=1e-4)
