"""`absorb`: what it refuses, all at once and typed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from returns.result import Failure
from torch import Tensor, nn

from qfunc import Prepared, absorb, convert, fuse, materialize, prepare, prepare_qat, trace, unwrap
from qfunc.errors import BadConfig, NonFinite, Unobserved, WrongStage, problems

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def prepared_of(channels: int = 4) -> Prepared:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())
    return unwrap(prepare_qat(unwrap(trace(model, X).bind(lambda graph: fuse(graph, qat=True)))))


def trained_of(prepared: Prepared) -> nn.Module:
    module = unwrap(materialize(prepared)).train()
    module(X)
    return module


def told(result: Any) -> list[tuple[type, str]]:
    assert isinstance(result, Failure)
    return [(type(problem), problem.node) for problem in problems(result.failure())]


@pytest.mark.parametrize("stage", [None, 3, "graph", "prepared"])
def test_only_what_was_prepared_for_training_absorbs(stage: Any) -> None:
    graph = unwrap(trace(nn.Sequential(nn.Linear(3, 3)).eval()).bind(fuse))
    given = {"graph": graph, "prepared": unwrap(prepare(graph))}.get(stage, stage)
    result = absorb(given, nn.Linear(3, 3))
    assert isinstance(result, Failure)
    assert isinstance(result.failure(), WrongStage)


@pytest.mark.parametrize("module", [None, 3, {}, {"a": 3}, nn.ReLU()])
def test_what_has_no_tensors_is_told_once(module: Any) -> None:
    assert told(absorb(prepared_of(), module)) == [(BadConfig, "module")]


def test_misfits_are_told_all_at_once() -> None:
    prepared = prepared_of()
    state: dict[str, Tensor] = dict(trained_of(prepared).state_dict())
    del state["0.bias"]
    state |= {"0.weight": torch.zeros(2), "other": torch.zeros(1), "1.running_var": torch.full((4,), torch.nan)}
    expected = {(BadConfig, "0.bias"), (BadConfig, "0.weight"), (BadConfig, "other"), (NonFinite, "1.running_var")}
    found = told(absorb(prepared, state))
    assert set(found) == expected
    assert len(found) == len(expected)


def test_the_module_of_another_stage_is_refused() -> None:
    found = told(absorb(prepared_of(), trained_of(prepared_of(5))))
    assert (BadConfig, "0.weight") in found
    assert {kind for kind, _ in found} == {BadConfig}


def test_what_has_seen_no_data_is_told_by_convert() -> None:
    prepared = prepared_of()
    calibrated = unwrap(absorb(prepared, unwrap(materialize(prepared))))
    assert {kind for kind, _ in told(convert(calibrated))} == {Unobserved}
    assert convert(unwrap(absorb(prepared, trained_of(prepared)))).unwrap()


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


def test_a_model_without_tensors_absorbs_a_state_without_tensors() -> None:
    graph = unwrap(trace(Plain(), X).bind(lambda graph: fuse(graph, qat=True)))
    prepared = unwrap(prepare_qat(graph))
    module = unwrap(materialize(prepared)).train()
    torch.testing.assert_close(module(X), torch.relu(X), atol=0.05, rtol=0)
    quantized = absorb(prepared, module).bind(convert).bind(materialize)
    torch.testing.assert_close(unwrap(quantized)(X), torch.relu(X), atol=0.05, rtol=0)
