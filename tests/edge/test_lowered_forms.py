"""Every way of writing what runs on plain codes, between two layers: it gets its kernel, and the kernel is right."""

from __future__ import annotations

import pytest
import torch

import qfunc
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
    "F.prelu({x}, torch.full((1,), 0.3))",
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
