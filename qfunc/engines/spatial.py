"""Rows of the `onednn` engine: transposed convolutions, norms that stand alone, what works on spatial dimensions."""

from __future__ import annotations

from dataclasses import replace
from math import isnan

from qfunc.config.kernel import Call, KernelRow, Plan, kernel_node
from qfunc.engines.post_op import post_op
from qfunc.engines.weights import layer_of
from qfunc.ir import Arg, Expression, Node, refs

_RANKS = (1, 2, 3)
_FLOAT = "the result is read in float"
_OTHER_QPARAMS = "input and output have different qparams"


def _conv_transpose(call: Call) -> Plan:
    node = call.node
    # It is an ordinary convolution, whose result is rearranged.
    layer = layer_of(call, f"onednn.conv{node.kind[-2:]}", node.post, axis=1)
    if isinstance(layer, str):
        return layer
    names = ("stride", "padding", "output_padding", "dilation", "groups")
    args = {**{name: node.get(name) for name in names}, **layer}
    return kernel_node(call, f"onednn.{node.kind}", (call.input.codes,), **args)


def _batch_norm(call: Call) -> Plan:
    node = call.node
    if call.output is None:
        return _FLOAT
    if node.get("training") is not False:
        return "it norms by the statistics of its input"
    parameters = {name: node.get(name) for name in ("running_mean", "running_var", "weight", "bias")}
    optional = ("weight", "bias")
    if not all(isinstance(p, Expression) or (p is None and name in optional) for name, p in parameters.items()):
        return "a parameter is computed by the graph"
    post = post_op("codes.add", node.post, call.output)
    if isinstance(post, str):
        return post
    affines = {"given": call.input.affine, "output": call.output}
    options = {"eps": node.get("eps"), "post_op": post[0], **affines}
    return kernel_node(call, "codes.batch_norm", (call.input.codes,), **parameters, **options)


def _prelu(call: Call) -> Plan:
    weight = call.node.get("weight")
    if call.output is None:
        return _FLOAT
    if not isinstance(weight, Expression):
        return "its weight is computed by the graph"
    affines = {"given": call.input.affine, "output": call.output}
    return kernel_node(call, "codes.prelu", (call.input.codes,), weight=weight, **affines)


def clamp_row(call: Call) -> Plan:
    """A ReLU or clamp that leaves the qparams: bounds are codes."""
    node = call.node
    if call.output != call.input.affine:
        return _OTHER_QPARAMS
    low, high = (0.0, None) if node.kind == "relu" else (node.get("min"), node.get("max"))
    for bound in (low, high):
        if not (bound is None or (isinstance(bound, (int, float)) and not isnan(bound))):
            return "a bound is computed by the graph"
    return kernel_node(call, "codes.clamp", (call.input.codes,), low=low, high=high, given=call.output)


def _adaptive_max_pool(call: Call) -> Plan:
    if call.output != call.input.affine:
        return _OTHER_QPARAMS
    kernel = f"codes.{call.node.kind}"
    return kernel_node(call, kernel, (call.input.codes,), output_size=call.node.get("output_size"))


def _pad(call: Call) -> Plan:
    node = call.node
    if call.output != call.input.affine:
        return _OTHER_QPARAMS
    pad = node.get("pad")
    computed = any(True for _ in refs(pad))
    options = {"pad": None if computed else pad, "mode": node.get("mode"), "value": node.get("value")}
    made = kernel_node(call, "codes.pad", (call.input.codes,), given=call.output, **options)
    return _called_with(made, pad) if computed and isinstance(made, Node) else made


def _interpolate(call: Call) -> Plan:
    node = call.node
    if call.output != call.input.affine:
        return _OTHER_QPARAMS
    if node.get("mode") == "bicubic":
        return "bicubic interpolation leaves the range of its input"
    size = node.get("size")
    computed = any(True for _ in refs(size))
    options = {name: value for name, value in node.args if name not in ("input", "size")}
    made = kernel_node(
        call, "codes.interpolate", (call.input.codes,), given=call.output, size=None if computed else size, **options
    )
    return _called_with(made, size) if computed and isinstance(made, Node) else made


def _called_with(kernel: Node, value: Arg) -> Node:
    """A kernel's node with one more input, which the graph computes."""
    inputs = kernel.get("inputs")
    assert isinstance(inputs, tuple), kernel
    return replace(kernel, args=(("inputs", (*inputs, value)), *kernel.args[1:]))


SPATIAL: tuple[KernelRow, ...] = (
    *(KernelRow(f"onednn.conv_transpose{rank}d", (f"conv_transpose{rank}d",), _conv_transpose) for rank in _RANKS),
    KernelRow("batch_norm", ("batch_norm",), _batch_norm),
    KernelRow("prelu", ("prelu",), _prelu),
    *(KernelRow(f"adaptive_max_pool{rank}d", (f"adaptive_max_pool{rank}d",), _adaptive_max_pool) for rank in _RANKS),
    KernelRow("pad", ("pad",), _pad),
    KernelRow("interpolate", ("interpolate",), _interpolate),
)
"""These rows."""
