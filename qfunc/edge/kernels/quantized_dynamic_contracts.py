"""The contracts of engine `"quantized"` for layers that quantize or cast as the model runs, and for tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.contract import Contract, Sample
from qfunc.edge.kernels.grid import QuantizeDynamically
from qfunc.edge.kernels.quantized import TorchEngine
from qfunc.edge.kernels.quantized_dynamic import (
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedLinearDynamic,
    QuantizedLinearFloat16,
)
from qfunc.edge.kernels.weighted_contracts import weights
from qfunc.numerics.qparams import UINT8
from qfunc.numerics.saturation import PairLayouts


@dataclass(frozen=True, slots=True)
class _Layer:
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    relu: bool
    reduce_range: bool


def _inputs(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    x = torch.randn(shape, generator=generator)
    yield from (("of both signs", x), ("positive", x.abs() + 1), ("negative", -x.abs() - 1), ("large", x * 1e4))
    yield from (("zeros", x * 0), ("strided", torch.randn((*shape, 2), generator=generator)[..., 0]))
    yield "empty batch", x[:0]


def _samples(engine: TorchEngine, layouts: PairLayouts) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(11)
    turn = 0
    for shape, outs in (((3, 8), 5), ((1, 64), 32), ((2, 5, 33), 7)):
        weight, scale = weights((outs, shape[-1]), layouts.dense, generator)
        bias = torch.randn(outs, generator=generator)
        for label, x in _inputs(shape, generator):
            turn += 1
            reduce_range = engine != "qnnpack" and turn % 3 == 0
            layer = _Layer(weight, scale, bias if turn % 4 else None, turn % 2 == 0, reduce_range)
            yield Sample(f"{shape} -> {outs}, {label}", (x,), layer, None)


def _linear(layer: _Layer, x: Tensor, weight: Tensor) -> Tensor:
    value = F.linear(x.double(), weight.double(), None if layer.bias is None else layer.bias.double())
    return value.relu() if layer.relu else value


def _dynamic_reference(sample: Sample) -> Tensor:
    layer: _Layer = sample.setup
    rounded = QuantizeDynamically(replace(UINT8, quant_max=127) if layer.reduce_range else UINT8)(sample.tensors[0])
    return _linear(layer, rounded, layer.weight.double() * layer.scale.double()[:, None])


def _dynamic_kernel(engine: TorchEngine, sample: Sample) -> Tensor:
    layer: _Layer = sample.setup
    options = {"reduce_range": layer.reduce_range, "relu": layer.relu}
    module = QuantizedLinearDynamic(layer.weight, layer.scale, layer.bias, engine, **options)
    module(sample.tensors[0] * 0.3 + 0.1)  # what an engine keeps of a call must not change the next
    return module(sample.tensors[0])  # type: ignore[no-any-return]


def _half(layer: _Layer) -> Tensor:
    return (layer.weight * layer.scale[:, None]).to(torch.float16)


def _float16_reference(sample: Sample) -> Tensor:
    return _linear(sample.setup, sample.tensors[0].to(torch.float16), _half(sample.setup))


def _float16_kernel(engine: TorchEngine, sample: Sample) -> Tensor:
    layer: _Layer = sample.setup
    module = QuantizedLinearFloat16(_half(layer), layer.bias, engine, relu=layer.relu)
    return module(sample.tensors[0])  # type: ignore[no-any-return]


def dynamic_contracts(engine: TorchEngine, layouts: PairLayouts) -> Iterator[Contract]:
    """The contracts of these linear layers for one of torch's engines."""
    samples = partial(_samples, engine, layouts)
    kernel = partial(_dynamic_kernel, engine)
    yield Contract(f"quantized.linear_dynamic[{engine}]", kernel, _dynamic_reference, samples)
    kernel = partial(_float16_kernel, engine)
    yield Contract(f"quantized.linear_float16[{engine}]", kernel, _float16_reference, samples)


def _table() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(12)
    weight = torch.randint(0, 256, (10, 8), dtype=torch.uint8, generator=generator)
    scale = torch.rand(10, generator=generator) * 0.01 + 1e-3
    return weight, scale, torch.randn(10, generator=generator) * 100 + 128


def _rows() -> Tensor:
    weight, scale, zero_point = (value.double() for value in _table())
    return (weight - zero_point[:, None]) * scale[:, None]


def table_contracts() -> Iterator[Contract]:
    """The contracts of tables of vectors, which no engine has kernels of its own for."""
    indices = torch.tensor([[1, 2], [9, 0], [3, 3]])
    offsets = torch.tensor([0, 2, 2, 5])

    def lookups() -> Iterator[Sample]:
        yield from (Sample(f"{index.dtype}", (index,), None, None) for index in (indices, indices.to(torch.int32)))
        yield Sample("no index", (indices[:0],), None, None)
        yield Sample("strided", (indices[:, 0],), None, None)

    def bags() -> Iterator[Sample]:
        yield Sample("two dimensions", (indices,), None, None)
        yield Sample("offsets", (indices.reshape(-1), offsets), None, None)
        factors = torch.arange(6, dtype=torch.float32) - 2.5
        yield Sample("factors", (indices.reshape(-1), offsets, factors), None, None)
        yield Sample("strided", (indices.t(),), None, None)
        pairs = (torch.stack([value, value], -1)[:, 0] for value in (indices.reshape(-1), offsets, factors))
        yield Sample("strided factors", tuple(pairs), None, None)

    def sums(sample: Sample) -> Tensor:
        index, *rest = sample.tensors
        start, factors = rest[0] if rest else None, rest[1].double() if len(rest) > 1 else None
        return F.embedding_bag(index, _rows(), start, mode="sum", per_sample_weights=factors)

    yield Contract(
        "quantized.embedding",
        lambda sample: QuantizedEmbedding(*_table())(*sample.tensors),
        lambda sample: F.embedding(sample.tensors[0], _rows()),
        lookups,
    )
    yield Contract(
        "quantized.embedding_bag",
        lambda sample: QuantizedEmbeddingBag(*_table())(*sample.tensors),
        sums,
        bags,
    )
