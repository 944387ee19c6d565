"""Standalone and custom modules, inputs and outputs of codes: converted, lowered by each engine, run and copied."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc import (
    CPU,
    X86,
    CustomConfig,
    QConfig,
    QConfigMapping,
    Standalone,
    calibrate,
    convert,
    fuse,
    layers,
    lower,
    materialize,
    prepare,
    trace,
    unwrap,
)
from qfunc.numerics.observers import MinMax, PerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC_PER_CHANNEL, UINT8
from qfunc.testing import sqnr
from tests.convert.forms import run
from tests.custom.test_custom_modules import GAIN, Gain, QuantizedGain

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
INSIDE = QConfigMapping().set_global(QConfig(MinMax(UINT8), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)))
ENGINES = ("onednn", "quantized", "reference")


class Block(nn.Module):
    """A standalone module with a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.two(F.relu(self.one(x))) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.block, self.pool = nn.Conv2d(3, 4, 3), Block(), nn.AdaptiveAvgPool2d(1)
        self.before, self.gain, self.head = nn.Linear(4, 8), Gain(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(self.block(F.relu(self.stem(x))))
        return self.head(self.gain(self.before(torch.flatten(y, 1))))


STANDALONES = {
    "the parent's": Standalone(),
    "its own mapping": Standalone(INSIDE),
    "another backend": Standalone(X86.qconfig_mapping, X86),
    "float": Standalone(QConfigMapping()),
}
BORDERS: dict[str, dict[str, Any]] = {
    "floats": {},
    "codes in": {"input_quantized_indexes": (0,)},
    "codes out": {"output_quantized_indexes": (0,)},
    "codes": {"input_quantized_indexes": (0,), "output_quantized_indexes": (0,)},
}


def converted_of(standalone: Standalone, borders: dict[str, Any], *, backend=CPU, equalize=None, **options: Any):
    custom = CustomConfig(standalone_types={Block: standalone}, custom_modules=(GAIN,), **borders)
    graph = unwrap(fuse(unwrap(trace(Net().eval(), X, custom=custom)), backend=backend, custom=custom))
    prepared = unwrap(prepare(graph, backend=backend, custom=custom, equalize=equalize))
    return unwrap(convert(unwrap(calibrate(prepared, [X], progress=False)), **options))


def computed(module: nn.Module, stage: Any, *, quantized: bool = False) -> Tensor:
    """What a model makes of X, whatever it takes and gives."""
    given = X
    for q in stage.input_qparams.values():
        given = torch.clamp(torch.round(X * (1 / q.scale)) + q.zero_point, *q.bounds).to(torch.uint8)
        if quantized:
            given = torch._make_per_tensor_quantized_tensor(given, q.scale, q.zero_point)
    found = run(module, given)
    for q in stage.output_qparams.values():
        found = found.int_repr() if quantized else found
        assert found.dtype == torch.uint8
        found = (found.float() - q.zero_point) * q.scale
    return found


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("standalone", STANDALONES)
def test_it_computes_what_the_model_does(standalone: str, borders: str, engine: str) -> None:
    backend, quantized = (X86, True) if engine == "quantized" else (CPU, False)
    converted = converted_of(STANDALONES[standalone], BORDERS[borders], backend=backend)
    lowered = unwrap(lower(converted, engine=engine))
    module = unwrap(materialize(lowered))
    expected = run(Net().eval(), X)
    assert sqnr(expected, computed(unwrap(materialize(converted)), converted)) > 20
    assert sqnr(expected, computed(module, lowered, quantized=quantized)) > (15 if lowered.certificate.limited else 20)
    assert type(module.gain) is QuantizedGain


@pytest.mark.parametrize("engine", ENGINES)
def test_copies_compute_the_same(engine: str) -> None:
    lowered = unwrap(lower(converted_of(STANDALONES["its own mapping"], BORDERS["codes"]), engine=engine))
    module, quantized = unwrap(materialize(lowered)), engine == "quantized"
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(*(computed(each, lowered, quantized=quantized) for each in (made, module)))


@pytest.mark.parametrize(("backend", "engine"), [(CPU, "onednn"), (X86, "quantized")], ids=str)
def test_codes_cross_the_border_of_a_standalone_module(backend: Any, engine: str) -> None:
    """Where both sides quantize a value alike, kernels inside take the codes of kernels outside, and give theirs."""
    lowered = unwrap(lower(converted_of(Standalone(), BORDERS["codes"], backend=backend), engine=engine))
    inside = [entry for entry in lowered.certificate.entries if entry.module.startswith("block")]
    assert len(inside) >= 2
    assert all(entry.kernel and entry.output == "uint8" for entry in inside), inside


@pytest.mark.parametrize("borders", BORDERS)
@pytest.mark.parametrize("standalone", STANDALONES)
def test_equalized_and_with_original_weights_too(standalone: str, borders: str) -> None:
    converted = converted_of(STANDALONES[standalone], BORDERS[borders], equalize=layers, keep_original_weights=True)
    assert any(node.kind == "mul" for node in converted.graph)
    for engine in ENGINES:
        lowered = unwrap(lower(converted, engine=engine))
        module = unwrap(materialize(lowered))
        assert sqnr(run(Net().eval(), X), computed(module, lowered, quantized=engine == "quantized")) > 15
        expected = {"stem", "before", "head"} | ({"block.one", "block.two"} if standalone != "float" else set())
        assert module.original_weights.keys() == expected


@pytest.mark.parametrize("name", ["stem", "block", "block.two", "gain", "head"])
def test_parts_of_it_may_be_kept_float_later(name: str) -> None:
    custom = CustomConfig(standalone_types={Block: Standalone()}, custom_modules=(GAIN,), input_quantized_indexes=(0,))
    graph = unwrap(fuse(unwrap(trace(Net().eval(), X, custom=custom)), custom=custom))
    calibrated = unwrap(calibrate(unwrap(prepare(graph, custom=custom)), [X], progress=False))
    second = CPU.qconfig_mapping.set_module_name(name, None)
    converted = unwrap(convert(calibrated, qconfig_mapping=second))
    module = unwrap(materialize(unwrap(lower(converted))))
    assert (type(module.gain) is Gain) == (name == "gain")
    assert sqnr(run(Net().eval(), X), computed(module, converted)) > 20
    assert any(node.origin.module.startswith(name) for node in converted.graph if node.id in converted.floats)
