"""The contracts of engine `"quantized"` for transposed convolutions and what torch's onednn engine fuses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.contract import Contract, Sample, adversarial_codes, output_for, real_values
from qfunc.edge.kernels.quantized import QConvCall, QuantizedLinear, TorchEngine
from qfunc.edge.kernels.quantized_contracts import as_quantized
from qfunc.edge.kernels.quantized_layers import (
    QUANTIZED_CONV_TRANSPOSE,
    QTransposedCall,
    QuantizedConvAdd2d,
    QuantizedLinearLeakyReLU,
    QuantizedLinearTanh,
)
from qfunc.edge.kernels.weighted_contracts import weights
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import PairLayout, PairLayouts

_GIVEN, _OTHER = Affine(0.04, 7), Affine(0.7, 131)
_SLOPE = 0.3
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True, slots=True)
class _Transposed:
    weight: Tensor
    bias: Tensor | None
    call: QTransposedCall


# in, out, kernel, groups, stride, padding, output_padding, dilation
_SHAPES = ((8, 6, 3, 1, 1, 0, 0, 1), (6, 8, 3, 2, 2, 1, 1, 1), (8, 8, 2, 8, 2, 0, 0, 1), (5, 3, 3, 1, 1, 1, 0, 2))
_SCALE = 0.01


def _transposed_samples(dims: int, engine: TorchEngine, layout: PairLayout) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(dims)
    # One scale for all cannot be limited: where pairs saturate only small weights and activations are lowered to it.
    largest = 127 if layout == "none" else 63
    for ins, outs, kernel, groups, stride, padding, output_padding, dilation in _SHAPES:
        if engine == "onednn" and output_padding:  # refused, and so said
            continue
        shape = (ins, outs // groups, *(kernel,) * dims)
        weight = torch.randint(-largest, largest + 1, shape, dtype=torch.int8, generator=generator)
        weight[:, 0] = largest
        bias = torch.randn(outs, generator=generator)
        each = (dims * (stride,), dims * (padding,), dims * (output_padding,), dims * (dilation,))
        call = QTransposedCall(1.0, 0, *each, groups)
        for label, codes in islice(adversarial_codes((2, ins, *(4, 3, 2)[:dims]), generator), 6 if dims < 3 else 2):
            setup = _Transposed(weight, bias if padding else None, call)
            sample = Sample(f"{ins} -> {outs}, kernel {kernel}, groups {groups}, {label}", (codes,), setup, None)
            output = output_for(_transposed_reference(sample))
            setup = replace(setup, call=replace(call, output_scale=output.scale, output_zero_point=output.zero_point))
            yield replace(sample, setup=setup, output=output)


def _transposed_reference(sample: Sample) -> Tensor:
    setup: _Transposed = sample.setup
    call, dims = setup.call, setup.weight.dim() - 2
    bias = None if setup.bias is None else setup.bias.double()
    geometry = (call.stride, call.padding, call.output_padding, call.groups, call.dilation)
    scale = torch.tensor(_SCALE, dtype=torch.float32).double()
    real = real_values(sample.tensors[0], _GIVEN)
    return _TRANSPOSED[dims](real, setup.weight.double() * scale, bias, *geometry)


def _transposed_kernel(engine: TorchEngine, sample: Sample) -> Tensor:
    setup: _Transposed = sample.setup
    make = QUANTIZED_CONV_TRANSPOSE[setup.weight.dim() - 2]
    module = make(setup.weight, torch.tensor([_SCALE]), setup.bias, setup.call, engine)
    return module(as_quantized(sample.tensors[0], _GIVEN)).int_repr()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Layer:
    weight: Tensor
    scale: Tensor
    bias: Tensor


def _linear_samples(post: str, layouts: PairLayouts) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(4)
    for shape, outs in (((3, 8), 5), ((2, 5, 33), 7)):
        weight, scale = weights((outs, shape[-1]), layouts.dense, generator)
        layer = _Layer(weight, scale * 0.1, torch.randn(outs, generator=generator))
        for label, codes in islice(adversarial_codes(shape, generator), 6):
            sample = Sample(f"{shape} -> {outs}, {label}", (codes,), layer, None)
            yield replace(sample, output=output_for(_linear_reference(post, sample)))


def _linear_reference(post: str, sample: Sample) -> Tensor:
    layer: _Layer = sample.setup
    scaled = layer.weight.double() * layer.scale.double()[:, None]
    value = F.linear(real_values(sample.tensors[0], _GIVEN), scaled, layer.bias.double())
    return value.tanh() if post == "tanh" else F.leaky_relu(value, _SLOPE)


def _linear_kernel(post: str, engine: TorchEngine, sample: Sample) -> Tensor:
    layer: _Layer = sample.setup
    assert sample.output is not None
    parts = (layer.weight, layer.scale, layer.bias, sample.output, engine)
    module: QuantizedLinear = (
        QuantizedLinearTanh(*parts) if post == "tanh" else QuantizedLinearLeakyReLU(*parts, negative_slope=_SLOPE)
    )
    return module(as_quantized(sample.tensors[0], _GIVEN)).int_repr()  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class _Sum:
    layer: _Layer
    call: QConvCall


# in, out, kernel, groups, stride, padding
_SUMS = ((3, 16, 3, 1, 1, 1), (16, 8, 1, 1, 1, 0), (16, 16, 3, 16, 1, 1), (12, 8, 3, 4, 2, 2))


def _sum_samples(layouts: PairLayouts) -> Iterator[Sample]:
    generator = torch.Generator().manual_seed(5)
    turn = 0
    for ins, outs, kernel, groups, stride, padding in _SUMS:
        shape = (outs, ins // groups, kernel, kernel)
        weight, scale = weights(shape, layouts.of(shape, groups), generator)
        layer = _Layer(weight, scale, torch.randn(outs, generator=generator))
        for label, codes in islice(adversarial_codes((2, ins, 6, 5), generator), 6):
            turn += 1
            call = QConvCall(1.0, 0, (stride,) * 2, (padding,) * 2, (1, 1), groups, relu=turn % 2 == 0)
            alone = Sample(f"{ins} -> {outs}, kernel {kernel}, {label}", (codes,), _Sum(layer, call), None)
            size = _sum_reference(alone).shape
            other = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
            if turn % 3:
                other = other.contiguous(memory_format=torch.channels_last)
            sample = replace(alone, tensors=(codes, other))
            output = output_for(_sum_reference(sample))
            call = replace(call, output_scale=output.scale, output_zero_point=output.zero_point)
            yield replace(sample, setup=_Sum(layer, call), output=output)


def _sum_reference(sample: Sample) -> Tensor:
    layer, call = sample.setup.layer, sample.setup.call
    x, *others = sample.tensors
    weight = layer.weight.double() * layer.scale.double().reshape(-1, 1, 1, 1)
    geometry = (call.stride, call.padding, call.dilation, call.groups)
    value = F.conv2d(real_values(x, _GIVEN), weight, layer.bias.double(), *geometry)
    for other in others:
        value = value + real_values(other, _OTHER)
    return value.relu() if call.relu else value


def _sum_kernel(engine: TorchEngine, sample: Sample) -> Tensor:
    layer, call = sample.setup.layer, sample.setup.call
    module = QuantizedConvAdd2d(layer.weight, layer.scale, layer.bias, call, engine)
    x, other = as_quantized(sample.tensors[0], _GIVEN), as_quantized(sample.tensors[1], _OTHER)
    return module(x, other).int_repr()  # type: ignore[no-any-return]


def layer_contracts(engine: TorchEngine, layouts: PairLayouts) -> Iterator[Contract]:
    """The contracts of these layers for one of torch's engines."""
    for dims in (1, 2, 3):
        if engine == "qnnpack" and dims == 3:  # it gives what it finds in memory: another verdict every time
            continue
        samples = partial(_transposed_samples, dims, engine, layouts.dense)
        kernel = partial(_transposed_kernel, engine)
        yield Contract(f"quantized.conv_transpose{dims}d[{engine}]", kernel, _transposed_reference, samples)
    if engine != "onednn":
        return
    for post in ("leaky_relu", "tanh"):
        name, kernel = f"quantized.linear[onednn][{post}]", partial(_linear_kernel, post, engine)
        yield Contract(name, kernel, partial(_linear_reference, post), partial(_linear_samples, post, layouts))
    name, kernel = "quantized.conv2d_add[onednn]", partial(_sum_kernel, engine)
    yield Contract(name, kernel, _sum_reference, partial(_sum_samples, layouts))
