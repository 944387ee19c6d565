"""Stages in pickles: what arrives is the same program on the same weights, as fresh as it was when it left."""

from __future__ import annotations

import copy
import pickle
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from multiprocessing import get_context
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from returns.result import Failure, Success
from torch import Tensor, nn

from qfunc import (
    CustomConfig,
    CustomFusion,
    CustomModule,
    FixedQParams,
    Histogram,
    MinMax,
    MovingAverageMinMax,
    MovingAveragePerChannelMinMax,
    PerChannelMinMax,
    QuantSpec,
    calibrate,
    convert,
    decomposed_attention,
    fuse,
    lower,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.edge.ship import pack, unpack
from qfunc.errors import BadConfig, Problem, Several, StaleSource, UserFunctionFailed, WrongStage, problems, render
from qfunc.ir import Graph, digest, to_text
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import Statistics
from qfunc.testing import same_bits
from qfunc.testing.walk import Case, Walk, fingerprint, walk
from tests.custom.test_custom_modules import GAIN
from tests.custom.test_custom_modules import Net as GainNet
from tests.zoo import ZOO


def again(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def graph_of(stage: Any) -> Graph:
    return stage if isinstance(stage, Graph) else stage.graph


def model_of(stage: Any) -> nn.Module:
    return graph_of(stage).sources["model"].model


def outcome(stage: Any, inputs: tuple[Any, ...]) -> tuple[str, str, Any]:
    """The stage as text, and what it computes."""
    graph = graph_of(stage)
    with torch.no_grad():
        return digest(graph), to_text(graph, full=True), unwrap(materialize(stage))(*inputs)


def assert_same(one: tuple[str, str, Any], other: tuple[str, str, Any]) -> None:
    assert one[:2] == other[:2]
    assert same_bits(one[2], other[2])


# What a model may hold beside layers: all of it at the top level of a module, to be found in other processes.


@torch.fx.wrap
def negated(x: Tensor) -> Tensor:
    return -x


def in_line(is_qat: bool, *parts: Any) -> nn.Module:
    return nn.Sequential(*parts)


class Holding(nn.Module):
    """A function of its own that is called, tied parameters, buffers on one memory, a constant made in its forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.act = nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU()
        self.second.weight = self.first.weight
        both = torch.randn(2, 8)
        self.register_buffer("up", both[0])
        self.register_buffer("down", both[1], persistent=False)
        self.plain = torch.randn(8)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = negated(self.act(self.first(x))) + self.up
        x = self.norm(self.second(x) * self.down + self.plain)
        return x + torch.arange(8.0)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.attention(x, x, x, need_weights=False)[0]


SETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], CustomConfig]] = {
    "holding": (Holding, (4, 8), CustomConfig()),
    "custom modules": (GainNet, (4, 8), CustomConfig(custom_modules=(GAIN,))),
    "owned": (Holding, (4, 8), CustomConfig(fusions=(CustomFusion(in_line, pattern=(nn.Linear, nn.ReLU)),))),
    "replaced": (Attending, (2, 3, 8), CustomConfig(replacements={nn.MultiheadAttention: decomposed_attention})),
}
ZOO_NAMES = ("resnet", "tied", "shared", "transformer_leaf", "aliased", "many_inputs")


def walked(name: str) -> Walk:
    if name in SETS:
        make, shape, custom = SETS[name]
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return walk(Case(make().eval(), (x,), ((x,), (2 * x,)), custom=custom))
    case = next(case for case in ZOO if case.name == name)
    model, inputs = case.build()
    return walk(Case(model, inputs, tuple(case.batches(2))))


@pytest.mark.parametrize("name", [*SETS, *ZOO_NAMES])
def test_every_stage_arrives_as_it_left_and_the_model_stays_as_it_was(name: str) -> None:
    way = walked(name)
    assert list(way.stages) == ["trace", "fuse", "prepare", "calibrate", "convert", "lower"]
    before = fingerprint((way.case.model, list(way.stages.values())))
    arrived = again(way.stages)
    for step, stage in way.stages.items():
        assert_same(outcome(stage, way.case.inputs), outcome(arrived[step], way.case.inputs))
        assert model_of(arrived[step]) is model_of(arrived["trace"]) is not model_of(stage)
    assert fingerprint((way.case.model, list(way.stages.values()))) == before
    assert arrived["trace"] != way.stages["trace"]


def test_an_owned_leaf_and_a_custom_module_are_among_them() -> None:
    kinds = {node.kind for name in ("owned", "custom modules") for node in walked(name).stages["lower"].graph}
    assert {"owned", "custom_module"} <= kinds


def test_the_way_goes_on_from_where_a_stage_arrives() -> None:
    way = walked("holding")
    expected = outcome(way.stages["lower"], way.case.inputs)
    stage = again(way.stages["prepare"])
    lowered = calibrate(stage, way.case.batches, progress=False).bind(convert).bind(lower)
    assert_same(outcome(unwrap(lowered), way.case.inputs), expected)
    statistics = again(way.stages["calibrate"]).statistics
    lowered = convert(Calibrated(way.stages["prepare"], statistics)).bind(lower)
    assert_same(outcome(unwrap(lowered), way.case.inputs), expected)


def test_ties_and_shared_memory_are_kept() -> None:
    model = model_of(again(unwrap(trace(Holding().eval()))))
    assert model.first.weight is model.second.weight
    assert model.up.untyped_storage().data_ptr() == model.down.untyped_storage().data_ptr()
    made = unwrap(materialize(again(unwrap(trace(Holding().eval())))))
    assert made.first.weight is made.second.weight
    assert sorted(made.state_dict()) == sorted(unwrap(materialize(unwrap(trace(Holding().eval())))).state_dict())


def test_one_model_travels_once_and_stages_of_one_pickle_agree() -> None:
    model = nn.Sequential(nn.Linear(200, 200), nn.ReLU()).eval()
    weight = model[0].weight.nbytes
    one, two = unwrap(trace(model)), unwrap(trace(model))
    stages = [one, two, unwrap(fuse(one).bind(prepare)), unwrap(fuse(two).bind(prepare))]
    data = pickle.dumps(stages)
    assert weight < len(data) < 1.3 * weight
    first, second, third, fourth = pickle.loads(data)
    assert first == second
    assert third == fourth
    assert third.graph.sources == first.sources
    other = unwrap(trace(copy.deepcopy(model)))
    assert len({id(model_of(stage)) for stage in again([one, two, other])}) == 2
    assert first != again(other)


# Other processes


def run_there(stages: list[Any], inputs: tuple[Any, ...]) -> list[tuple[str, str, Any]]:
    return [outcome(stage, inputs) for stage in stages]


def calibrate_there(prepared: Prepared, batches: Any) -> Any:
    return calibrate(prepared, batches, progress=False)


def write_there(graph: Graph) -> None:
    with torch.no_grad():
        for tensor in model_of(graph).parameters():
            tensor.zero_()


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONHASHSEED", "12345")
        with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            pool.submit(len, ()).result()
            yield pool


@pytest.mark.parametrize("name", [*SETS, "resnet"])
def test_stages_compute_in_another_process_what_they_compute_here(workers: ProcessPoolExecutor, name: str) -> None:
    way = walked(name)
    stages = list(way.stages.values())
    there = workers.submit(run_there, stages, way.case.inputs).result()
    for stage, found in zip(stages, there, strict=True):
        assert_same(outcome(stage, way.case.inputs), found)


@pytest.mark.parametrize("name", ["holding", "custom modules"])
def test_a_prepared_stage_is_calibrated_in_another_process(workers: ProcessPoolExecutor, name: str) -> None:
    way = walked(name)
    found = unwrap(workers.submit(calibrate_there, way.stages["prepare"], list(way.case.batches)).result())
    assert found.statistics == way.stages["calibrate"].statistics
    lowered = unwrap(convert(found).bind(lower))
    assert_same(outcome(lowered, way.case.inputs), outcome(way.stages["lower"], way.case.inputs))


def test_another_process_fails_with_the_same_error(workers: ProcessPoolExecutor) -> None:
    stage = walked("holding").stages["prepare"]
    assert workers.submit(calibrate_there, stage, []).result() == calibrate(stage, [])


def test_no_memory_is_shared_with_another_process(workers: ProcessPoolExecutor) -> None:
    model = Holding().eval()
    graph = unwrap(trace(model))
    before = fingerprint(model)
    workers.submit(write_there, graph).result()
    assert fingerprint(model) == before
    assert not any(tensor.is_shared() for tensor in model.state_dict().values())


@pytest.mark.parametrize("dumps", [pickle.dumps, ForkingPickler.dumps, lambda graph: unwrap(pack(graph))])
def test_memory_that_is_shared_until_written_to_stays_so(dumps: Callable[[Graph], bytes]) -> None:
    model = Holding().eval()
    graph = unwrap(trace(model))
    made = unwrap(materialize(graph))
    before = {name: torch._C._is_cow_tensor(tensor) for name, tensor in model.state_dict().items()}
    assert before["first.weight"]
    dumps(graph)
    assert {name: torch._C._is_cow_tensor(tensor) for name, tensor in model.state_dict().items()} == before
    assert torch._C._is_cow_tensor(made.first.weight)


# Freshness


@torch.no_grad()
def written(model: nn.Module) -> None:
    model.second.bias.mul_(2)


def replaced(model: nn.Module) -> None:
    model.second.bias = nn.Parameter(torch.ones(8))


def other_memory(model: nn.Module) -> None:
    model.second.bias.data = torch.ones(8)


def trained(model: nn.Module) -> None:
    model.train()(torch.ones(4, 8))
    model.eval()


def removed(model: nn.Module) -> None:
    del model.second.bias


CHANGES = {
    written: {"second.bias"},
    replaced: {"second.bias"},
    other_memory: {"second.bias"},
    removed: {"second.bias"},
    trained: {"norm.running_mean", "norm.running_var"},
}


def stale(graph: Graph) -> set[str]:
    result = materialize(graph)
    found = problems(result.failure()) if isinstance(result, Failure) else ()
    assert all(isinstance(problem, StaleSource) for problem in found)
    return {problem.node for problem in found}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_is_stale_arrives_stale_and_what_is_fresh_can_become_so(change: Callable[[nn.Module], None]) -> None:
    model = Holding().eval()
    graph = unwrap(trace(model))
    fresh = again(graph)
    change(model)
    assert stale(graph) == CHANGES[change]
    arrived = again(graph)
    assert stale(arrived) == stale(again(arrived)) == stale(copy.deepcopy(arrived)) == CHANGES[change]
    assert stale(fresh) == set()
    change(model_of(fresh))
    assert stale(fresh) == stale(again(fresh)) == CHANGES[change]


def test_graphs_of_one_model_before_and_after_a_change_stay_unequal() -> None:
    model = nn.Linear(4, 4).eval()
    graphs = []
    for change in (True, True, False, False):
        graphs.append(unwrap(trace(model)))
        if change:
            nn.init.ones_(model.bias)
    expected = [[one == other for other in graphs] for one in graphs]
    assert expected[2:] == [[False, False, True, True]] * 2
    arrived = again(graphs)
    assert [[one == other for other in arrived] for one in arrived] == expected
    assert [bool(stale(graph)) for graph in arrived] == [True, True, False, False]


@pytest.mark.parametrize("late", [False, True])
def test_a_module_that_another_stands_for_is_watched_too(late: bool) -> None:
    make, _, custom = SETS["replaced"]
    model = make().eval()
    graph = unwrap(trace(model, custom=custom))
    graph = again(graph) if late else graph
    source = graph.sources["model"]
    assert source.original is not source.model
    assert source.original.first is source.model.first
    source.original.attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    assert stale(graph)
    assert stale(again(graph)) == stale(graph)


class Forgetful(nn.Linear):
    """Its own way of pickling leaves out a tensor that its forward reads."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("cache", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.cache

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_buffers": {}}


def test_a_tensor_that_is_left_out_is_stale_where_it_is_missing() -> None:
    graph = unwrap(trace(Forgetful()))
    assert stale(graph) == set()
    assert stale(again(graph)) == {"cache"}


# Copies


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy])
def test_copies_are_equal_and_of_the_same_model(way: Callable[[Any], Any]) -> None:
    for stage in walked("custom modules").stages.values():
        copied = way(stage)
        assert copied == stage
        assert model_of(copied) is model_of(stage)
        assert stale(copied) == set()


# What cannot be pickled


def holding(**attributes: Any) -> Any:
    model = Holding().eval()
    for name, value in attributes.items():
        setattr(model, name, value)
    return unwrap(trace(model))


def local_class(base: type) -> type:
    class Local(base):
        pass

    return Local


class Hinted(nn.Linear):
    """Its input has a type that only this process knows, which the graph holds."""

    def forward(self, x):
        return torch.relu(x)


Hinted.forward.__annotations__["x"] = local_class(Tensor)


class Broken:
    def __reduce__(self) -> Any:
        raise RuntimeError("an open handle")


def nested() -> Graph:
    inner = nn.Sequential(nn.Linear(8, 8), local_class(nn.ReLU)())
    return unwrap(trace(nn.Sequential(nn.Linear(8, 8), inner).eval()))


def several_parts() -> Graph:
    model = nn.Sequential(local_class(nn.ReLU)(), nn.Linear(8, 8)).eval()
    model[1].handle, model[1].names = Broken(), ["a", lambda: 0]
    return unwrap(trace(model))


def hooked() -> Graph:
    model = Holding().eval()
    model.act.register_forward_hook(lambda *args: None)
    return unwrap(trace(model))


def custom_module() -> Prepared:
    made = CustomModule(GAIN.float_type, lambda module, qconfig: GAIN.observed(module, qconfig), GAIN.quantized)
    custom = CustomConfig(custom_modules=(made,))
    graph = unwrap(trace(GainNet().eval(), torch.ones(4, 8), custom=custom))
    return unwrap(prepare(graph, custom=custom))


UNPICKLABLE: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "an attribute": (lambda: holding(scaled=lambda x: 2 * x), ("scaled",)),
    "an attribute of a part": (lambda: holding(act=_with(nn.ReLU(), note=Broken())), ("act.note",)),
    "a local class": (nested, ("1.1",)),
    "the model's class": (lambda: unwrap(trace(local_class(Holding)().eval())), ("model",)),
    "several": (several_parts, ("0", "1.handle", "1.names[1]")),
    "a hook": (hooked, ("act._forward_hooks",)),
    "a custom module": (custom_module, ("observed",)),
    "an object of the graph": (lambda: unwrap(trace(Hinted(2, 2))), ("input 'x'",)),
    "a generator": (lambda: holding(stream=(i for i in range(3))), ("stream",)),
}


def _with(module: nn.Module, **attributes: Any) -> nn.Module:
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("name", UNPICKLABLE)
def test_pack_names_each_part_that_cannot_be_pickled(name: str) -> None:
    make, places = UNPICKLABLE[name]
    stage = make()
    with pytest.raises(Exception):  # noqa: B017, PT011 - pickle's own, of many types
        pickle.dumps(stage)
    found = problems(pack(stage).failure())
    assert all(isinstance(problem, UserFunctionFailed) for problem in found)
    assert len(found) == len(places), found
    for problem, place in zip(found, places, strict=True):
        assert place in problem.node
        assert "cannot be pickled" in problem.reason
        assert "importable module" in render(problem)


def test_pack_and_unpack_give_the_stage() -> None:
    way = walked("holding")
    for stage in way.stages.values():
        assert_same(outcome(unwrap(pack(stage).bind(unpack)), way.case.inputs), outcome(stage, way.case.inputs))


def test_pack_and_unpack_refuse_what_is_no_stage() -> None:
    assert pack(nn.Linear(2, 2)).failure() == WrongStage("Linear", "Graph, Prepared, Calibrated, Converted or Lowered")
    assert isinstance(unpack("text").failure(), BadConfig)
    assert isinstance(unpack(pickle.dumps(3)).failure(), WrongStage)
    data = unwrap(pack(holding()))
    for damaged in (b"", b"text", data[:-20], data[: len(data) // 2], data.replace(b"Holding", b"Missing")):
        assert isinstance(unpack(damaged).failure(), UserFunctionFailed)


def test_cloudpickle_carries_what_plain_pickle_cannot() -> None:
    cloudpickle = pytest.importorskip("cloudpickle")
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    graph = nested()
    assert_same(outcome(pickle.loads(cloudpickle.dumps(graph)), (x,)), outcome(graph, (x,)))
    assert stale(pickle.loads(cloudpickle.dumps(graph))) == set()


# Results and what they hold


def an_error(cls: type) -> Any:
    """An error of a type, each field filled by its own type."""
    types = typing.get_type_hints(cls)
    filled = {str: "a name", int: 3, float: 0.5, tuple[str, ...]: ("one", "two"), Any: Statistics("a digest")}
    return cls(*(filled[types[each.name]] for each in fields(cls)))


ERRORS = typing.get_args(Problem)


@pytest.mark.parametrize("cls", ERRORS, ids=lambda cls: cls.__name__)
def test_errors_and_results_pickle(cls: type) -> None:
    error = an_error(cls)
    result = Failure(Several((error, error)))
    assert again(error) == error
    assert again(result) == result
    assert render(again(result).failure()) == render(result.failure())
    assert again(Success(error)) == Success(error)


OBSERVERS = [
    MinMax(),
    MovingAverageMinMax(),
    PerChannelMinMax(INT8_NARROW_PER_CHANNEL),
    MovingAveragePerChannelMinMax(INT8_NARROW_PER_CHANNEL),
    Histogram(),
    FixedQParams(QuantSpec(), 1 / 256, 0),
]


@pytest.mark.parametrize("observer", OBSERVERS, ids=lambda observer: type(observer).__name__)
def test_observers_and_their_states_pickle(observer: Any) -> None:
    state = observer.update(observer.init(), torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    assert again(observer) == observer
    assert again(observer.statistic) == observer.statistic
    assert hash(again(observer.statistic)) == hash(observer.statistic)
    assert again(state) == state
    assert again(observer.finish(state)) == observer.finish(state)


def test_sites_and_statistics_pickle() -> None:
    stage = walked("resnet").stages["calibrate"]
    assert again(stage.prepared.sites) == stage.prepared.sites
    assert again(stage.statistics) == stage.statistics
    arrived = again(stage)
    assert {fold.key for fold in arrived.prepared.folds} == set(arrived.statistics.measured)
