"""The kernels on torch's quantized tensors."""

import copy
import io
import pickle

import pytest
import torch

from qfunc.edge.kernels.contract import check
from qfunc.edge.kernels.quantized import (
    QUANTIZED_CONV,
    QConvCall,
    QuantizedAdd,
    QuantizedCat,
    QuantizedLinear,
    QuantizedMul,
)
from qfunc.edge.kernels.quantized_tensors import DequantizeTensor, QuantizeTensor
from qfunc.numerics.grid import Affine

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*:UserWarning")
ENGINES = sorted(e for e in torch.backends.quantized.supported_engines if e != "none")
OUT = Affine(0.5, 90)


def make(kind, engine, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dims = {"conv1d": 1, "conv2d": 2, "conv3d": 3, "linear": 0}[kind]
    weight = torch.randint(-63, 64, (8, 8, *[3] * dims), dtype=torch.int8, generator=generator)
    scale, bias = torch.rand(8, generator=generator) * 0.01 + 0.01, torch.randn(8, generator=generator)
    if not dims:
        return QuantizedLinear(weight, scale, bias, OUT, engine, relu=True), torch.randn(4, 8, generator=generator)
    ones = (1,) * dims
    module = QUANTIZED_CONV[dims](weight, scale, bias, QConvCall(0.5, 90, ones, ones, ones, relu=True), engine)
    return module, torch.randn(2, 8, *[6] * dims, generator=generator)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "linear"])
def test_packed_kernels_survive_copies_casts_and_other_engines(kind, engine):
    before = torch.backends.quantized.engine
    module, x = make(kind, engine)
    assert torch.backends.quantized.engine == before
    net = torch.nn.Sequential(QuantizeTensor(Affine(0.03, 100)), module, DequantizeTensor())
    expected = net(x)
    other, _ = make(kind, engine, seed=1)
    other.load_state_dict(module.state_dict())
    loaded = torch.nn.Sequential(net[0], other, net[2])
    nets = [copy.deepcopy(net), pickle.loads(pickle.dumps(net)), copy.deepcopy(net).half(), loaded]
    assert all(torch.equal(n(x), expected) for n in nets)
    assert list(module.state_dict()) == ["weight", "weight_scale", "bias"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "conv3d", "linear"])
def test_packed_kernels_script_and_save(kind, engine):
    module, x = make(kind, engine)
    net = torch.nn.Sequential(QuantizeTensor(Affine(0.03, 100)), module, DequantizeTensor())
    scripted = torch.jit.script(net)
    assert torch.equal(scripted(x), net(x))
    if (kind, engine) == ("conv3d", "qnnpack"):
        return  # torch cannot serialize QNNPACK's conv3d
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(x), net(x))


def test_pointwise_kernels_script():
    quantize = QuantizeTensor(Affine(0.03, 100))
    generator = torch.Generator().manual_seed(0)
    x = quantize(torch.randn(2, 3, 4, 4, generator=generator))
    y = quantize(torch.randn(2, 3, 1, 1, generator=generator))
    for module in (QuantizedAdd(OUT), QuantizedAdd(OUT, relu=True), QuantizedMul(OUT), QuantizedMul(OUT, relu=True)):
        scripted = torch.jit.script(module)
        assert torch.equal(scripted(y, x).int_repr(), module(x, y).int_repr())
    cat = QuantizedCat(OUT, 1)
    assert torch.equal(torch.jit.script(cat)([x, x]).int_repr(), cat([x, x]).int_repr())


def test_every_contract_of_the_host_report_can_be_run_again():
    from qfunc.edge.host import check_host
    from qfunc.edge.kernels.quantized_contracts import quantized_contracts

    report = check_host()
    for contract in quantized_contracts(report.quantized_layouts):
        assert check(contract) == report.verdict(contract.name)
