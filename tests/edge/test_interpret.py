"""`interpret`: it computes what the materialized module computes, and shows every value on the way."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from qfunc import (
    Calibrated,
    CustomConfig,
    CustomModule,
    MinMax,
    PerChannelMinMax,
    Prepared,
    QConfig,
    QConfigMapping,
    R,
    calibrate,
    fuse,
    interpret,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.edge.interpret import interpreter
from qfunc.edge.observer import ObserverError
from qfunc.errors import BadBatch, BadConfig, QuantError, StaleSource, UserFunctionFailed, WrongStage
from qfunc.ir import Graph
from qfunc.numerics.qparams import INT8_NARROW_PER_CHANNEL
from qfunc.passes.stages import Site
from qfunc.testing import Case, Walk, cases, models, same_bits, walk
from qfunc.testing.walk import fingerprint, graph_of
from tests.zoo import ZOO, ZooCase

each_architecture = pytest.mark.parametrize("zoo", ZOO, ids=str)
Seen = list[tuple[str, Any]]


def failure(result: R[Any]) -> QuantError:
    found: QuantError = result.failure()
    return found


def copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def shown(stage: Any, batch: Any) -> tuple[Any, Seen]:
    """The output, and copies of all values that a hook saw."""
    seen: Seen = []
    output = unwrap(interpret(stage, batch, lambda id, value: seen.append((id, copied(value)))))
    return output, seen


def hold(way: Walk) -> None:
    """At every stage: the output is that of the module, every node is seen once in order, the batch stays."""
    for name, stage in way.stages.items():
        for inputs in way.inputs():
            try:
                expected = way.run(name, tuple(map(copied, inputs)))
            except (ObserverError, RuntimeError):
                continue  # qparams along an axis whose size changes from one batch to the next: no module runs
            before = fingerprint(inputs)
            output, seen = shown(stage, inputs)
            assert fingerprint(inputs) == before, name
            assert [id for id, _ in seen] == list(graph_of(stage).order), name
            assert same_bits(seen[-1][1], output), name
            assert same_bits(output, expected), name


@each_architecture
def test_architectures(zoo: ZooCase) -> None:
    model, inputs = zoo.build()
    way = walk(Case(model, inputs, tuple(zoo.batches(1))))
    assert len(way.stages) == 6
    hold(way)


@settings(max_examples=settings().max_examples // 2)
@given(data=st.data())
def test_random_models(data: st.DataObject) -> None:
    hold(walk(data.draw(cases(aliasing=data.draw(st.booleans()), configured=data.draw(st.booleans())))))


# The values that a hook is shown --------------------------------------------------------------------------------------


class _Values(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: Seen = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.seen.append((n.name, copied(value)))
        return value


def agree_with_fx(graph: Graph, inputs: tuple[Any, ...]) -> None:
    values = _Values(unwrap(materialize(graph)))
    with torch.no_grad():
        values.run(*map(copied, inputs))
    _, seen = shown(graph, inputs)
    expected = [(id, value) for id, value in values.seen if id in graph.nodes]  # the others load parameters
    assert [id for id, _ in seen] == [id for id, _ in expected]
    for (id, value), (_, wanted) in zip(seen, expected, strict=True):
        assert same_bits(value, wanted), id


@each_architecture
def test_values_of_an_unfused_graph_are_those_of_fx(zoo: ZooCase) -> None:
    model, inputs = zoo.build()
    agree_with_fx(unwrap(trace(model)), inputs)


@given(made=models(aliasing=True))
def test_values_of_random_unfused_graphs_are_those_of_fx(made: Any) -> None:
    agree_with_fx(unwrap(trace(made.module)), made.example_inputs)


def test_a_fused_node_is_seen_once_with_its_last_value() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 5)
    graph = unwrap(trace(model).bind(fuse))
    (id,) = (node.id for node in graph if node.post)
    _, seen = shown(graph, x)
    assert [name for name, _ in seen] == ["input_1", id, "output"]
    assert same_bits(dict(seen)[id], model(x).detach())


def folded(prepared: Prepared, batches: list[Any]) -> dict[str, Any]:
    """The states of all observers by their sites, folded by a hook."""
    at: dict[str, list[Site]] = {}
    for site in prepared.measured:
        for tap in site.taps:
            at.setdefault(tap, []).append(site)
    states = {site.id: site.observer.init() for site in prepared.measured}

    def fold(id: str, value: Any) -> None:
        for site in at.get(id, ()):
            states[site.id] = site.observer.update(states[site.id], value.detach())

    made = unwrap(interpreter(prepared))
    for batch in batches:
        unwrap(made.run(batch, fold))
    return states


def state_of(calibrated: Calibrated, site: Site) -> Any:
    """What `calibrate` keeps of a site."""
    return calibrated.statistics.state(site.folds)


@each_architecture
def test_observing_by_a_hook_is_observing_by_modules(zoo: ZooCase) -> None:
    model, inputs = zoo.build()
    mapping = QConfigMapping().set_global(QConfig(MinMax(), PerChannelMinMax(INT8_NARROW_PER_CHANNEL)))
    graph = unwrap(trace(model, inputs).bind(fuse))
    prepared, batches = unwrap(prepare(graph, mapping)), zoo.batches(2)
    calibrated = unwrap(calibrate(prepared, batches))
    assert prepared.measured or zoo.aliasing
    assert folded(prepared, batches) == {site.id: state_of(calibrated, site) for site in prepared.measured}


class _InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x[:, :2]
        z = y + 1
        y.mul_(3)
        return x + z.sum()


def test_a_value_that_is_written_to_is_seen_as_it_is_then() -> None:
    x = torch.arange(8.0).reshape(2, 4)
    before = x.clone()
    held: dict[str, Any] = {}
    graph = unwrap(trace(_InPlace().eval(), x))

    def hook(id: str, value: Any) -> None:
        held[id] = (value, copied(value))

    assert same_bits(unwrap(interpret(graph, x, hook)), _InPlace()(before.clone()))
    assert same_bits(x, before)
    values = list(held.values())
    assert same_bits(values[0][1], before)  # the input, before the write and after it
    assert same_bits(values[0][0], torch.cat([3 * before[:, :2], before[:, 2:]], 1))


def test_values_are_let_go() -> None:
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(4, 4), nn.Tanh()))).eval()
    graph = unwrap(trace(model))
    alive: list[Any] = []
    counts: list[int] = []

    def hook(id: str, value: Any) -> None:
        if id != "input_1":
            alive.append(weakref.ref(value))
            counts.append(sum(ref() is not None for ref in alive))

    unwrap(interpret(graph, torch.ones(1, 4), hook))
    assert counts[:-1] == [1] * (len(graph) - 2), "when a value is looked at, what it was computed from is gone"


# One interpreter for many batches -------------------------------------------------------------------------------------


def test_an_interpreter_runs_again_and_inside_its_own_hook() -> None:
    torch.manual_seed(0)
    made = unwrap(interpreter(unwrap(trace(nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()))))
    a, b = torch.randn(2, 4), torch.randn(5, 4)
    inner: list[Any] = []
    wanted = unwrap(made.run(a)), unwrap(made.run({"input": b}))
    assert same_bits(unwrap(made.run(b, lambda id, value: inner.append(unwrap(made.run(a))))), wanted[1])
    assert len(inner) == 4
    assert all(same_bits(value, wanted[0]) for value in inner)
    assert same_bits(unwrap(made.run((a,))), wanted[0])


def test_hooks_of_the_model_itself_run() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    model.register_forward_hook(lambda module, args, output: output * 10)
    model.register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    graph, x = unwrap(trace(model)), torch.randn(2, 4)
    assert same_bits(unwrap(interpret(graph, x)), model(x).detach())
    model.register_forward_hook(lambda module, args, output: 1 / 0)
    error = failure(interpret(unwrap(trace(model)), x))
    assert isinstance(error, UserFunctionFailed)
    assert (error.node, "ZeroDivisionError" in error.reason) == ("model", True)


class _Gain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class _ObservedGain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * x


def test_custom_modules_are_those_of_the_stage() -> None:
    gain = CustomModule(_Gain, lambda module, qconfig: _ObservedGain(), lambda module: _Gain())
    custom = CustomConfig(custom_modules=(gain,))
    model, x = nn.Sequential(nn.Linear(4, 3), _Gain()).eval(), torch.randn(2, 4)
    graph = unwrap(trace(model, x, custom=custom))
    prepared = unwrap(prepare(graph, custom=custom))
    for stage in (graph, prepared, unwrap(calibrate(prepared, [x]))):
        output, seen = shown(stage, x)
        assert [id for id, _ in seen] == list(graph.order)
        assert same_bits(output, unwrap(materialize(stage))(x).detach())
    assert not same_bits(unwrap(interpret(graph, x)), unwrap(interpret(prepared, x)))


# Errors ---------------------------------------------------------------------------------------------------------------


def net() -> Graph:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    return unwrap(trace(layers.eval()).bind(fuse))


FITS = torch.zeros(2, 3, 5, 5)


def test_a_batch_that_does_not_bind() -> None:
    error = failure(interpret(net(), (FITS, FITS)))
    assert error == BadBatch(0, "the model takes 'input', but 2 inputs were given")


def test_an_operator_that_fails_is_told_with_its_place_and_inputs() -> None:
    error = failure(interpret(net(), torch.zeros(2, 3, 6, 6)))
    assert isinstance(error, UserFunctionFailed)
    assert error.node == "3"
    assert "Linear fails on (" in error.reason
    assert "float32[2, 64]" in error.reason


def test_a_failure_among_fused_operators_is_told_at_their_node() -> None:
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(self.conv(x) + y)

    x = torch.zeros(1, 3, 5, 5)
    graph = unwrap(trace(Fused().eval(), (x, torch.zeros(1, 4, 5, 5))).bind(fuse))
    (node,) = (node for node in graph if node.post)
    error = failure(interpret(graph, (x, torch.zeros(1, 4, 3, 3))))
    assert isinstance(error, UserFunctionFailed)
    assert error.node == node.place
    assert "one of 3 fused operators" in error.reason
    assert "float32[1, 4, 5, 5]" in error.reason
    assert "float32[1, 4, 3, 3]" in error.reason


def counting_hook(id: str, value: Any) -> None:
    if id != "input_1":
        raise LookupError(id)


def test_a_hook_that_raises_is_told_with_the_node() -> None:
    error = failure(interpret(net(), FITS, counting_hook))
    assert isinstance(error, UserFunctionFailed)
    assert error.node == "0", "the place of the convolution, behind which the ReLU is fused"
    assert error.reason.startswith("the hook counting_hook raised LookupError")


def test_an_interrupt_goes_through() -> None:
    def hook(id: str, value: Any) -> None:
        raise KeyboardInterrupt

    made = unwrap(interpreter(net()))
    with pytest.raises(KeyboardInterrupt):
        made.run(FITS, hook)
    unwrap(made.run(FITS))  # without that hook


def stale() -> Graph:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    graph = unwrap(trace(model))
    with torch.no_grad():
        model[0].weight.add_(1)
    return graph


REFUSED: dict[type, Callable[[], R[Any]]] = {
    WrongStage: lambda: interpret(nn.Linear(2, 2), FITS),
    BadConfig: lambda: interpret(net(), FITS, 3),  # type: ignore[arg-type]
    StaleSource: lambda: interpret(stale(), torch.zeros(1, 4)),
}


@pytest.mark.parametrize("error", REFUSED)
def test_what_cannot_be_run_is_refused(error: type) -> None:
    assert type(failure(REFUSED[error]())) is error
