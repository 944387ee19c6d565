"""Training with fake quantization on a CUDA device; absorbed, it is on the CPU again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfunc import (
    Schedule,
    Switches,
    absorb,
    convert,
    lower,
    materialize,
    switch,
    unwrap,
)
from tests.training.models import differing, gradients, histograms, inputs, loss, prepared, tensors, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SCHEDULE = Schedule({2: Switches(observe=False), 3: Switches(freeze_norms=True)})


STAGES = {
    "observed": prepared,
    "learned": lambda: prepared(learned=True),
    "exact": lambda: prepared(folding="exact"),
    "histograms": histograms,
}
STAGE = pytest.mark.parametrize("name", STAGES)


@pytest.fixture(autouse=True)
def _exact_products() -> Any:
    """Convolutions and products in float32 as such, as on the CPU."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


def on_cpu(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in found.items()}


def is_of_numbers(name: str) -> bool:
    return not name.endswith("observer_state")


@STAGE
def test_a_step_is_that_of_the_cpu(name: str) -> None:
    stage = STAGES[name]()
    module = unwrap(materialize(stage))
    other = copy.deepcopy(module).to("cuda")
    loss(module, inputs()).backward()
    value = loss(lambda x: other(x.to("cuda")).cpu(), inputs())
    value.backward()
    assert all(tensor.is_cuda for tensor in other.state_dict().values() if tensor.numel())
    found, expected = ({n: t for n, t in tensors(side).items() if is_of_numbers(n)} for side in (other, module))
    # a value that lies between two integers may be rounded to either, so that a few gradients are another step's
    assert not differing(on_cpu(found), expected, 1e-3)
    assert not differing(on_cpu(gradients(other)), gradients(module), 5e-2)


@STAGE
def test_trained_there_absorbed_here(name: str) -> None:
    stage = STAGES[name]()
    module = unwrap(materialize(stage)).to("cuda")
    optimizer = torch.optim.AdamW(module.parameters(), 0.003, fused=True)
    for step in range(4):
        switch(module, SCHEDULE.at(step))
        train(module, optimizer, [inputs(step).to("cuda")])
    expected = module.eval()(inputs(9).to("cuda")).cpu()
    for given in (module, module.state_dict()):
        calibrated = unwrap(absorb(stage, given))
        again = unwrap(materialize(calibrated)).eval()
        assert not any(tensor.is_cuda for tensor in again.state_dict().values())
        torch.testing.assert_close(again(inputs(9)), expected, rtol=1e-3, atol=2e-2)
        lowered = unwrap(convert(calibrated).bind(lower).bind(materialize)).eval()
        torch.testing.assert_close(lowered(inputs(9)), expected, rtol=1e-3, atol=2e-2)


@STAGE
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_scaled_gradients(name: str, dtype: torch.dtype) -> None:
    stage = STAGES[name]()
    module = unwrap(materialize(stage)).to("cuda")
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype):
            value = loss(module, inputs().to("cuda"))
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(value.item())
    assert losses[-1] < losses[0]
    assert all(t.dtype == torch.float32 for n, t in module.state_dict().items() if n.endswith((".scale", ".min_val")))
    unwrap(absorb(stage, module).bind(convert).bind(lower).bind(materialize))


@pytest.mark.parametrize("learned", [False, True])
def test_nothing_waits_for_a_value_once_training_runs(learned: bool) -> None:
    module = unwrap(materialize(prepared(learned=learned))).to("cuda")
    x = inputs().to("cuda")
    target = torch.zeros(4, dtype=torch.long, device="cuda")
    for _ in range(2):
        nn.functional.cross_entropy(module(x), target).backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        nn.functional.cross_entropy(module(x), target).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_checkpoints_from_there_load_here() -> None:
    stage = prepared(learned=True)
    module = unwrap(materialize(stage)).to("cuda")
    train(module, torch.optim.SGD(module.parameters(), 0.05), [inputs().to("cuda")])
    here = unwrap(materialize(stage))
    here.load_state_dict(module.state_dict())
    expected = module.eval()(inputs(9).to("cuda")).cpu()
    torch.testing.assert_close(here.eval()(inputs(9)), expected, rtol=1e-3, atol=2e-2)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(inputs(9).to("cuda")), module(inputs(9).to("cuda")))


def test_compiled_there() -> None:
    stage = prepared()
    module = unwrap(materialize(stage)).to("cuda")
    plain = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        for side in (compiled, plain):
            loss(lambda x, side=side: side(x.to("cuda")).cpu(), inputs(seed)).backward()
    assert not differing(on_cpu(gradients(module)), on_cpu(gradients(plain)), 1e-4)
    unwrap(absorb(stage, compiled).bind(convert))
