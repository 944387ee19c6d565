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
from qfunc.config.shapes import DOCUMENTS, OBSERVERS, OneOf, Record, Row, WithOrWithout
from qfunc.match import Anything, Constant, Pattern, Step
from qfunc.numerics.qparams import UINT8
from qfunc.testing import models
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
    result = to_json(mapping)
    if "2.5" in repr(mapping) or "nan" in repr(mapping):
        assert {type(p).__name__ for p in getattr(result.failure(), "errors", [result.failure()])} == {"BadConfig"}
    else:
        assert unwrap(from_json(unwrap(result))) == mapping


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
        operators=(OperatorConfig(("tanh",), Observation.BY_TENSORS, fixed=Sketch(inner=Sketch(depth=3))),),
    )
    assert again(backend, names) == backend


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
        case Record(_, fields) | Row(fields):
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
    found = [record for shape in (*DOCUMENTS.values(), *OBSERVERS.values()) for record in records(shape)]
    assert {BackendConfig, Step, Pattern, CustomFusion, OperatorConfig, QuantSpec} <= {record.type for record in found}
    for record in found:
        assert set(record.fields) == {field.name for field in dataclasses.fields(record.type)}, record.type


def test_the_text_is_of_this_form():
    mapping = QConfigMapping().set_object_type("relu", None).set_global(QConfig(MinMax(), MinMax()))
    spec = {"ch_axis": None, "dtype": "uint8", "eps": 2.0**-23, "qscheme": "per_tensor_affine"}
    observer = {"observer": "MinMax", "spec": {**spec, "quant_max": 255, "quant_min": 0}}
    document = {
        "global_qconfig": {"activation": observer, "input_activation": None, "weight": observer},
        "module_name_object_type_orders": [],
        "module_name_regexes": [],
        "module_names": {},
        "object_types": {".relu": None},
        "qfunc": "QConfigMapping",
        "version": 1,
    }
    assert unwrap(to_json(mapping)) == json.dumps(document, indent=1)


def test_the_text_does_not_depend_on_the_hash_seed():
    code = "import qfunc, hashlib; print(hashlib.sha256(qfunc.to_json(qfunc.ONEDNN).unwrap().encode()).hexdigest())"
    texts = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
        texts.add(done.stdout)
    assert len(texts) == 1
