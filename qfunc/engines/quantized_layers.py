"""The `quantized` engine's layers: convolutions, transposed ones, and linear layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from qfunc.config.kernel import Call, Plan, kernel_node
from qfunc.engines.post_op import PostOpLiteral, breach, clips, contract_name, post_op
from qfunc.engines.weights import weight_of
from qfunc.ir import Arg, Expression, Node, TensorFact
from qfunc.numerics.saturation import PairLayout, pair_bound
from qfunc.params import DequantizeWeight, QuantizeWeight, loads

Planner: TypeAlias = Callable[[Call, str], Plan]
"""How a call becomes a node, given which of torch's engines runs it."""

RANKS = {"conv1d": 3, "conv2d": 4, "conv3d": 5, "conv_transpose1d": 3, "conv_transpose2d": 4, "conv_transpose3d": 5}
"""How many dimensions the input of a convolution has with its batch."""

Padding: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""What to pad beforehand, as `F.pad` takes it, and what the kernel pads."""


def weighted(call: Call, engine: str) -> Plan:
    """A convolution or a linear layer, with the post-ops that a torch engine has."""
    node = call.node
    weight = weight_of(call, call.host.layouts(engine))
    if isinstance(weight, str):
        return weight
    declined = not_quantized(call) or _no_batch(node)
    if declined:
        return declined
    sums = node.kind == "conv2d" and engine == "onednn" and bool(node.post) and node.post[0].kind == "add"
    post = _post_op(call, engine, sums=sums)
    if isinstance(post, str):
        return post
    bias = node.get("bias")
    if not (bias is None or isinstance(bias, Expression)):
        return "its bias is computed by the graph"
    kernel = f"quantized.{node.kind}{'_add' * sums}"
    broken = breach(call.host, contract_name(f"{kernel}[{engine}]", str(post[0])))
    if broken:
        return broken
    args: dict[str, Any] = {"weight": weight, "bias": bias, "output": call.output, "engine": engine}
    if node.kind == "linear":
        return kernel_node(call, kernel, (call.input.codes,), post_op=post, **args)
    sides = padding_of(node, next(loads(weight)).shape[2:])
    if isinstance(sides, str):
        return sides
    args |= {name: node.get(name) for name in ("stride", "dilation", "groups", "padding_mode")}
    args |= {"pad": sides[0], "padding": sides[1], "relu": post == ("relu",)}
    if not sums:
        return kernel_node(call, kernel, (call.input.codes,), **args)
    other = call.operands["post.0.other"][0].codes
    return kernel_node(call, kernel, (call.input.codes, other), overwrite=other in call.dead_after, **args)


def not_quantized(call: Call) -> str:
    """Why a kernel that writes codes of all 8 bits cannot give this result; empty where it can."""
    return "the kernel writes quantized tensors only" if call.output is None else clips(call.output)


def padding_of(node: Node, kernel: tuple[int, ...]) -> Padding | str:
    """What is padded before a convolution, and what by it; or why that is not known.

    >>> padding_of(Node("c", "conv1d", (("padding", "same"), ("padding_mode", "zeros"), ("dilation", (1,)))), (4,))
    ((1, 2), (0,))
    """
    padding, dilation, none = node.get("padding"), _numbers(node.get("dilation")), (0,) * len(kernel)
    if padding == "valid":
        return (), none
    if dilation is None:
        return "an option is computed by the graph"
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        widths = _numbers(padding)
        if widths is None:
            return "an option is computed by the graph"
        sides = [(width, width) for width in widths]
    if node.get("padding_mode") == "zeros" and all(left == right for left, right in sides):
        return (), tuple(left for left, _ in sides)
    return tuple(width for pair in reversed(sides) for width in pair), none


def _numbers(given: Arg) -> tuple[int, ...] | None:
    """A tuple of integers; None where it is none."""
    found = tuple(value for value in given if isinstance(value, int)) if isinstance(given, tuple) else ()
    return found if isinstance(given, tuple) and len(found) == len(given) else None


def _no_batch(node: Node) -> str:
    rank = len(node.fact.shape) if isinstance(node.fact, TensorFact) else None
    fits = rank is None or (rank >= 2 if node.kind == "linear" else rank == RANKS[node.kind])
    return "" if fits else "the kernel takes a batch dimension"


def _post_op(call: Call, engine: str, *, sums: bool) -> PostOpLiteral | str:
    kernel = f"quantized.{call.node.kind}{'_add' * sums}"
    kernel = f"{kernel}[onednn]" if sums or (engine == "onednn" and call.node.kind == "linear") else kernel
    post = post_op(kernel, call.node.post[sums:], call.output)
    if not isinstance(post, str):
        return post
    return f"{post}: prepare with backend={'ONEDNN' if engine == 'onednn' else 'X86'} for this engine"


def transposed(call: Call, engine: str) -> Plan:
    """A transposed convolution.

    torch's x86 engine hands those with output padding to fbgemm, whose kernel is right for most others too; where it is
    not, qnnpack's is taken.
    """
    node = call.node
    names = ("fbgemm", "qnnpack", "x86") if engine == "x86" else (engine,)
    engines = [name for name in names if name in call.host.quantized_engines] or [engine]
    broken = {name: _transposed_breach(call, name) for name in engines}
    packed_by = next((name for name in engines if not broken[name]), engines[0])
    weight = _one_scale(call, call.host.layouts(packed_by).dense)
    if isinstance(weight, str):
        return weight
    declined = not_quantized(call) or _no_batch(node)
    if declined:
        return declined
    if post_op("quantized.conv_transpose", node.post, call.output) != ("none",):
        return "the kernel has no post-op"
    if broken[packed_by]:
        return broken[packed_by]
    bias = node.get("bias")
    if not (bias is None or isinstance(bias, Expression)):
        return "its bias is computed by the graph"
    options = ("stride", "padding", "output_padding", "dilation", "groups")
    args: dict[str, Any] = {name: node.get(name) for name in options}
    args |= {"weight": weight, "bias": bias, "output": call.output, "engine": packed_by}
    return kernel_node(call, f"quantized.{node.kind}", (call.input.codes,), **args)


def _transposed_breach(call: Call, engine: str) -> str:
    """Why an engine's kernel cannot be used.

    Two of torch 2.13 give what they find in memory, so that no contract could say twice the same of them: fbgemm's for
    two rows of multiples of 8 channels, and qnnpack's in three dimensions.
    """
    node, weight = call.node, call.node.get("weight")
    if engine == "fbgemm" and node.kind == "conv_transpose2d" and isinstance(weight, DequantizeWeight):
        ins, outs, rows, _ = next(loads(weight.value)).shape
        if node.get("groups") == 1 and rows == 2 and ins % 8 == 0 and outs % 8 == 0:
            return "fbgemm's kernel for two rows is wrong for multiples of 8 channels"
    if engine == "qnnpack" and node.kind == "conv_transpose3d":
        return "qnnpack's kernel is wrong in three dimensions"
    return breach(call.host, f"quantized.{node.kind}[{engine}]")


def _one_scale(call: Call, layout: PairLayout) -> QuantizeWeight | str:
    """The weight, of one scale, which cannot be limited for single channels."""
    weight = call.node.get("weight")
    if not isinstance(weight, DequantizeWeight):
        return "its weight is not quantized, or is computed by the graph"
    spec = weight.value.observer.spec
    if spec.dtype != "int8" or not spec.symmetric:
        return f"the kernel takes symmetric int8 weights, not {spec.dtype} {spec.qscheme}"
    if spec.ch_axis is not None:
        return "the kernel takes one scale for the whole weight: observe it with MinMax(INT8_SYMMETRIC)"
    low, high = call.input.affine.expected
    most = high - min(low, 0)
    if layout != "none" and pair_bound(most) < 2 * max(-spec.quant_min, spec.quant_max):
        return "the kernel can overflow on this host: use activations of 7 bits"
    return QuantizeWeight(weight.value.value, weight.value.observer, "none", most)
