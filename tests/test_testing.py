"""The material that the other tests are made of: random models, the zoo, metrics, the oracle."""

from __future__ import annotations

import copy
import math
import pickle
import random
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st

from qfunc.edge.statements import StatementTracer
from qfunc.testing import FAMILIES, Input, Program, build, max_abs_error, models, oracle, programs, same_bits, sqnr
from qfunc.testing.write import write_program
from tests.zoo import ZOO, ZooCase

each = pytest.mark.parametrize("case", ZOO, ids=str)
with_oracle = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")


def run(module, inputs):
    with torch.no_grad():
        return module(*copy.deepcopy(inputs))


# The zoo


@each
def test_zoo_runs_traces_and_repeats(case: ZooCase) -> None:
    model, inputs = case.build()
    again, same_inputs = case.build()
    assert not model.training
    assert same_bits(inputs, same_inputs)
    output = run(model, inputs)
    assert same_bits(output, run(again, same_inputs))
    assert same_bits(output, run(torch.fx.symbolic_trace(model), inputs))


@each
def test_zoo_signals_are_alive_and_bounded(case: ZooCase) -> None:
    model, _ = case.build()
    batches = case.batches()
    outputs = [run(model, batch) for batch in batches]
    assert not same_bits(outputs[0], outputs[1])
    assert all(max_abs_error(output, output) == 0 for output in outputs)


@with_oracle
@pytest.mark.parametrize("case", [case for case in ZOO if not case.oracle], ids=str)
def test_oracle_quantizes_the_zoo(case: ZooCase) -> None:
    model, inputs = case.build()
    before = copy.deepcopy(model.state_dict())
    quantized = oracle.quantize(model, case.batches())
    assert 10 < sqnr(run(model, inputs), run(quantized, inputs)) < math.inf
    assert same_bits(before, model.state_dict())


def test_names_of_the_zoo_are_unique() -> None:
    assert len({case.name for case in ZOO}) == len(ZOO)


# Random models


@given(models())
def test_models_run_trace_and_repeat(case) -> None:
    before = copy.deepcopy(case.example_inputs)
    output = run(case.module, case.example_inputs)
    assert same_bits(output, run(build(case.program).module, case.example_inputs))
    with torch.no_grad():
        assert same_bits(output, case.module(**case.named_inputs))
    assert same_bits(before, case.example_inputs), "an input was written to"
    assert not any(module.training for module in case.module.modules())
    assert same_bits(output, run(torch.fx.symbolic_trace(case.module), case.example_inputs))


@given(models(aliasing=True, families=("conv", "activation", "shape", "inplace", "arithmetic")))
def test_aliasing_models_run_and_trace(case) -> None:
    output = run(case.module, case.example_inputs)
    assert same_bits(output, run(_traced(case.module), case.example_inputs))


def _traced(module):
    """An fx graph that also holds the statements which write in place."""
    return torch.fx.GraphModule(module, StatementTracer().trace(module))


@given(models())
def test_models_run_at_any_batch_size(case) -> None:
    for size in (1, 5):
        (batch,) = case.batches(1, size)
        run(case.module, batch)


@given(models(max_nodes=6))
def test_models_print_as_they_are_built(case) -> None:
    scope = {"Program": Program, "Input": Input, "build": build}
    again = eval(repr(case), scope)
    assert again.program == case.program
    assert same_bits(again.module.state_dict(), case.module.state_dict())


@given(models(max_nodes=6))
def test_models_are_copied_and_pickled(case) -> None:
    output = run(case.module, case.example_inputs)
    for other in (copy.deepcopy(case.module), pickle.loads(pickle.dumps(case.module))):
        assert same_bits(output, run(other, case.example_inputs))


@settings(max_examples=20)
@given(st.sampled_from(FAMILIES), st.data())
def test_families_are_all_drawn_alone(family: str, data) -> None:
    case = data.draw(models(families=(family, "conv"), max_nodes=5))
    run(case.module, case.example_inputs)


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown families"):
        write_program(random.Random(0).choice, families=("convolution",))


def test_programs_shrink() -> None:
    strategy = programs(max_nodes=5, families=("conv", "activation", "arithmetic"))
    few = settings(max_examples=300, derandomize=True)
    found = find(strategy, lambda program: any(" + " in line for line in program.body), settings=few)
    assert len(found.body) == 1
    assert len(found.inputs) == 1
    assert not found.setup


def _features(program: Program) -> set[str]:
    text, targets = program.description, [target for target, _ in program.setup]
    called = [line for line in program.body for name in targets if f"self.{name}(" in line]
    return {
        name
        for name, present in {
            "in place": "inplace=True" in text or "_(" in text or "+=" in text,
            "tied": any(".weight" in target for target in targets),
            "shared module": len(called)
            > len(set(targets) & {line.split("self.")[1].split("(")[0] for line in called}),
            "default input": bool(program.defaults) and "gain" in "".join(program.body),
            "dict input": any(spec.form == "dict" for spec in program.inputs),
            "nested output": program.result.startswith(("(", "{", "[")),
            "size": ".shape" in text or ".size(" in text,
            "functional weights": "nn.Parameter" in text,
            "depthwise": "groups=4" in text,
            "padding mode": "'reflect'" in text or "'circular'" in text,
            "same padding": "'same'" in text,
            "block": "nn.Sequential" in text,
            "transposed module": "nn.ConvTranspose" in text,
            "transposed function": "F.conv_transpose" in text,
            "output size": "output_size=[" in text,
        }.items()
        if present
    }


def test_some_hundred_programs_have_every_feature() -> None:
    seen: set[str] = set()
    for seed in range(400):
        seen |= _features(write_program(random.Random(seed).choice))
    missing = {
        "in place", "tied", "shared module", "default input", "dict input", "nested output", "size",
        "functional weights", "depthwise", "padding mode", "same padding", "block",
        "transposed module", "transposed function", "output size",
    } - seen  # fmt: skip
    assert not missing


def test_aliasing_programs_read_what_was_overwritten() -> None:
    families = ("conv", "shape", "identity", "inplace")
    overwritten = {
        aliasing: sum(
            _reads_overwritten(write_program(random.Random(seed).choice, families=families, aliasing=aliasing))
            for seed in range(100)
        )
        for aliasing in (False, True)
    }
    assert overwritten[False] == 0
    assert overwritten[True] > 10


def _reads_overwritten(program: Program) -> bool:
    """Whether the outputs change when every in-place operator of the traced model writes to a copy."""
    case = build(program)
    graph = _traced(case.module)
    output = run(graph, case.example_inputs)
    copied = _OutOfPlace(graph).run(*copy.deepcopy(case.example_inputs))
    return (
        max_abs_error(output, copied) > 1e-4
    )  # sums over copies, which have other strides, may differ in the last bit


class _OutOfPlace(torch.fx.Interpreter):
    """Gives in-place operators a copy of their operand; a result that nothing reads goes by the operand's name."""

    def run_node(self, n: torch.fx.Node):
        operand = n.args[0] if n.args and isinstance(n.args[0], torch.fx.Node) else None
        held = self.env.get(operand)
        if isinstance(held, torch.Tensor):
            self.env[operand] = held.clone()
        with torch.no_grad():
            result = super().run_node(n)
        return result.clone() if isinstance(result, torch.Tensor) else result


def test_hypothesis_is_imported_late() -> None:
    code = "import sys, qfunc.testing; assert 'hypothesis' not in sys.modules; qfunc.testing.models"
    subprocess.run([sys.executable, "-c", code], check=True)


# Metrics


def test_metrics_take_nested_outputs_and_nan() -> None:
    a = {"y": (torch.ones(2), [torch.tensor([1.0, math.nan])]), "n": 3}
    assert same_bits(a, copy.deepcopy(a))
    assert math.isnan(max_abs_error(a, a))
    assert math.isnan(sqnr(a, a))
    assert not same_bits(a, {"y": (torch.ones(2), (torch.tensor([1.0, math.nan]),)), "n": 3})
    assert not same_bits(torch.ones(2), torch.ones(2, 1))


def test_metrics_refuse_other_structures() -> None:
    with pytest.raises(ValueError, match="structure"):
        sqnr((torch.ones(1),), [torch.ones(1)])
    with pytest.raises(ValueError, match="shape"):
        max_abs_error(torch.ones(1), torch.ones(2))


# The oracle


@with_oracle
def test_oracle_tells_what_is_observed_and_shared() -> None:
    case = next(case for case in ZOO if case.name == "squeezenet")
    model, inputs = case.build()
    prepared = oracle.prepare(model, inputs, "x86")
    calibrated = oracle.calibrate(prepared, case.batches())
    observed = oracle.observed_values(calibrated)
    assert {o.observer for o in observed} == {"HistogramObserver"}
    groups = {o.shared for o in observed}
    assert any(len(group) > 1 for group in groups), "a pool shares its input's observer"
    qparams = oracle.observer_qparams(calibrated)
    assert qparams["x" if "x" in qparams else "input_1"] != ((1.0,), (0,))
    for group in groups:
        assert len({qparams[name] for name in group}) == 1
    assert oracle.observer_qparams(prepared) != qparams, "calibrate worked on a copy"
    weights = oracle.weight_qparams(oracle.reference(calibrated))
    assert len(weights["0"][0]) == 8


@with_oracle
@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack", "onednn"])
def test_oracle_has_the_engines(backend: str) -> None:
    if backend not in oracle.engines():
        pytest.skip(f"this torch has no {backend}")
    case = next(case for case in ZOO if case.name == "resnet")
    model, inputs = case.build()
    before = torch.backends.quantized.engine
    assert sqnr(run(model, inputs), run(oracle.quantize(model, case.batches(), backend), inputs)) > 10
    assert torch.backends.quantized.engine == before


@with_oracle
def test_oracle_hides_only_its_own_warnings() -> None:
    class Loud(torch.nn.Module):
        def forward(self, x):
            warnings.warn("mine", UserWarning, stacklevel=2)
            return x.relu()

    with pytest.warns(UserWarning, match="mine"):
        oracle.fuse(Loud().eval())


# What conftest gives


def test_shared_images_fit_the_shared_model(cifar) -> None:
    logits = run(cifar.model, (cifar.images[:100],))
    assert (logits.argmax(1) == cifar.labels[:100]).float().mean() > 0.75
    assert cifar.calibration.shape == (1000, 3, 32, 32)


def test_torchvision_is_there(torchvision_zoo) -> None:
    model, example = torchvision_zoo.build("squeezenet1_1")
    assert run(model, (example,)).shape == (1, 1000)
