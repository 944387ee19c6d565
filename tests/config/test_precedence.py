"""Which entry of a configuration holds where several name an operator, a value or a use; and which contradict."""

from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from returns.result import Failure
from torch import nn

from qfunc import (
    CPU,
    ONEDNN,
    X86,
    CustomConfig,
    Histogram,
    MinMax,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    describe,
    fuse,
    get_default_qconfig_mapping,
    prepare,
    trace,
    unwrap,
)
from qfunc.config.point import Edge, used
from qfunc.config.resolve import resolve_qconfigs
from qfunc.config.selectors import first_layer, last_layer, layers
from qfunc.errors import BadConfig, UnknownName, UserFunctionFailed, problems
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL, UINT8
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, ReuseInput
from qfunc.testing import models
from qfunc.testing.quantizations import WRONG_SELECTORS
from qfunc.testing.reordering import reordered
from qfunc.testing.strategies import configurations

WEIGHT = PerChannelMinMax(INT8_NARROW_PER_CHANNEL)
Q = QConfig(Histogram(), WEIGHT)
OTHER = QConfig(MinMax(), WEIGHT)
INT16 = MinMax(QuantSpec("int16", -(2**15), 2**15 - 1))
THIRD = PerChannelMinMax(QuantSpec(qscheme="per_channel_affine", ch_axis=2))
PER_CHANNEL = PerChannelMinMax(QuantSpec(qscheme="per_channel_affine", ch_axis=1))


class Layers(nn.Module):
    """Two linear layers, the second inside a block, and a sum that reads the first one's result a second time."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        y = self.first(x)
        return self.block(y) + y


GRAPH = unwrap(trace(Layers().eval(), torch.randn(2, 4)))
IDS = {node.origin.module: node.id for node in GRAPH if node.kind == "linear"}
FIRST, SECOND = IDS["first"], IDS["block.0"]
SUM = next(node.id for node in GRAPH if node.kind == "add")


def every_linear(graph):
    return [node.id for node in graph if node.kind == "linear"]


# All name the layer `block.0`, and some others.
STRENGTHS = (
    ("global", lambda mapping, choice: mapping.set_global(choice)),
    ("object type", lambda mapping, choice: mapping.set_object_type(nn.Linear, choice)),
    ("selector", lambda mapping, choice: mapping.set_selected(every_linear, choice)),
    ("regex", lambda mapping, choice: mapping.set_module_name_regex("block.*", choice)),
    ("outer module", lambda mapping, choice: mapping.set_module_name("block", choice)),
    ("module name", lambda mapping, choice: mapping.set_module_name("block.0", choice)),
    ("order", lambda mapping, choice: mapping.set_module_name_object_type_order("block", nn.Linear, 0, choice)),
    ("node", lambda mapping, choice: mapping.set_node(SECOND, choice)),
)


@pytest.mark.parametrize("choices", [(Q, OTHER), (Q, None), (None, OTHER)], ids=["both", "float", "quantized"])
@pytest.mark.parametrize(("weaker", "stronger"), list(combinations(STRENGTHS, 2)), ids=lambda pair: pair[0])
def test_the_stronger_entry_holds_whatever_the_order_of_calls(weaker, stronger, choices):
    calls = [(weaker[1], choices[0]), (stronger[1], choices[1])]
    found = []
    for order in permutations(calls):
        mapping = QConfigMapping()
        for entry, choice in order:
            mapping = entry(mapping, choice)
        found.append(mapping)
        assert resolve_qconfigs(mapping, GRAPH)[SECOND] == choices[1]
        prepared = unwrap(prepare(GRAPH, mapping, backend=X86))
        assert (SECOND in prepared.weights) == (choices[1] is not None)
    assert found[0] == found[1]


def test_all_strengths_at_once_are_taken_off_one_by_one():
    mapping = QConfigMapping()
    marks = [QConfig(MinMax(QuantSpec(quant_max=100 + i)), WEIGHT) for i in range(len(STRENGTHS))]
    for (_, entry), mark in zip(STRENGTHS, marks, strict=True):
        mapping = entry(mapping, mark)
        assert resolve_qconfigs(mapping, GRAPH)[SECOND] == mark


def test_of_regexes_the_one_set_first_holds():
    mapping = QConfigMapping().set_module_name_regex("b.*", Q).set_module_name_regex(".*0", None)
    assert resolve_qconfigs(mapping, GRAPH)[SECOND] == Q
    mapping = mapping.set_module_name_regex("b.*", Q)
    assert resolve_qconfigs(mapping, GRAPH)[SECOND] is None


# Single values and single uses


def decisions(mapping, backend=X86, graph=GRAPH):
    prepared = unwrap(prepare(graph, mapping, backend=backend))
    return prepared, str(unwrap(describe(prepared)))


ALL = QConfigMapping().set_global(Q)
OPERATORS = {
    "all": ALL,
    "by type": QConfigMapping().set_object_type(nn.Linear, Q),
    "by node": ALL.set_node(FIRST, OTHER).set_node(SECOND, OTHER).set_node(SUM, None),
}


@pytest.mark.parametrize("mapping", OPERATORS.values(), ids=list(OPERATORS))
def test_a_value_is_kept_float_for_all_its_uses(mapping):
    before, _ = decisions(mapping)
    assert FIRST in before.outputs
    prepared, text = decisions(mapping.set_output(FIRST, None))
    assert FIRST not in prepared.outputs
    assert not any(value == FIRST for site in prepared.sites.values() for value in site.taps)
    assert Edge(SECOND, "input") not in prepared.inputs
    assert f"result of {FIRST} (" not in text
    assert not prepared.notes


@pytest.mark.parametrize("mapping", OPERATORS.values(), ids=list(OPERATORS))
def test_a_value_is_quantized_with_sixteen_bits(mapping):
    prepared, text = decisions(mapping.set_output(FIRST, INT16))
    assert prepared.sites[prepared.outputs[FIRST]].observer == INT16
    (line,) = [line for line in text.splitlines() if f"result of {FIRST} (" in line]
    assert "MinMax" in line and "int16 -32768..32767" in line


@pytest.mark.parametrize("mapping", OPERATORS.values(), ids=list(OPERATORS))
def test_a_use_has_a_scale_for_each_channel_and_others_do_not(mapping):
    edge = Edge(SECOND, "input")
    prepared, text = decisions(mapping.set_edge(edge, PER_CHANNEL))
    assert prepared.sites[prepared.inputs[edge]].observer == PER_CHANNEL
    assert prepared.sites[prepared.outputs[FIRST]].observer.spec == UINT8
    (line,) = [line for line in text.splitlines() if f"input of {SECOND} (" in line]
    assert "PerChannelMinMax" in line and "per_channel_affine" in line


def test_a_use_is_kept_float_and_others_are_not():
    mapping = ALL.set_edge(Edge(FIRST, "input"), None)
    x = next(iter(GRAPH)).id
    prepared, _ = decisions(mapping)
    assert Edge(FIRST, "input") not in prepared.inputs and x not in {t for s in prepared.sites.values() for t in s.taps}
    assert FIRST in prepared.weights and FIRST in prepared.outputs


def test_a_use_holds_against_an_entry_of_its_value():
    edge = Edge(SECOND, "input")
    prepared, _ = decisions(ALL.set_output(FIRST, None).set_edge(edge, INT16))
    assert FIRST not in prepared.outputs and prepared.sites[prepared.inputs[edge]].observer == INT16


def test_uses_and_values_of_operators_that_stay_float_are_quantized_there():
    edge = Edge(SUM, "input")
    prepared, _ = decisions(QConfigMapping().set_edge(edge, INT16).set_output(SUM, INT16))
    assert {site.observer for site in prepared.sites.values()} == {INT16}
    assert edge in prepared.inputs and SUM in prepared.outputs


@pytest.mark.parametrize(
    ("mapping", "node", "words"),
    [
        (ALL.set_edge(Edge(SUM, "input", 1), None), SUM, "no value no. 1 in its argument 'input'"),
        (ALL.set_edge(Edge(SUM, "no such"), None), SUM, "no value no. 0 in its argument 'no such'"),
        (ALL.set_edge(Edge(SUM, "post.x"), None), SUM, "no value no. 0 in its argument 'post.x'"),
        (ALL.set_edge(Edge(SUM, f"post.{'1' * 5000}.other"), None), SUM, "no value no. 0"),
        (ALL.set_output(SUM, THIRD), SUM, "ch_axis 2 is no axis of 'add', a tensor of 2 dimensions"),
        (ALL.set_edge(Edge(SUM, "other"), FakeQuantize(THIRD)), "first", "ch_axis 2 is no axis of 'first'"),
        (ALL.set_edge("x", None), "edges", "'x' is no use of a value"),
        (ALL.set_edge(Edge(SUM, 3), None), "edges", "is no use of a value"),
        (
            ALL.set_edge(Edge(SUM, "input"), ReuseInput()),
            str(Edge(SUM, "input")),
            "has no input whose qparams to reuse",
        ),
        (ALL.set_output(SUM, 3), "int", "no observer"),
    ],
)
def test_entries_of_places_that_cannot_be_meant_are_errors(mapping, node, words):
    (problem,) = problems(prepare(GRAPH, mapping).failure())
    assert isinstance(problem, BadConfig)
    assert problem.node == node and words in problem.reason


class Awkward(nn.Module):
    """Values that nothing can quantize: a view that is written to, an index, a size."""

    def forward(self, x, index):
        double = x * 2
        view = double.view(-1)
        view.add_(1)
        return double.reshape(x.shape)[index] + index


AWKWARD = unwrap(trace(Awkward().eval(), (torch.randn(2, 2), torch.tensor([0, 1]))))
REFUSED = {
    "mul": "changed in place",
    "view": "changed in place",
    "add_": "changed in place",
    "reshape": "changed in place",
    "getitem": "changed in place",
    "index": "a tensor of int64",
    "getattr_1": "no tensor",
    "output": "what the model returns",
}


@pytest.mark.parametrize("quantization", [MinMax(), Dynamic(), Cast()], ids=["observer", "dynamic", "cast"])
@pytest.mark.parametrize("id", AWKWARD.order)
def test_values_that_cannot_be_quantized_are_errors_and_may_be_kept_float(id, quantization):
    edges = [Edge(node.id, name) for node in AWKWARD for name, _ in node.args]
    uses = [edge for edge in edges if used(AWKWARD[edge.user], edge) == id]
    assert uses or id in ("output", "add_")
    for entry in (ALL.set_output(id, None), *(ALL.set_edge(edge, None) for edge in uses)):
        unwrap(prepare(AWKWARD, entry))
    for entry in (ALL.set_output(id, quantization), *(ALL.set_edge(edge, quantization) for edge in uses)):
        result = prepare(AWKWARD, entry)
        if id in REFUSED:
            (problem,) = problems(result.failure())
            assert isinstance(problem, BadConfig) and REFUSED[id] in problem.reason
            assert problem.node == AWKWARD[id].place
        else:
            unwrap(result)


def test_unknown_nodes_are_all_told_with_those_that_may_be_meant():
    mapping = ALL.set_node("frist", None).set_output("a", None).set_edge(Edge("b", "input"), None)
    found = problems(prepare(GRAPH, mapping).failure())
    assert [(type(problem), problem.node) for problem in found] == [(UnknownName, id) for id in ("a", "b", "frist")]
    assert "first" in found[-1].remedy


def test_an_input_has_no_input_whose_qparams_to_reuse():
    mapping = ALL.set_node(FIRST, QConfig(MinMax(), WEIGHT, input_activation=ReuseInput()))
    (problem,) = problems(prepare(GRAPH, mapping).failure())
    assert isinstance(problem, BadConfig) and "no input of its own" in problem.reason


def test_reusing_the_qparams_of_an_input_leaves_an_operator_without_one_float():
    graph = unwrap(trace(nn.Sequential(nn.Embedding(3, 4)).eval(), torch.tensor([0, 2])))
    prepared, text = decisions(QConfigMapping().set_global(QConfig(ReuseInput(), KeepFloat())), X86, graph)
    assert not prepared.sites and not prepared.weights
    assert "its input, whose qparams it is to reuse, is not quantized" in text


# Selectors


def test_two_selectors_of_one_operator_for_different_configurations_are_an_error_that_names_both():
    (problem,) = problems(prepare(GRAPH, ALL.set_selected(layers, Q).set_selected(last_layer, None)).failure())
    assert isinstance(problem, BadConfig) and problem.node == "block.0"
    assert "last_layer and layers select it for different configurations" in problem.reason
    assert f"set_node({SECOND!r}, qconfig)" in problem.remedy


def test_two_selectors_may_agree_or_leave_the_decision_to_the_node():
    both = ALL.set_selected(layers, Q).set_selected(last_layer, Q)
    assert resolve_qconfigs(both, GRAPH)[SECOND] == Q
    apart = ALL.set_selected(layers, Q).set_selected(last_layer, None).set_node(SECOND, OTHER)
    assert unwrap(prepare(GRAPH, apart)).weights.keys() == {FIRST, SECOND}
    assert resolve_qconfigs(apart, GRAPH)[SECOND] == OTHER


def test_broken_selectors_are_told():
    mapping = QConfigMapping()
    for selector in WRONG_SELECTORS.values():
        mapping = mapping.set_selected(selector, None)
    found = problems(prepare(GRAPH, mapping).failure())
    failed = {problem.node: problem.reason for problem in found if isinstance(problem, UserFunctionFailed)}
    assert failed.keys() == {"_raises", "_nothing", "_number", "_falls_short"}
    assert "ValueError" in failed["_raises"]
    unknown = {(problem.node, problem.what) for problem in found if isinstance(problem, UnknownName)}
    assert {("no_such_node", "node (selected by _unknown)"), ("[]", "node (selected by _objects)")} <= unknown
    assert len(failed) + len(unknown) == len(found)


def test_a_selector_is_asked_about_the_graph_as_it_is_prepared():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 4)).eval()
    fused = unwrap(fuse(unwrap(trace(model, torch.randn(1, 3, 4, 4)))))
    prepared = unwrap(prepare(fused, CPU.qconfig_mapping.set_selected(first_layer, None)))
    assert [fused[id].kind for id in prepared.weights] == ["linear"]


# Fused operators


def fused(*modules, backend=CPU):
    return unwrap(fuse(unwrap(trace(nn.Sequential(*modules).eval(), torch.randn(2, 4))), backend=backend))


LINEAR_RELU = fused(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        (ALL.set_object_type(nn.ReLU, None), "object_types['torch.nn.ReLU']"),
        (ALL.set_object_type(nn.ReLU, OTHER), "object_types['torch.nn.ReLU']"),
        (ALL.set_module_name("1", None), "module_names['1']"),
        (ALL.set_module_name_regex("1", None), "module_name_regexes['1']"),
        (ALL.set_module_name("0", None).set_module_name("1", Q), "module_names['1']"),
        (QConfigMapping().set_object_type(nn.ReLU, Q), "object_types['torch.nn.ReLU']"),
    ],
)
def test_fused_operators_with_different_configurations_are_an_error_that_names_the_part(mapping, words):
    (problem,) = problems(prepare(LINEAR_RELU, mapping).failure())
    assert isinstance(problem, BadConfig) and problem.node == "0"
    assert "fused with '1'" in problem.reason and words in problem.reason
    assert "unfused_names" in problem.remedy


def test_an_entry_for_the_layer_of_a_fused_operator_is_for_all_of_it():
    mapping = QConfigMapping().set_object_type(nn.Linear, Q)
    assert len(unwrap(prepare(LINEAR_RELU, mapping)).weights) == 2
    mapping = QConfigMapping().set_module_name("0", Q)
    assert len(unwrap(prepare(LINEAR_RELU, mapping)).weights) == 1
    mapping = ALL.set_module_name("0", None).set_module_name("1", None)
    assert len(unwrap(prepare(LINEAR_RELU, mapping)).weights) == 1


def test_a_batch_norm_that_is_folded_into_a_layer_is_a_part_of_it():
    graph = fused(nn.Linear(4, 4), nn.BatchNorm1d(4))
    (problem,) = problems(prepare(graph, ALL.set_module_name("1", None)).failure())
    assert problem.node == "0" and "fused with '1'" in problem.reason


def test_a_node_a_selector_or_an_order_names_a_fused_operator_as_a_whole():
    first = next(node.id for node in LINEAR_RELU if node.kind == "linear")
    of_relu = ALL.set_object_type(nn.ReLU, None)
    for mapping in (
        of_relu.set_node(first, OTHER),
        of_relu.set_selected(first_layer, OTHER),
        of_relu.set_module_name_object_type_order("", nn.Linear, 0, OTHER),
    ):
        assert unwrap(prepare(LINEAR_RELU, mapping)).weights[first] == WEIGHT


def test_linear_and_tanh_are_one_for_onednn_and_its_own_configuration_suits_both():
    graph = fused(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), backend=ONEDNN)
    assert [post.kind for node in graph for post in node.post] == ["tanh"]
    prepared = unwrap(prepare(graph, backend=ONEDNN))
    assert len(prepared.weights) == 2
    assert unwrap(prepare(graph, ONEDNN.qconfig_mapping, backend=ONEDNN)) == prepared


# The order of entries


@given(model=models(max_nodes=4), data=st.data(), invalid=st.booleans())
def test_law_7_errors_and_notes_do_not_depend_on_the_order_of_entries_either(model, data, invalid):
    graph = unwrap(trace(model.module, model.example_inputs))
    mapping = data.draw(configurations(graph, invalid=invalid))
    other = reordered(mapping, graph) if not invalid else _again(mapping)
    found, again = (prepare(graph, each) for each in (mapping, other))
    assert found == again
    if not isinstance(found, Failure):
        assert found.unwrap().notes == again.unwrap().notes
        assert found.unwrap().floats == again.unwrap().floats


def _again(mapping: QConfigMapping) -> QConfigMapping:
    """The same entries in tables that are walked backwards, where that can be."""
    return reordered(mapping, GRAPH) if not any(mapping.module_name_regexes) else mapping


def test_configurations_reordered_are_walked_in_another_order():
    mapping = QConfigMapping()
    for number in range(12):
        mapping = mapping.set_node(f"n{number}", None).set_output(f"n{number}", None)
        mapping = mapping.set_edge(Edge(f"n{number}", "input"), None).set_module_name(f"n{number}", None)
    other = reordered(mapping, GRAPH)
    assert other == mapping
    for name in ("nodes", "outputs", "edges", "module_names"):
        tables: Any = getattr(mapping, name), getattr(other, name)
        assert list(tables[0]) != list(tables[1])


def test_values_are_told_of_that_stay_float_anyway():
    mapping = QConfigMapping().set_output(SUM, None).set_edge(Edge(SUM, "input"), None).set_selected(every_linear, Q)
    mapping = mapping.set_selected(_nothing, None).set_output(SECOND, None).set_edge(Edge(FIRST, "input"), None)
    prepared = unwrap(prepare(GRAPH, mapping, backend=X86))
    assert [note.node for note in prepared.notes] == [
        "selections['_nothing']", f"outputs[{SUM!r}]", f"edges[{Edge(SUM, 'input')}]"
    ]  # fmt: skip
    assert KeepFloat() == mapping.outputs[SUM]
    described = str(unwrap(describe(prepared))).splitlines()
    assert f"note: outputs[{SUM!r}] changes nothing; " in described[-2]


def test_a_use_of_a_value_that_is_quantized_where_it_is_made_may_be_unrounded():
    edge = Edge(SUM, "other")
    mapping = QConfigMapping().set_object_type(nn.Linear, Q).set_edge(edge, None)
    prepared = unwrap(prepare(GRAPH, mapping, backend=X86))
    assert prepared.unrounded == {edge}
    assert FIRST in prepared.outputs
    for one in (prepared, unwrap(prepare(GRAPH, mapping.set_edge(edge, INT16), backend=X86))):
        assert not one.notes


def _nothing(graph):
    return ()


def test_what_is_the_reference_s_or_a_result_is_named_as_such():
    ao = pytest.importorskip("torch.ao.quantization")
    given = QConfigMapping(ao.default_qconfig)
    (problem,) = problems(prepare(GRAPH, given).failure())
    assert problem.node == "global_qconfig" and "torch.ao.quantization.qconfig.QConfig" in problem.reason
    (problem,) = problems(prepare(GRAPH, ao.QConfigMapping()).failure())
    assert "got a torch.ao.quantization.qconfig_mapping.QConfigMapping" in problem.reason
    (problem,) = problems(prepare(GRAPH, get_default_qconfig_mapping()).failure())
    assert "got a Success" in problem.reason and "unwrap" in problem.remedy
    (problem,) = problems(prepare(GRAPH, custom=CustomConfig(standalone_names={"s": ALL})).failure())
    assert "a dict with a QConfigMapping" in problem.reason
