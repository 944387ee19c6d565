"""Standalone modules: regions of the graph with a configuration and a backend of their own, nothing fused across."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from returns.result import Failure, Success
from torch import Tensor, nn

from qfunc import (
    CPU,
    X86,
    BackendConfig,
    CustomConfig,
    CustomFusion,
    MeanSquaredError,
    MinMax,
    PerChannelMinMax,
    Prepared,
    QConfig,
    QConfigMapping,
    Standalone,
    annotate,
    calibrate,
    convert,
    describe,
    explain_fusion,
    fuse,
    materialize,
    prepare,
    quantize,
    trace,
    unwrap,
)
from qfunc.config.qconfig_mapping import Selector
from qfunc.config.resolve import ancestors, places_of
from qfunc.config.selectors import first_layer, last_layer, layers
from qfunc.errors import BadConfig, UnknownName, problems
from qfunc.ir import Graph, users, verify
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
from qfunc.passes.regions import region_notes, regions
from qfunc.testing import ModelCase, models, oracle, relative_error, sqnr
from tests.fusion.models import conv, fused, image, kinds, norm, run, sequential
from tests.parity.sides import our_mapping, their_mapping

X = image()
BARE = replace(CPU, name="bare", fusions=(), drop_identities=False, move_norms=False)


class Block(nn.Sequential):
    """A type to name standalone modules by."""


def names(*paths: str) -> CustomConfig:
    return CustomConfig(standalone_names=dict.fromkeys(paths, Standalone()))


def graph_of(model: nn.Module) -> Graph:
    return unwrap(trace(model, X))


def owned_regions(model: nn.Module, custom: CustomConfig) -> dict[str, str]:
    """Module path of every operator -> path of its region."""
    graph = graph_of(model)
    found = regions(graph, custom)
    return {node.origin.module: found[node.id].path for node in graph if node.id in found}


# Regions


def test_the_innermost_standalone_module_holds() -> None:
    model = sequential(nn.Sequential(conv(), Block(conv(), nn.ReLU())), conv())
    assert owned_regions(model, names("0")) == {"0.0": "0", "0.1.0": "0", "0.1.1": "0"}
    assert owned_regions(model, names("0", "0.1")) == {"0.0": "0", "0.1.0": "0.1", "0.1.1": "0.1"}
    assert owned_regions(model, names("0.1.0")) == {"0.1.0": "0.1.0"}
    assert owned_regions(model, CustomConfig()) == {}


def test_a_name_is_stronger_than_a_type_and_none_is_the_parents() -> None:
    outer, inner = QConfigMapping().set_module_name("1.0", None), QConfigMapping().set_module_name("0", None)
    model = sequential(sequential(conv(), Block(conv())), Block(conv()))
    custom = CustomConfig(
        standalone_names={"0": Standalone(outer, BARE), "1": Standalone(inner)},
        standalone_types={Block: Standalone()},
    )
    found = regions(graph_of(model), custom)
    held = {region.path: region for region in found.values()}
    assert {path: (r.qconfig_mapping, r.base, r.backend) for path, r in held.items()} == {
        "0": (outer, "0", BARE),
        "0.1": (outer, "0", BARE),
        "1": (inner, "1", None),
    }


def test_what_does_not_exist_is_told_of_with_what_may_be_meant() -> None:
    model = sequential(nn.Sequential(conv(), nn.ReLU()), conv())
    mapping = QConfigMapping().set_module_name("00", None).set_module_name("0", None)
    custom = CustomConfig(standalone_names={"0": Standalone(mapping), "O": Standalone()})
    for result in (fuse(graph_of(model), custom=custom), explain_fusion(graph_of(model), custom=custom)):
        found = problems(result.failure())
        assert [type(problem) for problem in found] == [UnknownName, UnknownName]
        assert [(problem.node, problem.reason) for problem in found] == [
            ("O", "there is no module 'O'"),
            ("00", "there is no submodule of '0' named '00'"),
        ]
    assert [problem.node for problem in problems(trace(model, X, custom=custom).failure())] == ["O"]
    of_type = CustomConfig(standalone_types={Block: Standalone()}, standalone_names={"0.1": Standalone()})
    notes = [*region_notes(graph_of(model), of_type, regions(graph_of(model), of_type))]
    assert [note.node for note in notes] == [f"standalone_types[{__name__}.Block]"]
    dropped = unwrap(fuse(graph_of(sequential(conv(), nn.Identity())), custom=names("1")))
    assert [n.node for n in region_notes(dropped, names("1"), regions(dropped, names("1")))] == [
        "standalone_names['1']"
    ]


@pytest.mark.parametrize(
    ("custom", "field"),
    [
        (CustomConfig(standalone_names={"0": None}), "standalone_names"),
        (CustomConfig(standalone_names=("0",)), "standalone_names"),
        (CustomConfig(standalone_types={"Block": Standalone()}), "standalone_types"),
        (CustomConfig(standalone_types={Block: Standalone(3)}), "standalone_types['Block']"),
        (CustomConfig(standalone_names={"0": Standalone(backend="x86")}), "standalone_names['0']"),
    ],
)
def test_a_configuration_of_the_wrong_type_is_told_of(custom: CustomConfig, field: str) -> None:
    found = problems(trace(sequential(conv()), X, custom=custom).failure())
    assert [(type(problem), problem.node) for problem in found] == [(BadConfig, field)]


# Fusion


def test_nothing_is_fused_across_a_border() -> None:
    model = sequential(conv(), nn.Sequential(norm(), nn.ReLU()), nn.ReLU(), conv())
    assert kinds(fused(model, X)) == ["conv2d + relu", "relu", "conv2d"]
    assert kinds(fused(model, X, custom=names("1"))) == ["conv2d", "batch_norm + relu", "relu", "conv2d"]


def test_norms_stay_on_their_side_of_a_border() -> None:
    before = sequential(nn.Sequential(norm()), conv())
    behind = sequential(nn.Sequential(conv(), norm()), norm())
    pooled = sequential(nn.Sequential(conv(), nn.AvgPool2d(2)), norm())
    assert kinds(fused(before, X)) == kinds(fused(behind, X)) == ["conv2d"]
    assert kinds(fused(before, X, custom=names("0"))) == ["batch_norm", "conv2d"]
    assert kinds(fused(behind, X, custom=names("0"))) == ["conv2d", "batch_norm"]
    assert kinds(fused(pooled, X, custom=names("0"))) == ["conv2d", "avg_pool2d", "batch_norm"]


def test_two_standalone_modules_are_two_regions() -> None:
    model = sequential(Block(conv()), Block(nn.ReLU()))
    assert kinds(fused(model, X)) == ["conv2d + relu"]
    assert kinds(fused(model, X, custom=CustomConfig(standalone_types={Block: Standalone()}))) == ["conv2d", "relu"]


def test_inside_its_own_backend_fuses() -> None:
    model = sequential(conv(), nn.ReLU(), Block(conv(), nn.Identity(), nn.ReLU()))
    bare = CustomConfig(standalone_types={Block: Standalone(backend=BARE)})
    whole = CustomConfig(standalone_types={Block: Standalone(backend=CPU)})
    assert kinds(fused(model, X, custom=bare)) == ["conv2d + relu", "conv2d", "identity", "relu"]
    assert kinds(fused(model, X, custom=whole, backend=BARE)) == ["conv2d", "relu", "conv2d + relu"]


def test_a_fuser_is_called_where_its_backend_holds_and_within_borders() -> None:
    fusion = CustomFusion(lambda is_qat, *parts: nn.Sequential(*parts), pattern=(nn.Conv2d, nn.ReLU))
    model = sequential(conv(), nn.ReLU(), Block(conv(), nn.ReLU(), conv()), nn.ReLU())
    own = replace(BARE, fusions=(fusion,))
    inside = CustomConfig(standalone_types={Block: Standalone(backend=own)})
    assert kinds(fused(model, X, custom=inside, backend=BARE)) == ["conv2d", "relu", "owned", "conv2d", "relu"]
    everywhere = CustomConfig(fusions=(fusion,), standalone_types={Block: Standalone(backend=BARE)})
    assert kinds(fused(model, X, custom=everywhere)) == ["owned", "owned", "conv2d", "relu"]


def test_the_report_names_the_border() -> None:
    model = sequential(conv(), nn.Sequential(nn.ReLU()))
    report = unwrap(explain_fusion(graph_of(model), custom=names("1")))
    assert [(row.place, row.reason) for row in report.unfused] == [
        ("0", "conv2d + relu: the border of the standalone module '1' is between")
    ]


def test_a_module_called_on_both_sides_of_no_border_is_one_region() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(conv(), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    torch.manual_seed(0)
    assert kinds(fused(Twice().eval(), X, custom=names("block"))) == ["conv2d + relu", "conv2d + relu"]


# Quantization


class Whole(nn.Module):
    """A standalone module between two layers, with a branch around it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = conv(kernel=3), conv()
        self.sub = Block(conv(), nn.ReLU(), conv(), nn.MaxPool2d(2, 1, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(self.sub(x) + x[..., 1:, 1:])


def quantized_places(prepared: Prepared) -> set[str]:
    return {prepared.graph[id].place for id in prepared.weights}


def prepared_with(
    custom: CustomConfig, mapping: QConfigMapping | None = None, backend: BackendConfig = CPU
) -> Prepared:
    graph = unwrap(fuse(unwrap(trace(Whole().eval(), X, custom=custom)), backend=backend, custom=custom))
    return unwrap(prepare(graph, mapping, backend=backend, custom=custom))


FLOAT = Standalone(QConfigMapping())
ALL = {"first", "sub.0", "sub.2", "last"}


def test_a_region_without_a_configuration_stays_float() -> None:
    assert quantized_places(prepared_with(CustomConfig())) == ALL
    assert quantized_places(prepared_with(names("sub"))) == ALL
    assert quantized_places(prepared_with(CustomConfig(standalone_names={"sub": FLOAT}))) == {"first", "last"}
    assert quantized_places(prepared_with(CustomConfig(standalone_types={Block: FLOAT}))) == {"first", "last"}


def test_the_names_in_a_region_are_relative_to_it() -> None:
    inside = CPU.qconfig_mapping.set_module_name("0", None)
    custom = CustomConfig(standalone_names={"sub": Standalone(inside)})
    assert quantized_places(prepared_with(custom)) == ALL - {"sub.0"}
    by_order = CPU.qconfig_mapping.set_module_name_object_type_order("", nn.Conv2d, 1, None)
    custom = CustomConfig(standalone_names={"sub": Standalone(by_order)})
    assert quantized_places(prepared_with(custom)) == ALL - {"sub.2"}
    outside = CPU.qconfig_mapping.set_module_name("sub", None)
    custom = CustomConfig(standalone_names={"sub": Standalone(CPU.qconfig_mapping)})
    assert quantized_places(prepared_with(custom, outside)) == ALL
    assert quantized_places(prepared_with(names("sub"), outside)) == {"first", "last"}


def test_a_region_is_quantized_by_its_own_backend_and_described_so() -> None:
    lean = replace(CPU, name="lean", operators=CPU.operators[:1])
    custom = CustomConfig(standalone_names={"sub": Standalone(None, lean)})
    described = unwrap(describe(prepared_with(custom)))
    assert {row.place: row.reason for row in described.floats}["sub.3"] == "the lean backend has no rule for it"
    whole = CustomConfig(standalone_names={"sub": Standalone(None, CPU)})
    reasons = {row.place: row.reason for row in unwrap(describe(prepared_with(whole, backend=lean))).floats}
    assert reasons["add"] == "the lean backend has no rule for it"
    assert "lean" not in reasons.get("sub.3", "")


def test_sites_inside_have_the_observers_of_the_region() -> None:
    inside = QConfigMapping().set_global(QConfig(MinMax(), PerChannelMinMax(INT8_NARROW_PER_CHANNEL)))
    prepared = prepared_with(CustomConfig(standalone_names={"sub": Standalone(inside)}))
    place = {node.id: node.place for node in prepared.graph}
    uses = {
        (place[edge.user], edge.slot): type(prepared.sites[site].observer) for edge, site in prepared.inputs.items()
    }
    values = {id: type(prepared.sites[site].observer) for id, site in prepared.outputs.items()}
    of_place = {place[id]: observer for id, observer in values.items()}
    assert uses["first", "input"] is MeanSquaredError
    assert of_place["sub.0"] is MinMax
    unmatched = inside.set_object_type(nn.Linear, None)
    noted = prepared_with(CustomConfig(standalone_names={"sub": Standalone(unmatched)})).notes
    assert [note.node for note in noted] == ["standalone module 'sub': object_types['torch.nn.Linear']"]


def test_a_node_is_named_in_the_configuration_of_the_part_that_it_is_in() -> None:
    graph = unwrap(fuse(unwrap(trace(Whole().eval(), X)), custom=names("sub")))
    (inner,) = (node.id for node in graph if node.place == "sub.2")
    naming = CPU.qconfig_mapping.set_node(inner, None)
    own, shared = CustomConfig(standalone_names={"sub": Standalone(CPU.qconfig_mapping)}), names("sub")
    assert quantized_places(unwrap(prepare(graph, naming, custom=shared))) == ALL - {"sub.2"}
    inside = CustomConfig(standalone_names={"sub": Standalone(naming)})
    assert quantized_places(unwrap(prepare(graph, custom=inside))) == ALL - {"sub.2"}
    for mapping, custom, place in (
        (naming, own, "sub.2"),
        (None, CustomConfig(standalone_names={"sub": Standalone(naming.set_node("last", None))}), "last"),
    ):
        found = prepare(graph, mapping, custom=custom).failure()
        assert isinstance(found, BadConfig) and found.node == place and "standalone module" in found.reason


# Notes


class Mixed(nn.Module):
    """A layer behind two standalone modules, the second of which has a layer of another type."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.last = Block(conv()), Block(nn.ReLU6(), nn.Linear(8, 8)), conv()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.two(self.one(x)))


BLOCKS = CustomConfig(standalone_types={Block: Standalone()})


def prepared_mixed(custom: CustomConfig, mapping: QConfigMapping | None = None) -> Prepared:
    return unwrap(prepare(unwrap(fuse(unwrap(trace(Mixed().eval(), X)), custom=custom)), mapping, custom=custom))


def test_an_entry_of_the_parent_s_mapping_that_holds_inside_is_not_told_of() -> None:
    default = CPU.qconfig_mapping
    prepared = prepared_mixed(BLOCKS, default.set_object_type(nn.Linear, None))
    assert (prepared.notes, quantized_places(prepared)) == ((), {"one.0", "last"})
    assert prepared_mixed(BLOCKS, default.set_module_name_regex(r"two\.1", None)).notes == ()
    (first,) = (edge for edge in prepared_mixed(BLOCKS).inputs if edge.user == "one_0")
    for mapping in (default.set_output("x", None), default.set_edge(first, None)):
        prepared = prepared_mixed(BLOCKS, mapping)
        assert (prepared.notes, first in prepared.inputs) == ((), False)
    own = CustomConfig(standalone_types={Block: Standalone(replace(default))})
    assert [note.node for note in prepared_mixed(own, default.set_object_type(nn.Linear, None)).notes] == [
        "object_types['torch.nn.Linear']"
    ]
    assert [note.node for note in prepared_mixed(own, default.set_output("x", None)).notes] == ["outputs['x']"]


def test_an_entry_of_a_mapping_of_several_modules_is_told_of_once_where_it_holds_in_none() -> None:
    default = CPU.qconfig_mapping
    for form, told in ((nn.Linear, []), (nn.Tanh, ["torch.nn.Tanh"])):
        custom = CustomConfig(standalone_types={Block: Standalone(default.set_object_type(form, None))})
        notes = [note.node for note in prepared_mixed(custom).notes]
        assert notes == [f"standalone modules 'one', 'two': object_types[{name!r}]" for name in told]


# Selectors


def test_a_selector_sees_the_part_that_its_mapping_is_for() -> None:
    def own(selector: Selector) -> CustomConfig:
        return CustomConfig(standalone_names={"sub": Standalone(CPU.qconfig_mapping.set_selected(selector, None))})

    assert quantized_places(prepared_with(own(first_layer))) == ALL - {"sub.0"}
    assert quantized_places(prepared_with(own(last_layer))) == ALL - {"sub.2"}
    of_each = CustomConfig(standalone_types={Block: Standalone(CPU.qconfig_mapping.set_selected(layers, None))})
    assert quantized_places(prepared_mixed(of_each)) == {"last"}
    outside = CPU.qconfig_mapping.set_selected(first_layer, None)
    assert quantized_places(prepared_with(names("sub"), outside)) == ALL - {"first"}

    def of_another(graph: Graph) -> frozenset[str]:
        return frozenset({"last"})

    prepared = prepared_with(own(of_another))
    (note,) = prepared.notes
    assert quantized_places(prepared) == ALL
    assert note.node.startswith("standalone module 'sub': selections[") and note.text.startswith("selects no node")


def test_a_selector_runs_once_for_each_mapping_on_a_whole_graph() -> None:
    seen: list[Graph] = []

    def everything(graph: Graph) -> frozenset[str]:
        seen.append(unwrap(verify(graph)))
        assert users(graph).keys() == graph.nodes.keys()
        return frozenset(graph.order)

    mapping = CPU.qconfig_mapping.set_selected(everything, None)
    assert quantized_places(prepared_mixed(BLOCKS, mapping)) == set()
    assert len(seen) == 1
    own = CustomConfig(standalone_names={"two": Standalone(mapping)})
    assert quantized_places(prepared_mixed(own)) == {"one.0", "last"}
    assert [node.kind for node in seen[-1]] == ["placeholder", "clamp", "linear", "output"]


# Work


def test_entries_are_looked_through_once_whatever_the_number_of_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"places": 0, "ancestors": 0}

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            calls[name] += 1
            return function(*args)

        return call

    model = sequential(*(Block(nn.Sequential(conv(), nn.ReLU())) for _ in range(8)))
    graph = graph_of(model)
    monkeypatch.setattr("qfunc.passes.annotate.places_of", counted("places", places_of))
    monkeypatch.setattr("qfunc.passes.regions.ancestors", counted("ancestors", ancestors))
    table = {str(i): Standalone(CPU.qconfig_mapping.set_module_name("0", None)) for i in range(8)}
    for custom, mappings in ((BLOCKS, 1), (CustomConfig(standalone_names=table), 9)):
        calls.update(places=0, ancestors=0)
        unwrap(annotate(graph, custom=custom))
        assert calls["places"] == mappings
        assert calls["ancestors"] <= len(graph.modules)


# Any entry, any backend


def test_an_entry_that_suits_an_operator_in_some_region_is_no_error() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = Block(conv()), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.conv(x))

    only_linear = replace(CPU, operators=(replace(CPU.operators[0], kinds=("linear",)),))
    custom = CustomConfig(standalone_types={Block: Standalone(None, only_linear)})
    graph = unwrap(trace(Both().eval(), X, custom=custom))
    assert quantized_places(unwrap(prepare(graph, custom=custom))) == {"linear"}


def test_annotations_say_the_same_and_every_error_is_told_at_once() -> None:
    custom = CustomConfig(standalone_names={"sub": FLOAT})
    graph = unwrap(fuse(unwrap(trace(Whole().eval(), X)), custom=custom))
    annotations = unwrap(annotate(graph, custom=custom))
    assert unwrap(prepare(graph, annotations)) == unwrap(prepare(graph, custom=custom))
    wrong = QConfigMapping().set_module_name("three", None)
    bad = CustomConfig(standalone_names={"sub": Standalone(wrong), "sup": Standalone()})
    found = problems(prepare(graph, QConfigMapping().set_module_name("frist", None), custom=bad).failure())
    assert {problem.node for problem in found} == {"frist", "sup", "three"}


@pytest.mark.parametrize("custom", [names("sub"), CustomConfig(standalone_types={Block: FLOAT})])
def test_a_model_with_a_standalone_module_is_quantized_in_one_call(custom: CustomConfig) -> None:
    model = Whole().eval()
    lowered = unwrap(quantize(model, [X], custom=custom, progress=False))
    assert not lowered.certificate.fallbacks
    assert sqnr(run(model, (X,)), run(unwrap(materialize(lowered)), (X,))) > 25


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
@pytest.mark.parametrize("inside", ["minmax", "histogram", "float", "parent"])
@pytest.mark.parametrize("outside", ["histogram", "float"])
def test_the_outputs_are_the_references(inside: str, outside: str) -> None:
    import torch.ao.quantization as ao
    from torch.ao.quantization.fx.custom_config import PrepareCustomConfig

    def ours(config: str) -> QConfigMapping:
        return QConfigMapping() if config == "float" else our_mapping(config)

    def theirs(config: str) -> object:
        return ao.QConfigMapping() if config == "float" else their_mapping(config)

    model = Whole().eval()
    their_custom = PrepareCustomConfig().set_standalone_module_name(
        "sub", None if inside == "parent" else theirs(inside), (X,), None, None
    )
    prepared = oracle.prepare(model, (X,), theirs(outside), prepare_custom_config=their_custom)
    expected = run(oracle.convert(oracle.calibrate(prepared, [(X,)])), (X,))
    standalone = Standalone() if inside == "parent" else Standalone(ours(inside))
    custom = CustomConfig(standalone_names={"sub": standalone})
    graph = unwrap(fuse(unwrap(trace(model, X, custom=custom)), backend=X86, custom=custom))
    stage = unwrap(prepare(graph, ours(outside), backend=X86, custom=custom))
    converted = unwrap(convert(unwrap(calibrate(stage, [X], progress=False))))
    actual, float_output = run(unwrap(materialize(converted)), (X,)), run(model, (X,))
    if inside == outside == "float":
        assert torch.allclose(actual, float_output, atol=1e-5)
    step = float((float_output.max() - float_output.min()) / 127)
    assert (actual - expected).abs().max() <= 1.01 * step
    assert (actual - expected).abs().mean() <= 0.25 * step


# Any model, any part of it


@st.composite
def standalone_cases(draw: st.DrawFn) -> tuple[ModelCase, CustomConfig]:
    """A random model, some of whose modules are standalone, with configurations and backends of their own."""
    made = draw(models(max_nodes=8))
    paths = [path for path, _ in made.module.named_modules() if path]
    chosen = draw(st.lists(st.sampled_from(paths), unique=True, max_size=4)) if paths else []
    mappings = st.sampled_from([None, QConfigMapping(), CPU.qconfig_mapping, X86.qconfig_mapping])
    backends = st.sampled_from([None, CPU, X86, BARE])
    table = {path: Standalone(draw(mappings), draw(backends)) for path in chosen}
    types = {type(made.module.get_submodule(path)) for path in paths}
    of_type = draw(st.sampled_from(sorted(types, key=str))) if types and draw(st.booleans()) else None
    return made, CustomConfig(standalone_names=table, standalone_types={of_type: Standalone()} if of_type else {})


@settings(deadline=None, max_examples=40)
@given(case=standalone_cases())
def test_regions_keep_the_meaning_and_their_borders_whatever_the_model(case: tuple[ModelCase, CustomConfig]) -> None:
    made, custom = case
    graph = unwrap(trace(made.module, made.example_inputs, custom=custom))
    inside = {id: region.path for id, region in regions(graph, custom).items()}
    result = unwrap(fuse(graph, custom=custom))
    outputs = [run(module, made.example_inputs) for module in (made.module, unwrap(materialize(result)))]
    assert relative_error(*outputs) < 1e-3
    places = {node.place: inside.get(node.id) for node in graph}
    for row in unwrap(explain_fusion(graph, custom=custom)).fused:
        assert len({places[place] for place in row.places if place in places}) <= 1, row
    stage = prepare(result, custom=custom)
    if isinstance(stage, Failure):
        return  # a mapping whose dtypes do not suit a backend
    done = calibrate(stage.unwrap(), [made.example_inputs], progress=False).bind(convert).bind(materialize)
    if isinstance(done, Success):
        run(done.unwrap(), made.example_inputs)
    kept_float = {id for id, r in regions(result, custom).items() if r.qconfig_mapping == QConfigMapping()}
    prepared = stage.unwrap()
    assert not kept_float & {*prepared.weights, *prepared.outputs, *(edge.user for edge in prepared.inputs)}
