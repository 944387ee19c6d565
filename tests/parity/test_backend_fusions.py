"""Each backend fuses what torch.ao's fuses: every pattern of torch.ao's own tables, for evaluation and for training."""

import operator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import qfunc
from qfunc import MatchAllNode, explain_fusion, fuse, materialize, trace, unwrap
from qfunc.testing import oracle

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

BACKENDS = {name: getattr(qfunc, name.upper()) for name in oracle.BACKENDS}
SHAPES = {"1d": (3, 4, 9), "2d": (3, 4, 6, 5), "3d": (2, 4, 4, 3, 5)}
OPTIONS = {
    "Conv": {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1},
    "Batc": {"num_features": 4},
    "Line": {"in_features": 4, "out_features": 4},
    "Leak": {"negative_slope": 0.2},
}
"""By how the name of the class begins."""


class Chain(nn.Module):
    """The operators of a pattern, one after the other; what is no part of the match is computed from `y`.

    The values of the steps in `read` are returned as well, and so are read by something else than the next step.
    """

    def __init__(self, pattern, read=(), beside=None):
        super().__init__()
        self.steps, self.read = [], read
        self.add_module("beside", beside)
        self._value(pattern)

    def _value(self, pattern):
        """The position of a pattern's value; of the two inputs, the positions are -1 and -2."""
        if pattern is MatchAllNode:
            return -2
        made, *operands = pattern if isinstance(pattern, tuple) else (pattern, None)
        sources = [-1 if operand is None else self._value(operand) for operand in operands]
        name = ""
        if isinstance(made, type):
            name = f"m{len(self.steps)}"
            self.add_module(name, made(**OPTIONS.get(made.__name__[:4], {})))
        self.steps.append((name or made, sources))
        return len(self.steps) - 1

    def forward(self, x, y):
        values = [*[None] * len(self.steps), y if self.beside is None else self.beside(y), x]
        for position, (step, sources) in enumerate(self.steps):
            call = getattr(self, step) if isinstance(step, str) else step
            values[position] = call(*(values[source] for source in sources))
        last = values[len(self.steps) - 1]
        return (last, *(values[position] for position in self.read)) if self.read else last


def built(pattern, read=(), beside=None, training=False):
    """A model of a pattern with random parameters and statistics, and inputs for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Chain(pattern, read, beside() if beside else None)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight.data, module.running_var):
                    tensor.uniform_(0.5, 2.0)
                for tensor in (module.bias.data, module.running_mean):
                    tensor.normal_()
        first = type(model.m0).__name__
        shape = (6, 4) if first == "Linear" else SHAPES[first[-2:]]
        return model.train(training), (torch.randn(shape), torch.randn(shape))


def label(pattern):
    if isinstance(pattern, tuple):
        first, *operands = pattern
        return f"{label(first)}({','.join(map(label, operands))})"
    return f"{pattern.__module__.rpartition('.')[2].strip('_')}.{pattern.__name__}"


@dataclass(frozen=True)
class Case:
    backend: str
    pattern: object

    def __str__(self):
        return f"{self.backend}-{label(self.pattern)}"

    @property
    def theirs(self):
        return {"backend_config": oracle.backend_config(self.backend)}

    @property
    def ours(self):
        return BACKENDS[self.backend]


CASES = [Case(name, pattern) for name in BACKENDS if oracle.available() for pattern in oracle.fusion_patterns(name)]
each = pytest.mark.parametrize("case", CASES, ids=str)

REFUSED = {"functional.leaky_relu(linear.Linear)", "torch.tanh(linear.Linear)"}
"""Patterns that torch.ao lists and cannot fuse, as it makes no modules of these functions; qfunc fuses them."""

NO_MODULE = r"Incorrect types for input modules: Linear and (function|builtin)"
UNTRAINABLE = r"not yet supported in QAT|Cannot fuse train modules"
"""How torch.ao fails where a pattern is for evaluation only, which its table does not tell."""

UNLISTED = (
    (torch.relu, nn.Conv2d),
    (torch.relu, (nn.BatchNorm2d, nn.Conv2d)),
    (nn.ReLU6, nn.Conv2d),
    (F.relu, (operator.add, nn.Conv2d, MatchAllNode)),
    (F.relu, (torch.add, MatchAllNode, (nn.BatchNorm2d, nn.Conv2d))),
    (operator.mul, nn.Conv2d, MatchAllNode),
    (operator.add, nn.Conv1d, MatchAllNode),
    (torch.sigmoid, nn.Linear),
    (F.relu, nn.BatchNorm1d),
    (nn.ReLU, nn.ConvTranspose2d),
    (nn.ReLU, (nn.BatchNorm2d, nn.ConvTranspose2d)),
    (F.relu, (nn.BatchNorm3d, nn.ConvTranspose3d)),
)
"""What resembles patterns, and no backend fuses whole."""


def unfit_for_training(pattern):
    """Whether qfunc has a pattern for evaluation only, because torch.ao fails at it."""
    text = label(pattern)
    return "BatchNorm" in text and any(part in text for part in ("ConvTranspose", "add", "LeakyReLU"))


def calls(graph):
    """The operators of an fx graph, or of a graph."""
    if isinstance(graph, torch.fx.Graph):
        return [node for node in graph.nodes if node.op.startswith("call_")]
    return [node for node in graph if node.kind not in ("placeholder", "get_attr", "output")]


def close(one, other):
    """Equal but for the rounding of float32, of which folding makes some more."""
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(close, one, other))
    return torch.allclose(one, other, rtol=2e-6, atol=2e-6 * one.abs().max().item())


def run(module, inputs):
    with torch.no_grad():
        return module(*inputs)


@pytest.mark.parametrize("name", BACKENDS)
def test_names(name):
    assert BACKENDS[name].name == name


@each
def test_evaluation(case):
    model, inputs = built(case.pattern)
    traced = unwrap(trace(model, inputs))
    fused = unwrap(fuse(traced, backend=case.ours))
    made = unwrap(explain_fusion(traced, backend=case.ours)).fused
    assert len(calls(fused)) == len(made) == 1
    assert close(run(model, inputs), run(unwrap(materialize(fused)), inputs))
    if label(case.pattern) in REFUSED:
        with pytest.raises(AssertionError, match=NO_MODULE):
            oracle.fuse(model, **case.theirs)
        return
    theirs = oracle.fuse(model, **case.theirs)
    assert len(calls(theirs.graph)) == 1
    assert close(run(theirs, inputs), run(unwrap(materialize(fused)), inputs))
    assert made[0].module == type(theirs.m0).__name__


@each
def test_a_second_user_of_what_is_inside(case):
    """Neither swallows a value that something else reads."""
    for inner in range(len(Chain(case.pattern).steps) - 1):
        model, inputs = built(case.pattern, read=(inner,))
        traced = unwrap(trace(model, inputs))
        fused = unwrap(fuse(traced, backend=case.ours))
        report = unwrap(explain_fusion(traced, backend=case.ours))
        assert calls(traced)[inner].id in fused.nodes
        assert close(run(model, inputs), run(unwrap(materialize(fused)), inputs))
        assert_alike(oracle.fuse(model, **case.theirs), fused, report, inputs)


def others():
    """For each backend what another one fuses, and what none does."""
    known = dict.fromkeys(case.pattern for case in CASES)
    for name in BACKENDS:
        own = {case.pattern for case in CASES if case.backend == name}
        yield from (Case(name, pattern) for pattern in (*known, *UNLISTED) if pattern not in own)


@pytest.mark.parametrize("case", tuple(others()) if CASES else (), ids=str)
def test_what_the_table_does_not_list(case):
    """It is left alone, or fused as far as it is listed, by both."""
    model, inputs = built(case.pattern)
    traced = unwrap(trace(model, inputs))
    fused = unwrap(fuse(traced, backend=case.ours))
    report = unwrap(explain_fusion(traced, backend=case.ours))
    assert len(calls(fused)) > 1
    assert_alike(oracle.fuse(model, **case.theirs), fused, report, inputs)


def assert_alike(theirs, fused, report, inputs):
    """The same values, and as many operators; sums and products with ReLU are only observed as one by torch.ao."""
    assert close(run(theirs, inputs), run(unwrap(materialize(fused)), inputs))
    functional = [chain for chain in report.fused if chain.pattern.startswith(("add", "mul"))]
    assert len(calls(theirs.graph)) == len(calls(fused)) + len(functional)


@pytest.mark.parametrize("add", [torch.add, operator.add])
@pytest.mark.parametrize("relu", [False, True])
def test_a_sum_of_two_convolutions(add, relu):
    """One of them takes the sum behind it."""
    case = Case("onednn", (add, nn.Conv2d, MatchAllNode))
    pattern = (nn.ReLU, case.pattern) if relu else case.pattern
    model, inputs = built(pattern, beside=lambda: nn.Conv2d(4, 4, 1))
    fused = unwrap(fuse(unwrap(trace(model, inputs)), backend=case.ours))
    theirs = oracle.fuse(model, **case.theirs)
    assert close(run(theirs, inputs), run(unwrap(materialize(fused)), inputs))
    assert len(calls(fused)) == len(calls(theirs.graph)) == 2


def test_observed_as_one():
    """torch.ao folds the norm and then takes a linear and what follows for one pattern; here that is one chain."""
    for name, activations in {"x86": (nn.ReLU,), "onednn": (nn.ReLU, nn.LeakyReLU, nn.Tanh, torch.tanh)}.items():
        for activation in activations:
            model, inputs = built((activation, (nn.BatchNorm1d, nn.Linear)))
            fused = unwrap(fuse(unwrap(trace(model, inputs)), backend=BACKENDS[name]))
            assert len(calls(fused)) == 1
            prepared = oracle.prepare(model, inputs, name, **Case(name, ()).theirs)
            assert len(oracle.observed_values(prepared)) == 2


def trained(module, inputs):
    """What one step in training mode gives: the output, and by parameters as they were, gradients; and statistics."""
    module.train()
    was = {name: tuple(value.flatten().tolist()) for name, value in module.state_dict().items()}
    out = module(*inputs)
    out.square().sum().backward()
    gradients = {was[name]: parameter.grad for name, parameter in module.named_parameters()}
    statistics = {was[name]: value for name, value in module.named_buffers()}
    return out.detach(), gradients, statistics


def same_training(one, other):
    assert close(one[0], other[0])
    for ours, theirs in zip(one[1:], other[1:], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(close(ours[key].float(), theirs[key].float()) for key in ours)


@each
def test_training(case):
    model, inputs = built(case.pattern, training=True)
    traced = unwrap(trace(model, inputs))
    fused = unwrap(fuse(traced, backend=case.ours, qat=True))
    made = unwrap(explain_fusion(traced, backend=case.ours, qat=True)).fused
    ours = trained(unwrap(materialize(fused)), inputs)
    same_training(trained(built(case.pattern, training=True)[0], inputs), ours)
    if label(case.pattern) in REFUSED:
        with pytest.raises(AssertionError, match=NO_MODULE):
            oracle.fuse(model, qat=True, **case.theirs)
        return
    if unfit_for_training(case.pattern):
        with pytest.raises(Exception, match=UNTRAINABLE):
            oracle.fuse(model, qat=True, **case.theirs)
        assert len(calls(fused)) > 1
        return
    theirs = oracle.fuse(model, qat=True, **case.theirs)
    same_training(trained(theirs, inputs), ours)
    assert len(calls(theirs.graph)) == len(calls(fused)) == len(made) == 1
    assert made[0].module == type(theirs.m0).__name__
