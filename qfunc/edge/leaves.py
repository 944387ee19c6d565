"""Which module computes a node of qfunc's own: an observer, a quantizer, a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qfunc.edge.evaluate import Evaluator
from qfunc.edge.kernels.affine import Dequantize, Quantize, tabulate
from qfunc.edge.kernels.arithmetic import Add, Cat, Mul
from qfunc.edge.kernels.conv import ConvCall, OnednnConv, OnednnConvAdd
from qfunc.edge.kernels.grid import DequantizeGrid, QuantizeDynamically, QuantizeGrid
from qfunc.edge.kernels.linear import LinearCall, OnednnLinear
from qfunc.edge.kernels.pool import AdaptiveAvgPool, AvgPool, MaxPool, Mean
from qfunc.edge.kernels.post_op import read_post_op
from qfunc.edge.kernels.quantized import (
    QUANTIZED_CONV,
    DequantizeTensor,
    QConvCall,
    QuantizedAdd,
    QuantizedCat,
    QuantizedLinear,
    QuantizedMul,
    QuantizeTensor,
)
from qfunc.edge.observer import ObserverModule
from qfunc.ir import Arg, Expression, Node, Opaque, Token
from qfunc.numerics.grid import Affine, Grid, literals
from qfunc.ops import BY_NAME, resolve
from qfunc.params import DeriveQParams, QuantizeWeight

Builder = Callable[[Node, Evaluator, Mapping[str, Opaque]], nn.Module]
Weights = tuple[Tensor, Tensor, Tensor | None]


def _observer(node: Node, _: Evaluator, objects: Mapping[str, Opaque]) -> nn.Module:
    token = node.get("fold")
    assert isinstance(token, Token)
    return ObserverModule(objects[token.id].value)


def _literal(make: Callable[[Any], nn.Module]) -> Builder:
    """A module made of the node's literal arguments alone."""
    return lambda node, _evaluator, _objects: make(_Literals(node))


def _quantize(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    qparams = _qparams(node.get("output"), evaluator)
    return Quantize(qparams) if isinstance(qparams, Affine) else QuantizeGrid(qparams)


def _dequantize(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    qparams = _qparams(node.get("input"), evaluator)
    return Dequantize(qparams) if isinstance(qparams, Affine) else DequantizeGrid(qparams)


def _qparams(given: Arg, evaluator: Evaluator) -> Affine | Grid:
    """Qparams that a graph holds; some are known when the weights are."""
    if isinstance(given, DeriveQParams):
        return literals(evaluator.qparams(given))
    assert isinstance(given, (Affine, Grid)), given
    return given


class _Literals:
    """A node's arguments as attributes."""

    __slots__ = ("_node",)

    def __init__(self, node: Node) -> None:
        self._node = node

    def __getattr__(self, name: str) -> Any:
        return self._node.get(name)


def _weights(node: Node, evaluator: Evaluator) -> Weights:
    """Integer weight, its scale per output channel, and the bias, as kernels take them."""
    weight, bias = node.get("weight"), node.get("bias")
    assert isinstance(weight, QuantizeWeight)
    quantized = evaluator.quantized(weight)
    channels = quantized.values.shape[0]
    scale = quantized.qparams.scale.to(torch.float32).expand(channels).contiguous()
    floats = evaluator.tensor(bias).to(torch.float32).clone() if isinstance(bias, Expression) else None
    return quantized.values.contiguous(), scale, floats


def _output(affine: Affine | None) -> tuple[float, int, Any]:
    """Scale, zero point and dtype of a kernel's result; None is float32."""
    return (1.0, 0, "float32") if affine is None else (affine.scale, affine.zero_point, affine.dtype)


def _onednn_conv(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    given: Any = _Literals(node)
    call = ConvCall(
        given.input.scale,
        given.input.zero_point,
        *_output(given.output),
        given.stride,
        given.padding,
        given.dilation,
        given.groups,
        given.padding_mode,
        read_post_op(given.post_op),
    )
    if node.kind.endswith("_add"):
        return OnednnConvAdd(*_weights(node, evaluator), call, given.other, overwrite=given.overwrite)
    return OnednnConv(*_weights(node, evaluator), call)


def _onednn_linear(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    given: Any = _Literals(node)
    scale, zero_point, dtype = _output(given.output)
    source: Affine = given.input
    post_op = read_post_op(given.post_op)
    call = LinearCall(source.scale, source.zero_point, scale, zero_point, dtype, source.dtype, post_op)
    return OnednnLinear(*_weights(node, evaluator), call)


def _table(given: Any) -> nn.Module:
    """The table of an elementwise operator with its options, its post-ops behind it."""

    def function(x: Tensor) -> Tensor:
        value = _compute(given.function, {given.operand: x, **dict(given.options)})
        for kind, options in given.posts:
            value = _compute(kind, {"input": value, **dict(options)})
        return value

    return tabulate(
        function, given.input, given.output, " + ".join([given.function, *(kind for kind, _ in given.posts)])
    )


def _compute(kind: str, values: Mapping[str, Any]) -> Tensor:
    target, names = BY_NAME[kind].call
    positional = [values[name] for name in names if not name.endswith("=")]
    keywords = {name[:-1]: values[name[:-1]] for name in names if name.endswith("=")}
    result: Tensor = resolve(target)(*positional, **keywords)
    return result


def _average(given: Any) -> nn.Module:
    return AvgPool(
        given.kernel_size,
        given.given,
        given.output,
        stride=given.stride,
        padding=given.padding,
        ceil_mode=given.ceil_mode,
        count_include_pad=given.count_include_pad,
        divisor_override=given.divisor_override,
    )


def _average1d(given: Any) -> nn.Module:
    options = {"stride": given.stride, "padding": given.padding, "ceil_mode": given.ceil_mode}
    return AvgPool(given.kernel_size, given.given, given.output, count_include_pad=given.count_include_pad, **options)


def _dims(dim: Arg) -> tuple[int, ...]:
    """Dimensions to reduce, all for None."""
    match dim:
        case None:
            return ()
        case int():
            return (dim,)
        case _:
            return tuple(getattr(dim, "items", dim))  # type: ignore[arg-type]


def _quantized_conv(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    given: Any = _Literals(node)
    geometry = (given.stride, given.padding, given.dilation, given.groups)
    call = QConvCall(given.output.scale, given.output.zero_point, *geometry, given.relu)
    return QUANTIZED_CONV[len(given.stride)](*_weights(node, evaluator), call, given.engine)


def _quantized_linear(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    given: Any = _Literals(node)
    return QuantizedLinear(*_weights(node, evaluator), given.output, given.engine, relu=given.relu)


_MAX_POOL = _literal(
    lambda g: MaxPool(g.kernel_size, g.stride, g.padding, g.dilation, ceil_mode=g.ceil_mode),
)
_ADAPTIVE = _literal(lambda g: AdaptiveAvgPool(g.output_size, g.given, g.output))

LEAVES: Mapping[str, Builder] = MappingProxyType(
    {
        "observe": _observer,
        "quantize": _quantize,
        "dequantize": _dequantize,
        "quantize_dynamically": _literal(lambda g: QuantizeDynamically(g.spec)),
        **{f"onednn.conv{rank}d": _onednn_conv for rank in (1, 2, 3)},
        **{f"onednn.conv{rank}d_add": _onednn_conv for rank in (1, 2)},
        "onednn.linear": _onednn_linear,
        "codes.add": _literal(lambda g: Add(g.left, g.right, g.output, g.post_op)),
        "codes.mul": _literal(lambda g: Mul(g.left, g.right, g.output, g.post_op)),
        "codes.table": _literal(_table),
        "codes.cat": _literal(lambda g: Cat(g.grids, g.output, g.dim)),
        **{f"codes.max_pool{rank}d": _MAX_POOL for rank in (1, 2, 3)},
        "codes.avg_pool1d": _literal(_average1d),
        **{f"codes.avg_pool{rank}d": _literal(_average) for rank in (2, 3)},
        **{f"codes.adaptive_avg_pool{rank}d": _ADAPTIVE for rank in (1, 2, 3)},
        "codes.mean": _literal(lambda g: Mean(_dims(g.dim), g.given, g.output, keepdim=g.keepdim)),
        "quantized.quantize": _literal(lambda g: QuantizeTensor(g.output)),
        "quantized.dequantize": _literal(lambda _: DequantizeTensor()),
        **{f"quantized.conv{rank}d": _quantized_conv for rank in (1, 2, 3)},
        "quantized.linear": _quantized_linear,
        "quantized.add": _literal(lambda g: QuantizedAdd(g.output, relu=g.relu)),
        "quantized.mul": _literal(lambda g: QuantizedMul(g.output, relu=g.relu)),
        "quantized.cat": _literal(lambda g: QuantizedCat(g.output, g.dim)),
    }
)
"""Kind of node -> how its module is made. Such a node's `inputs` argument holds what the module is called with."""
