"""The `quantized` engine: torch's own kernels on quantized tensors, for its x86, fbgemm, qnnpack and onednn engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from qfunc.backends.cpu import MOVES
from qfunc.config.host_report import HostReport
from qfunc.config.kernel import Call, Engine, KernelRow, Plan, kernel_node, on_codes
from qfunc.engines.island import island
from qfunc.engines.post_op import PostOpLiteral, breach, post_op
from qfunc.engines.weights import clips, weight_of
from qfunc.ir import Expression, Node, Origin, Ref, TensorFact, Written
from qfunc.ir.node import NamedArgs


def torch_engine(call: Call) -> str:
    """The engine of torch's that packs and runs the kernels on this host: x86 where there is one."""
    return next(torch_engines(call.host))


def torch_engines(host: HostReport) -> Iterator[str]:
    """The engines of torch's that a host has, the best first."""
    return (e for e in ("x86", "fbgemm", "onednn", "qnnpack") if e in host.quantized_engines)


def _weighted(call: Call) -> Plan:
    node, engine = call.node, torch_engine(call)
    weight = weight_of(call, call.host.layouts(engine))
    if isinstance(weight, str):
        return weight
    if call.output is None:
        return "the kernel writes quantized tensors only"
    declined = clips(call.output) or _no_batch(node)
    if declined:
        return declined
    post = _post_op(call)
    if isinstance(post, str):
        return post
    bias = node.get("bias")
    if not (bias is None or isinstance(bias, Expression)):
        return "its bias is computed by the graph"
    broken = breach(call.host, f"quantized.{node.kind}[{engine}]")
    if broken:
        return broken
    args: dict[str, Any] = {
        "weight": weight,
        "bias": bias,
        "output": call.output,
        "relu": post == ("relu",),
        "engine": engine,
    }
    if node.kind == "linear":
        return kernel_node(call, "quantized.linear", (call.input.codes,), **args)
    if node.get("padding_mode") != "zeros" or not isinstance(node.get("padding"), tuple):
        return "the kernel pads with zeros only, by numbers"
    options = {name: node.get(name) for name in ("stride", "padding", "dilation", "groups")}
    return kernel_node(call, f"quantized.{node.kind}", (call.input.codes,), **args, **options)


def _post_op(call: Call) -> PostOpLiteral | str:
    post = post_op(f"quantized.{call.node.kind}", call.node.post, call.output)
    return f"{post}: prepare with backend=X86 for this engine" if isinstance(post, str) else post


def _no_batch(node: Node) -> str:
    ranks = {"conv1d": 3, "conv2d": 4, "conv3d": 5}
    rank = len(node.fact.shape) if isinstance(node.fact, TensorFact) else None
    fits = rank is None or (rank >= 2 if node.kind == "linear" else rank == ranks[node.kind])
    return "" if fits else "the kernel takes a batch dimension"


def _arithmetic(call: Call) -> Plan:
    node = call.node
    operands = [operand for slot in ("input", "other") for operand in call.operands.get(slot, ())]
    if len(operands) != 2:
        return "one operand is a number"
    if call.output is None:
        return "the kernel writes quantized tensors only"
    if clips(call.output):
        return clips(call.output)
    if node.kind == "add" and node.get("alpha") != 1:
        return "the sum is scaled by alpha"
    post = _post_op(call)
    if isinstance(post, str):
        return post
    broken = breach(call.host, f"quantized.{node.kind}[relu]") if post == ("relu",) else ""
    if broken:
        return broken
    codes = tuple(operand.codes for operand in operands)
    return kernel_node(call, f"quantized.{node.kind}", codes, output=call.output, relu=post == ("relu",))


def _cat(call: Call) -> Plan:
    if call.output is None:
        return "the kernel writes quantized tensors only"
    if clips(call.output):
        return clips(call.output)
    codes = tuple(operand.codes for operand in call.operands["tensors"])
    return kernel_node(call, "quantized.cat", (codes,), output=call.output, dim=call.node.get("dim"))


def _same_qparams(call: Call) -> Plan:
    """Aten's operator takes quantized tensors and hands their qparams on."""
    if call.output != call.input.affine:
        return "input and output have different qparams"
    if call.node.kind == "clamp" and any(isinstance(call.node.get(name), Ref) for name in ("min", "max")):
        return "a bound is computed by the graph"
    if call.node.has("dtype") and call.node.get("dtype") is not None:
        return "the mean is taken in another dtype"
    return on_codes(call)


def _fixed(scale: float, zero_point: int) -> Any:
    def plan(call: Call) -> Plan:
        """Aten's operator takes quantized tensors and gives its function's own range."""
        output = call.output
        if output is None or (output.scale, output.zero_point) != (scale, zero_point):
            return f"the kernel gives scale {scale:g} and zero point {zero_point} only"
        return on_codes(call)

    return plan


def _hardswish(call: Call) -> Plan:
    if call.output is None:
        return "the kernel writes quantized tensors only"
    if clips(call.output):
        return clips(call.output)
    name, scale, zero_point = "torch.ops.quantized.hardswish", call.output.scale, call.output.zero_point
    args: NamedArgs = (("0", Ref(call.input.codes)), ("1", scale), ("2", zero_point))
    origin = Origin(call.node.origin.module, call.node.origin.type, Written("call_function", name, ("0", "1", "2")))
    return Node(call.node.id, name, args, origin=origin, fact=call.node.fact)


def _on_uint8(row: KernelRow) -> KernelRow:
    """The row for `uint8` codes alone: plain `int8` ones are no quantized tensors."""

    def plan(call: Call) -> Plan:
        affines = [operand.affine for operands in call.operands.values() for operand in operands]
        dtypes = {affine.dtype for affine in (*affines, call.output) if affine is not None}
        return row.plan(call) if dtypes == {"uint8"} else "the kernel takes and gives uint8 activations"

    return replace(row, plan=plan)


_POOLS = tuple(f"{kind}{rank}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3))

_ROWS = (
    KernelRow("quantized.weighted", ("conv1d", "conv2d", "conv3d", "linear"), _weighted, checked=False),
    *(KernelRow(f"quantized.{name}", (name,), _arithmetic) for name in ("add", "mul")),
    KernelRow("quantized.cat", ("cat",), _cat),
    KernelRow("quantized.hardswish", ("hardswish",), _hardswish, checked=False),
    KernelRow("quantized.sigmoid", ("sigmoid", "hardsigmoid"), _fixed(1 / 256, 0), checked=False),
    KernelRow("quantized.tanh", ("tanh",), _fixed(2 / 256, 128), checked=False),
    KernelRow("quantized.aten", ("relu", "clamp", "mean", *_POOLS), _same_qparams, checked=False),
)

_CONVERSIONS = tuple((kind, f"quantized.{kind}") for kind in ("quantize", "dequantize"))

QUANTIZED = Engine("quantized", (*map(_on_uint8, _ROWS), island("quantized.float")), MOVES, _CONVERSIONS)
"""The kernels of torch's quantized tensors."""
