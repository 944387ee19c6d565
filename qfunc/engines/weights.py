"""Quantized weights and results as kernels take and give them: limited weights, ends of ranges."""

from __future__ import annotations

from typing import Any

from qfunc.config.kernel import Call
from qfunc.engines.post_op import breach, contract_name, post_op
from qfunc.ir import Expression, PostOp, Ref
from qfunc.numerics.saturation import PairLayout, PairLayouts, pair_bound
from qfunc.params import DequantizeWeight, QuantizeWeight, loads


def weight_of(call: Call, layouts: PairLayouts, *, axis: int = 0) -> QuantizeWeight | str:
    """The quantized weight of a call, limited to what this host's kernels add without overflow.

    Seven-bit activations are meant to need no limit; as in the reference, the headroom above them is not provided for.
    """
    weight = call.node.get("weight")
    if not isinstance(weight, DequantizeWeight):
        return "its weight is computed by the graph" if isinstance(weight, Ref) else "its weight is not quantized"
    low, high = call.input.affine.expected
    most = high - min(low, 0)  # kernels shift int8 activations to uint8
    return limited(call, weight.value, most, layouts, axis=axis)


def layer_of(
    call: Call, kernel: str, posts: tuple[PostOp, ...], *, axis: int = 0, int8: bool = False
) -> dict[str, Any] | str:
    """What a kernel of oneDNN's for a layer is made with: weight, bias, qparams and post-op; or why it takes no call.

    `kernel` is the one whose post-ops it has and whose contract it needs, `posts` what it has to do behind the layer.
    Output channels of the weight are along `axis`; with `int8` activations may be that as well.
    """
    weight = weight_of(call, call.host.onednn_layouts, axis=axis)
    if isinstance(weight, str):
        return weight
    if call.input.affine.dtype != "uint8" and not int8:
        return "the kernel takes uint8 activations"
    bias = call.node.get("bias")
    if not (bias is None or isinstance(bias, Expression)):
        return "its bias is computed by the graph"
    post = post_op(kernel, posts, call.output)
    if isinstance(post, str):
        return post
    broken = breach(call.host, contract_name(kernel, str(post[0])))
    if broken:
        return broken
    return {"weight": weight, "bias": bias, "input": call.input.affine, "output": call.output, "post_op": post}


def limited(
    call: Call, weight: QuantizeWeight, most: int, layouts: PairLayouts, *, axis: int = 0
) -> QuantizeWeight | str:
    """A quantized weight limited to what this host's kernels add without overflow to activations up to `most`.

    Its output channels are along `axis`; where that is 1, a kernel rearranges the weight, so that any two may meet.
    """
    if unfit(weight, axis):
        return unfit(weight, axis)
    spec = weight.observer.spec
    safe = pair_bound(most) >= 2 * max(-spec.quant_min, spec.quant_max)
    if safe:
        return QuantizeWeight(weight.value, weight.observer, "none", most)
    groups = call.node.get("groups") if call.node.kind.startswith("conv") else 1
    if not isinstance(groups, int):
        return "an option is computed by the graph"
    pairs: PairLayout = "any of axis 1" if layouts.saturates else "none"
    if axis == 0:
        pairs = layouts.of(next(loads(weight.value)).shape, groups)  # folding keeps the shape
    return QuantizeWeight(weight.value, weight.observer, pairs, most)


def unfit(weight: QuantizeWeight, axis: int = 0) -> str:
    """Why kernels that take int8 weights cannot take this one; empty where they can."""
    spec = weight.observer.spec
    if spec.dtype != "int8" or not spec.symmetric:
        return f"the kernel takes symmetric int8 weights, not {spec.dtype} {spec.qscheme}"
    if spec.ch_axis not in (axis, None):
        return f"its weight has scales along ch_axis={spec.ch_axis}, and its output channels are axis {axis}"
    return ""
