"""Modules of transposed convolutions, of norms that stand alone, and of what works on spatial dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from qfunc.edge.build import Builder, Literals, Weights, literal, output
from qfunc.edge.evaluate import Evaluator
from qfunc.edge.kernels.affine import clamp_codes
from qfunc.edge.kernels.conv_transpose import ConvTransposeCall, OnednnConvTranspose
from qfunc.edge.kernels.norm import BatchNorm, PReLU
from qfunc.edge.kernels.post_op import read_post_op
from qfunc.edge.kernels.spatial import AdaptiveMaxPool, Interpolate, Pad
from qfunc.ir import Arg, Expression, ListArg, Node, Opaque
from qfunc.params import QuantizeWeight


def transposed_weights(node: Node, evaluator: Evaluator) -> Weights:
    """Integer weight, its scale per output channel (those of a group's are every group's), and the bias."""
    weight, bias, groups = node.get("weight"), node.get("bias"), node.get("groups")
    assert isinstance(weight, QuantizeWeight) and isinstance(groups, int)
    quantized = evaluator.quantized(weight)
    of_group = quantized.qparams.scale.to(torch.float32).expand(quantized.values.shape[1])
    floats = evaluator.tensor(bias).to(torch.float32).clone() if isinstance(bias, Expression) else None
    return quantized.values.contiguous(), of_group.repeat(groups), floats


def _conv_transpose(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    given: Any = Literals(node)
    call = ConvTransposeCall(
        given.input.scale,
        given.input.zero_point,
        *output(given.output),
        given.stride,
        given.padding,
        given.output_padding,
        given.dilation,
        given.groups,
        read_post_op(given.post_op),
    )
    return OnednnConvTranspose(*transposed_weights(node, evaluator), call)


def _batch_norm(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    given: Any = Literals(node)

    def parameter(value: Arg) -> Tensor | None:
        return evaluator.tensor(value) if isinstance(value, Expression) else None

    mean, var = parameter(given.running_mean), parameter(given.running_var)
    assert mean is not None and var is not None, node
    affine = (parameter(given.weight), parameter(given.bias))
    return BatchNorm.of(mean, var, *affine, given.eps, given.given, given.output, given.post_op)


def _prelu(node: Node, evaluator: Evaluator, _: Mapping[str, Opaque]) -> nn.Module:
    given: Any = Literals(node)
    slope = evaluator.tensor(given.weight).to(torch.float32).reshape(-1).clone()
    return PReLU(slope, given.given, given.output)


def _interpolate(given: Any) -> nn.Module:
    options = {
        "size": _plain(given.size),
        "scale_factor": _plain(given.scale_factor),
        "align_corners": given.align_corners,
        "recompute_scale_factor": given.recompute_scale_factor,
        "antialias": given.antialias,
    }
    return Interpolate(given.given, given.mode, options)


def _plain(value: Arg) -> Any:
    return list(value.items) if isinstance(value, ListArg) else value


def _sizes(value: Arg) -> tuple[int | None, ...]:
    plain = _plain(value)
    return tuple(plain) if isinstance(plain, (tuple, list)) else (plain,)


SPATIAL_LEAVES: Mapping[str, Builder] = MappingProxyType(
    {
        **{f"onednn.conv_transpose{rank}d": _conv_transpose for rank in (1, 2, 3)},
        "codes.batch_norm": _batch_norm,
        "codes.prelu": _prelu,
        "codes.clamp": literal(lambda g: clamp_codes(g.low, g.high, g.given)),
        **{
            f"codes.adaptive_max_pool{rank}d": literal(lambda g: AdaptiveMaxPool(_sizes(g.output_size)))
            for rank in (1, 2, 3)
        },
        "codes.pad": literal(lambda g: Pad(None if g.pad is None else tuple(_plain(g.pad)), g.mode, g.value, g.given)),
        "codes.interpolate": literal(_interpolate),
    }
)
"""How each is made, by the kind of its node."""
