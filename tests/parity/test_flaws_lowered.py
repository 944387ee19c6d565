"""Where torch.ao is wrong or fails: each model, lowered, is as near to the float one as its quantization steps make it.

The bound is `tests.parity.error_bound`'s, of every element. What torch.ao makes of the same model fails, cannot be
converted, or is beyond the bound of the parity backend by the factor that is stated.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils._pytree import tree_leaves

from qfunc import (
    CPU,
    X86,
    Calibrated,
    Converted,
    CustomConfig,
    Histogram,
    MinMax,
    QConfig,
    QConfigMapping,
    calibrate,
    check_host,
    convert,
    fuse,
    lower,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.backends.qconfigs import PER_CHANNEL_DYNAMIC
from qfunc.ir import Graph
from qfunc.numerics.affine import dequantize
from qfunc.numerics.qparams import INT8_SYMMETRIC, UINT8_REDUCED
from qfunc.testing import oracle
from qfunc.testing.metrics import same_bits
from tests.parity import test_flaws as models
from tests.parity.error_bound import error_bounds

ENGINES = ("onednn", "quantized", "reference")
NOTHING = CustomConfig()
BACKENDS = {"default": CPU, "parity": X86}
IMAGE = (4, 4, 8, 8)


class SeveralSites(nn.Module):
    """One layer and one activation at two sites, of which the first has the larger range."""

    def __init__(self):
        super().__init__()
        self.fc, self.swish = nn.Linear(8, 8), nn.Hardswish()

    def forward(self, x):
        return self.swish(self.fc(5 * x)), self.swish(self.fc(x))


class TwoCats(nn.Module):
    """Both concatenations hold `a`, and other ranges besides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.d, self.e = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.b.weight.mul_(30)

    def forward(self, x):
        a, b, c = self.a(x), self.b(x), self.c(x)
        return self.d(torch.cat([a, b], 1)), self.e(torch.cat([c, a], 1))


class SubAlpha(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return torch.sub(self.one(x), self.two(x), alpha=3), torch.add(self.one(x), self.two(x), alpha=0.5)


class SecondUser(nn.Module):
    """The linear is read before the ReLU as well."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        y = F.linear(x, self.weight)
        return F.relu(y), y - 1


class PReLU(nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self.conv, self.prelu = nn.Conv2d(4, 4, 3), nn.PReLU(parameters)
        nn.init.uniform_(self.prelu.weight, -0.5, 2.0)

    def forward(self, x):
        return self.prelu(self.conv(x))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(8, 8)
        self.kernel, self.weight = nn.Parameter(torch.randn(4, 4, 1, 1) / 2), nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        x = F.conv2d(self.conv(input=x), weight=self.kernel)
        return F.linear(input=self.fc(input=x), weight=self.weight)


class OwnBias(nn.Module):
    """A parameter of a layer is read beside it."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(x) + self.fc.bias


class SharedWeight(nn.Module):
    """A linear function and a product read one weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x):
        return F.linear(x, self.weight) + x * self.weight[0]


class Chain(nn.Module):
    """Fifteen hundred functions in a row, between two layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.one(x)
        for _ in range(1500):
            x = F.relu(x)
        return self.two(x)


class EndsInFloat(nn.Module):
    """No backend quantizes the last operator."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        return torch.cumsum(self.fc(x), 1)


@dataclass(frozen=True)
class Flaw:
    """A model, the shape of its input, and what torch.ao gives: an exception, or the least factor beyond the bound."""

    name: str
    model: Any
    shape: tuple[int, ...]
    theirs: float | tuple[type[Exception], str]
    mapping: QConfigMapping | None = None
    lowered: bool = True
    """Whether it is torch.ao's lowered model that is wrong, not its reference model."""

    def __str__(self):
        return self.name


DYNAMIC = QConfigMapping().set_global(PER_CHANNEL_DYNAMIC)
SIMPLE = QConfigMapping().set_global(QConfig(MinMax(UINT8_REDUCED), MinMax(INT8_SYMMETRIC)))
FLAWS = (
    Flaw("one module at several sites", SeveralSites, (16, 8), 2),
    Flaw("a fused module's other site", models.OtherSite, IMAGE, 10),
    Flaw("add with alpha", models.AlphaBehindConvolution, IMAGE, 10),
    Flaw("sub and add with alpha", SubAlpha, IMAGE, 10),
    Flaw("second user of a dynamic linear", SecondUser, (16, 8), 10, DYNAMIC),
    Flaw("two cats that share an operand", TwoCats, IMAGE, 5),
    Flaw("reflect padding", lambda: models.Padded("reflect", 1), IMAGE, 2, lowered=False),
    Flaw("replicate padding", lambda: models.Padded("replicate", 1), IMAGE, (ValueError, "'padding_mode' replicate")),
    Flaw("circular padding", lambda: models.Padded("circular", 1), IMAGE, (ValueError, "'padding_mode' circular")),
    Flaw("same padding", lambda: models.Padded("zeros", "same"), IMAGE, (RuntimeError, "instead found type 'tuple'")),
    Flaw("same reflect padding", lambda: models.Padded("reflect", "same"), IMAGE, (TypeError, "tuple of ints")),
    Flaw("same replicate padding", lambda: models.Padded("replicate", "same"), IMAGE, (ValueError, "replicate")),
    Flaw("same circular padding", lambda: models.Padded("circular", "same"), IMAGE, (ValueError, "circular")),
    Flaw("prelu with one parameter", lambda: PReLU(1), IMAGE, 10),
    Flaw("prelu with a parameter a channel", lambda: PReLU(4), IMAGE, 10),
    Flaw("keywords", Keywords, IMAGE, (AssertionError, "Dequantize index 0 exceeded")),
    Flaw("tied weights", models.Tied, (16, 8), (TypeError, "must be Tensor, not method")),
    Flaw("a weight with two readers", SharedWeight, (16, 8), (KeyError, "weight")),
    Flaw("a parameter read beside its layer", OwnBias, (16, 8), (TypeError, "invalid combination of arguments")),
    Flaw("in place on aliased values", models.InPlace, IMAGE, 10),
    Flaw("a chain of 1,500 functions", Chain, (16, 8), (RecursionError, "maximum recursion depth"), SIMPLE),
)


@dataclass(frozen=True)
class Built:
    """A model in evaluation mode, its data, its graph, and the reference form."""

    model: nn.Module
    batches: list[torch.Tensor]
    traced: Graph
    calibrated: Calibrated
    converted: Converted


def built(model, shape, backend, mapping=None, custom=NOTHING):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, batches = model().eval(), [torch.randn(shape) for _ in range(2)]
    traced = unwrap(trace(module))
    prepared = unwrap(prepare(unwrap(fuse(traced, backend=backend)), mapping, backend=backend, custom=custom))
    calibrated = unwrap(calibrate(prepared, batches, progress=False))
    return Built(module, batches, traced, calibrated, unwrap(convert(calibrated)))


@cache
def built_flaw(flaw, backend):
    return built(flaw.model, flaw.shape, BACKENDS[backend], flaw.mapping)


def lowered(converted, engine):
    if engine not in (*check_host().engines, "reference"):
        pytest.skip(f"this host has no engine {engine}")
    return unwrap(lower(converted, engine=engine))


def excess(made, stage, module):
    """The error of the worst element as a share of its bound, beside which there is that of computing in float32."""
    worst = 0.0
    for batch in made.batches:
        with torch.no_grad():
            expected, actual = tree_leaves(made.model(batch.clone())), tree_leaves(module(batch.clone()))
        bounds = error_bounds(made.traced, made.converted, stage, batch.clone())
        for exact, got, bound in zip(expected, actual, bounds, strict=True):
            error = (exact - got).abs()
            worst = max(worst, float((error / (bound + 1e-5 * exact.abs().max())).max()))
    return worst


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("flaw", FLAWS, ids=str)
def test_within_its_steps(flaw, engine, backend):
    made = built_flaw(flaw, backend)
    stage = lowered(made.converted, engine)
    assert excess(made, stage, unwrap(materialize(stage))) <= 1


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
@pytest.mark.filterwarnings("ignore:All inputs of this cat operator must share:UserWarning")
@pytest.mark.parametrize("flaw", FLAWS, ids=str)
def test_what_torch_ao_gives(flaw):
    made = built_flaw(flaw, "parity")
    if isinstance(flaw.theirs, tuple):
        error, message = flaw.theirs
        with default_recursion_limit(), pytest.raises(error, match=message):
            theirs(flaw, made)(made.batches[0])
    else:
        assert excess(made, lowered(made.converted, "reference"), theirs(flaw, made)) > flaw.theirs


@contextmanager
def default_recursion_limit():
    """Python's own, whatever others in this process have raised it to."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def theirs(flaw, made):
    """torch.ao's model with its default configuration, or its dynamic one."""
    import torch.ao.quantization as ao

    dynamic = ao.QConfigMapping().set_global(ao.per_channel_dynamic_qconfig)
    batches = [(batch,) for batch in made.batches]
    prepared = oracle.prepare(made.model, batches[0], dynamic if flaw.mapping is DYNAMIC else "x86")
    return (oracle.convert if flaw.lowered else oracle.reference)(oracle.calibrate(prepared, batches))


CODES = CustomConfig(output_quantized_indexes=(0,))


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_quantized_output_of_an_operator_that_is_not(backend):
    """torch.ao: `output_quantized_idxs` is ignored without a word, and the output is float."""
    problem = trace(EndsInFloat().eval()).bind(lambda graph: prepare(graph, backend=backend, custom=CODES)).failure()
    assert (problem.node, "set_output('cumsum'" in problem.remedy) == ("cumsum", True)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_quantized_output_as_that_remedy_has_it(engine, backend):
    mapping = backend.qconfig_mapping.set_output("cumsum", Histogram())
    made = built(EndsInFloat, (16, 8), backend, mapping, CODES)
    stage = lowered(made.converted, engine)
    module, qparams = unwrap(materialize(stage)), stage.output_qparams[0]

    def in_float(x):
        codes = module(x)
        if codes.is_quantized:
            return codes.dequantize()
        assert codes.dtype is torch.uint8
        return dequantize(codes, torch.tensor(qparams.scale), torch.tensor(qparams.zero_point))

    assert excess(made, stage, in_float) <= 1


@pytest.mark.parametrize("engine", ENGINES)
def test_converting_twice(engine):
    """torch.ao: conversion changes the prepared model, which cannot be converted, or used, again."""
    made = built_flaw(FLAWS[1], "default")
    before = unwrap(materialize(made.calibrated))
    modules = [unwrap(materialize(lowered(unwrap(convert(made.calibrated)), engine))) for _ in range(2)]
    after = unwrap(materialize(made.calibrated))
    with torch.no_grad():
        for batch in made.batches:
            assert same_bits(modules[0](batch), modules[1](batch))
            assert same_bits(before(batch), after(batch))
    assert unwrap(convert(made.calibrated)) == made.converted
