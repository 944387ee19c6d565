"""Which module computes a node of qfunc's own: an observer, a quantizer, a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from qfunc.edge.build import Builder, Literals, dims, literal, output, weights
from qfunc.edge.custom_modules import CustomModuleError
from qfunc.edge.evaluate import Evaluator
from qfunc.edge.fake_quantizers import fake_quantizer
from qfunc.edge.kernels.affine import Dequantize, Quantize, requantize, tabulate
from qfunc.edge.kernels.arithmetic import Add, Cat, Mul, Stack
from qfunc.edge.kernels.conv import ConvCall, OnednnConv, OnednnConvAdd
from qfunc.edge.kernels.grid import DequantizeGrid, QuantizeDynamically, QuantizeGrid
from qfunc.edge.kernels.island import Island, computed
from qfunc.edge.kernels.linear import LinearCall, OnednnLinear
from qfunc.edge.kernels.own import made
from qfunc.edge.kernels.pool import AdaptiveAvgPool, AvgPool, MaxPool, Mean, Sum
from qfunc.edge.kernels.post_op import read_post_op
from qfunc.edge.observer import ObserverModule
from qfunc.edge.qat_layers import Mode
from qfunc.edge.quantized_leaves import QUANTIZED_LEAVES
from qfunc.edge.spatial_leaves import SPATIAL_LEAVES
from qfunc.edge.weight_leaves import WEIGHT_LEAVES
from qfunc.engines.island import IslandCall
from qfunc.engines.own import OWN
from qfunc.errors import UserFunctionFailed, told
from qfunc.ir import Arg, Expression, Node, Opaque, Token
from qfunc.numerics.grid import Affine, Grid, literals
from qfunc.params import DeriveQParams


def _observer(node: Node, _: Evaluator, objects: Mapping[str, Opaque]) -> nn.Module:
    token = node.get("fold")
    assert isinstance(token, Token)
    return ObserverModule(objects[token.id].value)


def _fake_quantize(node: Node, _: Evaluator, objects: Mapping[str, Opaque]) -> nn.Module:
    token = node.get("start")
    assert isinstance(token, Token)
    return fake_quantizer(objects[token.id].value)


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


def _onednn_conv(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    given: Any = Literals(node)
    call = ConvCall(
        given.input.scale,
        given.input.zero_point,
        *output(given.output),
        given.stride,
        given.padding,
        given.dilation,
        given.groups,
        given.padding_mode,
        read_post_op(given.post_op),
    )
    if node.kind.endswith("_add"):
        return OnednnConvAdd(*weights(node, evaluator), call, given.other, overwrite=given.overwrite)
    return OnednnConv(*weights(node, evaluator), call)


def _onednn_linear(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    given: Any = Literals(node)
    scale, zero_point, dtype = output(given.output)
    source: Affine = given.input
    post_op = read_post_op(given.post_op)
    call = LinearCall(source.scale, source.zero_point, scale, zero_point, dtype, source.dtype, post_op)
    return OnednnLinear(*weights(node, evaluator), call)


def _table(given: Any) -> nn.Module:
    """The table of an elementwise operator with its options, its post-ops behind it."""

    def function(x: Tensor) -> Tensor:
        value = computed(given.function, {given.operand: x, **dict(given.options)})
        for kind, options in given.posts:
            value = computed(kind, {"input": value, **dict(options)})
        return value

    return tabulate(
        function, given.input, given.output, " + ".join([given.function, *(kind for kind, _ in given.posts)])
    )


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


def _island(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    parameters = {name: value for name, value in node.args if isinstance(value, Expression)}
    call: Any = node.get("call")
    rank: Any = node.get("batched_rank") if node.has("batched_rank") else None
    buffers = {name: evaluator.tensor(value).clone() for name, value in parameters.items()}
    return Island(call, buffers, batched_rank=rank)


def _own(node: Node, _: Evaluator, objects: Mapping[str, Opaque]) -> nn.Module:
    token, call = node.get("make"), node.get("call")
    assert isinstance(token, Token) and isinstance(call, IslandCall)
    try:
        return made(objects[token.id].value, call)
    except Exception as error:
        raise CustomModuleError(UserFunctionFailed(token.id.removeprefix("kernel:"), told(error))) from error


_MAX_POOL = literal(
    lambda g: MaxPool(g.kernel_size, g.stride, g.padding, g.dilation, ceil_mode=g.ceil_mode),
)
_ADAPTIVE = literal(lambda g: AdaptiveAvgPool(g.output_size, g.given, g.output))

LEAVES: Mapping[str, Builder] = MappingProxyType(
    {
        "observe": _observer,
        "fake_quantize": _fake_quantize,
        "training_mode": literal(lambda _: Mode(of_norms=False)),
        "norm_mode": literal(lambda _: Mode(of_norms=True)),
        "quantize": _quantize,
        "dequantize": _dequantize,
        "quantize_dynamically": literal(lambda g: QuantizeDynamically(g.spec)),
        **{f"onednn.conv{rank}d": _onednn_conv for rank in (1, 2, 3)},
        **{f"onednn.conv{rank}d_add": _onednn_conv for rank in (1, 2)},
        "onednn.linear": _onednn_linear,
        **WEIGHT_LEAVES,
        "requantize": literal(lambda g: requantize(g.given, g.output)),
        "codes.float": _island,
        OWN: _own,
        "codes.add": literal(lambda g: Add(g.left, g.right, g.output, g.post_op, alpha=g.alpha)),
        "codes.sub": literal(lambda g: Add(g.left, g.right, g.output, g.post_op, alpha=-g.alpha)),
        "codes.mul": literal(lambda g: Mul(g.left, g.right, g.output, g.post_op)),
        "codes.table": literal(_table),
        "codes.cat": literal(lambda g: Cat(g.grids, g.output, g.dim)),
        "codes.stack": literal(lambda g: Stack(g.grids, g.output, g.dim)),
        **{f"codes.max_pool{rank}d": _MAX_POOL for rank in (1, 2, 3)},
        "codes.avg_pool1d": literal(_average1d),
        **{f"codes.avg_pool{rank}d": literal(_average) for rank in (2, 3)},
        **{f"codes.adaptive_avg_pool{rank}d": _ADAPTIVE for rank in (1, 2, 3)},
        "codes.mean": literal(lambda g: Mean(dims(g.dim), g.given, g.output, keepdim=g.keepdim)),
        "codes.sum": literal(lambda g: Sum(dims(g.dim), g.given, g.output, keepdim=g.keepdim)),
        **SPATIAL_LEAVES,
        **QUANTIZED_LEAVES,
    }
)
"""Kind of node -> how its module is made. Such a node's `inputs` argument holds what the module is called with."""
