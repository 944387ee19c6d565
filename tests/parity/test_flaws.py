"""Where torch.ao is wrong or fails, the float model judges: every quantized output is near it."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from qfunc import CPU, X86, QConfig, QConfigMapping, materialize, quantize, unwrap
from qfunc.numerics.observers import MinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC, UINT8
from qfunc.testing import sqnr


class Shared(nn.Module):
    """Called at two sites with different ranges."""

    def __init__(self):
        super().__init__()
        self.fc, self.swish, self.out = nn.Linear(8, 8), nn.Hardswish(), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.swish(self.fc(x))), self.swish(self.fc(x.pow(3)))


class OtherSite(nn.Module):
    """One site of the convolution is followed by a batch norm and a ReLU, one by neither."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.2, 3.0)

    def forward(self, x):
        return self.relu(self.norm(self.conv(x))), self.conv(x)


class Alpha(nn.Module):
    def forward(self, x):
        return torch.add(x, x.flip(1), alpha=4)


class AlphaBehindConvolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return torch.add(self.conv(x), x, alpha=4).relu()


class TwoCats(nn.Module):
    """Both concatenations hold the same value, and have other ranges besides."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.d, self.e = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        a, b, c = self.a(x), self.b(x) * 2, self.c(x) * 3
        return self.d(torch.cat([a, b], 1)), self.e(torch.cat([b, c], 1))


class Padded(nn.Module):
    def __init__(self, mode, padding):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=padding, padding_mode=mode)

    def forward(self, x):
        return self.conv(x + 2).relu()


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.weight = nn.Conv2d(4, 4, 3), nn.Parameter(torch.randn(4, 4, 3, 3) / 6)

    def forward(self, x):
        return F.conv2d(self.conv(input=x).relu(), weight=self.weight, bias=None)


class Tied(nn.Module):
    """The weight of one linear is that of another, and of a function; its bias is read by an addition."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        return F.linear(self.two(self.one(x)), self.one.weight) + self.one.bias, x * self.one.weight[0]


class InPlace(nn.Module):
    """The view reads what the in-place operator wrote."""

    def __init__(self):
        super().__init__()
        self.conv, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.conv(x)
        view = y[:, :2]
        y.add_(1)
        return self.out(y), view * 2


class NormOfThreeDimensions(nn.Module):
    """The norm's channels are axis 1, the linear's the last; both have 6."""

    def __init__(self):
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.2, 3.0)

    def forward(self, x):
        return self.norm(self.fc(x)).relu()


class LinearReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.relu = nn.Linear(8, 8), nn.ReLU()

    def forward(self, x):
        return self.relu(self.fc(x))


class Sizes(nn.Module):
    """What is reshaped by its own sizes is quantized all the same."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        return self.fc(x.reshape(x.size(0), x.size(1) * x.size(2)))


@dataclass(frozen=True)
class Flaw:
    """A model, the shape of its input, and what torch.ao does with it."""

    name: str
    model: object
    shape: tuple
    theirs: str

    def __str__(self):
        return self.name


IMAGE = (4, 4, 8, 8)
FLAWS = (
    Flaw("shared", Shared, (16, 8), "one module for both sites, with the qparams of the last one"),
    Flaw("other_site", OtherSite, IMAGE, "the fused module replaces the unfused site as well"),
    Flaw("alpha", Alpha, IMAGE, "alpha is dropped"),
    Flaw("alpha_behind_convolution", AlphaBehindConvolution, IMAGE, "alpha is dropped"),
    Flaw("two_cats", TwoCats, IMAGE, "sharing is not transitive, and lowering takes the wrong qparams"),
    *(
        Flaw(f"{mode}_{padding}", lambda m=mode, p=padding: Padded(m, p), IMAGE, "padding modes are ignored, or fail")
        for mode in ("zeros", "reflect", "replicate", "circular")
        for padding in (1, "same")
    ),
    Flaw("keywords", Keywords, IMAGE, "fails in convert"),
    Flaw("tied", Tied, (16, 8), "fails in convert"),
    Flaw("in_place", InPlace, IMAGE, "the view misses the write"),
    Flaw("norm_of_three_dimensions", NormOfThreeDimensions, (8, 6, 4), "the norm is folded along the wrong axis"),
    Flaw("sizes", Sizes, (8, 4, 4), "the linear stays float"),
)


def seeded(flaw):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return flaw.model().eval(), [torch.randn(flaw.shape) for _ in range(4)]


@pytest.mark.parametrize("backend", [None, X86], ids=["default", "parity"])
@pytest.mark.parametrize("engine", ["onednn", "quantized"])
@pytest.mark.parametrize("flaw", FLAWS, ids=str)
def test_float_meaning(flaw, engine, backend):
    model, batches = seeded(flaw)
    lowered = unwrap(quantize(model, batches, engine=engine, backend=backend, progress=False))
    module = unwrap(materialize(lowered))
    with torch.no_grad():
        expected, actual = [model(b.clone()) for b in batches], [module(b.clone()) for b in batches]
    assert sqnr(expected, actual) > (31 if backend is None and engine == "onednn" else 24)


@pytest.mark.parametrize("backend", [None, X86], ids=["default", "parity"])
def test_type_of_one_part_of_a_fused_chain(backend):
    """torch.ao: LookupError, unless all parts of what is fused are configured alike."""
    model, batches = LinearReLU().eval(), [torch.randn(8, 8)]
    given = (backend or CPU).qconfig_mapping.global_qconfig
    mapping = QConfigMapping().set_object_type(nn.Linear, given)
    lowered = unwrap(quantize(model, batches, qconfig_mapping=mapping, backend=backend, progress=False))
    assert [(e.operator, bool(e.kernel)) for e in lowered.certificate.entries] == [("linear + relu", True)]


class Long(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.fc(x)
        for _ in range(1000):
            x = F.hardtanh(x + x, -1.0, 1.0)
        return self.fc(x)


def test_long_chain():
    """torch.ao: RecursionError on more than about a thousand chained functions."""
    torch.manual_seed(0)
    model, batch = Long().eval(), torch.randn(4, 4)
    mapping = QConfigMapping().set_global(QConfig(MinMax(UINT8), MinMax(INT8_SYMMETRIC)))
    lowered = unwrap(quantize(model, [batch], qconfig_mapping=mapping, progress=False, strict=True))
    assert lowered.certificate.in_int8 == lowered.certificate.total >= 1000
    with torch.no_grad():
        assert sqnr(model(batch), unwrap(materialize(lowered))(batch)) > 25
