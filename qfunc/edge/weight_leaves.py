"""The modules of layers that read floats: quantized or cast as the model runs, or with weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qfunc.edge.build import Builder, Literals, weights
from qfunc.edge.evaluate import Evaluator
from qfunc.edge.kernels.dynamic import OnednnLinearDynamic
from qfunc.edge.kernels.embedding import CodesEmbedding, CodesEmbeddingBag
from qfunc.edge.kernels.post_op import read_post_op
from qfunc.edge.kernels.recurrent_int8 import RecurrentCall, RecurrentCast, RecurrentDynamic
from qfunc.edge.kernels.weight_only import CastWeight, Int8WeightLinear, OnednnLinearFloat16, WeightOnly
from qfunc.ir import Expression, Node, Opaque
from qfunc.numerics.qparams import QParams
from qfunc.params import CastWeight as CastExpression
from qfunc.params import QuantizeWeight

Objects = Mapping[str, Opaque]


def _linear_dynamic(node: Node, evaluator: Evaluator, _: Objects) -> nn.Module:
    given: Any = Literals(node)
    return OnednnLinearDynamic(*weights(node, evaluator), given.spec, given.output, read_post_op(given.post_op))


def _codes(expression: QuantizeWeight, evaluator: Evaluator) -> tuple[Tensor, QParams, torch.dtype]:
    """Codes and qparams as buffers of their own, and the type that the weight has in float."""
    found = evaluator.quantized(expression)
    q = found.qparams
    owned = QParams(q.scale.to(torch.float32).clone(), q.zero_point.clone(), q.spec)
    return found.values.contiguous(), owned, evaluator.tensor(expression.value).dtype


def _small(expression: CastExpression, evaluator: Evaluator) -> tuple[Tensor, torch.dtype]:
    """A parameter in its smaller type, and the type that it has in float."""
    value = evaluator.tensor(expression.value)
    return value.to(getattr(torch, expression.dtype)), value.dtype


def _others(node: Node, evaluator: Evaluator) -> dict[str, Tensor]:
    """The parameters of a node besides its weight, as they are."""
    return {
        name: evaluator.tensor(value).clone()
        for name, value in node.args
        if isinstance(value, Expression) and name != "weight"
    }


def _int8_linear(node: Node, evaluator: Evaluator, _: Objects) -> nn.Module:
    with_bias = node if node.has("bias") else node.with_args(bias=None)
    return Int8WeightLinear(*weights(with_bias, evaluator), Literals(node).call)


def _weight_only(node: Node, evaluator: Evaluator, _: Objects) -> nn.Module:
    given: Any = Literals(node)
    values, qparams, dtype = _codes(given.weight, evaluator)
    return WeightOnly(values, qparams, given.call, _others(node, evaluator), dtype)


def _cast_weight(node: Node, evaluator: Evaluator, _: Objects) -> nn.Module:
    given: Any = Literals(node)
    weight, dtype = _small(given.weight, evaluator)
    return CastWeight(weight, given.call, _others(node, evaluator), dtype)


def _float16_linear(node: Node, evaluator: Evaluator, _: Objects) -> nn.Module:
    given: Any = Literals(node)
    bias = _others(node, evaluator).get("bias")
    weight, _dtype = _small(given.weight, evaluator)
    return OnednnLinearFloat16(weight.contiguous(), None if bias is None else bias.to(torch.float32), given.call)


def _embedding(node: Node, evaluator: Evaluator, _: Objects) -> nn.Module:
    given: Any = Literals(node)
    return CodesEmbedding(*_codes(given.weight, evaluator), given.output)


def _embedding_bag(node: Node, evaluator: Evaluator, _: Objects) -> nn.Module:
    given: Any = Literals(node)
    options: Any = {name: node.get(name) for name in ("mode", "include_last_offset", "padding_idx") if node.has(name)}
    return CodesEmbeddingBag(*_codes(given.weight, evaluator), given.output, **options)


def _recurrent_call(node: Node, evaluator: Evaluator) -> tuple[RecurrentCall, dict[str, Tensor]]:
    """The literals of the source's layer or cell, and its biases."""
    given: Any = Literals(node)
    layer: Any = evaluator.module(given.module)
    kind = given.kind.removeprefix("torch.nn.").removesuffix("Cell")
    # a layer says so in its mode, and a cell in its function
    mode: Any = kind if kind != "RNN" else f"RNN_{layer.nonlinearity.upper()}"
    sizes = (layer.input_size, layer.hidden_size)
    biases = {
        name: value.detach().to(torch.float32).clone()
        for name, value in layer.named_parameters(recurse=False)
        if name.startswith("bias_")
    }
    if given.kind.endswith("Cell"):
        return RecurrentCall(mode, *sizes, cell=True, output=given.output), biases
    shape = (layer.num_layers, layer.bidirectional, layer.batch_first, layer.proj_size)
    return RecurrentCall(mode, *sizes, *shape), biases


def _recurrent_dynamic(node: Node, evaluator: Evaluator, _: Objects) -> nn.Module:
    call, biases = _recurrent_call(node, evaluator)
    matrices: dict[str, tuple[Tensor, Tensor]] = {}
    for name, value in node.args:
        if isinstance(value, QuantizeWeight):
            values, qparams, _dtype = _codes(value, evaluator)
            matrices[name] = values, qparams.scale.expand(values.shape[0]).contiguous()
    return RecurrentDynamic(call, matrices, biases, Literals(node).spec)


def _recurrent_cast(node: Node, evaluator: Evaluator, _: Objects) -> nn.Module:
    call, biases = _recurrent_call(node, evaluator)
    matrices = {name: _small(value, evaluator)[0] for name, value in node.args if isinstance(value, CastExpression)}
    return RecurrentCast(call, matrices, biases, getattr(torch, Literals(node).dtype))


WEIGHT_LEAVES: Mapping[str, Builder] = MappingProxyType(
    {
        "onednn.linear_dynamic": _linear_dynamic,
        "onednn.linear_float16": _float16_linear,
        "int8_weight.linear": _int8_linear,
        "weight_only": _weight_only,
        "cast_weight": _cast_weight,
        "codes.embedding": _embedding,
        "codes.embedding_bag": _embedding_bag,
        "recurrent_dynamic": _recurrent_dynamic,
        "recurrent_cast": _recurrent_cast,
    }
)
"""Kind of node -> how its module is made."""
