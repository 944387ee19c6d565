"""Which module computes a node of the `quantized` engine."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qfunc.edge.build import Builder, Literals, dims, literal, weights
from qfunc.edge.evaluate import Evaluator
from qfunc.edge.kernels.quantized import (
    QUANTIZED_CONV,
    QConvCall,
    QuantizedAdd,
    QuantizedCat,
    QuantizedLinear,
    QuantizedMul,
)
from qfunc.edge.kernels.quantized_dynamic import (
    QuantizedEmbedding,
    QuantizedEmbeddingBag,
    QuantizedLinearDynamic,
    QuantizedLinearFloat16,
)
from qfunc.edge.kernels.quantized_layers import (
    QUANTIZED_CONV_TRANSPOSE,
    QTransposedCall,
    QuantizedConvAdd2d,
    QuantizedLinearLeakyReLU,
    QuantizedLinearTanh,
)
from qfunc.edge.kernels.quantized_operators import (
    QuantizedBatchNorm,
    QuantizedELU,
    QuantizedGroupNorm,
    QuantizedHardsigmoid,
    QuantizedHardswish,
    QuantizedInstanceNorm,
    QuantizedLayerNorm,
    QuantizedLeakyReLU,
    QuantizedMatmul,
    QuantizedMean,
    QuantizedNumber,
    QuantizedPad,
    QuantizedSigmoid,
    QuantizedSoftmax,
    QuantizedStack,
)
from qfunc.edge.kernels.quantized_tensors import DequantizeTensor, QuantizeTensor, ended
from qfunc.ir import Expression, Node, Opaque
from qfunc.params import QuantizeWeight

_Objects = Mapping[str, Opaque]


def _conv_call(given: Any) -> QConvCall:
    geometry = (given.stride, given.padding, given.dilation, given.groups)
    output = given.output
    return QConvCall(output.scale, output.zero_point, *geometry, given.relu, given.pad, given.padding_mode)


def _conv(node: Node, evaluator: Evaluator, _: _Objects) -> nn.Module:
    given: Any = Literals(node)
    return QUANTIZED_CONV[len(given.stride)](*weights(node, evaluator), _conv_call(given), given.engine)


def _conv_add(node: Node, evaluator: Evaluator, _: _Objects) -> nn.Module:
    given: Any = Literals(node)
    parts = weights(node, evaluator)
    return QuantizedConvAdd2d(*parts, _conv_call(given), given.engine, overwrite=given.overwrite)


def _conv_transpose(node: Node, evaluator: Evaluator, _: _Objects) -> nn.Module:
    given: Any = Literals(node)
    assert isinstance(given.weight, QuantizeWeight)
    quantized = evaluator.quantized(given.weight)
    scale = quantized.qparams.scale.to(torch.float32).reshape(1)
    geometry = (given.stride, given.padding, given.output_padding, given.dilation, given.groups)
    call = QTransposedCall(given.output.scale, given.output.zero_point, *geometry)
    make = QUANTIZED_CONV_TRANSPOSE[len(given.stride)]
    return make(quantized.values.contiguous(), scale, _float(given.bias, evaluator), call, given.engine)


def _linear(node: Node, evaluator: Evaluator, _: _Objects) -> nn.Module:
    given: Any = Literals(node)
    parts = (*weights(node, evaluator), given.output, given.engine)
    match given.post_op:
        case ("leaky_relu", slope):
            return QuantizedLinearLeakyReLU(*parts, negative_slope=slope)
        case ("tanh",):
            return QuantizedLinearTanh(*parts)
        case post:
            return QuantizedLinear(*parts, relu=post == ("relu",))


def _float(value: Any, evaluator: Evaluator) -> Tensor | None:
    return evaluator.tensor(value).to(torch.float32).clone() if isinstance(value, Expression) else None


def _batch_norm(node: Node, evaluator: Evaluator, _: _Objects) -> nn.Module:
    given: Any = Literals(node)
    mean, var = _float(given.running_mean, evaluator), _float(given.running_var, evaluator)
    assert mean is not None and var is not None
    weight, bias = _float(given.weight, evaluator), _float(given.bias, evaluator)
    # the operator wants both
    factors = (torch.ones_like(mean) if weight is None else weight, torch.zeros_like(mean) if bias is None else bias)
    return QuantizedBatchNorm(mean, var, *factors, given.output, eps=given.eps, relu=given.relu)


def _norm(node: Node, evaluator: Evaluator, _: _Objects) -> nn.Module:
    given: Any = Literals(node)
    factors = (_float(given.weight, evaluator), _float(given.bias, evaluator), given.output)
    match node.kind:
        case "quantized.layer_norm":
            return QuantizedLayerNorm(given.normalized_shape, *factors, eps=given.eps)
        case "quantized.group_norm":
            return QuantizedGroupNorm(given.num_groups, *factors, eps=given.eps)
        case _:
            return QuantizedInstanceNorm(*factors, given.eps, batched_rank=given.batched_rank)


def _linear_dynamic(node: Node, evaluator: Evaluator, _: _Objects) -> nn.Module:
    given: Any = Literals(node)
    options = {"reduce_range": given.reduce_range, "relu": given.relu}
    return QuantizedLinearDynamic(*weights(node, evaluator), given.engine, **options)


def _linear_float16(node: Node, evaluator: Evaluator, _: _Objects) -> nn.Module:
    given: Any = Literals(node)
    weight, bias = evaluator.tensor(given.weight).to(torch.float16), _float(given.bias, evaluator)
    return QuantizedLinearFloat16(weight, bias, given.engine, relu=given.relu)


def _table(node: Node, evaluator: Evaluator, _: _Objects) -> nn.Module:
    given: Any = Literals(node)
    quantized = evaluator.quantized(given.weight)
    parts = (quantized.values.contiguous(), quantized.qparams.scale, quantized.qparams.zero_point)
    if node.kind == "quantized.embedding":
        return QuantizedEmbedding(*parts)
    return QuantizedEmbeddingBag(*parts, include_last_offset=given.include_last_offset)


def _with_ends(builder: Builder) -> Builder:
    """A kernel that gives codes of all 8 bits, clamped to those that its node asks for."""

    def build(node: Node, evaluator: Evaluator, objects: _Objects) -> nn.Module:
        made = builder(node, evaluator, objects)
        if not node.has("ends"):
            return made
        given: Any = Literals(node)
        return ended(made, given.output, given.ends, given.inputs)

    return build


_KERNELS: Mapping[str, Builder] = MappingProxyType(
    {
        "quantized.quantize": literal(lambda g: QuantizeTensor(g.output)),
        "quantized.dequantize": literal(lambda _: DequantizeTensor()),
        **{f"quantized.conv{rank}d": _conv for rank in (1, 2, 3)},
        "quantized.conv2d_add": _conv_add,
        **{f"quantized.conv_transpose{rank}d": _conv_transpose for rank in (1, 2, 3)},
        "quantized.linear": _linear,
        "quantized.linear_dynamic": _linear_dynamic,
        "quantized.linear_float16": _linear_float16,
        **{f"quantized.{kind}": _table for kind in ("embedding", "embedding_bag")},
        "quantized.add": literal(lambda g: QuantizedAdd(g.output, relu=g.relu)),
        "quantized.mul": literal(lambda g: QuantizedMul(g.output, relu=g.relu)),
        "quantized.number": literal(lambda g: QuantizedNumber(g.output, g.number, product=g.product, relu=g.relu)),
        "quantized.matmul": literal(lambda g: QuantizedMatmul(g.output)),
        "quantized.cat": literal(lambda g: QuantizedCat(g.output, g.dim)),
        "quantized.stack": literal(lambda g: QuantizedStack(g.output, g.dim)),
        "quantized.pad": literal(lambda g: QuantizedPad(g.pad, g.mode, g.value)),
        "quantized.elu": literal(lambda g: QuantizedELU(g.output, g.alpha)),
        "quantized.leaky_relu": literal(lambda g: QuantizedLeakyReLU(g.output, g.negative_slope)),
        "quantized.hardswish": literal(lambda g: QuantizedHardswish(g.output)),
        "quantized.hardsigmoid": literal(lambda _: QuantizedHardsigmoid()),
        "quantized.sigmoid": literal(lambda g: QuantizedSigmoid(g.output)),
        "quantized.mean": literal(lambda g: QuantizedMean(dims(g.dim), keepdim=g.keepdim)),
        "quantized.softmax": literal(lambda g: QuantizedSoftmax(g.output, g.dim)),
        "quantized.batch_norm": _batch_norm,
        **{f"quantized.{kind}": _norm for kind in ("layer_norm", "group_norm", "instance_norm")},
    }
)

QUANTIZED_LEAVES: Mapping[str, Builder] = MappingProxyType({kind: _with_ends(make) for kind, make in _KERNELS.items()})
"""Kind of node -> how its module is made."""
