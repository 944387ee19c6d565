"""Checkpoints of what trains with fake quantization: copies, files, other processes, and going on where one ended."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from qfunc import (
    FakeQuantize,
    QuantSpec,
    Schedule,
    Switches,
    absorb,
    convert,
    materialize,
    switch,
    switched,
    unwrap,
)
from qfunc.edge.fake_quantize import FakeQuantizer
from qfunc.edge.fake_quantizers import fake_quantizer
from qfunc.numerics.observers import MovingAveragePerChannelMinMax
from qfunc.passes.training import Start
from tests.training.models import Residual, differing, histograms, inputs, prepared, tensors, train, training

ROOT = Path(__file__).parents[2]
LEARNED = pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
FOLDINGS = pytest.mark.parametrize("folding", ["approximate", "exact"])

BATCHES = [inputs(seed) for seed in range(6)]
SCHEDULE = Schedule(
    {0: Switches(learn=False), 1: Switches(learn=True), 3: Switches(observe=False), 4: Switches(freeze_norms=True)}
)


STAGES = {
    "observed": prepared,
    "learned": lambda: prepared(learned=True),
    "exact": lambda: prepared(folding="exact"),
    "histograms": histograms,
    "without examples": lambda: prepared(example=False),
}
STAGE = pytest.mark.parametrize("name", STAGES)


def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), 0.003)


def scheduled(module: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        switch(module, SCHEDULE.at(step))
        train(module, optimizer, [BATCHES[step]])


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def same(a: nn.Module, b: nn.Module) -> None:
    """Two modules are in the same state, and compute the same, in evaluation and in further training."""
    assert not differing(tensors(a), tensors(b))
    assert [m.training for m in a.modules()] == [m.training for m in b.modules()]
    for module in (a, b):
        module.eval()
    assert torch.equal(a(inputs(9)), b(inputs(9)))
    for module in (a, b):
        module.train()
        train(module, torch.optim.SGD(module.parameters(), 0.05), [inputs(8)] * 2)
    assert not differing(tensors(a), tensors(b))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": through_file,
}


@STAGE
@pytest.mark.parametrize("how", COPIES)
def test_copies_in_the_middle_of_training(name: str, how: str) -> None:
    stage = STAGES[name]()
    module = unwrap(materialize(stage))
    scheduled(module, optimizer_of(module), range(2))
    before = tensors(module)
    made = COPIES[how](module)
    same(made, module)
    assert differing(before, tensors(module))


def test_a_copy_of_what_has_not_run_begins_as_it_does() -> None:
    _, module = training(learned=True)
    same(copy.deepcopy(module), module)


def test_copies_share_nothing() -> None:
    _, module = training(learned=True)
    scheduled(module, optimizer_of(module), range(2))
    made = copy.deepcopy(module)
    before = tensors(module)
    switch(made, Switches(observe=False, freeze_norms=True))
    train(made, optimizer_of(made), BATCHES)
    assert not differing(tensors(module), before)
    assert all(part.on["observer_enabled"] for part in module.modules() if isinstance(part, FakeQuantizer))


@STAGE
def test_states_are_tensors_alone_and_load_into_another_module(name: str) -> None:
    stage = STAGES[name]()
    module = unwrap(materialize(stage))
    scheduled(module, optimizer_of(module), range(5))
    state = module.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    by_safetensors = safetensors.torch.load(safetensors.torch.save(state))
    assert by_safetensors.keys() == state.keys()
    for given in (loaded, by_safetensors):
        fresh = unwrap(materialize(STAGES[name]()))
        found = fresh.load_state_dict(given)
        assert not found.missing_keys
        assert not found.unexpected_keys
        for part, other in zip(fresh.modules(), module.modules(), strict=True):
            assert getattr(part, "on", None) == getattr(other, "on", None)
        switch(fresh, SCHEDULE.at(4))
        switched_on = copy.deepcopy(module)
        same(fresh, switched_on)


@STAGE
def test_what_is_resumed_ends_where_what_was_not_interrupted_does(name: str) -> None:
    whole = unwrap(materialize(STAGES[name]()))
    scheduled(whole, optimizer := optimizer_of(whole), range(6))
    for at in (1, 4):
        first = unwrap(materialize(STAGES[name]()))
        scheduled(first, held := optimizer_of(first), range(at))
        file = io.BytesIO()
        torch.save({"module": first.state_dict(), "optimizer": held.state_dict()}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        second = unwrap(materialize(STAGES[name]()))
        second.load_state_dict(loaded["module"])
        resumed = optimizer_of(second)
        resumed.load_state_dict(loaded["optimizer"])
        scheduled(second, resumed, range(at, 6))
        assert not differing(tensors(second), tensors(whole))
        moments, expected = resumed.state_dict()["state"], optimizer.state_dict()["state"]
        assert all(torch.equal(moments[i]["exp_avg"], expected[i]["exp_avg"]) for i in expected)


@STAGE
def test_what_is_absorbed_goes_on_where_it_ended(name: str) -> None:
    stage = STAGES[name]()
    module = unwrap(materialize(stage))
    scheduled(module, optimizer_of(module), range(2))
    again = unwrap(absorb(stage, module).bind(materialize))
    x = inputs(9)
    assert torch.equal(again.eval()(x), module.eval()(x))
    assert list(again.state_dict()) == list(module.state_dict())


@STAGE
def test_checkpoints_are_absorbed_as_the_module_is(name: str) -> None:
    stage = STAGES[name]()
    module = unwrap(materialize(stage))
    scheduled(module, optimizer_of(module), range(3))
    x = inputs(9)
    outputs = [
        unwrap(absorb(stage, given).bind(convert).bind(materialize)).eval()(x)
        for given in (module, module.state_dict(), nn.DataParallel(module), nn.DataParallel(module).state_dict())
    ]
    assert all(torch.equal(out, outputs[0]) for out in outputs)


class Outer(nn.Module):
    """A model with a part called `module`, as wrappers have."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def test_a_part_called_module_is_no_wrapper() -> None:
    torch.manual_seed(0)
    stage, module = training(model=Outer())
    train(module, optimizer_of(module), BATCHES[:2])
    assert all(name.startswith(("module.", "activation_post_process_")) for name in module.state_dict())
    for given in (module, nn.DataParallel(module), nn.DataParallel(nn.DataParallel(module)).state_dict()):
        converted = unwrap(absorb(stage, given).bind(convert).bind(materialize)).eval()
        torch.testing.assert_close(converted(inputs(9)), module.eval()(inputs(9)), rtol=1e-4, atol=1e-4)


@LEARNED
def test_a_checkpoint_of_the_float_model_is_loaded(learned: bool) -> None:
    _, module = training(learned=learned)
    torch.manual_seed(5)
    model = Residual().train()
    model(inputs(3))
    found = module.load_state_dict(model.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all("fake_quant" in name or "post_process" in name or name.endswith("frozen") for name in found.missing_keys)
    off = switch(module, Switches(fake_quantize=False)).eval()
    torch.testing.assert_close(off(inputs()), model.eval()(inputs()), rtol=0, atol=1e-6)
    train(switch(module, Switches(fake_quantize=True)).train(), optimizer_of(module), BATCHES)


def test_a_state_of_another_stage_is_refused() -> None:
    _, module = training(learned=True)
    module(inputs())
    other = unwrap(materialize(prepared(model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))))
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(module.state_dict())


def test_switches_of_a_state_hold_where_it_is_loaded() -> None:
    stage, module = training()
    module(inputs())
    state = switched(module.state_dict(), Switches(observe=False, freeze_norms=True))
    again = unwrap(materialize(stage))
    again.load_state_dict(state)
    before = tensors(again)
    again.train()(inputs(1))
    assert not differing(tensors(again), before)


PROGRAM = """
import sys, torch
from qfunc import materialize, unwrap
from tests.training.test_checkpoints import STAGES, optimizer_of, scheduled
torch.set_num_threads(1)
source, target = sys.argv[1:]
ended = {}
for name, state in torch.load(source, weights_only=True).items():
    module = unwrap(materialize(STAGES[name]()))
    held = optimizer_of(module)
    module.load_state_dict(state["module"])
    held.load_state_dict(state["optimizer"])
    scheduled(module, held, range(3, 6))
    ended[name] = module.state_dict()
torch.save(ended, target)
"""


def test_another_process_goes_on(tmp_path: Path) -> None:
    whole, half = {}, {}
    for name in ("learned", "histograms"):
        module = unwrap(materialize(STAGES[name]()))
        scheduled(module, held := optimizer_of(module), range(3))
        half[name] = copy.deepcopy({"module": module.state_dict(), "optimizer": held.state_dict()})
        scheduled(module, held, range(3, 6))
        whole[name] = tensors(module)
    torch.save(half, tmp_path / "half.pt")
    environment = {**os.environ, "PYTHONHASHSEED": "12", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "half.pt"), str(tmp_path / "whole.pt")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
    for name, found in torch.load(tmp_path / "whole.pt", weights_only=True).items():
        assert not differing(found, whole[name])


@LEARNED
def test_sizes_that_only_data_tells_are_loaded_and_trained(learned: bool) -> None:
    """Without an example, how many channels a value has is known once it came by."""
    observer = MovingAveragePerChannelMinMax(QuantSpec("uint8", 0, 255, "per_channel_affine", 1))
    start = Start(FakeQuantize(observer, learned=learned), "x", ())
    part, other, x = fake_quantizer(start), fake_quantizer(start), inputs(1)
    assert part.scale.shape == (0,)
    optimizer = torch.optim.Adam(part.parameters(), 0.01) if learned else None
    for _ in range(2):
        value = part(x.clone().requires_grad_()).square().sum()
        value.backward()
        if optimizer is not None:
            optimizer.step()
    assert part.scale.shape == (3,)
    other.load_state_dict(part.state_dict())
    assert torch.equal(other.eval()(x), part.eval()(x))
    assert torch.equal(copy.deepcopy(part)(x), part(x))
