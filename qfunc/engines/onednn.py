"""The `onednn` engine: oneDNN's int8 kernels and aten's, on plain `uint8` tensors."""

from __future__ import annotations

from typing import Any

from qfunc.backends.cpu import ELEMENTWISE, MOVES
from qfunc.config.kernel import Call, Engine, KernelRow, Plan, kernel_node
from qfunc.engines.dynamic import DYNAMIC_ROWS
from qfunc.engines.island import island
from qfunc.engines.post_op import breach, post_op
from qfunc.engines.spatial import SPATIAL, clamp_row
from qfunc.engines.weights import layer_of
from qfunc.ir import Ref


def _conv(call: Call) -> Plan:
    node = call.node
    sums = node.post[:1] if node.post and node.post[0].kind == "add" else ()
    if sums and node.kind == "conv3d":
        return "the kernel adds in one and two dimensions"
    if sums and call.output is None:
        return "the kernel that adds writes uint8, and the result is read in float"
    kernel = f"onednn.{node.kind}{'_add' * len(sums)}"
    layer = layer_of(call, kernel, node.post[len(sums) :])
    if isinstance(layer, str):
        return layer
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    args = {**{name: node.get(name) for name in names}, **layer}
    if not sums:
        return kernel_node(call, kernel, (call.input.codes,), **args)
    other = call.operands["post.0.other"][0]
    args |= {"other": other.affine, "overwrite": other.codes in call.dead_after}
    return kernel_node(call, kernel, (call.input.codes, other.codes), **args)


def _linear(call: Call) -> Plan:
    layer = layer_of(call, "onednn.linear", call.node.post, int8=True)
    return layer if isinstance(layer, str) else kernel_node(call, "onednn.linear", (call.input.codes,), **layer)


def _arithmetic(call: Call) -> Plan:
    node = call.node
    operands = [operand for slot in ("input", "other") for operand in call.operands.get(slot, ())]
    if call.output is None:
        return "the result is read in float"
    if node.kind in ("add", "sub") and not isinstance(node.get("alpha"), (int, float)):
        return "an option is computed by the graph"
    codes = tuple(operand.codes for operand in operands)
    if len(operands) == 1:
        broken = breach(call.host, "table")
        return broken or kernel_node(call, "codes.table", codes, function=node.kind, **_unary(call))
    if node.kind not in ("add", "sub", "mul"):
        return f"no kernel computes {node.kind} of codes and codes"
    kernel = f"codes.{node.kind}"
    post = post_op(kernel, node.post, call.output)
    if isinstance(post, str):
        return post
    broken = breach(call.host, f"{node.kind}[relu]") if post == ("relu",) else ""
    if broken:
        return broken
    left, right = (operand.affine for operand in operands)
    options = {} if node.kind == "mul" else {"alpha": node.get("alpha")}
    return kernel_node(call, kernel, codes, left=left, right=right, output=call.output, post_op=post[0], **options)


def _unary(call: Call) -> dict[str, Any]:
    """What a table needs to know of an elementwise operator: all arguments but the operand, and the post-ops."""
    node = call.node
    options = tuple((name, value) for name, value in node.args if not isinstance(value, Ref))
    taken = next(name for name, value in node.args if isinstance(value, Ref))
    posts = tuple((post.kind, post.args) for post in node.post)
    affines = {"input": call.input.affine, "output": call.output}
    return {"operand": taken, "options": options, "posts": posts, **affines}


def _table(call: Call) -> Plan:
    if call.output is None:
        return "the result is read in float"
    literal = (type(None), int, float, str)
    if not all(isinstance(value, literal) for name, value in call.node.args if name != "input"):
        return "an option is computed by the graph"
    return kernel_node(call, "codes.table", (call.input.codes,), function=call.node.kind, **_unary(call))


def _max_pool(call: Call) -> Plan:
    if call.output != call.input.affine:
        return "input and output have different qparams"
    options = {name: value for name, value in call.node.args if name != "input"}
    return kernel_node(call, f"codes.{call.node.kind}", (call.input.codes,), **options)


def _average(call: Call) -> Plan:
    if call.output is None:
        return "the result is read in float"
    options = {name: value for name, value in call.node.args if name != "input"}
    if options.pop("dtype", None) is not None:
        return "it is taken in another dtype"
    affines = {"given": call.input.affine, "output": call.output}
    return kernel_node(call, f"codes.{call.node.kind}", (call.input.codes,), **options, **affines)


def _join(call: Call) -> Plan:
    operands = call.operands["tensors"]
    if call.output is None:
        return "the result is read in float"
    grids = tuple(operand.affine for operand in operands)
    codes = tuple(operand.codes for operand in operands)
    kernel = f"codes.{call.node.kind}"
    return kernel_node(call, kernel, (codes,), grids=grids, output=call.output, dim=call.node.get("dim"))


TABULATED = (*ELEMENTWISE, "relu", "clamp", "sigmoid", "hardsigmoid", "tanh")
"""Elementwise functions that run as tables of 256 codes where no kernel has them as a post-op."""

_ROWS: tuple[KernelRow, ...] = (
    *(KernelRow(f"onednn.conv{rank}d", (f"conv{rank}d",), _conv) for rank in (1, 2, 3)),
    KernelRow("onednn.linear", ("linear",), _linear),
    *(KernelRow(name, (name,), _arithmetic) for name in ("add", "sub", "mul")),
    KernelRow("table", ("div", "pow"), _arithmetic),
    KernelRow("clamp", ("relu", "clamp"), clamp_row),
    KernelRow("table", TABULATED, _table),
    *(KernelRow(f"max_pool{rank}d", (f"max_pool{rank}d",), _max_pool) for rank in (1, 2, 3)),
    *(
        KernelRow(name, (name,), _average)
        for name in (
            *(f"{kind}{rank}d" for kind in ("avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3)),
            "mean",
            "sum",
        )
    ),
    *(KernelRow(name, (name,), _join) for name in ("cat", "stack")),
    *SPATIAL,
    *DYNAMIC_ROWS,
    island("codes.float"),
)

ONEDNN = Engine("onednn", _ROWS, MOVES, requantizes=True)
"""The default engine."""
