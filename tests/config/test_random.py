"""Random configurations hold every kind of entry and every way to quantize, and name what a model has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from returns.result import Failure
from torch import nn

import qfunc.testing.laws
from qfunc import QConfig, prepare, trace, unwrap
from qfunc.config.qconfig_mapping import tables
from qfunc.errors import BadConfig, UnknownName, UnsupportedDType, UserFunctionFailed, problems
from qfunc.testing import configurations, qconfigs

MODEL = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU()), nn.Flatten(), nn.Linear(4, 2)).eval()
GRAPH = unwrap(trace(MODEL, torch.randn(1, 3, 1, 1)))
TABLES = {name for name, _ in tables(qfunc.QConfigMapping())}


def drawn(strategy: st.SearchStrategy[Any], count: int = 200) -> list[Any]:
    found: list[Any] = []

    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate], deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(strategy)
    def collect(value: Any) -> None:
        found.append(value)

    collect()
    return found


def ways(qconfig: QConfig) -> Iterator[tuple[str, str]]:
    for field in ("activation", "weight", "input_activation"):
        yield field, type(getattr(qconfig, field)).__name__


@pytest.mark.parametrize("invalid", [False, True])
def test_configurations_have_every_kind_of_entry_and_qconfigs_every_way(invalid):
    mappings = drawn(configurations(GRAPH, invalid=invalid), 150)
    assert {name for mapping in mappings for name, table in tables(mapping) if table} == TABLES
    both = {"Cast", "FakeQuantize"}
    found = {pair for qconfig in drawn(qconfigs(invalid=invalid)) for pair in ways(qconfig)}
    for field in ("activation", "input_activation"):
        known = {name for name_of, name in found if name_of == field}
        assert {"FakeQuantize", "MinMax", "Histogram", "FixedQParams"} <= known
    weights = {name for name_of, name in found if name_of == "weight"}
    assert both | {"KeepFloat", "PerChannelMinMax"} <= weights
    assert ("Dynamic" in weights) == ("ReuseInput" in weights) == invalid
    assert {("input_activation", "NoneType"), ("activation", "Dynamic"), ("activation", "KeepFloat")} <= found
    assert {("activation", "Cast"), ("activation", "ReuseInput"), ("input_activation", "Cast")} <= found


def test_the_nodes_of_a_model_are_those_that_it_has_when_traced():
    mappings = drawn(configurations(MODEL), 40)
    named = {id for m in mappings for id in (*m.nodes, *m.outputs, *(edge.user for edge in m.edges))}
    assert named
    assert named <= GRAPH.nodes.keys()


def test_valid_ones_name_only_what_there_is_and_fail_for_dtypes_and_contradictions_alone():
    results = [prepare(GRAPH, mapping) for mapping in drawn(configurations(GRAPH))]
    failed = [result.failure() for result in results if isinstance(result, Failure)]
    failures = [problem for failure in failed for problem in problems(failure)]
    assert {type(problem) for problem in failures} <= {UnsupportedDType, BadConfig}
    assert all("different configurations" in p.reason for p in failures if isinstance(p, BadConfig))
    assert len(failed) < len(results) // 2


def test_invalid_ones_fail_in_every_way():
    results = [prepare(GRAPH, mapping) for mapping in drawn(configurations(GRAPH, invalid=True), 300)]
    failed = [result.failure() for result in results if isinstance(result, Failure)]
    kinds = {type(problem) for failure in failed for problem in problems(failure)}
    assert {BadConfig, UnknownName, UnsupportedDType, UserFunctionFailed} <= kinds
    reasons = " ".join(problem.reason for failure in failed for problem in problems(failure))
    wrong = ("no node", "no module", "no value no.", "a weight does not change", "no floating-point dtype", "raised")
    for words in wrong:
        assert words in reasons, words


def test_the_strategy_is_what_is_imported():
    assert callable(qfunc.testing.configurations)
