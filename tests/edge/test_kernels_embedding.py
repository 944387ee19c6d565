"""Tables of codes against the float operator on the table dequantized, bit for bit."""

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from qfunc.edge.kernels.embedding import CodesEmbedding, CodesEmbeddingBag, pack_nibbles, unpack_nibbles
from qfunc.numerics.affine import dequantize, quantize
from qfunc.numerics.grid import Affine
from qfunc.numerics.observers import MinMax, PerChannelMinMax
from qfunc.numerics.qparams import (
    INT8,
    INT8_SYMMETRIC,
    INT8_SYMMETRIC_PER_CHANNEL,
    UINT4_FLOAT_QPARAMS,
    UINT8_FLOAT_QPARAMS,
    QuantSpec,
)
from qfunc.testing.metrics import same_bits

SPECS = {
    "uint8": UINT8_FLOAT_QPARAMS,
    "uint4": UINT4_FLOAT_QPARAMS,
    "int8 per tensor": INT8_SYMMETRIC,
    "int8 affine": INT8,
    "int8 per row": INT8_SYMMETRIC_PER_CHANNEL,
    "int8 affine per row": QuantSpec("int8", -128, 127, "per_channel_affine", 0),
    "uint4 per column": QuantSpec("uint4", 0, 15, "per_channel_affine", 1),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def table(spec, shape=(10, 7), dtype=torch.float32):
    """Codes, their qparams, and the float table that they stand for."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.3
    observer = PerChannelMinMax(spec) if spec.per_channel else MinMax(spec)
    q = observer.finish(observer.update(observer.init(), weight))
    codes = quantize(weight, q.scale, q.zero_point, spec.quant_min, spec.quant_max, spec.torch_dtype, spec.ch_axis)
    return codes, q, dequantize(codes, q.scale, q.zero_point, spec.ch_axis, dtype)


@each_spec
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_an_embedding_is_the_float_one(spec, dtype):
    codes, qparams, real = table(spec, dtype=dtype)
    kernel = CodesEmbedding(codes, qparams, dtype, None)
    for shape, of in itertools.product([(), (3,), (2, 3), (0,), (2, 0)], [torch.int64, torch.int32]):
        index = torch.randint(0, 10, shape, dtype=of)
        assert same_bits(kernel(index), F.embedding(index, real))
    assert same_bits(kernel(torch.arange(10)[::3]), F.embedding(torch.arange(10)[::3], real))


def test_codes_of_four_bits_take_half_the_bytes():
    for width in (1, 2, 7, 8):
        codes = torch.randint(0, 16, (5, width), dtype=torch.uint8)
        packed = pack_nibbles(codes)
        assert packed.shape == (5, (width + 1) // 2)
        assert torch.equal(unpack_nibbles(packed, width), codes)
    kernel = CodesEmbedding(*table(UINT4_FLOAT_QPARAMS, (10, 8))[:2], torch.float32, None)
    assert kernel.state_dict()["weight"].nbytes == 10 * 8 // 2


BAGS = [
    ({}, (2, 3), None),
    ({}, (6,), [0, 2, 2, 5]),
    ({}, (6,), [0]),
    ({}, (0,), [0, 0]),
    ({"include_last_offset": True}, (6,), [0, 2, 6]),
    ({"padding_idx": 4}, (6,), [0, 3, 3]),
    ({"padding_idx": -1}, (4, 5), None),
    ({"padding_idx": 0}, (0,), [0]),
]


@each_spec
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(("options", "shape", "offsets"), BAGS, ids=str)
def test_a_bag_is_the_float_one(spec, mode, options, shape, offsets):
    codes, qparams, real = table(spec)
    kernel = CodesEmbeddingBag(codes, qparams, torch.float32, None, mode=mode, **options)
    for seed, of in enumerate((torch.int64, torch.int32)):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(0, 10, shape, dtype=of, generator=generator)
        if "padding_idx" in options and index.numel():
            index.view(-1)[1::2] = options["padding_idx"] % 10
        bags = None if offsets is None else torch.tensor(offsets, dtype=of)
        expected = F.embedding_bag(index, real, bags, mode=mode, **options)
        assert same_bits(kernel(index, bags), expected)
        if mode == "sum":
            weights = torch.rand(shape, generator=generator)
            expected = F.embedding_bag(index, real, bags, mode=mode, per_sample_weights=weights, **options)
            assert same_bits(kernel(index, bags, weights), expected)


def test_a_result_may_be_codes():
    codes, qparams, real = table(UINT8_FLOAT_QPARAMS)
    output = Affine(0.02, 120)
    got = CodesEmbedding(codes, qparams, torch.float32, output)(torch.tensor([3]))
    assert torch.equal(got, quantize(real[3:4], torch.tensor(0.02), torch.tensor(120), 0, 255, torch.uint8))


def test_an_index_without_a_row_raises_and_ends_no_process():
    script = """
import torch
from qfunc.edge.kernels.embedding import CodesEmbedding, CodesEmbeddingBag
from tests.edge.test_kernels_embedding import SPECS, table
for spec in SPECS.values():
    codes, qparams, _ = table(spec)
    bag = CodesEmbeddingBag(codes, qparams, torch.float32, None)
    for bad in (10, -1, 2**40):
        index = torch.tensor([0, bad])
        for call in (lambda: CodesEmbedding(codes, qparams, torch.float32, None)(index), lambda: bag(index[None])):
            try:
                call()
            except IndexError as error:
                assert "out of range" in str(error)
            else:
                raise AssertionError(bad)
    try:
        bag(torch.tensor([0, 1]), torch.tensor([0, 7]))
    except RuntimeError:
        continue
    raise AssertionError("offsets")
print("done")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr
