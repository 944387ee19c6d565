"""The modules of the `quantized` engine: they copy, script, take awkward inputs and guard against the rest."""

from __future__ import annotations

import copy
import io
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc.edge.host import check_host
from qfunc.edge.kernels import quantized
from qfunc.edge.kernels import quantized_operators as operators
from qfunc.edge.kernels.contract import adversarial_codes, check
from qfunc.edge.kernels.conv import ConvCall, OnednnConv
from qfunc.edge.kernels.island import computed
from qfunc.edge.kernels.quantized import QUANTIZED_CONV, active_engine
from qfunc.edge.kernels.quantized_contracts import as_quantized
from qfunc.edge.kernels.quantized_dynamic import (
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedLinearDynamic,
    QuantizedLinearFloat16,
)
from qfunc.edge.kernels.quantized_every_contract import every_quantized_contract
from qfunc.edge.kernels.quantized_layers import (
    QUANTIZED_CONV_TRANSPOSE,
    QConvCall,
    QTransposedCall,
    QuantizedConvAdd2d,
    QuantizedLinearLeakyReLU,
    QuantizedLinearTanh,
)
from qfunc.edge.kernels.quantized_tensors import pad_quantized
from qfunc.engines.quantized import MOVES_OF_TENSORS
from qfunc.numerics.grid import Affine

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*:UserWarning")
ENGINES = check_host().quantized_engines
OUT, GIVEN = Affine(0.05, 90), Affine(0.03, 100)
X = as_quantized(torch.randint(0, 256, (2, 8, 5, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8), GIVEN)
FACTORS = (torch.arange(8.0) - 3, torch.ones(8))

MODULES: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
    "matmul": (operators.QuantizedMatmul(OUT), (X, X.transpose(2, 3))),
    "number": (operators.QuantizedNumber(OUT, -0.7, product=True), (X,)),
    "number relu": (operators.QuantizedNumber(OUT, 1.3, product=False, relu=True), (X,)),
    "pad": (operators.QuantizedPad((1, 0, 2, 1), "circular"), (X,)),
    "elu": (operators.QuantizedELU(OUT, 1.2), (X,)),
    "leaky_relu": (operators.QuantizedLeakyReLU(OUT, 0.3), (X,)),
    "hardswish": (operators.QuantizedHardswish(OUT), (X,)),
    "hardsigmoid": (operators.QuantizedHardsigmoid(), (X,)),
    "sigmoid": (operators.QuantizedSigmoid(OUT), (X,)),
    "softmax": (operators.QuantizedSoftmax(Affine(1 / 256, 0), 1), (X,)),
    "batch_norm": (operators.QuantizedBatchNorm(FACTORS[0], FACTORS[1], *FACTORS, OUT), (X,)),
    "layer_norm": (operators.QuantizedLayerNorm((6,), None, None, OUT), (X,)),
    "group_norm": (operators.QuantizedGroupNorm(2, *FACTORS, OUT), (X,)),
    "instance_norm": (operators.QuantizedInstanceNorm(*FACTORS, OUT, 1e-5), (X,)),
}


@pytest.mark.parametrize("name", MODULES)
def test_operators_copy_cast_pickle_and_script(name: str) -> None:
    module, inputs = MODULES[name]
    expected = module(*inputs).int_repr()
    others = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).half()]
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    assert all(torch.equal(other(*inputs).int_repr(), expected) for other in (*others, torch.jit.load(file)))


@pytest.mark.parametrize("number", [0, 0.0, 1, -1, 2.5, -300.0, 1e-5, 70])
@pytest.mark.parametrize("product", [True, False])
def test_sums_and_products_with_numbers(number: float, product: bool) -> None:
    real = X.dequantize().double() * number if product else X.dequantize().double() + number
    output = Affine(max((real.max() - real.min()).item(), 1e-3) / 250, 128)
    result = operators.QuantizedNumber(output, number, product=product)(X)
    exact = (real / output.scale + 128).clamp(0, 255)
    assert (result.int_repr().double() - exact).abs().max() < 1.01


def _layers(engine: str) -> dict[str, tuple[nn.Module, Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return torch.randint(-63, 64, shape, dtype=torch.int8, generator=generator)

    scale, bias = torch.rand(8, generator=generator) * 0.01 + 0.01, torch.randn(8, generator=generator)
    floats = torch.randn(3, 6, generator=generator)
    made: dict[str, tuple[nn.Module, Tensor]] = {}
    if check_host().verdict(f"quantized.conv_transpose2d[{engine}]").ok:
        ones = (1, 1)
        call = QTransposedCall(OUT.scale, OUT.zero_point, (2, 2), ones, ones, ones)
        parts = (weight(8, 4, 3, 3), scale[:1], bias[:4])
        made["conv_transpose"] = (QUANTIZED_CONV_TRANSPOSE[2](*parts, call, engine), X)
    made["linear_dynamic"] = (QuantizedLinearDynamic(weight(8, 6), scale, bias, engine, relu=True), floats)
    if check_host().verdict(f"quantized.linear_float16[{engine}]").ok:
        half = torch.randn(8, 6, generator=generator).half()
        made["linear_float16"] = (QuantizedLinearFloat16(half, bias, engine), floats)
    table = (weight(8, 4).view(torch.uint8), scale, bias)
    made["embedding"] = (QuantizedEmbedding(*table), torch.tensor([[1, 7], [0, 3]]))
    made["embedding_bag"] = (QuantizedEmbeddingBag(*table), torch.tensor([[1, 7], [0, 3]]))
    if engine == "onednn":
        made["leaky"] = (QuantizedLinearLeakyReLU(weight(8, 6), scale, bias, OUT, engine, negative_slope=0.2), X)
        made["tanh"] = (QuantizedLinearTanh(weight(8, 6), scale, bias, OUT, engine), X)
    return made


@pytest.mark.parametrize("engine", ENGINES)
def test_layers_survive_copies_casts_and_other_engines(engine: str) -> None:
    before = torch.backends.quantized.engine
    for name, (module, x) in _layers(engine).items():
        expected = module(x)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).half()]
        other = copy.deepcopy(module)
        for tensor in other.state_dict().values():
            tensor.zero_()
        other.load_state_dict(module.state_dict())
        with active_engine(engine):
            scripted = torch.jit.script(module)(x)
        for result in (*(one(x) for one in (*copies, other)), scripted):
            assert torch.equal(result, expected), name
        assert not any(tensor.is_quantized for tensor in module.state_dict().values())
    assert torch.backends.quantized.engine == before


@pytest.mark.skipif("onednn" not in ENGINES, reason="torch has no onednn engine here")
@pytest.mark.parametrize("shape", [(2, 4, 5, 6), (1, 4, 5, 6), (2, 1, 1, 1), (4, 5, 6), (3, 1, 4, 5, 6)])
def test_the_other_operand_of_a_fused_sum_may_broadcast_and_is_kept(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randint(-63, 64, (4, 8, 3, 3), dtype=torch.int8, generator=generator)
    scale, ones = torch.full((4,), 0.01), (1, 1)
    module = QuantizedConvAdd2d(weight, scale, None, QConvCall(0.4, 90, ones, ones, ones), "onednn")
    other = as_quantized(torch.randint(0, 256, shape, generator=generator).to(torch.uint8), GIVEN)
    kept = other.int_repr().clone()
    real = F.conv2d(X.dequantize(), weight.float() * 0.01, padding=1) + other.dequantize()
    result = module(X, other)
    assert torch.equal(other.int_repr(), kept)
    assert (result.int_repr() - (real / 0.4 + 90).clamp(0, 255)).abs().max() < 1.01


@pytest.mark.skipif("onednn" not in ENGINES, reason="torch has no onednn engine here")
@pytest.mark.parametrize("relu", [False, True])
def test_fused_sums_are_scripted(relu: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-63, 64, (4, 8, 3, 3), dtype=torch.int8, generator=generator)
    call = QConvCall(0.4, 90, (1, 1), (0, 0), (1, 1), relu=relu, pad=(1, 1, 1, 1), padding_mode="reflect")
    module = QuantizedConvAdd2d(weight, torch.full((4,), 0.01), None, call, "onednn")
    scripted = torch.jit.script(module)
    for shape in ((2, 4, 5, 6), (2, 4, 1, 1)):  # the second is added in float
        other = as_quantized(torch.randint(0, 256, shape, generator=generator).to(torch.uint8), GIVEN)
        with active_engine("onednn"):
            found = scripted(X, other)
        assert torch.equal(found.int_repr(), module(X, other).int_repr())


@pytest.mark.skipif("onednn" not in ENGINES, reason="torch has no onednn engine here")
def test_an_input_is_padded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    def pad(x: Tensor, *args: Any) -> Tensor:
        given.append(x)
        return pad_quantized(x, *args)

    monkeypatch.setattr(quantized, "pad_quantized", pad)
    weight, call = torch.ones((4, 8, 3, 3), dtype=torch.int8), QConvCall(0.4, 90, (2, 2), (0, 0), (1, 1))
    call = replace(call, pad=(1, 1, 1, 1), padding_mode="reflect")
    module = QUANTIZED_CONV[2](weight, torch.full((4,), 0.01), None, call, "onednn")
    assert module.guarded  # so that the sizes of the result are needed as well
    assert module(X).shape == (2, 4, 3, 3)
    assert len(given) == 1


def _geometries(seed: int, count: int) -> Iterator[tuple[int, int, tuple[int, ...], tuple[tuple[int, ...], ...]]]:
    """Channels of a group, outputs of it, sizes, and kernel, stride, padding and dilation of small convolutions."""
    draw = random.Random(seed)
    while count:
        dims = draw.choice((1, 2, 2, 3))
        kernel, size = ([draw.randint(1, most) for _ in range(dims)] for most in (4, 6))
        stride, dilation = ([draw.choice((1, 1, 2, 3)) for _ in range(dims)] for _ in range(2))
        padding = [draw.randint(0, 3) for _ in range(dims)]
        room = zip(size, kernel, padding, dilation, strict=True)
        if all(s + 2 * p > d * (k - 1) for s, k, p, d in room):
            count -= 1
            channels, outs = draw.choice((1, 1, 2, 3, 8, 16)), draw.choice((1, 2, 8, 16, 48))
            yield channels, outs, tuple(size), (tuple(kernel), tuple(stride), tuple(padding), tuple(dilation))


CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("engine", ["plain", *ENGINES])
def test_convolutions_of_any_small_shape_are_right(engine: str) -> None:
    """Windows larger than inputs, single ones in spite of a stride, ones in padding, many outputs of one channel."""
    generator = torch.Generator().manual_seed(4)
    for turn, (channels, outs, size, geometry) in enumerate(_geometries(5, 300)):
        kernel, stride, padding, dilation = geometry
        groups, zero_point = (1, 2, 3, 8)[turn % 4], (0, 100, 255)[turn % 3]
        weight = torch.randint(-63, 64, (outs * groups, channels, *kernel), dtype=torch.int8, generator=generator)
        x = torch.randint(0, 256, (1 + turn % 2, channels * groups, *size), generator=generator).to(torch.uint8)
        options = (stride, padding, dilation, groups)
        exact = CONVOLVE[len(size)](x.double() - zero_point, weight.double(), None, *options)
        step = max(exact.abs().max().item() / 120, 1.0)
        ones, codes = torch.ones(outs * groups), (exact / step + 128).clamp(0, 255)
        if engine == "plain":
            sums = OnednnConv(weight, ones, None, ConvCall(1.0, zero_point, 1.0, 0, "float32", *options))(x)
            found = (sums.double() / step + 128).clamp(0, 255)
        else:
            call = QConvCall(step, 128, *options)
            module = QUANTIZED_CONV[len(size)](weight, ones, None, call, engine)
            found = module(as_quantized(x, Affine(1.0, zero_point))).int_repr().double()
        assert found.shape == codes.shape, geometry
        assert (found - codes).abs().max() < 1.01, (tuple(weight.shape), tuple(x.shape), options)


@pytest.mark.skipif("onednn" not in ENGINES, reason="torch has no onednn engine here")
def test_fused_sums_of_any_small_shape_are_right() -> None:
    generator = torch.Generator().manual_seed(6)
    for turn, (channels, outs, size, geometry) in enumerate(_geometries(7, 200)):
        if len(size) != 2:
            continue
        kernel, stride, padding, dilation = geometry
        groups = (1, 2, 8)[turn % 3]
        weight = torch.randint(-63, 64, (outs * groups, channels, *kernel), dtype=torch.int8, generator=generator)
        x = torch.randint(0, 256, (2, channels * groups, *size), generator=generator).to(torch.uint8)
        options = (stride, padding, dilation, groups)
        exact = F.conv2d(x.double() - 100, weight.double(), None, *options)
        step = max(exact.abs().max().item() / 60, 1.0)
        other = torch.randint(64, 192, exact.shape, generator=generator).to(torch.uint8)
        call, given = QConvCall(step, 128, *options), as_quantized(other, Affine(step, 128))
        module = QuantizedConvAdd2d(weight, torch.ones(outs * groups), None, call, "onednn")
        found = module(as_quantized(x, Affine(1.0, 100)), given).int_repr()
        codes = (exact / step + other.double()).clamp(0, 255)
        assert (found.double() - codes).abs().max() < 1.01, (tuple(weight.shape), tuple(x.shape), options)


MOVED: dict[str, tuple[dict[str, object], ...]] = {
    "flatten": ({"start_dim": 1, "end_dim": -1}, {"start_dim": 2, "end_dim": 3}),
    "unflatten": ({"dim": 1, "sizes": (2, 4)},),
    "reshape": ({"shape": (2, -1)}, {"shape": (2, 4, 2, 30)}),
    "permute": ({"dims": (0, 2, 3, 1)}, {"dims": (3, 1, 0, 2)}),
    "transpose": ({"dim0": 1, "dim1": 2},),
    "squeeze": ({"dim": None}, {"dim": 1}),
    "unsqueeze": ({"dim": 0}, {"dim": -1}),
    "contiguous": ({},),
    "detach": ({},),
    "getitem": ({"index": 0}, {"index": (slice(None), slice(None, None, 2))}, {"index": (slice(None), [0, 2])}),
    "narrow": ({"dim": 1, "start": 2, "length": 3},),
    "expand": ({"size": (3, 2, 8, 5, 6)},),
    "repeat": ({"repeats": (1, 2, 1, 3)}, {"repeats": (2, 1, 2, 1, 3)}),
    "repeat_interleave": tuple({"repeats": 2, "dim": dim, "output_size": None} for dim in (1, -1, None)),
    "pixel_shuffle": ({"upscale_factor": 2},),
    "pixel_unshuffle": ({"downscale_factor": 1},),
    "channel_shuffle": ({"groups": 2}, {"groups": 4}),
    "flip": ({"dims": (1, -1)},),
    "select": ({"dim": 1, "index": -2},),
    "movedim": ({"source": 1, "destination": -1},),
    "index_select": ({"dim": 1, "index": torch.tensor([3, 0, 3])},),
    "dropout": ({"p": 0.5, "training": False},),
    "identity": ({},),
    "chunk": ({"chunks": 3, "dim": 1},),
    "split": ({"split_size": 3, "dim": 1}, {"split_size": [3, 5], "dim": 1}),
    "unbind": ({"dim": 1},),
}


@pytest.mark.parametrize("active", ENGINES)
@pytest.mark.parametrize("kind", sorted(MOVES_OF_TENSORS))
def test_what_moves_elements_moves_quantized_ones(kind: str, active: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for options in MOVED[kind]:
        for label, codes in adversarial_codes((2, 8, 5, 6), generator):
            if not codes.numel() and kind in ("reshape", "flatten", "unflatten", "expand", "getitem"):
                continue  # sizes that an empty batch does not have
            expected = computed(kind, {"input": codes, **options})
            with active_engine(active):
                found = computed(kind, {"input": as_quantized(codes, GIVEN), **options})
            parts = found if isinstance(found, (tuple, list)) else [found]
            wanted = expected if isinstance(expected, (tuple, list)) else [expected]
            for part, want in zip(parts, wanted, strict=True):
                assert (part.q_scale(), part.q_zero_point()) == (GIVEN.scale, GIVEN.zero_point), (options, label)
                assert torch.equal(part.int_repr(), want), (options, label)


@pytest.mark.skipif("onednn" not in ENGINES, reason="this torch has no onednn engine")
def test_threads_that_need_another_engine_wait_for_each_other() -> None:
    weight, given = torch.ones(4, 4, dtype=torch.int8), as_quantized(torch.ones(3, 4, dtype=torch.uint8), GIVEN)
    kernel = QuantizedLinearTanh(weight, torch.ones(4), None, Affine(1 / 128, 128), "onednn")
    expected, before, interval = kernel(given).int_repr(), torch.backends.quantized.engine, sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(kernel, [given] * 12000))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(each.int_repr(), expected) for each in found)
    assert torch.backends.quantized.engine == before


ENDS = """
import sys, torch
from qfunc.edge.kernels import quantized
from qfunc.edge.kernels import quantized_operators as operators
from qfunc.edge.kernels.quantized import QUANTIZED_CONV, QConvCall, active_engine
from qfunc.edge.kernels.quantized_dynamic import QuantizedEmbedding, QuantizedEmbeddingBag, QuantizedLinearDynamic
from qfunc.edge.kernels.quantized_layers import QUANTIZED_CONV_TRANSPOSE, QTransposedCall
from qfunc.numerics.grid import Affine
out = Affine(0.1, 3)
empty = torch.quantize_per_tensor(torch.zeros(0, 4, 4, 4), 0.1, 3, torch.quint8)
full = torch.quantize_per_tensor(torch.zeros(1, 4, 4, 4), 0.1, 3, torch.quint8)
weight, scale = torch.ones(4, 4, 1, 1, dtype=torch.int8), torch.ones(4)
table = (torch.ones(3, 4, dtype=torch.uint8), torch.ones(3), torch.zeros(3))
engine = sys.argv[2]
torch.backends.quantized.engine = engine
one, zero = (1, 1), (0, 0)
for call in sys.argv[1].splitlines():
    print(call, flush=True)
    try:
        eval(call)
    except (AssertionError, RuntimeError, IndexError, ValueError):
        pass
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_ends_the_process(engine: str) -> None:
    calls = (
        "operators.QuantizedHardswish(out)(empty)",
        "operators.QuantizedHardsigmoid()(empty)",
        "operators.QuantizedBatchNorm(torch.zeros(4), torch.ones(4), None, None, out)(empty)",
        "operators.QuantizedBatchNorm(torch.zeros(3), torch.ones(3), None, None, out)(full)",
        "operators.QuantizedLayerNorm((5,), None, None, out)(full)",
        "operators.QuantizedGroupNorm(0, None, None, out)(full)",
        "operators.QuantizedGroupNorm(3, None, None, out)(full)",
        "operators.QuantizedMatmul(out)(full, empty)",
        "operators.QuantizedSoftmax(out, 7)(full)",
        "QUANTIZED_CONV[2](weight, scale, None, QConvCall(0.1, 3, zero, zero, one), engine)(full)",
        "QUANTIZED_CONV[2](weight, scale, None, QConvCall(0.1, 3, one, zero, one, 0), engine)(full)",
        "QUANTIZED_CONV_TRANSPOSE[2](weight, scale[:1], None, QTransposedCall(.1, 3, zero, zero, zero, one), 'fbgemm')",
        "QUANTIZED_CONV_TRANSPOSE[2](weight, scale[:1], None, QTransposedCall(.1, 3, one, zero, zero, one, 0), engine)",
        "QuantizedEmbedding(*table)(torch.tensor([3]))",
        "QuantizedEmbedding(*table)(torch.tensor([-1]))",
        "QuantizedEmbedding(*table)(torch.tensor([], dtype=torch.int64))",
        "QuantizedEmbeddingBag(*table)(torch.tensor([0, 9]), torch.tensor([0]))",
        "QuantizedEmbeddingBag(*table)(torch.tensor([0, 1]), torch.tensor([0, 5]))",
        "QuantizedLinearDynamic(weight[:, :, 0, 0].contiguous(), scale, None, engine)(torch.zeros(0, 4))",
        "QuantizedLinearDynamic(weight[:, :, 0, 0].contiguous(), scale, None, engine)(torch.zeros(2, 3))",
    )
    command = [sys.executable, "-W", "ignore", "-c", ENDS, "\n".join(calls), engine]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-500:])
    assert done.stdout.splitlines() == list(calls)


def test_every_contract_of_the_host_report_can_be_run_again() -> None:
    report = check_host()
    for contract in every_quantized_contract(report.quantized_layouts):
        assert check(contract) == report.verdict(contract.name)
