"""Laws 1 and 2 of `trace` and `materialize`: the same results bit for bit, and an untouched model."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from hypothesis import given
from torch import nn

from qfunc import ir
from qfunc.edge.materialize import materialize
from qfunc.edge.trace import trace
from qfunc.result import unwrap
from qfunc.testing import models, same_bits
from tests.zoo import ZOO, ZooCase

INPLACE = ("conv", "activation", "shape", "identity", "inplace", "arithmetic", "size")


def state(model: nn.Module) -> list[object]:
    """All that can be seen of a model and of the random generators: by identity, and tensors also by value."""
    seen: list[object] = [random.getstate(), torch.get_rng_state()]
    for path, module in model.named_modules(remove_duplicate=False):
        for name, value in vars(module).items():
            inner = [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)
            seen.append((path, name, inner))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        seen.append((name, tensor._version, tensor.requires_grad, tensor.grad is None, tensor.detach().clone()))
    return seen


def holds(model: nn.Module, inputs: tuple[object, ...], *, example: bool = True) -> None:
    """Assert both laws for a model and inputs."""
    before = state(model)
    graph = unwrap(trace(model, copy.deepcopy(inputs) if example else None))
    unwrap(ir.verify(graph))
    made = unwrap(materialize(graph))
    assert same_bits(before, state(model)), "the model was changed"
    theirs, ours = copy.deepcopy(inputs), copy.deepcopy(inputs)
    original = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        wanted = original(*theirs)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        got = made(*ours)
    assert same_bits(wanted, got), "another result"
    assert same_bits(theirs, ours), "another effect on the inputs"
    expected = dict(original.named_buffers())
    for name, buffer in made.named_buffers():
        if name in expected:
            assert same_bits(expected[name], buffer), f"another effect on {name}"
    assert same_bits(before, state(model)), "running the materialized module changed the model"


@pytest.mark.parametrize("example", [True, False])
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_zoo(case: ZooCase, example: bool) -> None:
    holds(*case.build(), example=example)


@given(models())
def test_random_models(case) -> None:
    holds(case.module, case.example_inputs)


@given(models(aliasing=True, families=INPLACE))
def test_random_models_that_write_in_place(case) -> None:
    holds(case.module, case.example_inputs, example=False)


@given(models(aliasing=True, families=INPLACE))
def test_random_models_that_write_in_place_with_facts(case) -> None:
    holds(case.module, case.example_inputs)
