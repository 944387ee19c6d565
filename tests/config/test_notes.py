"""Entries of a configuration that match nothing are told as notes, and no others are."""

from __future__ import annotations

import re
from difflib import get_close_matches

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from qfunc import (
    CPU,
    ONEDNN,
    X86,
    CustomConfig,
    Edge,
    Histogram,
    MinMax,
    QConfig,
    QConfigMapping,
    Standalone,
    decomposed_attention,
    describe,
    fuse,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
    prepare,
    quantize,
    render,
    trace,
    unwrap,
)
from qfunc.config.resolve import resolve_qconfigs
from qfunc.errors import BadConfig, UnknownName, problems
from qfunc.numerics.qparams import INT8_SYMMETRIC
from qfunc.testing import models
from qfunc.testing.strategies import BACKENDS, configurations


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.unused = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(functional.relu6(self.layer1(x)).mean((2, 3)))


GRAPH = unwrap(fuse(unwrap(trace(Model().eval(), torch.randn(1, 3, 4, 4)))))


def notes(mapping, graph=GRAPH, backend=CPU):
    return [str(note) for note in unwrap(prepare(graph, mapping, backend=backend)).notes]


@pytest.mark.parametrize(
    ("mapping", "note"),
    [
        (QConfigMapping().set_object_type(nn.Conv1d, None),
         "object_types['torch.nn.Conv1d'] matches no operator; the closest there: torch.nn.Conv2d"),
        (QConfigMapping().set_object_type("relu6", None),
         "object_types['.relu6'] matches no operator; the closest there: torch.nn.functional.relu6"),
        (QConfigMapping().set_object_type(nn.LSTM, None),
         ("object_types['torch.nn.LSTM'] matches no operator; "
         "there are .mean, torch.nn.Conv2d, torch.nn.Linear, torch.nn.functional.relu6")),
        (QConfigMapping().set_object_type(nn.ReLU, None),
         ("object_types['torch.nn.ReLU'] matches no operator; "
         "the graph's are fused behind other operators, whose type or name to configure instead")),
        (QConfigMapping().set_object_type(nn.BatchNorm2d, None),
         ("object_types['torch.nn.BatchNorm2d'] matches no operator; "
         "the model's are folded into other operators, removed, or never called on their own")),
        (QConfigMapping().set_module_name("unused", None),
         ("module_names['unused'] names a module without an operator: "
         "what it does is removed, or is never called on its own")),
        (QConfigMapping().set_edge(Edge("head", "input"), None),
         f"edges[{Edge('head', 'input')}] changes nothing; the use is not quantized"),
        (QConfigMapping().set_module_name_regex(r"layers1\..*", None),
         (r"module_name_regexes['layers1\\..*'] matches the path of no module with an operator; "
         "the closest there: layer1.0")),
        (QConfigMapping().set_module_name_regex("(en|de)coder", None),
         ("module_name_regexes['(en|de)coder'] matches the path of no module with an operator; "
         "there are head, layer1.0")),
        (QConfigMapping().set_module_name_object_type_order("", nn.Linear, 1, None),
         ("module_name_object_type_orders['', 'torch.nn.Linear', 1] matches no call; "
         "the model calls it once, counted from 0")),
        (QConfigMapping().set_module_name_object_type_order("layer1", nn.Conv1d, 0, None),
         ("module_name_object_type_orders['layer1', 'torch.nn.Conv1d', 0] matches no call; "
         "of what 'layer1' itself calls, the closest there: torch.nn.Conv2d")),
        (QConfigMapping().set_module_name_object_type_order("head", nn.Conv1d, 0, None),
         "module_name_object_type_orders['head', 'torch.nn.Conv1d', 0] matches no call; 'head' itself calls none"),
    ],
)  # fmt: skip
def test_what_matches_nothing_is_told_with_what_may_be_meant(mapping, note):
    assert notes(mapping) == [f"note: {note}"]
    described = str(unwrap(describe(unwrap(prepare(GRAPH, mapping)))))
    assert described.splitlines()[-1] == f"note: {note}"


def test_what_matches_is_not_told_of_even_if_a_stronger_entry_takes_it():
    mapping = (
        QConfigMapping()
        .set_object_type(nn.Conv2d, None)
        .set_object_type(functional.relu6, None)
        .set_module_name_regex("layer.*", None)
        .set_module_name_regex("layer1.*", None)
        .set_module_name("layer1", None)
        .set_module_name_object_type_order("layer1", nn.Conv2d, 0, None)
    )
    assert notes(mapping) == []


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_backend_s_own_entries_are_not_told_of(backend):
    graph = unwrap(trace(Model().eval(), torch.randn(1, 3, 4, 4)))
    assert notes(None, graph, backend) == []
    changed = backend.qconfig_mapping.set_module_name("head", None)
    assert notes(changed, graph, backend) == []
    asked = changed.set_object_type(nn.ConvTranspose2d, CPU.qconfig_mapping.global_qconfig)
    assert [note.split("'")[1] for note in notes(asked, graph, backend)] == ["torch.nn.ConvTranspose2d"]


def test_what_matches_in_a_standalone_module_without_a_mapping_is_not_told_of():
    mapping = QConfigMapping().set_object_type(nn.Conv2d, None).set_module_name_regex("layer1.0", None)
    mapping = mapping.set_module_name_object_type_order("layer1", nn.Conv2d, 0, None).set_module_name("layer1.0", None)
    graph = unwrap(trace(Model().eval(), torch.randn(1, 3, 4, 4)))
    custom = CustomConfig(standalone_names={"layer1": Standalone(None, X86)})
    assert unwrap(prepare(graph, mapping, custom=custom)).notes == ()


def test_notes_of_tracing_are_told_with_those_of_the_configuration():
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 4)).eval()
    custom = CustomConfig(replacements={nn.MultiheadAttention: decomposed_attention})
    lowered = unwrap(quantize(model, [torch.randn(2, 3, 4)], custom=custom, progress=False))
    note, uncounted = lowered.certificate.notes
    assert uncounted.node == "_0" and "multiply-adds" in uncounted.text
    assert str(note) in str(lowered.certificate).splitlines()
    assert note.node == "0.self_attn" and "inside '0', a TransformerEncoderLayer" in note.text


def test_unknown_modules_and_wrong_regexes_stay_errors():
    mapping = QConfigMapping().set_module_name("layer2", None).set_module_name_regex("x{99999999999999}", None)
    mapping = mapping.set_module_name_regex("(" * 9000, None)
    found = problems(prepare(GRAPH, mapping).failure())
    assert [type(problem) for problem in found] == [UnknownName, BadConfig, BadConfig]


def test_notes_are_no_part_of_a_stage_s_meaning():
    mapping = CPU.qconfig_mapping
    noted = unwrap(prepare(GRAPH, mapping.set_object_type(nn.LSTM, None)))
    assert noted.notes
    assert noted == unwrap(prepare(GRAPH, mapping))


@given(model=models(max_nodes=6), data=st.data())
def test_an_entry_is_told_of_just_if_it_chooses_nothing(model, data):
    """Alone in a mapping, an entry with a note chooses for no node, one without for at least one."""
    mapping = data.draw(configurations(model.module))
    graph = unwrap(trace(model.module, model.example_inputs))
    mark = QConfig(MinMax(), MinMax(INT8_SYMMETRIC))
    alone = {f"object_types[{form!r}]": QConfigMapping(object_types=QConfigMapping().object_types.set(form, mark))
             for form in mapping.object_types}  # fmt: skip
    for text, _ in mapping.module_name_regexes:
        alone[f"module_name_regexes[{text!r}]"] = QConfigMapping().set_module_name_regex(text, mark)
    for name, form, index in mapping.module_name_object_type_orders:
        orders = QConfigMapping().module_name_object_type_orders.set((name, form, index), mark)
        alone[f"module_name_object_type_orders[{name!r}, {form!r}, {index}]"] = QConfigMapping(
            module_name_object_type_orders=orders
        )
    operators = {node.id for node in graph if node.kind not in ("placeholder", "get_attr", "output")}
    for entry, single in alone.items():
        chosen = {id for id, choice in resolve_qconfigs(single, graph).items() if choice is mark} & operators
        found = [note.node for note in unwrap(prepare(graph, single, backend=CPU)).notes]
        assert found == ([] if chosen else [entry])


def test_a_mapping_prints_as_a_table_and_in_full():
    mapping = (
        QConfigMapping()
        .set_global(QConfig(Histogram(), MinMax()))
        .set_object_type("relu", None)
        .set_module_name_regex("b.*", None)
        .set_module_name("a", None)
        .set_module_name_object_type_order("a", nn.Linear, 1, QConfig(MinMax(), MinMax()))
    )
    minmax, histogram = "MinMax uint8 0..255 per_tensor_affine", "Histogram uint8 0..255 per_tensor_affine"
    assert [re.split(" {2,}", line) for line in str(mapping).splitlines()] == [
        ["entry", "activation", "weight"],
        ["torch.nn.Linear no. 1 of module 'a'", minmax, minmax],
        ["module 'a'", "float", "float"],
        ["modules like 'b.*'", "float", "float"],
        ["type .relu", "float", "float"],
        ["everything else", histogram, minmax],
    ]
    assert str(mapping.global_qconfig) == f"activation: {histogram}; weight: {minmax}"
    for entry in ("global_qconfig", "'.relu': None", "'b.*': None", "'a': None", "('a', 'torch.nn.Linear', 1)"):
        assert entry in repr(mapping)
    assert repr(QConfigMapping().set_module_name(3, None).set_module_name("a", None))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_backend_prints_with_all_that_it_fuses_and_runs(backend):
    text = str(backend)
    lines = text.splitlines()
    assert lines[0] == backend.name
    words = " ".join(lines)
    assert all(fusion.name in words for fusion in backend.fusions)
    assert all(", ".join(row.kinds) in text for row in backend.operators)
    assert text.endswith(str(backend.qconfig_mapping))
    assert repr(backend.qconfig_mapping) in repr(backend)


@pytest.mark.parametrize("backend", ["fbgemm", "x86", "qnnpack", "onednn"])
def test_entries_of_default_configurations_are_meant_for_any_model(backend):
    graph = unwrap(trace(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()).eval(), torch.ones(1, 4)))
    for mapping in (get_default_qconfig_mapping(backend), get_default_qat_qconfig_mapping(backend)):
        assert not unwrap(prepare(graph, unwrap(mapping), backend=ONEDNN)).notes


def test_a_regular_expression_stands_once():
    twice = QConfigMapping(module_name_regexes=(("layer1", None), ("layer1", None)))
    found = problems(prepare(GRAPH, twice).failure())
    assert [(type(problem), problem.node) for problem in found] == [(BadConfig, "layer1")]


def test_what_may_be_meant_is_looked_for_for_the_first_entries_alone(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return get_close_matches(*args, **options)

    monkeypatch.setattr("qfunc.passes.unmatched.get_close_matches", counted)
    mapping = QConfigMapping()
    for index in range(40):
        mapping = mapping.set_object_type(f"method{index:02}", None).set_module_name_regex(f"block{index:02}", None)
        mapping = mapping.set_module_name_object_type_order("", f"method{index:02}", 0, None)
    found = notes(mapping)
    assert len(found) == 120
    assert len(calls) <= 30
    assert sum("there are" in note or "the closest there" in note for note in found) == 15
    assert "note: object_types['.method39'] matches no operator" in found


def test_unknown_names_beyond_the_first_are_told_without_a_guess(monkeypatch):
    calls = []

    def counted(*args, **options):
        calls.append(args)
        return get_close_matches(*args, **options)

    monkeypatch.setattr("qfunc.errors.model.get_close_matches", counted)
    mapping = QConfigMapping()
    for index in range(100):
        mapping = mapping.set_module_name(f"layer1.{index + 10}", None)
    error = prepare(GRAPH, mapping).failure()
    text = render(error)
    assert len(calls) <= 20
    assert text.count("did you mean") == 20
    assert text.count("fix: there are ") == 80
    assert all(f"'layer1.{index + 10}'" in text for index in range(100))
