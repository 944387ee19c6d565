"""A backend of the user's, written in a few lines of JSON or of Python, goes the whole way."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qfunc import (
    BackendConfig,
    CustomFusion,
    DTypeConfig,
    DTypeWithConstraints,
    FixedQParams,
    MinMax,
    Observation,
    OperatorConfig,
    Pattern,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    Step,
    from_json,
    fuse,
    materialize,
    prepare,
    quantize,
    render,
    to_json,
    trace,
    unwrap,
)
from qfunc.errors import problems
from qfunc.numerics.qparams import INT8_SYMMETRIC_PER_CHANNEL, UINT8
from qfunc.testing import check_laws, sqnr
from qfunc.testing.strategies import cases

# Two patterns, two rows of operators.
DOCUMENT = """
{"qfunc": "BackendConfig", "version": 1, "name": "mine",
 "fusions": [
  {"name": "conv2d + batch_norm + relu",
   "steps": [{"kinds": ["conv2d"]}, {"kinds": ["batch_norm"]}, {"kinds": ["relu"]}]},
  {"name": "linear + relu", "steps": [{"kinds": ["linear"]}, {"kinds": ["relu"]}]}],
 "operators": [
  {"kinds": ["conv2d", "linear"], "observation": "own", "float_output": true},
  {"kinds": ["max_pool2d", "flatten"], "observation": "shared"}],
 "qconfig_mapping": {"global_qconfig": {
  "activation": {"observer": "MinMax"},
  "weight": {"observer": "PerChannelMinMax",
   "spec": {"dtype": "int8", "quant_min": -128, "quant_max": 127,
    "qscheme": "per_channel_symmetric", "ch_axis": 0}}}},
 "lazy": true, "observe_shared_outputs": false}
"""

CHAINS = (("conv2d", "batch_norm", "relu"), ("linear", "relu"))
MINE = BackendConfig(
    "mine",
    tuple(Pattern(" + ".join(kinds), tuple(Step((kind,)) for kind in kinds)) for kinds in CHAINS),
    (
        OperatorConfig(("conv2d", "linear"), Observation.OWN, float_output=True),
        OperatorConfig(("max_pool2d", "flatten"), Observation.SHARED),
    ),
    QConfigMapping().set_global(QConfig(MinMax(), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL))),
    lazy=True,
    observe_shared_outputs=False,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    head = (nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), *head, nn.Sigmoid()).eval()


def test_the_document_and_the_python_are_the_same_backend():
    assert unwrap(from_json(DOCUMENT)) == MINE
    assert len(DOCUMENT.strip().splitlines()) <= 20


def test_a_backend_from_a_document_quantizes_a_model():
    model, batches = network(), [torch.randn(8, 3, 10, 10) for _ in range(4)]
    lowered = unwrap(quantize(model, batches, backend=unwrap(from_json(DOCUMENT))))
    rows = {entry.module: entry.operator for entry in lowered.certificate.entries}
    assert rows["0"] == "conv2d + relu"
    assert rows["5"] == "linear + relu"
    assert lowered.certificate.in_int8 == 5
    assert lowered.certificate.total == 6
    wanted = model(batches[0])
    assert sqnr(wanted, unwrap(materialize(lowered))(batches[0])) > 25


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fusions": (Pattern("empty", ()),)}, "a pattern of 0 steps fuses nothing"),
        ({"fusions": (Pattern("lonely", (Step(("relu",)),)),)}, "a pattern of 1 steps fuses nothing"),
        ({"fusions": (Pattern("at", (Step(("add",), takes=("#one",)),)),)}, "'#one' is no position"),
        ({"fusions": (Pattern("at", (Step(("add",), sides=((-1, (Step(),)),)),)),)}, "-1 is no position"),
        ({"fusions": (Pattern("at", (Step(("add",), sides=((1, (Step(),)),)),)),)}, "a chain of its own"),
        ({"fusions": (3,)}, "expected a Pattern or a CustomFusion, got a int"),
        ({"fusions": (CustomFusion(len, pattern=(3, nn.ReLU)),)}, "3 stands where an operator is expected"),
        ({"operators": (3,)}, "expected an OperatorConfig, got a int"),
        ({"operators": (dataclasses.replace(MINE.operators[0], fixed=FixedQParams(UINT8, 0.0, 0)),)}, "not a scale"),
    ],
)
def test_a_backend_that_cannot_be_meant_is_told(changes, words):
    backend = dataclasses.replace(MINE, **changes)
    graph = unwrap(trace(network()))
    for result in (fuse(graph, backend=backend), prepare(graph, backend=backend)):
        assert any(words in problem.reason for problem in problems(result.failure())), render(result.failure())


KINDS = (
    *("conv2d", "linear", "batch_norm", "max_pool2d", "relu", "clamp"),
    *("add", "mul", "flatten", "sigmoid", "cat", "mean"),
)
kinds = st.sampled_from(KINDS)
steps = st.builds(Step, st.tuples(kinds), takes=st.sampled_from([("input",), ("input", "other"), ("#0",), ()]))
patterns = st.builds(Pattern, st.just("p"), st.lists(steps, min_size=2, max_size=3).map(tuple), st.booleans())
rows = st.builds(
    OperatorConfig,
    st.lists(kinds, max_size=3).map(tuple),
    st.sampled_from(list(Observation)),
    float_output=st.booleans(),
)
backends = st.builds(
    BackendConfig,
    st.just("any"),
    st.lists(patterns, max_size=4).map(tuple),
    st.lists(rows, max_size=4).map(tuple),
    st.just(MINE.qconfig_mapping),
    *[st.booleans()] * 4,
)


@settings(max_examples=15)
@given(case=cases(max_nodes=5), backend=backends)
def test_the_laws_hold_for_any_backend_and_it_comes_back(case, backend):
    assert unwrap(from_json(unwrap(to_json(backend)))) == backend
    assert check_laws(dataclasses.replace(case, backend=backend)) == ()


def test_dtypes_that_there_are_none_of_are_told_of_by_name():
    wrong = DTypeConfig(DTypeWithConstraints("int9"), "uint8", "float3", None)
    backend = dataclasses.replace(MINE, operators=(OperatorConfig(("linear",), Observation.OWN, (wrong,)),))
    graph = unwrap(trace(nn.Sequential(nn.Linear(2, 2)).eval()))
    found = problems(prepare(graph, backend=backend).failure())
    assert [(type(problem).__name__, problem.node) for problem in found] == [
        ("UnknownName", "int9"),
        ("UnknownName", "float3"),
    ]
    assert "int8" in found[0].remedy
