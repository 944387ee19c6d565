"""A configuration read back from its document is the configuration, and the document says all of it."""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyrsistent import pmap
from torch import nn

from qfunc import (
    CPU,
    CustomFusion,
    FixedQParams,
    Histogram,
    MatchAllNode,
    MinMax,
    MovingAverageMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    from_json,
    fuse,
    prepare,
    render,
    to_json,
    trace,
    unwrap,
)
from qfunc.config.backend_config import BackendConfig, Observation, OperatorConfig
from qfunc.config.dtype_config import DTypeConfig, DTypeWithConstraints
from qfunc.config.point import Edge
from qfunc.config.selectors import SELECTORS
from qfunc.config.shapes import DOCUMENTS, OBSERVERS, QUANTIZATIONS, OneOf, Record, Row, Rows, WithOrWithout
from qfunc.match import Anything, Constant, Pattern, Step
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.qparams import INT8_SYMMETRIC, UINT8
from qfunc.numerics.unmeasured import UNMEASURED, Cast, Dynamic, KeepFloat, ReuseInput
from qfunc.testing import models
from qfunc.testing.quantizations import WRONG_SELECTORS
from qfunc.testing.strategies import BACKENDS, configurations, qconfigs
from tests.zoo import ZOO

ROOT = Path(__file__).resolve().parents[2]


INNER = MinMax()


@dataclass(frozen=True)
class Sketch:
    """An observer of the user's, with a field of each plain type."""

    spec: QuantSpec = UINT8
    rate: float = 0.5
    words: tuple[str, ...] = ("a", "b")
    depth: int | None = None
    inner: Any = INNER
    flag: bool = True

    statistic = "sketch"

    def init(self):
        return self.inner.init()

    def update(self, state, tensor):
        return self.inner.update(state, tensor)

    def finish(self, state):
        return self.inner.finish(state)


def fused_pair(is_qat, *modules):
    return nn.Sequential(*modules)


class Getters:
    def root(self, pattern):
        return pattern[-1]


def extra(pattern):
    return []


NAMES = {"mine.Sketch": Sketch, "mine.fused_pair": fused_pair, "mine.extra": extra}


def again(value, names=NAMES):
    return unwrap(from_json(unwrap(to_json(value, names=names)), names=names))


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_every_backend_and_every_mapping_comes_back(backend):
    assert again(backend) == backend
    assert again(backend.qconfig_mapping) == backend.qconfig_mapping
    assert again(backend.qconfig_mapping.global_qconfig) == backend.qconfig_mapping.global_qconfig


@pytest.mark.parametrize("case", ZOO[:6], ids=lambda case: case.name)
def test_what_came_back_prepares_the_same(case):
    model, inputs = case.build()
    graph = unwrap(trace(model, inputs))
    for backend in BACKENDS[:3]:
        first, second = (unwrap(fuse(graph, backend=each)) for each in (backend, again(backend)))
        assert first == second
        assert unwrap(prepare(first, backend=backend)) == unwrap(prepare(second, backend=again(backend)))


@given(model=models(max_nodes=5), data=st.data())
def test_random_configurations_come_back_and_prepare_the_same(model, data):
    mapping = data.draw(configurations(model.module))
    text = unwrap(to_json(mapping))
    assert unwrap(from_json(text)) == mapping
    assert unwrap(to_json(unwrap(from_json(text)))) == text
    graph = unwrap(trace(model.module, model.example_inputs))
    assert prepare(graph, mapping) == prepare(graph, unwrap(from_json(text)))


@given(model=models(max_nodes=3), data=st.data())
def test_impossible_configurations_come_back_or_are_refused(model, data):
    mapping = data.draw(configurations(model.module, invalid=True))
    result = to_json(mapping, names=WRONG_SELECTORS)
    if "2.5" in repr(mapping) or "nan" in repr(mapping):
        assert {type(p).__name__ for p in getattr(result.failure(), "errors", [result.failure()])} == {"BadConfig"}
    else:
        assert unwrap(from_json(unwrap(result), names=WRONG_SELECTORS)) == mapping


finite = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**63), 2**63 - 1)
specs = st.builds(QuantSpec, st.text(), integers, integers, st.text(), st.none() | integers, finite)


@given(spec=specs, number=finite, integer=integers)
def test_all_numbers_and_strings_come_back_bit_for_bit(spec, number, integer):
    for observer in (FixedQParams(spec, number, integer), MovingAverageMinMax(spec, number), Histogram(spec, integer)):
        found = again(QConfig(observer, Sketch(spec, number, depth=integer)))
        assert found == QConfig(observer, Sketch(spec, number, depth=integer))
        assert repr(found) == repr(QConfig(observer, Sketch(spec, number, depth=integer)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 2**63, True, "1", None, 1j, [1]])
def test_what_is_no_number_of_json_is_refused(number):
    error = to_json(QConfig(FixedQParams(UINT8, number, 0), MinMax())).failure()
    assert error.node == "activation.scale"
    assert "a finite float" in error.reason


@given(qconfig=qconfigs())
def test_entries_of_every_strength_come_back(qconfig):
    mapping = (
        QConfigMapping()
        .set_object_type(nn.Linear, qconfig)
        .set_object_type("relu", None)
        .set_module_name_regex("b.*", qconfig)
        .set_module_name_regex("a.*", None)
        .set_module_name("a.b", qconfig)
        .set_module_name_object_type_order("a", nn.Linear, 10, None)
        .set_module_name_object_type_order("a", nn.Linear, 9, qconfig)
    )
    assert again(mapping) == mapping
    assert [text for text, _ in again(mapping).module_name_regexes] == ["b.*", "a.*"]


def test_a_user_s_own_classes_and_functions_come_back_by_name():
    tree = (nn.ReLU, (operator.add, (nn.BatchNorm2d, nn.Conv2d), MatchAllNode))
    getters = Getters()
    names = {**NAMES, "mine.root": getters.root}
    backend = replace(
        CPU,
        fusions=(
            CustomFusion(fused_pair, pattern=(nn.Conv2d, nn.Sigmoid)),
            CustomFusion(fused_pair, (), tree, getters.root, extra),
            CustomFusion(fused_pair, complex_pattern=(getattr, "shape")),
            CustomFusion(fused_pair, complex_pattern=("clamp", nn.Conv2d, 0, 2.5, None, True)),
            Pattern("odd", (Step(("add",), sides=((1, Anything()), (2, Constant((1, None, 2.0))))),), trains=False),
            Pattern("side", (Step(("add",), frozenset({"b", "a"}), (), ((0, (Step(("relu",)),)),), 2, repeats=True),)),
        ),
        operators=(OperatorConfig(("tanh",), Observation.OWN, fixed=Sketch(inner=Sketch(depth=3))),),
    )
    assert again(backend, names) == backend


WAYS = (
    *(Dynamic(), Dynamic(INT8_SYMMETRIC), Cast(), Cast("bfloat16", dynamic=True), KeepFloat(), ReuseInput()),
    *(FakeQuantize(MovingAverageMinMax()), FakeQuantize(FakeQuantize(FixedQParams(UINT8, 0.5, 3)))),
    *(FakeQuantize(Sketch(inner=FakeQuantize(Histogram()))), Sketch(inner=KeepFloat())),
)


@pytest.mark.parametrize("way", WAYS, ids=repr)
def test_every_way_to_quantize_comes_back_wherever_it_may_stand(way):
    mapping = (
        QConfigMapping()
        .set_global(QConfig(way, way, way))
        .set_object_type(nn.Linear, QConfig(way, MinMax()))
        .set_node("y", QConfig(MinMax(), way))
        .set_output("y", way)
        .set_edge(Edge("y", "input", 2), way)
    )
    assert again(mapping) == mapping
    assert repr(again(mapping)) == repr(mapping)


def test_what_measures_nothing_has_the_name_of_its_class():
    document = json.loads(unwrap(to_json(QConfig(Cast("bfloat16"), FakeQuantize(MinMax()), KeepFloat()))))
    spec = document["weight"]["observer"].pop("spec")
    assert document == {
        "qfunc": "QConfig",
        "version": 1,
        "activation": {"quantization": "Cast", "dtype": "bfloat16", "dynamic": False},
        "input_activation": {"quantization": "KeepFloat"},
        "weight": {
            "quantization": "FakeQuantize",
            "observer": {"observer": "MinMax"},
            "learned": False,
            "scale_gradient": True,
            "fused": False,
        },
    }
    assert spec["dtype"] == "uint8"


def test_every_union_of_ways_to_quantize_is_covered():
    assert {record.type for record in QUANTIZATIONS.values()} == {*UNMEASURED, FakeQuantize}


def every_other(graph):
    return graph.order[::2]


@dataclass(frozen=True)
class OfKind:
    """A selector with a field."""

    kind: str

    def __call__(self, graph):
        return [node.id for node in graph if node.kind == self.kind]


def test_selectors_come_back_by_their_own_names_or_by_registered_ones():
    names = {"mine.every_other": every_other, "mine.relus": OfKind("relu"), "mine.adds": OfKind("add")}
    qconfig = QConfig(MinMax(), MinMax())
    mapping = QConfigMapping()
    for selector in (*SELECTORS.values(), every_other, OfKind("add"), OfKind("relu")):
        mapping = mapping.set_selected(selector, qconfig)
    mapping = mapping.set_selected(OfKind("relu"), None)
    assert again(mapping, names) == mapping
    document = json.loads(unwrap(to_json(mapping, names=names)))
    assert sorted(document["selections"]) == sorted([*SELECTORS, *names])
    assert document["selections"]["mine.relus"] is None


def test_selectors_without_a_name_are_told_of():
    mapping = QConfigMapping().set_selected(every_other, None).set_selected(OfKind("add"), None)
    found = sorted(problem.reason for problem in to_json(mapping).failure().errors)
    assert found == ["the selector OfKind has no registered name", "the selector every_other has no registered name"]
    error = from_json(
        unwrap(to_json(mapping.set_selected(OfKind("add"), None), names={"a": every_other, "b": OfKind("add")}))
    )
    assert {problem.reason for problem in error.failure().errors} == {
        "there is no selector 'a'",
        "there is no selector 'b'",
    }


@given(data=st.data())
def test_entries_of_nodes_values_and_uses_come_back(data):
    way, text, index = st.sampled_from(WAYS), st.text(), st.integers(-(2**63), 2**63 - 1)
    mapping = QConfigMapping(
        nodes=pmap(data.draw(st.dictionaries(text, st.none() | st.builds(QConfig, way, way), max_size=3))),
        outputs=pmap(data.draw(st.dictionaries(text, way, max_size=3))),
        edges=pmap(data.draw(st.dictionaries(st.builds(Edge, text, text, index), way, max_size=4))),
    )
    assert again(mapping) == mapping
    backwards = (dict(list(table.items())[::-1]) for table in (mapping.nodes, mapping.outputs, mapping.edges))
    reset = QConfigMapping(**{name: pmap(t) for name, t in zip(("nodes", "outputs", "edges"), backwards, strict=True)})
    assert to_json(reset, names=NAMES) == to_json(mapping, names=NAMES)


BOUNDS = st.builds(
    DTypeWithConstraints, st.text(max_size=3), *[st.none() | st.integers(-9, 300)] * 2,
    *[st.none() | st.floats(0, 2)] * 3, st.none() | st.integers(0, 9),
)  # fmt: skip
DTYPES = st.none() | st.sampled_from(["uint8", "float16"]) | BOUNDS


@given(
    row=st.builds(
        OperatorConfig,
        st.tuples(st.text()),
        st.sampled_from(Observation),
        st.lists(st.builds(DTypeConfig, DTYPES, DTYPES, DTYPES, DTYPES, st.booleans()), max_size=3).map(tuple),
        by_tensor_count=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(Observation)), max_size=2).map(tuple),
        inputs=st.none() | st.tuples(st.text()) | st.just(()),
        weight=st.none() | st.text(),
        bias=st.none() | st.text(),
    )
)
def test_rows_of_backends_come_back(row):
    backend = replace(CPU, operators=(row,))
    assert again(backend) == backend


def test_what_has_no_name_is_told_with_the_way_to_register_it():
    backend = replace(CPU, fusions=(CustomFusion(lambda is_qat, *parts: parts[0], (Getters, nn.ReLU)),))
    backend = replace(backend, qconfig_mapping=QConfigMapping().set_module_name("a", QConfig(Sketch(), MinMax())))
    assert render(to_json(backend).failure()).splitlines() == [
        "BadConfig at fusions[0].fuser",
        "  why: the function lambda has no registered name",
        "  fix: give it one, here and in from_json: names={'mine.lambda': lambda}",
        "BadConfig at fusions[0].pattern[0]",
        "  why: the operator Getters has no registered name",
        "  fix: give it one, here and in from_json: names={'mine.Getters': Getters}",
        "BadConfig at qconfig_mapping.module_names['a'].activation",
        "  why: the observer Sketch has no registered name",
        "  fix: give it one, here and in from_json: names={'mine.Sketch': Sketch}",
    ]
    text = unwrap(to_json(QConfig(Sketch(), MinMax()), names=NAMES))
    error = from_json(text).failure()
    assert (error.node, error.reason) == ("activation.observer", "there is no observer 'mine.Sketch'")
    assert "names={'mine.Sketch': ...}" in error.remedy


@pytest.mark.parametrize(
    ("value", "names", "node"),
    [
        (3, {}, "configuration"),
        (QConfigMapping, {}, "configuration"),
        (QConfig(MinMax, MinMax()), {}, "activation"),
        (QConfig(MinMax(3), MinMax()), {}, "activation.spec"),
        (QConfig(MinMax(), Sketch(words=["a"])), NAMES, "weight.words"),
        (QConfig(MinMax(), Sketch(inner=object())), NAMES, "weight.inner"),
        (QConfigMapping(global_qconfig=3), {}, "global_qconfig"),
        (QConfigMapping().set_module_name(3, None), {}, "module_names"),
        (replace(CPU, operators=[]), {}, "operators"),
        (replace(CPU, fusions=(3,)), {}, "fusions[0]"),
        (QConfig(MinMax(), MinMax()), {"MinMax": Sketch}, "names['MinMax']"),
        (QConfig(MinMax(), MinMax()), {"torch.nn.ReLU": Sketch}, "names['torch.nn.ReLU']"),
        (QConfig(MinMax(), MinMax()), {"": Sketch}, "names"),
        (QConfig(MinMax(), MinMax()), {"a": 3}, "names['a']"),
        (QConfig(MinMax(), MinMax()), 3, "names"),
    ],
)
def test_what_cannot_be_written_is_told_with_its_place(value, names, node):
    assert to_json(value, names=names).failure().node == node


def test_a_pattern_that_nests_without_end_is_refused():
    steps: tuple[Step, ...] = (Step(("relu",)),)
    for _ in range(2000):
        steps = (Step(("add",), sides=((1, steps),)),)
    error = to_json(replace(CPU, fusions=(Pattern("deep", steps),))).failure()
    assert "nests deeper" in error.reason


def records(shape: Any) -> Any:
    """All records that a shape holds, those of late shapes apart."""
    match shape:
        case Record(_, fields) | Row(fields) | Rows(fields):
            yield from ([shape] if isinstance(shape, Record) else [])
            for part in fields.values():
                yield from records(part)
        case OneOf(cases):
            for _, part in cases.values():
                yield from records(part)
        case WithOrWithout(_, first, second):
            yield from (*records(first), *records(second))
        case _ if hasattr(shape, "of"):
            yield from records(shape.of)


def test_no_field_of_a_configuration_is_left_out():
    shapes = (*DOCUMENTS.values(), *OBSERVERS.values(), *QUANTIZATIONS.values())
    found = [record for shape in shapes for record in records(shape)]
    known = {BackendConfig, Step, Pattern, CustomFusion, OperatorConfig, DTypeConfig, DTypeWithConstraints, QuantSpec}
    assert known <= {record.type for record in found}
    for record in found:
        assert set(record.fields) == {field.name for field in dataclasses.fields(record.type)}, record.type


def test_the_text_is_of_this_form():
    mapping = QConfigMapping().set_object_type("relu", None).set_global(QConfig(MinMax(), MinMax()))
    spec = {"ch_axis": None, "dtype": "uint8", "eps": 2.0**-23, "qscheme": "per_tensor_affine"}
    observer = {"observer": "MinMax", "spec": {**spec, "quant_max": 255, "quant_min": 0}}
    document = {
        "edges": [],
        "global_qconfig": {"activation": observer, "input_activation": None, "weight": observer},
        "module_name_object_type_orders": [],
        "module_name_regexes": [],
        "module_names": {},
        "nodes": {},
        "object_types": {".relu": None},
        "outputs": {},
        "qfunc": "QConfigMapping",
        "selections": {},
        "version": 1,
    }
    assert unwrap(to_json(mapping)) == json.dumps(document, indent=1)


def test_the_text_does_not_depend_on_the_hash_seed():
    code = """
import hashlib, qfunc
from qfunc.config.point import Edge
from qfunc.config.selectors import SELECTORS
mapping = qfunc.ONEDNN.qconfig_mapping
for number in range(20):
    mapping = mapping.set_node(f"n{number}", None).set_output(f"n{number}", None)
    mapping = mapping.set_edge(Edge(f"n{number}", "input"), None)
for selector in SELECTORS.values():
    mapping = mapping.set_selected(selector, None)
for value in (qfunc.ONEDNN, mapping):
    print(hashlib.sha256(qfunc.to_json(value).unwrap().encode()).hexdigest())
"""
    texts = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
        texts.add(done.stdout)
    assert len(texts) == 1
