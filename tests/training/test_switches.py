"""Switches: in a module, in a state, by a schedule."""

from __future__ import annotations

import torch
from torch import nn

from qfunc import Schedule, Switches, fuse, materialize, prepare_qat, switch, switched, trace, unwrap
from qfunc.testing import same_bits

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def module_of() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return unwrap(trace(model, X).bind(lambda graph: fuse(graph, qat=True)).bind(prepare_qat).bind(materialize)).train()


def test_frozen_norms_survive_train() -> None:
    module = module_of()
    module(X)
    switch(module, Switches(freeze_norms=True)).eval().train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if name.startswith("1.")}
    module(X + 1)
    assert before
    assert all(same_bits(tensor, module.state_dict()[name]) for name, tensor in before.items())
    switch(module, Switches(freeze_norms=False))
    module(X + 1)
    assert not same_bits(before["1.running_mean"], module.state_dict()["1.running_mean"])


def test_without_observers_no_qparams_change() -> None:
    module = module_of()
    module(X)
    switch(module, Switches(observe=False))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items() if "scale" in name}
    module(10 * X)
    assert before
    assert all(same_bits(tensor, module.state_dict()[name]) for name, tensor in before.items())
    switch(module, Switches(observe=True))(10 * X)
    assert any(not same_bits(tensor, module.state_dict()[name]) for name, tensor in before.items())


def test_a_switched_state_is_that_of_the_switched_module_and_leaves_the_first_alone() -> None:
    module = module_of()
    module(X)
    state = module.state_dict()
    held = {name: tensor.clone() for name, tensor in state.items()}
    turned = switched(state, Switches(observe=False, freeze_norms=True))
    assert same_bits(state, held)
    assert not same_bits(turned, held)
    assert same_bits(turned, switch(module, Switches(observe=False, freeze_norms=True)).state_dict())


def test_a_schedule_says_the_same_wherever_it_is_resumed() -> None:
    schedule = Schedule({900: Switches(freeze_norms=True), 0: Switches(observe=True), 800: Switches(observe=False)})
    assert schedule.at(-1) == Switches()
    assert schedule.at(0) == schedule.at(799) == Switches(observe=True)
    assert schedule.at(800) == Switches(observe=False)
    assert schedule.at(10**6) == Switches(observe=False, freeze_norms=True)
