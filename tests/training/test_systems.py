"""What people do with a module that trains, done with one that trains with fake quantization."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from qfunc import Switches, absorb, convert, fuse, lower, materialize, prepare_qat, render, switch, trace, unwrap
from qfunc.edge.fake_quantize import FakeQuantizer
from qfunc.edge.observer import ObserverError
from qfunc.errors import BadConfig, problems
from qfunc.result import QuantException
from tests.training.models import (
    Residual,
    differing,
    gradients,
    histograms,
    inputs,
    loss,
    tensors,
    train,
    training,
)  # fmt: skip

LEARNED = pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
FOLDINGS = pytest.mark.parametrize("folding", ["approximate", "exact"])

# Optimizers -----------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 0.05),
    "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "SGD fused": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 0.003),
    "AdamW": lambda p: torch.optim.AdamW(p, 0.003),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.003, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 0.003, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


@LEARNED
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_train_it_and_what_converted_computes_is_what_it_computes(name: str, learned: bool) -> None:
    stage, module = training(learned=learned)
    losses = train(module, OPTIMIZERS[name](module.parameters()), [inputs()] * 12)
    assert losses[-1] < losses[0]
    converted = unwrap(absorb(stage, module).bind(convert).bind(materialize))
    x = inputs(1)
    torch.testing.assert_close(converted.eval()(x), module.eval()(x), rtol=1e-4, atol=1e-4)


@LEARNED
def test_an_optimizer_that_runs_the_module_itself(learned: bool) -> None:
    stage, module = training(learned=learned)
    optimizer = torch.optim.LBFGS(module.parameters(), lr=0.05, max_iter=5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(module, inputs())
        value.backward()
        return value

    first = optimizer.step(closure)
    assert all(torch.isfinite(p).all() for p in module.parameters())
    assert optimizer.step(closure) < first
    unwrap(absorb(stage, module).bind(convert))


def test_parameter_groups_by_the_kind_of_layer() -> None:
    _, module = training()
    kinds = {nn.Conv2d: {"stem", "conv"}, nn.BatchNorm2d: {"bn", "bn2"}, nn.Linear: {"head"}}
    for kind, paths in kinds.items():
        assert {path for path, part in module.named_modules() if isinstance(part, kind)} == paths
    norms = [p for part in module.modules() if isinstance(part, nn.BatchNorm2d) for p in part.parameters()]
    others = [p for p in module.parameters() if not any(p is norm for norm in norms)]
    optimizer = torch.optim.SGD([{"params": norms, "lr": 0.0}, {"params": others, "weight_decay": 1e-4}], lr=0.05)
    before = tensors(module)
    train(module, optimizer, [inputs()])
    moved = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert {"stem.weight", "conv.weight", "head.weight", "head.bias"} <= moved
    assert not any(name.startswith("bn") for name in moved)


@LEARNED
def test_names_of_parameters_are_the_model_s_and_those_of_learned_qparams(learned: bool) -> None:
    _, module = training(learned=learned)
    names = {name for name, _ in module.named_parameters()}
    of_model = {name for name, _ in Residual().named_parameters()}
    assert of_model <= names
    more = {name for name in names - of_model if not name.endswith((".scale", ".zero_point"))}
    assert not more
    assert bool(names - of_model) == learned


def test_gradients_are_clipped_and_accumulated() -> None:
    _, module = training()
    module(inputs())
    once = copy.deepcopy(module)
    halves = inputs().split(2)
    switch(module, Switches(observe=False, freeze_norms=True))
    switch(once, Switches(observe=False, freeze_norms=True))
    for half in halves:
        (loss(module, half) / 2).backward()
    loss(once, inputs()).backward()
    assert not differing(gradients(module), gradients(once), 1e-5)
    norm = nn.utils.clip_grad_norm_(module.parameters(), 0.01)
    assert norm > 0.01
    clipped = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(clipped, torch.tensor(0.01))


def test_frozen_parts_stay_and_the_rest_trains() -> None:
    stage, module = training()
    for part in (module.stem, module.bn):
        part.requires_grad_(False)
    before = tensors(module)
    train(module, torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1), [inputs(), inputs(1)])
    same = {name for name in before if torch.equal(before[name], module.state_dict()[name])}
    assert {"stem.weight", "bn.weight", "bn.bias"} <= same
    assert "head.weight" not in same
    assert torch.equal(
        unwrap(absorb(stage, module)).prepared.graph.sources["model"].model.stem.weight, before["stem.weight"]
    )


# Averages of models ---------------------------------------------------------------------------------------------------

AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean of buffers too": {"use_buffers": True},
    "moving": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.5)},
}


@LEARNED
@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_the_module_round_as_it_does(name: str, learned: bool) -> None:
    stage, module = training(learned=learned)
    average = swa_utils.AveragedModel(module, **AVERAGES[name])  # before there is anything to round with
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    for seed in range(3):
        train(module, optimizer, [inputs(seed)])
        average.update_parameters(module)
    swa_utils.update_bn([inputs(0), inputs(1)], average)
    found = average.eval()(inputs(7))
    parts = [part for part in average.modules() if isinstance(part, FakeQuantizer)]
    assert parts
    assert all(part.ready for part in parts)
    for given in (average, average.state_dict()):
        converted = unwrap(absorb(stage, given).bind(convert).bind(materialize)).eval()
        torch.testing.assert_close(converted(inputs(7)), found, rtol=1e-4, atol=1e-4)


def test_averages_of_a_module_with_histograms() -> None:
    stage = histograms()
    module = unwrap(materialize(stage))
    average = swa_utils.AveragedModel(module)
    train(module, torch.optim.SGD(module.parameters(), 0.05), [inputs()])
    average.update_parameters(module)
    expected = average.eval()(inputs(7))
    assert torch.equal(expected, module.eval()(inputs(7)))
    converted = unwrap(absorb(stage, average).bind(convert).bind(materialize)).eval()
    torch.testing.assert_close(converted(inputs(7)), expected, rtol=1e-4, atol=1e-4)


def test_averages_follow_the_switches_of_the_module() -> None:
    _, module = training()
    switch(module, Switches(fake_quantize=False))
    average = swa_utils.AveragedModel(module)
    module(inputs())
    switch(module, Switches(fake_quantize=True))
    average.update_parameters(module)
    assert torch.equal(average.eval()(inputs(1)), module.eval()(inputs(1)))


# Parts that are changed -----------------------------------------------------------------------------------------------


def test_pruned_parts_train_and_are_absorbed_once_pruning_is_done() -> None:
    stage, module = training()
    prune.l1_unstructured(module.conv, "weight", 0.5)
    train(module, torch.optim.SGD(module.parameters(), 0.05), [inputs()] * 2)
    found = problems(absorb(stage, module).failure())
    assert {problem.node for problem in found} == {"conv.weight", "conv.weight_orig", "conv.weight_mask"}
    assert all("prune.remove" in render(problem) for problem in found)
    prune.remove(module.conv, "weight")
    model = unwrap(absorb(stage, module)).prepared.graph.sources["model"].model
    assert (model.conv.weight == 0).float().mean() == 0.5


def test_parametrized_parts_train_and_are_absorbed_once_that_is_taken_off() -> None:
    stage, module = training()
    parametrizations.weight_norm(module.conv, "weight")
    losses = train(module, torch.optim.SGD(module.parameters(), 0.05), [inputs()] * 8)
    assert losses[-1] < losses[0]
    assert all("remove_parametrizations" in render(problem) for problem in problems(absorb(stage, module).failure()))
    nn.utils.parametrize.remove_parametrizations(module.conv, "weight")
    weight = unwrap(absorb(stage, module)).prepared.graph.sources["model"].model.conv.weight
    assert torch.equal(weight, module.conv.weight)


def test_synchronous_norms_train_and_cannot_be_frozen() -> None:
    stage, module = training()
    module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    assert isinstance(module.bn, nn.SyncBatchNorm)
    switch(module, Switches(freeze_norms=False))
    with pytest.raises(QuantException) as raised:
        switch(module, Switches(freeze_norms=True))
    assert [problem.node for problem in problems(raised.value.error)] == ["bn", "bn2"]
    unwrap(absorb(stage, module))


# Precision ------------------------------------------------------------------------------------------------------------


@FOLDINGS
@LEARNED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype, learned: bool, folding: str) -> None:
    stage, module = training(learned=learned, folding=folding)
    plain = copy.deepcopy(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.05)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for x in [inputs()] * 8:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            value = loss(module, x)
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
    train(plain, torch.optim.SGD(plain.parameters(), 0.05), [inputs()] * 8)
    assert {t.dtype for n, t in tensors(module).items() if n.endswith(("scale", "min_val"))} == {torch.float32}
    assert abs(value.item() - loss(plain, inputs()).item()) < 0.1
    lowered = unwrap(absorb(stage, module).bind(convert).bind(lower).bind(materialize)).eval()
    torch.testing.assert_close(lowered(inputs(1)), module.eval()(inputs(1)), rtol=1e-2, atol=2e-2)


@LEARNED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_qparams_keep_their_type_when_the_module_is_cast(dtype: torch.dtype, learned: bool) -> None:
    stage, module = training(learned=learned)
    module(inputs())
    before = {path: tensors(part) for path, part in module.named_modules() if isinstance(part, FakeQuantizer)}
    module.to(dtype)
    for path, held in before.items():
        assert not differing(tensors(module.get_submodule(path)), held)
    out = module(inputs().to(dtype))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)
    unwrap(absorb(stage, module).bind(convert))


def test_a_model_in_double_precision_is_told_to_have_no_kernels() -> None:
    model, x = Residual().double().train(), inputs().double()
    graph = unwrap(trace(model, x).bind(lambda graph: fuse(graph, qat=True)))
    assert "float64" in render(prepare_qat(graph).failure())


def test_a_scale_that_learning_has_made_negative_is_taken_for_the_least() -> None:
    stage, module = training(learned=True)
    module(inputs())
    with torch.no_grad():
        module.get_parameter("conv.weight_fake_quant.scale")[1] = -0.5
    again = unwrap(materialize(stage))
    again.load_state_dict(module.state_dict())
    assert torch.equal(again.eval()(inputs(1)), module.eval()(inputs(1)))
    converted = unwrap(absorb(stage, module).bind(convert).bind(materialize)).eval()
    torch.testing.assert_close(converted(inputs(1)), module(inputs(1)), rtol=1e-4, atol=1e-4)


# Checkpointed parts ---------------------------------------------------------------------------------------------------


def _later(module: nn.Module, x: Tensor, *, reentrant: bool) -> Tensor:
    return checkpoint(module, x, use_reentrant=reentrant)  # type: ignore[no-any-return]


@FOLDINGS
@LEARNED
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_module_learns_what_it_learns_without(reentrant: bool, learned: bool, folding: str) -> None:
    _, module = training(learned=learned, folding=folding)
    plain = copy.deepcopy(module)
    sides = [(module, lambda x: _later(module, x, reentrant=reentrant)), (plain, plain)]
    optimizers = [torch.optim.SGD(side.parameters(), 0.05, momentum=0.9) for side, _ in sides]
    for seed in range(3):
        for (side, call), optimizer in zip(sides, optimizers, strict=True):
            optimizer.zero_grad()
            loss(call, inputs(seed).requires_grad_()).backward()
            optimizer.step()
            assert gradients(side)
        assert not differing(gradients(module), gradients(plain))
        assert not differing(tensors(module), tensors(plain))


class Segments(nn.Module):
    """Calls parts of itself by checkpoint, in the way that a model's own forward does."""

    def __init__(self, module: nn.Module, *, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = module, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return _later(self.body, torch.tanh(x), reentrant=self.reentrant) * 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_fake_quantized_twice_is_measured_once(reentrant: bool) -> None:
    _, module = training()
    seen: list[Tensor] = []
    part = module.get_submodule("activation_post_process_1")
    measure = part._measure
    part._measure = lambda x: (seen.append(x), measure(x))[1]
    calls: list[int] = []
    part.register_forward_hook(lambda *_: calls.append(1))
    loss(Segments(module, reentrant=reentrant), inputs().requires_grad_()).backward()
    assert (len(calls), len(seen)) == (2, 1)


# Data, modes and other ways to run it ---------------------------------------------------------------------------------


def test_workers_of_a_data_loader() -> None:
    _, module = training()
    data = TensorDataset(torch.cat([inputs(seed) for seed in range(4)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads
        batches = [x for (x,) in DataLoader(data, 4, num_workers=1)]
    assert len(train(module, torch.optim.SGD(module.parameters(), 0.05), batches)) == 4


@LEARNED
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_it_observes_and_trains_later(mode: Any, learned: bool) -> None:
    stage, module = training(learned=learned)
    other = copy.deepcopy(module)
    with mode():
        module(inputs())
    other(inputs())
    assert not differing(tensors(module), tensors(other))
    train(module, torch.optim.SGD(module.parameters(), 0.05), [inputs()])
    train(other, torch.optim.SGD(other.parameters(), 0.05), [inputs()])
    assert not differing(tensors(module), tensors(other))
    unwrap(absorb(stage, module))


def test_torch_func() -> None:
    _, module = training()
    module(inputs())
    module.eval()
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())

    def value(given: dict[str, Tensor]) -> Tensor:
        return loss(lambda x: torch.func.functional_call(module, (given, buffers), (x,)), inputs(1))

    found = torch.func.grad(value)(parameters)
    loss(module, inputs(1)).backward()
    assert not differing({name: found[name] for name in gradients(module)}, gradients(module), 1e-6)
    module.train()

    def observing(given: dict[str, Tensor]) -> Tensor:
        return loss(lambda x: torch.func.functional_call(module, given, (x,)), inputs())

    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):  # as torch's own batch norms
        torch.func.grad(observing)(parameters)


def test_stateless_calls_leave_the_module_as_it_is() -> None:
    _, module = training()
    module(inputs())
    before = tensors(module)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    torch.func.functional_call(module, state, (inputs(1),))
    assert not differing(tensors(module), before)
    assert differing(dict(state), before)


def test_hooks_and_apply() -> None:
    _, module = training()
    seen: list[str] = []
    module.conv.register_forward_hook(lambda part, given, out: seen.append("forward"))
    module.conv.register_full_backward_hook(lambda part, given, out: seen.append("backward"))
    module.apply(lambda part: seen.append("applied") if isinstance(part, nn.Linear) else None)
    loss(module, inputs()).backward()
    assert seen == ["applied", "forward", "backward"]


def test_the_code_can_be_written_anew() -> None:
    _, module = training()
    module(inputs())
    expected = module.eval()(inputs(1))
    module.recompile()
    assert torch.equal(module(inputs(1)), expected)
    graph = module.graph
    next(node for node in graph.nodes if node.target == "head").target = "head"
    graph.lint()
    assert torch.equal(torch.fx.GraphModule(module, graph)(inputs(1)), expected)


def test_what_traces_through_it_is_told_how_not_to() -> None:
    _, module = training()
    with pytest.raises(ObserverError) as raised:
        torch.fx.symbolic_trace(module)
    assert isinstance(raised.value.problem, BadConfig)
    assert "is_leaf_module" in raised.value.problem.remedy


def test_torch_script() -> None:
    _, module = training()
    module(inputs())
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # both are deprecated
        traced = torch.jit.trace(module, inputs(), check_trace=False)
        assert torch.equal(traced(inputs(1)), module(inputs(1)))
        with pytest.raises(QuantException, match="not scripted"):
            torch.jit.script(module)


def test_export_of_what_has_been_trained() -> None:
    _, module = training()
    module(inputs())
    program = torch.export.export(module.eval(), (inputs(),))
    torch.testing.assert_close(program.module()(inputs(1)), module(inputs(1)), rtol=0, atol=1e-6)


def test_without_data_shapes_alone() -> None:
    _, module = training()
    assert module.to("meta").train().eval().train()(inputs().to("meta")).shape == (4, 4)
