"""Every way of writing what runs on plain codes, between two layers: it gets its kernel, and the kernel is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

import qfunc
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8
from qfunc.testing import forms, sqnr
from qfunc.testing.kernel_law import kernels_off
from qfunc.testing.program import Input, Program, build

SIDES = (6, 5, 4)
CONVS = ("nn.Conv{n}d(3, 4, 3, padding=1)", "nn.Conv{n}d({c}, 4, 1)")
TRANSPOSED = (
    "nn.ConvTranspose{n}d({c}, 6, 4, stride=2, padding=1)",
    "nn.ConvTranspose{n}d({c}, 6, 3, 2, 1, output_padding=1, groups=2)",
    "nn.Sequential(nn.ConvTranspose{n}d({c}, 6, 2, 2), nn.BatchNorm{n}d(6), nn.ReLU())",
    "nn.Sequential(nn.ConvTranspose{n}d({c}, 6, 3, 3, dilation=2, bias=False), nn.ReLU6())",
    "nn.ConvTranspose{n}d({c}, 5, 3)",
)
NORMS = (
    "nn.Sequential(nn.ReLU(), nn.BatchNorm{n}d({c}), nn.ReLU())",
    "nn.Sequential(nn.MaxPool{n}d(2), nn.BatchNorm{n}d({c}), nn.ReLU6())",
    "F.relu(F.batch_norm(F.max_pool{n}d({x}, 2), self.mean, self.var))",
)
REDUCTIONS = ("{x}.sum(1, keepdim=True)", "torch.sum({x}, dim=(1, -1), keepdim=True)", "{x}.sum([1], True)")
ISLANDS = (  # what has no kernel of its own on this engine
    "{x} / (1 + {y}.abs())",
    "{x}.div({y}.abs() + 1)",
    "torch.div({x}, 0.73, rounding_mode='trunc')",
    "nn.ConstantPad{n}d(1, 0.5)",
    "F.pad({x}, (1, 0), value=-1.0)",
)
FORMS = (*TRANSPOSED, *NORMS, *REDUCTIONS, *forms.CURVES, *forms.DIFFERENCES, *forms.RESIZES)
FORMS += tuple(form for form in forms.POOLS if "Max" in form or "max" in form)
FORMS += tuple(form for form in forms.COPIES if "stack" in form)


def program(form: str, n: int) -> Program:
    """A convolution, the form on its result, and a convolution of that."""
    text = form.format(x="v0", y="v1", c=4, last=SIDES[n - 1], n=n)
    module = text.startswith("nn.")
    first = CONVS[0].format(n=n)
    setup = [("m0", first), ("m1", first), ("mean", "nn.Buffer(torch.randn(4))"), ("var", "nn.Buffer(torch.ones(4))")]
    setup += [("op", text)] if module else []
    body = ["v0 = self.m0(x0)", "v1 = self.m1(x0)", f"v2 = {'self.op(v0)' if module else text}"]
    x = Input("x0", ((2, 3, *SIDES[:n]),))
    channels = build(Program(0, (x,), (), tuple(setup), tuple(body), "v2")).module(*example(x)).shape[1]
    setup += [("m2", CONVS[1].format(n=n, c=channels))]
    return Program(0, (x,), (), tuple(setup), (*body, "v3 = self.m2(v2)"), "v3")


def example(x: Input) -> tuple[torch.Tensor, ...]:
    return (torch.randn(x.shapes[0], generator=torch.Generator().manual_seed(0)),)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_it_runs_on_codes_and_within_a_step(form: str, n: int) -> None:
    case = build(program(form, n))
    batches = case.batches(3)
    graph = qfunc.unwrap(qfunc.fuse(qfunc.unwrap(qfunc.trace(case.module, case.example_inputs))))
    calibrated = qfunc.unwrap(qfunc.calibrate(qfunc.unwrap(qfunc.prepare(graph)), batches, progress=False))
    converted = qfunc.unwrap(qfunc.convert(calibrated))
    lowered = qfunc.unwrap(qfunc.lower(converted))
    floats = [e for e in lowered.certificate.entries if not e.kernel or e.kernel == "float island"]
    assert bool(floats) == (form in ISLANDS), floats
    assert [off for off in kernels_off(converted, lowered, case.batches(2, 3)) if off] == []
    module = qfunc.unwrap(qfunc.materialize(lowered))
    assert sqnr(case.module(*batches[0]), module(*batches[0])) > 15


def lowered_with(model: nn.Module, x: torch.Tensor, backend: qfunc.BackendConfig, mapping: qfunc.QConfigMapping | None):
    graph = qfunc.unwrap(qfunc.fuse(qfunc.unwrap(qfunc.trace(model.eval(), x)), backend=backend))
    prepared = qfunc.unwrap(qfunc.prepare(graph, mapping, backend=backend))
    converted = qfunc.unwrap(qfunc.convert(qfunc.unwrap(qfunc.calibrate(prepared, [x], progress=False))))
    return converted, qfunc.unwrap(qfunc.lower(converted))


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("weight", [INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL], ids=["one scale", "a scale a channel"])
@pytest.mark.parametrize("axis", [0, 1])
def test_weights_of_transposed_convolutions(groups: int, weight: qfunc.QuantSpec, axis: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(4, 8, 4, 2, 1, groups=groups), nn.ConvTranspose2d(8, 2, 2, 2))
    x = torch.randn(2, 4, 5, 5)
    observer = qfunc.PerChannelMinMax(replace(weight, ch_axis=axis)) if weight.per_channel else qfunc.MinMax(weight)
    qconfig = qfunc.QConfig(qfunc.MinMax(), observer)
    mapping = qfunc.QConfigMapping().set_module_name("0", qconfig).set_module_name("1", qconfig)
    converted, lowered = lowered_with(model, x, qfunc.CPU, mapping)
    if weight.per_channel and axis == 0:  # as it was asked for, by name
        reasons = [entry.reason for entry in lowered.certificate.fallbacks]
        assert len(reasons) == 2
        assert all("scales along ch_axis=0, and its output channels are axis 1" in reason for reason in reasons)
        return
    assert [e.kernel for e in lowered.certificate.entries] == ["onednn.conv_transpose2d"] * 2
    assert [off for off in kernels_off(converted, lowered, [(x,)]) if off] == []
    assert sqnr(model(x), qfunc.unwrap(qfunc.materialize(lowered))(x)) > 25


@torch.no_grad()
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("entry", ["global", "type", "function"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_configuration_for_many_layers_means_output_channels(groups: int, entry: str, trained: bool) -> None:
    torch.manual_seed(0)
    observer: Any = qfunc.PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
    qconfig = qfunc.QConfig(qfunc.MinMax(), FakeQuantize(observer) if trained else observer)
    mapping = {
        "global": qfunc.QConfigMapping().set_global(qconfig),
        "type": qfunc.QConfigMapping().set_object_type(nn.ConvTranspose1d, qconfig),
        "function": qfunc.QConfigMapping().set_object_type(F.conv_transpose1d, qconfig),
    }[entry]

    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.weight = nn.ConvTranspose1d(4, 8, 4, 2, 1, groups=groups), nn.Parameter(torch.randn(8, 3, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv_transpose1d(self.up(x), self.weight)

    model, x = Up().eval(), torch.randn(2, 4, 5)
    converted, lowered = lowered_with(model, x, qfunc.CPU, mapping)
    meant = [e for e in lowered.certificate.entries if e.intended]
    assert [e.kernel for e in meant] == ["onednn.conv_transpose1d"] * (2 if entry == "global" else 1)
    told = [note.text for note in lowered.certificate.notes if "along axis 1, its output channels" in note.text]
    assert [text.endswith("and 1 more") for text in told] == [entry == "global"]
    assert [off for off in kernels_off(converted, lowered, [(x,)]) if off] == []
    assert sqnr(model(x), qfunc.unwrap(qfunc.materialize(lowered))(x)) > 25
    graph = qfunc.unwrap(qfunc.trace(model, x))
    theirs = qfunc.unwrap(qfunc.prepare(graph, mapping, backend=qfunc.NATIVE)).weights
    assert {w.spec.ch_axis for w in theirs.values()} == {0}  # the reference's rule


class Scaled(nn.Module):
    """A sum and a difference scaled by alpha."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, z = self.one(x), self.two(x)
        return self.last(torch.sub(torch.add(y, z, alpha=0.5), z, alpha=2))


@torch.no_grad()
@pytest.mark.parametrize("backend", [qfunc.CPU, qfunc.X86, qfunc.FBGEMM], ids=lambda backend: backend.name)
def test_sums_scaled_by_alpha(backend: qfunc.BackendConfig) -> None:
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(2, 3, 6, 6)
    converted, lowered = lowered_with(model, x, backend, None)
    kernels = {e.operator: e.kernel for e in lowered.certificate.entries if e.operator in ("add", "sub")}
    own = backend is qfunc.CPU
    assert [kernel.startswith("codes.") for kernel in kernels.values()] == [own, own]
    assert [off for off in kernels_off(converted, lowered, [(x,)]) if off] == []
    assert sqnr(model(x), qfunc.unwrap(qfunc.materialize(lowered))(x)) > 25


@torch.no_grad()
def test_a_clamp_that_leaves_the_qparams_is_one_of_codes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.Hardtanh(-0.5, 0.25), nn.Conv2d(4, 4, 1))
    x = torch.randn(2, 3, 6, 6)
    known = qfunc.FixedQParams(UINT8, 1 / 64, 128)
    mapping = qfunc.CPU.qconfig_mapping.set_output("_0", known).set_output("_2", known)
    converted, lowered = lowered_with(model, x, qfunc.CPU, mapping)
    assert [e.kernel for e in lowered.certificate.entries][2] == "codes.clamp"
    assert [off for off in kernels_off(converted, lowered, [(x,)]) if off] == []
