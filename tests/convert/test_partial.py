"""A second mapping keeps parts of a calibrated stage float, as if it had been prepared so."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from qfunc import (
    CPU,
    X86,
    QConfig,
    QConfigMapping,
    calibrate,
    convert,
    fuse,
    layers,
    lower,
    materialize,
    prepare,
    reuse,
    trace,
    unwrap,
)
from qfunc.config.annotation import Annotations
from qfunc.config.point import Edge
from qfunc.config.qconfig_mapping import tables
from qfunc.errors import BadConfig, UnknownName, Unobserved, problems
from qfunc.numerics.observers import Histogram, MinMax, PerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC_PER_CHANNEL, UINT8
from qfunc.testing import oracle


class Net(nn.Module):
    """Convolutions, a residual sum, a pool and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
        self.pool, self.d, self.e = nn.MaxPool2d(2), nn.Linear(36, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = F.relu(self.a(x))
        y = self.pool(self.c(y + self.b(y)))
        return self.e(F.relu(self.d(torch.flatten(y, 1))))


WEIGHT = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
BATCHES = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
NAMES = "abcde"
each_backend = pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def calibrated_of(model, mapping=None, *, backend=CPU, equalize=None, batches=BATCHES):
    graph = unwrap(fuse(unwrap(trace(model, batches[0])), backend=backend))
    prepared = unwrap(prepare(graph, mapping, backend=backend, equalize=equalize))
    return unwrap(calibrate(prepared, batches, progress=False))


def without(mapping: QConfigMapping, *names: str) -> QConfigMapping:
    for name in names:
        mapping = mapping.set_module_name(name, None)
    return mapping


@each_backend
@pytest.mark.parametrize("equalize", [None, layers])
@pytest.mark.parametrize("names", [*NAMES, "ab", "de", "ace", "abcde"])
def test_it_is_what_preparing_so_gives(backend, equalize, names):
    model = net()
    calibrated = calibrated_of(model, backend=backend, equalize=equalize)
    second = without(backend.qconfig_mapping, *names)
    found = unwrap(convert(calibrated, qconfig_mapping=second))
    prepared = unwrap(prepare(calibrated.graph, second, backend=backend, equalize=equalize))
    expected = unwrap(reuse(prepared, calibrated.statistics).bind(convert))
    assert found == expected
    assert found != unwrap(convert(calibrated))
    kept = {
        node.origin.module for node in found.graph if node.id in found.floats and node.origin.type[:8] == "torch.nn"
    }
    assert set(names) <= kept
    assert unwrap(materialize(found))(BATCHES[0]).shape == (4, 3)


def test_the_same_mapping_changes_nothing():
    calibrated = calibrated_of(net())
    assert unwrap(convert(calibrated, qconfig_mapping=CPU.qconfig_mapping)) == unwrap(convert(calibrated))


def test_what_gains_nothing_any_more_is_float_too():
    calibrated = calibrated_of(net())
    found = unwrap(convert(calibrated, qconfig_mapping=without(CPU.qconfig_mapping, "d")).bind(lower))
    kinds = {entry.node: entry.kernel for entry in found.certificate.entries}
    assert not kinds["pool"]
    assert unwrap(convert(calibrated).bind(lower)).certificate.in_int8 > found.certificate.in_int8


def mapping_of_all_kinds() -> QConfigMapping:
    plain = QConfig(MinMax(UINT8), WEIGHT)
    return (
        QConfigMapping()
        .set_global(plain)
        .set_object_type(nn.Linear, plain)
        .set_selected(layers, None)
        .set_module_name_regex("a|b", plain)
        .set_module_name_regex("c", plain)
        .set_module_name("d", plain)
        .set_module_name_object_type_order("", nn.Conv2d, 0, plain)
        .set_node("e", plain)
        .set_output("relu", MinMax(UINT8))
        .set_edge(Edge("e", "input"), MinMax(UINT8))
    )


def test_every_kind_of_entry_may_become_none():
    first = mapping_of_all_kinds()
    calibrated = calibrated_of(net(), first)
    count = 0
    for name, table in tables(first):
        for key in table:
            changed = {
                "object_types": lambda m, k=key: m.set_object_type(nn.Linear, None),
                "selections": lambda m, k=key: m.set_selected(k, None),
                "module_name_regexes": lambda m, k=key: _with_regex(m, k),
                "module_names": lambda m, k=key: m.set_module_name(k, None),
                "module_name_object_type_orders": lambda m, k=key: m.set_module_name_object_type_order(
                    "", nn.Conv2d, 0, None
                ),
                "nodes": lambda m, k=key: m.set_node(k, None),
                "outputs": lambda m, k=key: m.set_output(k, None),
                "edges": lambda m, k=key: m.set_edge(k, None),
            }[name](first)
            found = convert(calibrated, qconfig_mapping=changed)
            prepared = unwrap(prepare(calibrated.graph, changed))
            expected = reuse(prepared, calibrated.statistics).bind(convert)
            assert type(found) is type(expected), (name, found, expected)
            assert found.value_or(None) == expected.value_or(None), name
            count += 1
    assert count == 9


def _with_regex(mapping, changed):
    kept = mapping.module_name_regexes
    made = QConfigMapping()
    for text, qconfig in kept:
        made = made.set_module_name_regex(text, None if text == changed else qconfig)
    return replace(mapping, module_name_regexes=made.module_name_regexes)


def test_all_that_is_more_than_none_is_told_at_once():
    first, other = mapping_of_all_kinds(), QConfig(Histogram(UINT8), WEIGHT)
    calibrated = calibrated_of(net(), first)
    second = (
        QConfigMapping()
        .set_global(other)
        .set_object_type(nn.Linear, None)
        .set_object_type(nn.Conv2d, other)
        .set_selected(layers, other)
        .set_module_name_regex("c", first.global_qconfig)
        .set_module_name_regex("a|b", first.global_qconfig)
        .set_module_name("b", None)
        .set_node("e", other)
        .set_output("relu", Histogram(UINT8))
    )
    found = {
        problem.node: problem.reason for problem in problems(convert(calibrated, qconfig_mapping=second).failure())
    }
    assert all(isinstance(p, BadConfig) for p in problems(convert(calibrated, qconfig_mapping=second).failure()))
    told = {node: reason.rpartition(" ")[2] for node, reason in found.items()}
    assert told == {
        "global_qconfig": "else",
        "object_types['torch.nn.Conv2d']": "it",
        "selections['layers']": "else",
        "module_names['d']": "not",
        "module_name_object_type_orders[('', 'torch.nn.Conv2d', 0)]": "not",
        f"edges[{Edge('e', 'input')!r}]": "not",
        "nodes['e']": "else",
        "outputs['relu']": "else",
        "module_name_regexes": "holds",
    }


def test_what_prepare_reports_is_reported():
    calibrated = calibrated_of(net())
    error = convert(calibrated, qconfig_mapping=without(CPU.qconfig_mapping, "none")).failure()
    assert isinstance(error, UnknownName)
    assert isinstance(convert(calibrated, qconfig_mapping="x86").failure(), BadConfig)


def test_what_no_statistics_tell_of_is_told():
    """The pool shares the range of what it reads, and is not measured; kept float, its result is a value of its own."""
    mapping = QConfigMapping().set_global(QConfig(MinMax(UINT8), WEIGHT))
    calibrated = calibrated_of(net(), mapping)
    found = problems(convert(calibrated, qconfig_mapping=mapping.set_object_type(nn.MaxPool2d, None)).failure())
    assert {type(problem) for problem in found} == {Unobserved}
    assert "calibrate that" in found[0].remedy


def test_a_stage_of_annotations_has_no_mapping():
    graph = unwrap(fuse(unwrap(trace(net(), BATCHES[0]))))
    prepared = unwrap(prepare(graph, Annotations()))
    error = convert(unwrap(calibrate(prepared, BATCHES, progress=False)), qconfig_mapping=QConfigMapping()).failure()
    assert isinstance(error, BadConfig)
    assert "reuse(" in error.remedy


def test_a_pickled_stage_can_be_converted_in_part():
    calibrated = calibrated_of(net(), equalize=layers)
    second = without(CPU.qconfig_mapping, "d")
    copied = pickle.loads(pickle.dumps(calibrated))
    assert (
        unwrap(convert(copied, qconfig_mapping=second)).graph.order
        == unwrap(convert(calibrated, qconfig_mapping=second)).graph.order
    )
    unpicklable = calibrated_of(net(), CPU.qconfig_mapping.set_selected(lambda graph: ["relu_1"], None))
    again = pickle.loads(pickle.dumps(unpicklable))
    assert unwrap(convert(again)).graph.order == unwrap(convert(unpicklable)).graph.order
    assert isinstance(convert(again, qconfig_mapping=second).failure(), BadConfig)


class Chain(nn.Module):
    """What torch.ao keeps float in part without errors of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)
        self.d, self.e = nn.Linear(144, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.e(self.d(torch.flatten(self.c(self.b(self.a(x))), 1)))


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
@pytest.mark.parametrize("names", [*NAMES, "ab", "ce", "bd", "abcde"])
def test_it_computes_what_torch_ao_does(names):
    from torch.ao.quantization import get_default_qconfig_mapping

    torch.manual_seed(0)
    model = Chain().eval()
    theirs = get_default_qconfig_mapping("x86")
    prepared = oracle.calibrate(oracle.prepare(model, (BATCHES[0],), theirs), [(batch,) for batch in BATCHES])
    for name in names:
        theirs.set_module_name(name, None)
    reference = oracle.reference(prepared, qconfig_mapping=theirs)
    converted = unwrap(convert(calibrated_of(model, backend=X86), qconfig_mapping=without(X86.qconfig_mapping, *names)))
    with torch.no_grad():
        expected, found = reference(BATCHES[0]), unwrap(materialize(converted))(BATCHES[0])
    counts = [sum("quantize_per_tensor" in str(node.target) for node in reference.graph.nodes),
              sum(node.kind == "quantize" for node in converted.graph)]  # fmt: skip
    assert counts[0] == counts[1]
    # Sums are rounded otherwise, and may fall to the other side of a step.
    assert torch.isclose(found, expected, rtol=0, atol=1e-5).float().mean() > 0.9
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()
