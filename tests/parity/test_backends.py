"""Every backend takes a model the whole way, on every engine: what an engine cannot run stays float, with a reason."""

import pytest
import torch
from torch import nn

from qfunc import CPU, TENSORRT, X86, calibrate, convert, fuse, lower, prepare, trace, unwrap
from qfunc.testing import Case, check_laws
from qfunc.testing.strategies import BACKENDS, ENGINES


class Mixed(nn.Module):
    """Layers, and operators that share, fix and have their own range."""

    def __init__(self):
        super().__init__()
        self.one, self.up, self.two = nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.norm, self.relu, self.elu, self.swish = nn.BatchNorm2d(4), nn.ReLU(), nn.ELU(0.5), nn.Hardswish()
        self.pool, self.out = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.up(self.relu(self.one(x))))
        x = self.relu(self.two(x) + self.elu(x))
        return self.out(torch.flatten(self.pool(torch.cat([self.swish(x), torch.sigmoid(x)], 1)), 1))


def mixed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Mixed().eval(), tuple((torch.randn(2, 4, 8, 8),) for _ in range(2))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_laws(backend, engine):
    model, batches = mixed()
    assert not check_laws(Case(model, batches[0], batches, backend, engine))


def certificate(backend, engine):
    model, batches = mixed()
    prepared = unwrap(prepare(unwrap(fuse(unwrap(trace(model, batches[0])), backend=backend)), backend=backend))
    calibrated = unwrap(calibrate(prepared, batches, progress=False))
    return {
        entry.operator: entry for entry in unwrap(lower(unwrap(convert(calibrated)), engine=engine)).certificate.entries
    }


def test_only_plain_linear_layers_take_int8_activations():
    for engine, operator in (("onednn", "conv2d + relu"), ("quantized", "conv2d + relu"), ("quantized", "linear")):
        assert "uint8 activations" in certificate(TENSORRT, engine)[operator].reason
    assert certificate(TENSORRT, "onednn")["linear"].kernel == "onednn.linear"


def test_transposed_convolutions_have_a_kernel_on_plain_codes():
    for backend in (CPU, X86):
        assert certificate(backend, "onednn")["conv_transpose2d"].kernel == "onednn.conv_transpose2d"


def test_an_elu_has_no_alpha_of_a_sum():
    assert certificate(X86, "onednn")["elu"].kernel
