"""Annotations: what a configuration says as data, which quantizers of the user's add to, and which become sites."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyrsistent import pmap
from returns.result import Failure
from torch import Tensor, nn

from qfunc import (
    CPU,
    QNNPACK,
    X86,
    FixedQParams,
    Histogram,
    MinMax,
    MovingAverageMinMax,
    PerChannelMinMax,
    QConfig,
    QConfigMapping,
    QuantSpec,
    annotate,
    calibrate,
    combine,
    convert,
    describe,
    from_json,
    fuse,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
    lower,
    materialize,
    prepare,
    to_json,
    trace,
    unwrap,
)
from qfunc.config.annotation import Annotations, Derived, SharedWith, Unshared
from qfunc.config.point import Edge
from qfunc.errors import BadConfig, Problem, UnknownName, UnsupportedDType, WrongStage, problems
from qfunc.numerics.fake_quantize import FakeQuantize, is_fixed
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8, UINT8_REDUCED
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, ReuseInput
from qfunc.testing import cases, sqnr, walk
from tests.zoo import ZOO

ROOT = Path(__file__).resolve().parents[1]
X = torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two branches, a sum of them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.head = (nn.Conv2d(4, 4, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(torch.cat([self.left(x), self.right(x)], 0)))


def fused():
    return unwrap(fuse(unwrap(trace(Net().eval(), X))))


def qparams_of(prepared, x=X):
    calibrated = unwrap(calibrate(prepared, [x], progress=False))
    return {id: site.observer.finish(calibrated.statistics.state(site.folds)) for id, site in prepared.sites.items()}


@pytest.mark.parametrize("backend", [CPU, X86], ids=lambda backend: backend.name)
@pytest.mark.parametrize("case", ZOO, ids=lambda case: case.name)
def test_a_mapping_and_its_annotations_prepare_alike(case, backend):
    model, inputs = case.build()
    graph = unwrap(fuse(unwrap(trace(model, inputs)), backend=backend))
    annotations = unwrap(annotate(graph, backend=backend))
    assert unwrap(prepare(graph, annotations, backend=backend)) == unwrap(prepare(graph, backend=backend))
    assert unwrap(combine(annotations, Annotations())) == annotations == unwrap(combine(annotations, annotations))


@settings(deadline=None)
@given(data=st.data(), case=cases(configured=True))
def test_any_part_may_be_kept_float(data, case):
    way = walk(case)
    if way.prepared is None:
        return
    graph = way.prepared.graph
    annotations = unwrap(annotate(graph, case.qconfig_mapping, backend=case.backend))
    for id in data.draw(st.lists(st.sampled_from(graph.order), max_size=3)):
        annotations = annotations.keep_float(id, "as the test has it")
        assert annotations.floats[id] == "as the test has it"
    prepared = unwrap(prepare(graph, annotations, backend=case.backend))
    result = calibrate(prepared, case.batches, progress=False).bind(convert)
    for converted in [unwrap(result)] if way.converted is not None else []:
        lowered = unwrap(lower(converted, engine=case.engine))
        unwrap(materialize(lowered))(*case.inputs)


def test_one_node_can_be_kept_float():
    graph = fused()
    annotations = unwrap(annotate(graph)).keep_float("left")
    result = prepare(graph, annotations).bind(lambda prepared: calibrate(prepared, [X], progress=False))
    lowered = unwrap(result.bind(convert).bind(lower))
    entries = {entry.node: (bool(entry.kernel), entry.reason) for entry in lowered.certificate.entries}
    assert entries["left"] == (False, "the annotations keep it float")
    assert entries["right"] == (True, "")


def test_a_use_with_a_spec_of_its_own_quantizes_the_value_anew():
    graph = fused()
    coarse = MinMax(QuantSpec(quant_max=15))
    annotations = unwrap(annotate(graph, CPU.qconfig_mapping))
    own = Annotations(
        annotations.inputs.set(Edge("right", "input"), coarse),
        annotations.outputs,
        annotations.weights,
        annotations.groups,
        annotations.taps,
    )
    prepared = unwrap(prepare(graph, own))
    assert prepared.inputs[Edge("left", "input")] != prepared.inputs[Edge("right", "input")]
    found = qparams_of(prepared)
    assert found[prepared.inputs[Edge("right", "input")]].spec.quant_max == 15
    assert found[prepared.inputs[Edge("left", "input")]].spec.quant_max == 255
    reference = unwrap(materialize(unwrap(convert(unwrap(calibrate(prepared, [X], progress=False))))))
    with torch.no_grad():
        assert sqnr(Net().eval()(X), reference(X)) > 10


def test_inputs_may_have_a_configuration_of_their_own():
    graph = fused()
    weight = CPU.qconfig_mapping.global_qconfig.weight
    own = QConfig(MinMax(), weight, input_activation=MinMax(QuantSpec(quant_max=15)))
    prepared = unwrap(prepare(graph, CPU.qconfig_mapping.set_module_name("right", own)))
    site = prepared.sites[prepared.inputs[Edge("right", "input")]]
    assert site.observer == own.input_activation
    assert prepared.sites[prepared.inputs[Edge("left", "input")]].observer.spec.quant_max == 255
    mapping = CPU.qconfig_mapping.set_global(own)
    assert unwrap(from_json(unwrap(to_json(mapping)))) == mapping
    wrong = QConfig(MinMax(), weight, input_activation=MinMax(QuantSpec("int16", -9, 9)))
    found = problems(prepare(graph, QConfigMapping().set_module_name("left", wrong)).failure())
    assert [type(problem) for problem in found] == [UnsupportedDType]


def test_values_share_qparams_where_annotations_say_so():
    graph = fused()
    given = unwrap(annotate(graph, backend=CPU)).keep_float("cat").keep_float("tanh").keep_float("head")
    outputs = given.outputs.set("left", MinMax()).set("right", SharedWith("left"))
    prepared = unwrap(prepare(graph, Annotations(given.inputs, outputs, given.weights)))
    assert prepared.outputs["left"] == prepared.outputs["right"]
    (site,) = {prepared.outputs["left"]}
    later = given.outputs.set("left", SharedWith("right")).set("right", MinMax())
    other = unwrap(prepare(graph, Annotations(given.inputs, later, given.weights)))
    assert other.outputs["left"] == other.outputs["right"]
    assert qparams_of(prepared)[site].spec == MinMax().spec


def test_quantizers_compose_and_conflicts_name_both():
    graph = fused()
    annotations = unwrap(annotate(graph))
    fixed = FixedQParams(QuantSpec(), 1 / 64, 128)
    mine = Annotations(outputs=Annotations().outputs.set("tanh", fixed))
    assert "tanh" in annotations.outputs
    assert annotations.outputs["tanh"] != fixed
    (problem,) = problems(combine(annotations, mine).failure())
    assert (problem.node, str(fixed) in problem.reason) == ("tanh", True)
    assert str(annotations.outputs["tanh"]) in problem.reason
    freed = unwrap(combine(annotations.keep_float("tanh"), mine))
    assert freed == unwrap(combine(mine, annotations.keep_float("tanh")))
    assert freed.outputs["tanh"] == fixed
    assert "tanh" not in freed.floats


class Unhashable(MinMax):
    """An observer of the user's."""

    __hash__ = None


def sharing_weight(spec, point="right"):
    """Annotations with a weight, and a point that is quantized by `spec`."""
    table = pmap({point: spec})
    weights = pmap({"left": MinMax(INT8_SYMMETRIC)})
    return Annotations(weights=weights, **{"outputs" if isinstance(point, str) else "inputs": table})


PER_CHANNEL_4 = PerChannelMinMax(QuantSpec(qscheme="per_channel_affine", ch_axis=4))
WRONG = (
    (Annotations(outputs=Annotations().outputs.set("lft", MinMax())), UnknownName, "lft"),
    (Annotations(inputs=Annotations().inputs.set(Edge("left", "weight"), MinMax())), BadConfig, "left"),
    (Annotations(inputs=Annotations().inputs.set(Edge("left", "input", 1), MinMax())), BadConfig, "left"),
    (Annotations(weights=Annotations().weights.set("cat", MinMax(INT8_SYMMETRIC))), BadConfig, "cat"),
    (Annotations(outputs=Annotations().outputs.set("left", MinMax(INT8_SYMMETRIC_PER_CHANNEL))), BadConfig, "MinMax"),
    (
        Annotations(outputs=Annotations().outputs.set("left", MinMax(QuantSpec("int17", -9, 9)))),
        UnknownName,
        "int17",
    ),
    (Annotations(outputs=Annotations().outputs.set("left", KeepFloat())), BadConfig, "KeepFloat"),
    (Annotations(outputs=Annotations().outputs.set("left", Derived((), sum, UINT8))), BadConfig, "Derived"),
    (Annotations(biases=Annotations().biases.set("cat", MinMax(INT8_SYMMETRIC))), BadConfig, "cat"),
    (Annotations(outputs=Annotations().outputs.set("left", SharedWith("right"))), BadConfig, "right"),
    (sharing_weight(SharedWith(Edge("left", "weight"))), BadConfig, "left"),
    (Annotations(weights=pmap({"left": Dynamic()})), BadConfig, "left"),
    (Annotations(weights=pmap({"left": Unshared(MinMax())})), BadConfig, "left"),
    (Annotations(weights=pmap({"left": SharedWith("right")})), BadConfig, "left"),
    (Annotations(biases=pmap({"left": Dynamic()})), BadConfig, "left"),
    (Annotations(outputs=pmap({"left": Unshared(KeepFloat())})), BadConfig, "KeepFloat"),
    (Annotations(outputs=pmap({"left": Unshared(ReuseInput())})), BadConfig, "ReuseInput"),
    (Annotations(outputs=pmap({"left": Unshared(FakeQuantize(Dynamic()))})), BadConfig, "FakeQuantize"),
    (Annotations(outputs=pmap({"left": Unhashable()})), BadConfig, "left"),
    (Annotations(outputs=pmap({"left": SharedWith(3)})), BadConfig, "left"),
    (Annotations(outputs=pmap({"left": Cast(3)})), BadConfig, "left"),
    (Annotations(outputs=pmap({"left": Dynamic(3)})), BadConfig, "left"),
    (Annotations(outputs=pmap({"left": MinMax(QuantSpec(qscheme=3))})), UnknownName, "3"),
    (Annotations(inputs=pmap({"left": MinMax()})), BadConfig, "inputs"),
    (Annotations(inputs=pmap({Edge("x", "input"): MinMax()})), BadConfig, "x"),
    (Annotations(inputs=pmap({Edge("x", "default"): MinMax()})), BadConfig, "x"),
    (sharing_weight(MinMax(), Edge("left", "weight")), BadConfig, "left"),
    (Annotations(outputs=pmap({"output": MinMax()})), BadConfig, "output"),
    (Annotations(inputs=pmap({Edge("output", "0", 3): MinMax()})), BadConfig, "output"),
    (Annotations(outputs={"left": MinMax()}), BadConfig, "outputs"),
    (Annotations(taps=frozenset({"left"})), BadConfig, "left"),
    (Annotations(groups=frozenset({()})), BadConfig, "groups"),
    (Annotations(groups=frozenset({"left"})), BadConfig, "groups"),
    (Annotations(quantized_outputs=frozenset({"left"})), BadConfig, "quantized_outputs"),
    (Annotations(swapped=pmap({"left": MinMax()})), BadConfig, "left"),
    (Annotations(outputs=pmap({"left": PER_CHANNEL_4})), BadConfig, "left"),
)


@pytest.mark.parametrize(("annotations", "kind", "node"), WRONG)
def test_what_cannot_be_meant_is_told(annotations, kind, node):
    found = problems(prepare(fused(), annotations).failure())
    assert [(type(problem), problem.node) for problem in found][:1] == [(kind, node)]


def test_other_arguments_are_refused():
    assert isinstance(annotate(Net()).failure(), WrongStage)
    assert isinstance(combine(Annotations(), 3).failure(), BadConfig)


def test_a_conflict_names_both_quantizers_and_what_each_says():
    other = MinMax(QuantSpec(eps=0.5))
    given = [Annotations(weights=Annotations().weights.set("conv", MinMax(spec))) for spec in (UINT8, INT8_SYMMETRIC)]
    (problem,) = problems(combine(Annotations(), *given).failure())
    assert problem.node == "conv"
    assert "its weight: annotations[1] says MinMax uint8 0..255" in problem.reason
    assert "annotations[2] says MinMax int8 -128..127" in problem.reason
    alike = [Annotations(outputs=Annotations().outputs.set("conv", observer)) for observer in (MinMax(), other)]
    (problem,) = problems(combine(*alike).failure())
    assert "eps=0.5" in problem.reason


def test_operators_that_nothing_annotates_stay_float_for_that_reason():
    graph = unwrap(trace(nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)).eval(), X[:, :, 0, 0]))
    first, second = [node.id for node in graph if node.kind in ("linear", "softmax")]
    mine = Annotations(inputs=Annotations().inputs.set(Edge(first, "input"), MinMax()))
    described = unwrap(describe(unwrap(prepare(graph, mine))))
    assert [(row.node, row.reason) for row in described.floats] == [(second, "nothing annotates it")]


@dataclass(frozen=True)
class Holding:
    """Frozen, and yet not hashable: it holds a list."""

    spec: QuantSpec
    seen: list[int]
    statistic = "held"

    def init(self):
        return MinMax(self.spec).init()

    def update(self, state, x):
        return MinMax(self.spec).update(state, x)

    def finish(self, state):
        return MinMax(self.spec).finish(state)


def test_observers_that_hold_what_is_not_hashable_are_errors():
    graph, holding = unwrap(trace(nn.Sequential(nn.Linear(4, 4)).eval())), Holding(UINT8, [1])
    mapping = CPU.qconfig_mapping.set_object_type(nn.Linear, QConfig(holding, MinMax(INT8_SYMMETRIC)))
    annotations = Annotations(outputs=Annotations().outputs.set(graph.order[1], holding))
    for configuration in (mapping, annotations):
        (problem,) = problems(prepare(graph, configuration).failure())
        assert isinstance(problem, BadConfig) and "hash" in problem.reason
        assert problem.node == ("Holding" if configuration is mapping else graph.order[1])


class Gate(nn.Module):
    """A value whose range is known, read by a layer, and in a `cat` with what that gives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.fc, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        return self.head(torch.cat([x, self.fc(x)], -1))


class Chain(Gate):
    """The same, read by a layer alone."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sigmoid(self.first(x)))


def chain():
    return unwrap(fuse(unwrap(trace(Chain().eval(), X))))


USE = Edge("fc", "input")
INT16 = QuantSpec("int16", -1024, 1023)
WEIGHT = CPU.qconfig_mapping.global_qconfig.weight
OWN_USES = (
    CPU.qconfig_mapping.set_edge(USE, MinMax(INT16)),
    CPU.qconfig_mapping.set_edge(USE, MinMax(QuantSpec(quant_max=15))),
    CPU.qconfig_mapping.set_edge(USE, PerChannelMinMax(QuantSpec(qscheme="per_channel_affine", ch_axis=3))),
    CPU.qconfig_mapping.set_edge(USE, FixedQParams(UINT8, 1 / 64, 0)),
    CPU.qconfig_mapping.set_edge(USE, Dynamic()),
    CPU.qconfig_mapping.set_module_name("fc", QConfig(Dynamic(), WEIGHT)),
)


@pytest.mark.parametrize("mapping", OWN_USES)
def test_a_fixed_range_of_a_value_does_not_override_what_a_use_asks_for(mapping):
    prepared = unwrap(prepare(chain(), mapping))
    site = prepared.sites[prepared.inputs[USE]]
    assert (site.observer, site.taps) == (mapping.edges.get(USE, Dynamic()), ("sigmoid",))
    own = prepared.outputs.get("sigmoid")  # what a dynamic layer alone reads is not rounded before it
    assert own is None if mapping is OWN_USES[-1] else is_fixed(prepared.sites[own].observer)


def test_a_fixed_range_for_the_value_alone_serves_no_use():
    graph = chain()
    annotations = unwrap(annotate(graph))
    alone = Unshared(annotations.outputs["sigmoid"])
    prepared = unwrap(prepare(graph, replace(annotations, outputs=annotations.outputs.set("sigmoid", alone))))
    assert prepared.sites[prepared.inputs[USE]].observer == annotations.inputs[USE]


def test_a_fixed_range_of_a_use_is_not_overridden_by_what_the_value_is_measured_with():
    graph = chain()
    fixed = FixedQParams(UINT8, 1 / 64, 128)
    prepared = unwrap(prepare(graph, CPU.qconfig_mapping.set_output("sigmoid", MinMax()).set_edge(USE, fixed)))
    assert prepared.sites[prepared.inputs[USE]].observer == fixed


@pytest.mark.parametrize("spec", [UINT8, UINT8_REDUCED, replace(UINT8, qscheme="per_tensor_symmetric")])
def test_a_fixed_range_serves_uses_of_the_same_codes_or_of_a_bit_less(spec):
    prepared = unwrap(prepare(chain(), CPU.qconfig_mapping.set_module_name("fc", QConfig(MinMax(spec), WEIGHT))))
    assert USE not in prepared.inputs
    assert is_fixed(prepared.sites[prepared.outputs["sigmoid"]].observer)


def layout(graph, mapping, backend):
    """Where the sites are and what shares one."""
    prepared = unwrap(prepare(graph, mapping, backend=backend))
    sites = {id: (site.taps, is_fixed(site.observer), site.observer.spec) for id, site in prepared.sites.items()}
    return sites, prepared.outputs, prepared.inputs, set(prepared.weights)


@pytest.mark.parametrize("backend", [X86, QNNPACK], ids=lambda backend: backend.name)
@pytest.mark.parametrize("model", [Gate, Chain], ids=lambda model: model.__name__)
def test_training_and_calibration_have_the_same_sites(model, backend):
    graph = unwrap(fuse(unwrap(trace(model().eval(), X)), backend=backend))
    plain = layout(graph, unwrap(get_default_qconfig_mapping(backend.name)), backend)
    assert layout(graph, unwrap(get_default_qat_qconfig_mapping(backend.name)), backend) == plain
    assert any(fixed for _, fixed, _ in plain[0].values()) == (model is Chain)


class Triple(nn.Module):
    """Three branches of one value."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x)


OBSERVERS = {"a": Histogram(), "b": MovingAverageMinMax(), "c": MinMax()}


@pytest.mark.parametrize("fixed", [(), ("a",), ("a", "b")])
def test_the_first_observer_in_the_graph_measures_for_all_that_share(fixed):
    """However the groups are written: a set of them has no order."""
    graph = unwrap(fuse(unwrap(trace(Triple().eval(), X))))
    observers = {**OBSERVERS, **dict.fromkeys(fixed, FixedQParams(UINT8, 1 / 256, 0))}
    found = set()
    for first in itertools.permutations("ab"):
        for second in itertools.permutations("bc"):
            for groups in itertools.permutations([first, second]):
                annotations = Annotations(outputs=pmap(observers), groups=_Ordered(groups))
                prepared = unwrap(prepare(graph, annotations))
                (site,) = prepared.sites.values()
                found.add((site.id, site.observer, site.taps))
    assert found == {("a", observers["abc"[len(fixed)]], ("a", "b", "c"))}


class _Ordered(frozenset):
    """A set that is read in the order in which it was written, as another hash seed might have it."""

    __slots__ = ("written",)

    def __init__(self, written):
        self.written = written

    def __iter__(self):
        return iter(self.written)


_SEEDED = """
from torch import nn
from pyrsistent import pmap
from qfunc import Histogram, MinMax, prepare, trace, unwrap
from qfunc.config.annotation import Annotations, SharedWith
from qfunc.errors import problems
from tests.test_annotate import Triple
graph = unwrap(trace(Triple().eval()))
given = Annotations(outputs=pmap({"a": Histogram(), "b": MinMax(), "c": MinMax()}))
groups = frozenset({("a", "b"), ("c", "b")})
print(unwrap(prepare(graph, Annotations(outputs=given.outputs, groups=groups))).sites["a"])
wrong = Annotations(
    outputs=pmap({id: MinMax() for id in ("p", "q", "r", "s")}),
    weights=pmap({id: MinMax() for id in ("add", "x")}),
    groups=frozenset({("t", "u"), ("v", "u")}),
    taps=frozenset({"a", "b", "c"}),
)
for problem in problems(prepare(graph, wrong).failure()):
    print(problem)
"""


def test_sites_and_problems_do_not_depend_on_the_hash_seed():
    outputs = set()
    for seed in ("1", "2", "3"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", _SEEDED]
        done = subprocess.run(command, env=environment, check=True, cwd=ROOT, capture_output=True, text=True)
        outputs.add(done.stdout)
    (text,) = outputs
    assert len(text.splitlines()) == 13


built = cache(fused)
IDS = st.sampled_from(("x", "left", "right", "cat", "tanh", "head", "output", "none", 3, None))
SLOTS = st.sampled_from(("input", "weight", "bias", "tensors", "post.0.other", "0", None))
POINTS = IDS | st.builds(Edge, IDS, SLOTS, st.sampled_from((0, 1, -1, "0", None)))
QUANTS = st.sampled_from((UINT8, INT16, INT8_SYMMETRIC_PER_CHANNEL, QuantSpec("int17"), QuantSpec(qscheme=None), 3))
GARBAGE = st.sampled_from((None, 3, "left", (), MinMax, Unhashable(), torch.ones(2), UINT8, object()))
MEASURED = st.builds(MinMax, QUANTS) | st.builds(PerChannelMinMax, QUANTS) | st.just(FixedQParams(UINT8, 0.1, 0))
SPECS = st.one_of(
    MEASURED,
    GARBAGE,
    st.builds(FakeQuantize, MEASURED | GARBAGE),
    st.builds(SharedWith, POINTS | GARBAGE),
    st.builds(Dynamic, QUANTS),
    st.builds(Cast, st.sampled_from(("float16", "float", 3, None)), st.sampled_from((True, None))),
    st.sampled_from((KeepFloat(), ReuseInput(), Unshared(KeepFloat()), Unshared(SharedWith("left")))),
    st.builds(Unshared, MEASURED | GARBAGE),
    st.builds(Derived, st.lists(POINTS, max_size=2).map(tuple) | GARBAGE, st.sampled_from((max, 3)), QUANTS),
)
KINDS = {
    "inputs": st.dictionaries(POINTS, SPECS, max_size=2).map(pmap),
    "groups": st.frozensets(st.lists(POINTS, max_size=3).map(tuple) | POINTS, max_size=2),
    "quantized_outputs": st.frozensets(st.sampled_from((0, 5, -1, "0", None)), max_size=2),
    "notes": st.lists(GARBAGE, max_size=1).map(tuple),
    **{name: st.dictionaries(POINTS, SPECS, max_size=2).map(pmap) for name in ("outputs", "weights", "biases")},
    **{name: st.dictionaries(IDS, SPECS, max_size=2).map(pmap) for name in ("floats", "swapped")},
    **{name: st.frozensets(POINTS, max_size=2) for name in ("taps", "refused", "quantized_inputs")},
}


@settings(deadline=None, max_examples=150)
@given(data=st.data(), base=st.booleans(), raw=st.booleans())
def test_garbage_is_told_or_does_something(data, base, raw):
    """Any values in any of the tables: what `prepare` takes can be calibrated and converted, or that is told."""
    graph = built()
    annotations = unwrap(annotate(graph)) if base else Annotations()
    for name in data.draw(st.lists(st.sampled_from(sorted(KINDS)), max_size=2, unique=True)):
        given, was = data.draw(KINDS[name]), getattr(annotations, name)
        given = was.update(given) if isinstance(given, type(pmap())) else was | given if name != "notes" else given
        annotations = replace(annotations, **{name: data.draw(GARBAGE) if raw else given})
    found = prepare(graph, annotations).bind(lambda p: calibrate(p, [X], progress=False).bind(convert))
    for problem in problems(found.failure()) if isinstance(found, Failure) else ():
        assert isinstance(problem, get_args(Problem))
        assert all(isinstance(part, str) and part for part in (problem.node, problem.reason, problem.remedy))
