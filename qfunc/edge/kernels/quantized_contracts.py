"""The contracts of engine `"quantized"`, per torch engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.contract import Contract, Sample, adversarial_codes, output_for, real_values
from qfunc.edge.kernels.quantized import (
    QUANTIZED_CONV,
    QConvCall,
    QuantizedAdd,
    QuantizedCat,
    QuantizedLinear,
    QuantizedMul,
    TorchEngine,
)
from qfunc.edge.kernels.weighted_contracts import CONV_SHAPES, weights
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import PairLayouts

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_GIVEN = Affine(0.04, 7)


def as_quantized(codes: Tensor, qparams: Affine) -> Tensor:
    """A `quint8` tensor of these codes."""
    return torch._make_per_tensor_quantized_tensor(codes, qparams.scale, qparams.zero_point)


@dataclass(frozen=True, slots=True)
class _Layer:
    weight: Tensor
    scale: Tensor
    bias: Tensor | None
    call: QConvCall | None  # None for a linear layer
    relu: bool


def _real(sample: Sample) -> Tensor:
    layer: _Layer = sample.setup
    call, dims = layer.call, layer.weight.dim() - 2
    x = real_values(sample.tensors[0], _GIVEN)
    weight = layer.weight.double() * layer.scale.double().reshape(-1, *[1] * (layer.weight.dim() - 1))
    bias = None if layer.bias is None else layer.bias.double()
    if call is None:
        result = F.linear(x, weight, bias)
    else:
        result = _CONV[dims](x, weight, bias, call.stride, call.padding, call.dilation, call.groups)
    return result.relu() if layer.relu else result


def _run(engine: TorchEngine, sample: Sample) -> Tensor:
    layer: _Layer = sample.setup
    parts = (layer.weight, layer.scale, layer.bias)
    assert sample.output is not None
    module: torch.nn.Module
    if layer.call is None:
        module = QuantizedLinear(*parts, sample.output, engine, relu=layer.relu)
    else:
        module = QUANTIZED_CONV[layer.weight.dim() - 2](*parts, layer.call, engine)
    return module(as_quantized(sample.tensors[0], _GIVEN)).int_repr()  # type: ignore[no-any-return]


def _conv_samples(dims: int, layouts: PairLayouts) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(dims)
    turn = 0
    for shape in CONV_SHAPES:
        filters = (shape.out_channels, shape.in_channels // shape.groups, *(shape.kernel,) * dims)
        weight, scale = weights(filters, layouts.of(filters, shape.groups), generator)
        bias = torch.randn(shape.out_channels, generator=generator)
        full = (2, shape.in_channels, *(shape.size - axis for axis in range(dims)))
        geometry = ((shape.stride,) * dims, (shape.padding,) * dims, (shape.dilation,) * dims, shape.groups)
        for label, codes in shape.codes(full, generator):
            if label == "empty batch":  # torch's engines differ on it; lowered graphs meet it in float only
                continue
            turn += 1
            relu = turn % 2 == 0
            layer = _Layer(weight, scale, bias if turn % 3 else None, QConvCall(1.0, 0, *geometry, relu), relu)
            sample = Sample(f"{shape}, {label}", (codes,), layer, None)
            output = output_for(_real(sample))
            call = QConvCall(output.scale, output.zero_point, *geometry, relu)
            layer = replace(layer, call=call)
            yield Sample(sample.label, (codes,), layer, output)


def _linear_samples(layouts: PairLayouts) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(4)
    turn = 0
    for shape, outs in (((3, 8), 5), ((1, 64), 32), ((2, 5, 33), 7)):
        weight, scale = weights((outs, shape[-1]), layouts.dense, generator)
        bias = torch.randn(outs, generator=generator)
        for label, codes in adversarial_codes(shape, generator):
            if label == "empty batch":
                continue
            turn += 1
            layer = _Layer(weight, scale, bias, None, relu=turn % 2 == 0)
            sample = Sample(f"{shape} -> {outs}, {label}", (codes,), layer, None)
            yield Sample(sample.label, (codes,), sample.setup, output_for(_real(sample)))


def _pairs() -> Iterator[tuple[Tensor, Tensor]]:
    grid = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    yield grid.repeat(256), grid.repeat_interleave(256)
    generator = torch.Generator().manual_seed(6)
    x, y = (torch.randint(0, 256, (2, 8, 3, 4), dtype=torch.uint8, generator=generator) for _ in range(2))
    yield x, y
    yield x.contiguous(memory_format=torch.channels_last), y
    yield x, y[:, :, :1, :1]
    yield x[:, :, :1, :1], y


def _binary(name: str, make: type[QuantizedAdd | QuantizedMul], *, relu: bool = False) -> Contract:
    function = torch.add if make is QuantizedAdd else torch.mul
    left, right = Affine(0.05, 128), Affine(0.037, 3)

    def reference(sample: Sample) -> Tensor:
        real = function(real_values(sample.tensors[0], left), real_values(sample.tensors[1], right))
        return real.relu() if relu else real

    def samples() -> Iterator[Sample]:
        for x, y in _pairs():
            sample = Sample(f"{tuple(x.shape)}, {tuple(y.shape)}", (x, y), None, None)
            yield Sample(sample.label, (x, y), None, output_for(reference(sample)))

    def kernel(sample: Sample) -> Tensor:
        assert sample.output is not None
        x, y = as_quantized(sample.tensors[0], left), as_quantized(sample.tensors[1], right)
        return make(sample.output, relu=relu)(x, y).int_repr()  # type: ignore[no-any-return]

    return Contract(name, kernel, reference, samples)


def _cat() -> Contract:
    left, right, output = Affine(0.05, 128), Affine(0.037, 3), Affine(0.06, 100)

    def samples() -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(6)
        x, y = (torch.randint(0, 256, (2, 8, 3, 4), dtype=torch.uint8, generator=generator) for _ in range(2))
        yield Sample("contiguous", (x, y), None, output)
        last = torch.channels_last
        yield Sample(
            "channels-last", (x.contiguous(memory_format=last), y.contiguous(memory_format=last)), None, output
        )

    def reference(sample: Sample) -> Tensor:
        return torch.cat([real_values(sample.tensors[0], left), real_values(sample.tensors[1], right)], 1)

    def kernel(sample: Sample) -> Tensor:
        given = [as_quantized(sample.tensors[0], left), as_quantized(sample.tensors[1], right)]
        return QuantizedCat(output, 1)(given).int_repr()  # type: ignore[no-any-return]

    return Contract("quantized.cat", kernel, reference, samples)


def quantized_contracts(engines: tuple[tuple[TorchEngine, PairLayouts], ...]) -> tuple[Contract, ...]:
    """The contracts of the packed kernels of these torch engines, and of those that need no packing."""
    packed = [
        contract
        for engine, layouts in engines
        for contract in (
            *(_conv_contract(engine, dims, layouts) for dims in (1, 2, 3)),
            Contract(
                f"quantized.linear[{engine}]",
                lambda sample, engine=engine: _run(engine, sample),  # type: ignore[misc]
                _real,
                lambda layouts=layouts: _linear_samples(layouts),  # type: ignore[misc]
            ),
        )
    ]
    pairs = (("quantized.add", QuantizedAdd), ("quantized.mul", QuantizedMul))
    plain = (_binary(name, make) for name, make in pairs)
    return (*packed, *plain, *(_binary(f"{name}[relu]", make, relu=True) for name, make in pairs), _cat())


def _conv_contract(engine: TorchEngine, dims: int, layouts: PairLayouts) -> Contract:
    return Contract(
        f"quantized.conv{dims}d[{engine}]",
        lambda sample: _run(engine, sample),
        _real,
        lambda: _conv_samples(dims, layouts),
    )
