"""Whatever text `from_json` is given, it answers with a configuration or a typed error, and runs nothing of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from returns.result import Failure, Success
from torch import nn

from qfunc import (
    CPU,
    EXECUTORCH,
    X86,
    MinMax,
    QConfig,
    QConfigMapping,
    from_json,
    fuse,
    prepare,
    render,
    to_json,
    trace,
    unwrap,
)
from qfunc.config.backend_config import Observation, OperatorConfig
from qfunc.config.dtype_config import DTypeConfig, DTypeWithConstraints
from qfunc.config.point import Edge
from qfunc.config.reading import LONGEST, MOST_PROBLEMS
from qfunc.config.selectors import first_layer
from qfunc.errors import BadConfig, UserFunctionFailed, problems
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.qparams import UINT8, QuantSpec
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat


@dataclass(frozen=True)
class Strict:
    """An observer of the user's that takes not every number."""

    spec: QuantSpec = UINT8
    rate: float = 0.5

    def __post_init__(self):
        if self.rate > 1:
            raise ValueError("rate is at most 1")


def keep(is_qat, *modules):
    return nn.Sequential(*modules)


class Unhashable:
    """A selector that cannot be a key."""

    __hash__ = None

    def __call__(self, graph):
        return graph.order


def nothing(graph):
    return ()


NAMES = {
    "mine.Strict": Strict,
    "mine.keep": keep,
    "mine.nothing": nothing,
    "mine.again": nothing,
    "mine.unhashable": Unhashable(),
}

MAPPING = (
    QConfigMapping()
    .set_global(QConfig(MinMax(), MinMax()))
    .set_object_type(nn.Linear, CPU.qconfig_mapping.global_qconfig)
    .set_module_name_regex(".*", None)
    .set_module_name_object_type_order("", nn.ReLU, 0, QConfig(MinMax(), Strict()))
    .set_selected(first_layer, QConfig(Dynamic(), MinMax(), Cast(dynamic=True)))
    .set_selected(nothing, None)
    .set_node("_1", QConfig(KeepFloat(), Cast("bfloat16")))
    .set_output("_0", FakeQuantize(MinMax()))
    .set_edge(Edge("_1", "input"), None)
)
CONSTRAINED = DTypeConfig(DTypeWithConstraints("int8", -127, scale_min_lower_bound=2.0**-12), None, "int8")
FUSION = {"fuser": "mine.keep", "complex_pattern": ["torch.nn.ReLU", ["operator.add", "MatchAllNode", ".relu", 3]]}
SIDES = {"name": "x", "steps": [{"sides": [{"position": 1, "side": {"constant": {"value": [1, None]}}}]}] * 2}


def documents() -> list[Any]:
    found = [json.loads(unwrap(to_json(each, names=NAMES))) for each in (MAPPING, EXECUTORCH, X86)]
    found[1]["fusions"] = [*found[1]["fusions"][:2], FUSION, SIDES]
    backend = replace(CPU, operators=(OperatorConfig(("linear",), Observation.OWN, (CONSTRAINED,), weight="weight"),))
    found[1]["operators"] += json.loads(unwrap(to_json(backend)))["operators"]
    found[2]["fusions"], found[2]["operators"] = found[2]["fusions"][-2:], found[2]["operators"][-3:]
    return found


DOCUMENTS = documents()
GRAPH = unwrap(trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(1, 3, 4, 4)))
ODD = st.sampled_from(
    [
        None,
        True,
        0,
        -1,
        3,
        2.5,
        2**70,
        -(10**400),
        1e300,
        "",
        "x",
        "#x",
        "#1",
        ".relu",
        "MinMax",
        "os.system",
        "mine.keep",
        "mine.unhashable",
        "first_layer",
        "Cast",
        "post.0",
        "post.x.other",
        "_1",
    ]
)
values = st.recursive(
    ODD, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document, from the root."""
    yield at
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


def mutated(value: Any, at: tuple[Any, ...], change: Any) -> Any:
    """The document with the part at a place changed; `change` gives the new parts of what holds it."""
    if not at:
        return change
    head, *rest = at
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[head] = mutated(value[head], tuple(rest), change)
    return copy


def check(text: str) -> Any:
    """Read a text; what is an error must be told whole, and what is none must not make `fuse` or `prepare` raise."""
    result = from_json(text, names=NAMES)
    match result:
        case Failure(error):
            assert 0 < len(problems(error)) <= MOST_PROBLEMS
            for problem in problems(error):
                assert isinstance(problem, BadConfig | UserFunctionFailed)
                assert problem.node and problem.reason and problem.remedy
            assert len(render(error)) < 100_000
        case Success(value):
            assert unwrap(from_json(unwrap(to_json(value, names=NAMES)), names=NAMES)) == value
            mapping = value if isinstance(value, QConfigMapping) else None
            backend = CPU if isinstance(value, QConfigMapping | QConfig) else value
            for stage in (fuse(GRAPH, backend=backend), prepare(GRAPH, mapping, backend=backend)):
                assert isinstance(stage, Success | Failure)
            assert str(value) and repr(value)
    return result


@given(data=st.data())
def test_a_changed_document_is_a_configuration_or_an_error(data):
    document = data.draw(st.sampled_from(DOCUMENTS))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.sampled_from(list(places(document))))
        document = mutated(document, at, data.draw(values))
    check(json.dumps(document))


@given(data=st.data())
def test_a_changed_text_is_a_configuration_or_an_error(data):
    text = json.dumps(data.draw(st.sampled_from(DOCUMENTS)))
    start = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 20))
    check(
        text[:start]
        + data.draw(st.text(st.sampled_from('{}[]",:0123456789eE.-+truefalsn\\u "\n')))
        + text[start + length :]
    )


@given(text=st.text())
def test_any_text_is_an_error(text):
    assert isinstance(check(text), Failure)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["qfunc"] + document.get("name", ""))
def test_every_field_is_checked_for_its_name_and_type(document):
    assert isinstance(from_json(json.dumps(document), names=NAMES), Success)
    for at in [at for at in places(document) if at and isinstance(at[-1], str)]:
        wrong = mutated(document, at, {"no such field": 1})
        error = from_json(json.dumps(wrong), names=NAMES).failure()
        assert all(isinstance(problem, BadConfig) for problem in problems(error))
        last = at[-1] if at[-1].isidentifier() else repr(at[-1])
        assert any(last in problem.node for problem in problems(error)), at


HEAD = '"qfunc": "QConfigMapping", "version": 1'
OBSERVER = '{"observer": "MinMax"}'
EDGE = '{"user": "_1", "slot": "input", "index": 0, "quantization": {"quantization": "KeepFloat"}}'
ORDER = '{"module_name": "", "object_type": "a", "index": 0, "qconfig": null}'


def weight(observer: str) -> str:
    """A mapping whose weights have this observer."""
    return f'{{{HEAD}, "global_qconfig": {{"activation": {OBSERVER}, "weight": {observer}}}}}'


@pytest.mark.parametrize(
    ("text", "node", "words"),
    [
        ("", "line 1, column 1", "no JSON"),
        ('{"qfunc": 1,\n "version"}', "line 2, column 11", "no JSON"),
        ("\ufeff{}", "line 1, column 1", "no JSON"),
        ('"' + '\\"' * 10**6, "line 1, column 1", "no JSON"),
        ("[1]", "document", "no object"),
        ('"x"', "document", "no object"),
        ("NaN", "document", "no object"),
        ('{"version": 1}', "qfunc", "missing"),
        ('{"qfunc": "os.system", "version": 1}', "qfunc", "no document of 'os.system'"),
        ('{"qfunc": ["QConfig"], "version": 1}', "qfunc", "no document"),
        ('{"qfunc": "QConfig", "qfunc": "QConfig", "version": 1}', "qfunc", "twice"),
        ('{"qfunc": "QConfigMapping", "version": 2}', "version", "it is 2, and only 1 can be read"),
        ('{"qfunc": "QConfigMapping", "version": true}', "version", "it is true"),
        ('{"qfunc": "QConfigMapping", "version": "1"}', "version", "'1'"),
        ('{"qfunc": "QConfigMapping", "version": 1.0}', "version", "1.0"),
        ('{"qfunc": "QConfigMapping"}', "version", "missing"),
        (f'{{{HEAD}, "global": null}}', "global", "no field 'global'"),
        (f'{{{HEAD}, "module_names": {{"a": null, "a": null}}}}', "module_names['a']", "twice"),
        (f'{{{HEAD}, "module_names": {{"a": 3}}}}', "module_names['a']", "expected an object, got 3"),
        (f'{{{HEAD}, "module_names": []}}', "module_names", "expected an object, got an array"),
        (f'{{{HEAD}, "global_qconfig": {{"activation": {OBSERVER}}}}}', "global_qconfig.weight", "missing"),
        (weight('{"observer": "os.system"}'),
         "global_qconfig.weight.observer", "there is no observer 'os.system'"),
        (weight('{"observer": "Cast"}'),
         "global_qconfig.weight.observer", "Cast observes nothing itself"),
        (weight('{"quantization": "MinMax"}'),
         "global_qconfig.weight.quantization", "'KeepFloat' or 'ReuseInput', got 'MinMax'"),
        (weight('{"quantization": ["Cast"]}'),
         "global_qconfig.weight.quantization", "got an array"),
        (weight('{"quantization": "Cast", "quantization": "Cast"}'),
         "global_qconfig.weight.quantization", "no field 'quantization'"),
        (weight('{"quantization": "Cast", "bits": 8}'),
         "global_qconfig.weight.bits", "no field 'bits'"),
        (weight('{"quantization": "FakeQuantize", "observer": "MinMax"}'),
         "global_qconfig.weight.observer", "expected an object"),
        (f'{{{HEAD}, "selections": {{"os.getcwd": null}}}}',
         "selections['os.getcwd']", "there is no selector 'os.getcwd'"),
        (f'{{{HEAD}, "selections": {{"mine.nothing": null, "mine.again": null}}}}',
         "selections['mine.again']", "names the same"),
        (f'{{{HEAD}, "selections": {{"mine.unhashable": null}}}}',
         "selections['mine.unhashable']", "not hashable"),
        (f'{{{HEAD}, "selections": []}}', "selections", "expected an object"),
        (f'{{{HEAD}, "outputs": {{"x": null}}}}', "outputs['x']", "expected an object"),
        (f'{{{HEAD}, "edges": [{EDGE}, {EDGE}]}}', "edges[1]", "names the same"),
        (f'{{{HEAD}, "edges": [{EDGE.replace("0", "0.5")}]}}', "edges[0].index", "expected an integer, got 0.5"),
        (weight('{"observer": "mine.keep"}'),
         "global_qconfig.weight.observer", "no class of an observer"),
        (weight('{"observer": "mine.Strict", "rate": 2}'),
         "global_qconfig.weight", "mine.Strict raised ValueError: rate is at most 1"),
        (weight('{"observer": "mine.Strict", "rate": "2"}'),
         "global_qconfig.weight.rate", "expected a number, got '2'"),
        (weight('{"observer": "MinMax", "spec": {"eps": 1e999}}'),
         "global_qconfig.weight.spec.eps", "not finite"),
        (weight('{"observer": "MinMax", "spec": {"quant_max": N}}'.replace("N", "1" * 5000)),
         "global_qconfig.weight.spec.quant_max", "too large"),
        (f'{{{HEAD}, "module_name_object_type_orders": [{ORDER}, {ORDER}]}}',
         "module_name_object_type_orders[1]", "names the same"),
        ("[" * 10**6, "document", "nests deeper"),
        ('{"a":' * 10**5, "document", "nests deeper"),
        (" " * (LONGEST + 1), "document", "characters"),
        (3, "text", "expected a str, got a int"),
        (b"{}", "text", "expected a str, got a bytes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_with_its_place(text, node, words):
    error = from_json(text, names=NAMES).failure()
    assert (error.node, words in error.reason) == (node, True), error


def test_all_errors_are_told_at_once_but_not_without_end():
    wrong = json.dumps({"qfunc": "QConfigMapping", "version": 1, "module_names": {"a": 1, "b": 2}, "x": 3})
    assert [p.node for p in problems(from_json(wrong).failure())] == ["x", "module_names['a']", "module_names['b']"]
    many = {"qfunc": "QConfigMapping", "version": 1, **{f"field{i}": i for i in range(100_000)}}
    assert len(problems(from_json(json.dumps(many)).failure())) == MOST_PROBLEMS


def test_nothing_that_a_document_names_is_imported():
    assert "antigravity" not in sys.modules
    for name in ("antigravity", "antigravity.fly", "builtins.eval", "torch.ao.quantization.MinMaxObserver"):
        fusion = {"fuser": name, "pattern": [name, name]}
        document = {"qfunc": "BackendConfig", "version": 1, "name": name, "fusions": [fusion], "operators": []}
        mapping = {"global_qconfig": {"activation": {"observer": name}, "weight": {"observer": name}}}
        error = from_json(json.dumps({**document, "qconfig_mapping": mapping}), names=NAMES).failure()
        assert len(problems(error)) == 5
    assert "antigravity" not in sys.modules
