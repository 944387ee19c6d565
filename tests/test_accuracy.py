"""What quantization costs on real data, and on small architectures, next to torch.ao.

The bounds hold on every host: kernels that could overflow get limited weights, which costs a few tenths of a decibel
where the CPU has no VNNI.
"""

from statistics import mean
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from qfunc import X86, check_host, materialize, quantize, unwrap
from qfunc.testing import oracle, sqnr
from tests.zoo import ZOO

needs_oracle = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
ENGINES = ("onednn", "quantized")


def int8(model, batches, **options):
    return unwrap(materialize(unwrap(quantize(model, batches, progress=False, **options))))


def outputs(model, batches):
    with torch.no_grad():
        return [model(*batch) for batch in batches]


class Real(NamedTuple):
    model: nn.Module
    calibration: list[tuple[Tensor]]
    images: list[tuple[Tensor]]
    labels: Tensor
    logits: list[Tensor]

    def accuracy(self, logits: list[Tensor]) -> float:
        return 100 * float((torch.cat(logits).argmax(1) == self.labels).float().mean())


@pytest.fixture(scope="module")
def real(cifar):
    images = [(batch,) for batch in cifar.images.split(500)]
    calibration = [(batch,) for batch in cifar.calibration[:500].split(100)]
    return Real(cifar.model, calibration, images, cifar.labels, outputs(cifar.model, images))


@pytest.fixture(scope="module")
def their_noise(real):
    return sqnr(real.logits, outputs(oracle.quantize(real.model, real.calibration), real.images))


@needs_oracle
@pytest.mark.parametrize("engine", ENGINES)
def test_resnet20_at_parity(real, their_noise, engine):
    logits = outputs(int8(real.model, real.calibration, engine=engine, backend=X86), real.images)
    assert sqnr(real.logits, logits) >= their_noise - 0.1
    assert real.accuracy(logits) >= real.accuracy(real.logits) - 0.5


@needs_oracle
def test_resnet20_by_default(real, their_noise):
    logits = outputs(int8(real.model, real.calibration), real.images)
    assert sqnr(real.logits, logits) > their_noise + 3
    assert real.accuracy(logits) >= real.accuracy(real.logits) - 0.5


@needs_oracle
def test_small_architectures():
    """No case is far behind torch.ao, the parity backend is not behind on average, the default one is ahead."""
    rows = [_noises(case) for case in ZOO if not case.oracle]
    limited = check_host().saturates
    for name, theirs, parity, default in rows:
        for engine, noise in zip(ENGINES, parity, strict=True):
            assert noise >= theirs - (0.6 if limited else 0.3), (name, engine)
        assert default >= theirs, name
    for index in range(len(ENGINES)):
        assert mean(parity[index] - theirs for _, theirs, parity, _ in rows) >= (-0.2 if limited else -0.1)
    assert mean(default - theirs for _, theirs, _, default in rows) > 3


def _noises(case):
    """Signal to noise in dB on the calibrated data: of torch.ao, of parity on each engine, of the default.

    The mean over two draws of the data: on one, ties of rounding decide tenths of a decibel either way.
    """
    model, _ = case.build()
    batches = case.batches(4, 64)
    draws = [_noises_on(model, batches[:2]), _noises_on(model, batches[2:])]
    theirs, *ours, default = (mean(noises) for noises in zip(*draws, strict=True))
    return case.name, theirs, tuple(ours), default


def _noises_on(model, batches):
    expected = outputs(model, batches)
    parity = [int8(model, batches, engine=engine, backend=X86) for engine in ENGINES]
    made = (oracle.quantize(model, batches), *parity, int8(model, batches))
    return [sqnr(expected, outputs(module, batches)) for module in made]
