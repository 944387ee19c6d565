"""What `describe` and `compare` say of prepared graphs is what the graphs hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from qfunc import CPU, X86, compare, describe, fuse, prepare, trace, unwrap
from qfunc.errors import WrongStage
from qfunc.testing import cases, walk
from tests.zoo import ZOO


def prepared_of(model, inputs, mapping=None, backend=CPU):
    fused = unwrap(fuse(unwrap(trace(model, inputs)), backend=backend))
    return unwrap(prepare(fused, mapping, backend=backend))


@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_every_decision_is_told(case, backend):
    model, inputs = case.build()
    prepared = prepared_of(model, inputs, backend=backend)
    told = unwrap(describe(prepared))
    assert {row.site for row in told.sites} == set(prepared.sites)
    assert {row.node for row in told.weights} == set(prepared.weights)
    assert {row.node: row.reason for row in told.floats}.items() <= dict(prepared.floats).items()
    operators = {node.id for node in prepared.graph if node.kind in ("conv1d", "conv2d", "conv3d", "linear")}
    of_graph = {edge.user for edge in prepared.inputs if edge.slot == "weight"}
    assert operators <= {row.node for row in told.weights} | of_graph | {row.node for row in told.floats}
    for row in told.sites:
        assert row.values == prepared.sites[row.site].taps
        assert row.why, "a site that nothing writes or reads"
    for text in (row.site for row in told.sites):
        assert text in str(told)
    assert not unwrap(compare(prepared, prepared))


@settings(deadline=None)
@given(case=cases(configured=True))
def test_two_are_the_same_just_if_nothing_is_told(case):
    one, other = walk(case).prepared, walk(case).prepared
    if one is None or other is None:
        return
    assert not unwrap(compare(one, other))
    bare = unwrap(prepare(one.graph, CPU.qconfig_mapping.set_global(None), backend=case.backend))
    same = (one.sites, one.outputs, one.inputs, one.weights) == (bare.sites, bare.outputs, bare.inputs, bare.weights)
    assert same is not any(
        d.what.startswith(("result", "weight")) or " of " in d.what for d in unwrap(compare(one, bare)).differences
    )


def test_a_comparison_reads_as_a_table():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    inputs = torch.randn(3, 4)
    first = prepared_of(model, inputs)
    second = prepared_of(model, inputs, CPU.qconfig_mapping.set_module_name("2", None))
    assert str(unwrap(compare(first, second))).splitlines() == [
        "decision      first                                                  second",
        "result of _1  MeanSquaredError uint8 0..255 per_tensor_affine of _1  -",
        "weight of _2  PerChannelMinMax int8 -127..127 per_channel_symmetric  -",
        "_2            -                                                      float: the configuration keeps it float",
    ]
    assert str(unwrap(compare(first, first))) == "no difference"


def test_other_stages_are_refused():
    graph = unwrap(trace(nn.ReLU()))
    assert describe(graph).failure() == WrongStage("Graph", "Prepared")
    assert compare(graph, graph).failure() == WrongStage("Graph", "Prepared")
