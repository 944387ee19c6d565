"""The `quantized` engine's operators without quantized weights."""

from __future__ import annotations

from math import isfinite
from typing import Any

from qfunc.config.kernel import Call, Plan, kernel_node, on_codes
from qfunc.engines.island import batched_rank
from qfunc.engines.post_op import breach, clips, post_op
from qfunc.engines.quantized_layers import not_quantized
from qfunc.ir import Expression, Node, Ref, TensorFact
from qfunc.numerics.grid import Affine

_QNNPACK = "qnnpack"
_UNIT, _TWO_UNITS = Affine(1 / 256, 0), Affine(2 / 256, 128)


def arithmetic(call: Call, _: str) -> Plan:
    """A sum or a product, of two values or of one and a number."""
    node = call.node
    operands = [operand for slot in ("input", "other") for operand in call.operands.get(slot, ())]
    declined = not_quantized(call)
    if declined:
        return declined
    if node.kind == "add" and node.get("alpha") != 1:
        return "the sum is scaled by alpha"
    post = post_op(f"quantized.{node.kind}", node.post, call.output)
    if isinstance(post, str):
        return f"{post}: prepare with backend=X86 for this engine"
    relu = post == ("relu",)
    broken = breach(call.host, f"quantized.{node.kind}[relu]") if relu else ""
    if broken:
        return broken
    codes = tuple(operand.codes for operand in operands)
    if len(operands) == 2:
        return kernel_node(call, f"quantized.{node.kind}", codes, output=call.output, relu=relu)
    number = next(value for name, value in node.args if name in ("input", "other") and not isinstance(value, Ref))
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 2**-100 < abs(number or 1) < 2**100:
        return "its other operand is not a finite number"
    args: dict[str, Any] = {"number": number, "product": node.kind == "mul", "relu": relu, "output": call.output}
    return kernel_node(call, "quantized.number", codes, **args)


def matmul(call: Call, _: str) -> Plan:
    """A product of two values."""
    operands = [operand for slot in ("input", "other") for operand in call.operands.get(slot, ())]
    declined = not_quantized(call)
    if declined or len(operands) != 2:
        return declined or "one operand is not computed by the graph"
    return kernel_node(call, "quantized.matmul", tuple(operand.codes for operand in operands), output=call.output)


def joined(call: Call, _: str) -> Plan:
    """A concatenation or a stack."""
    declined = not_quantized(call)
    if declined:
        return declined
    codes = tuple(operand.codes for operand in call.operands["tensors"])
    return kernel_node(call, f"quantized.{call.node.kind}", (codes,), output=call.output, dim=call.node.get("dim"))


def same_qparams(call: Call, engine: str) -> Plan:
    """Aten's operator takes quantized tensors and hands their qparams on."""
    node = call.node
    if call.output != call.input.affine:
        return "input and output have different qparams"
    if node.kind == "clamp" and any(isinstance(node.get(name), Ref) for name in ("min", "max")):
        return "a bound is computed by the graph"
    return _aten_breach(call, engine) or on_codes(call)


def mean(call: Call, engine: str) -> Plan:
    """Aten's mean hands the qparams on as well."""
    node = call.node
    if call.output != call.input.affine:
        return "input and output have different qparams"
    if node.get("dtype") is not None:
        return "the mean is taken in another dtype"
    options = {"dim": node.get("dim"), "keepdim": node.get("keepdim")}
    return _aten_breach(call, engine) or kernel_node(call, "quantized.mean", (call.input.codes,), **options)


def _aten_breach(call: Call, engine: str) -> str:
    """Aten has kernels of its own for torch's qnnpack engine."""
    return breach(call.host, f"quantized.{call.node.kind}{f'[{_QNNPACK}]' * (engine == _QNNPACK)}")


def pad(call: Call, _: str) -> Plan:
    """Padding of codes with the code of a number, or by a mode that repeats codes."""
    node, value = call.node, call.node.get("value")
    if call.output is None or call.output != call.input.affine:
        return "input and output have different qparams"
    if not (value is None or isinstance(value, (int, float))) or not isfinite(value or 0):
        return "it pads with a number that is not known, or not finite"
    if node.get("mode") == "constant" and not _holds(call.output, float(value or 0)):
        return "the codes do not hold the number that it pads with"
    args: dict[str, Any] = {"pad": node.get("pad"), "mode": node.get("mode"), "value": float(value or 0)}
    return kernel_node(call, "quantized.pad", (call.input.codes,), **args)


def _holds(output: Affine, value: float) -> bool:
    """Whether codes of all their dtype's bits are written: what saturates in a grid of fewer would be written out."""
    return output.bounds[0] <= round(value / output.scale) + output.zero_point <= output.bounds[1]


def interpolate(call: Call, engine: str) -> Plan:
    """A change of size by aten, which resizes quantized tensors in some modes."""
    node = call.node
    rank = len(node.fact.shape) if isinstance(node.fact, TensorFact) else 0
    if call.output != call.input.affine:
        return "input and output have different qparams"
    mode, ranks = node.get("mode"), {"nearest": (4,), "nearest-exact": (4,), "bilinear": (4,), "area": (3, 4, 5)}
    if not isinstance(mode, str) or rank not in ranks.get(mode, ()) or node.get("antialias") is not False:
        return f"aten does not resize quantized tensors by {mode!r} in {max(rank - 2, 0)} dimensions"
    return _aten_breach(call, engine) or on_codes(call)


def sigmoid(call: Call, engine: str) -> Plan:
    """A sigmoid of any qparams; by aten where these are its own."""
    declined = not_quantized(call)
    if declined:
        return declined
    if _are(call.output, _UNIT):
        return _aten_breach(call, engine) or on_codes(call)
    if engine == _QNNPACK:
        return "the kernel gives scale 0.00390625 and zero point 0 only"
    broken = breach(call.host, "quantized.sigmoid[any]")
    return broken or kernel_node(call, "quantized.sigmoid", (call.input.codes,), output=call.output)


def tanh(call: Call, engine: str) -> Plan:
    """A tanh by aten, with its own range."""
    if not _are(call.output, _TWO_UNITS):
        return "the kernel gives scale 0.0078125 and zero point 128 only"
    return _aten_breach(call, engine) or on_codes(call)


def hardsigmoid(call: Call, engine: str) -> Plan:
    """A hard sigmoid by aten, with its own range."""
    if not _are(call.output, _UNIT):
        return "the kernel gives scale 0.00390625 and zero point 0 only"
    return _aten_breach(call, engine) or kernel_node(call, "quantized.hardsigmoid", (call.input.codes,))


def _are(output: Affine | None, fixed: Affine) -> bool:
    same = output is not None and (output.scale, output.zero_point) == (fixed.scale, fixed.zero_point)
    return same and not clips(output)


def curved(call: Call, engine: str) -> Plan:
    """An activation with qparams of its own: `elu`, `leaky_relu`, `hardswish`."""
    declined = not_quantized(call) or _aten_breach(call, engine)
    if declined:
        return declined
    options = {name: value for name, value in call.node.args if name != "input"}
    if not all(isinstance(value, (int, float)) for value in options.values()):
        return "an option is computed by the graph"
    return kernel_node(call, f"quantized.{call.node.kind}", (call.input.codes,), output=call.output, **options)


def softmax(call: Call, _: str) -> Plan:
    """A softmax along a dimension that is given."""
    dim, declined = call.node.get("dim"), not_quantized(call)
    if declined:
        return declined
    if call.node.get("dtype") is not None or isinstance(dim, bool) or not isinstance(dim, int):
        return "its dimension is not given, or it computes in another dtype"
    return kernel_node(call, "quantized.softmax", (call.input.codes,), output=call.output, dim=dim)


def batch_norm(call: Call, _: str) -> Plan:
    """A batch norm that is fused with no layer, by its running statistics."""
    node = call.node
    declined = not_quantized(call) or _float_parameters(node, ("running_mean", "running_var"), ("weight", "bias"))
    if declined:
        return declined
    if node.get("training") is not False:
        return "it norms by the statistics of its input"
    post = post_op("quantized.batch_norm", node.post, call.output)
    if isinstance(post, str):
        return f"{post}: prepare with backend=X86 for this engine"
    args: dict[str, Any] = {name: node.get(name) for name in ("running_mean", "running_var", "weight", "bias", "eps")}
    args |= {"output": call.output, "relu": post == ("relu",)}
    return kernel_node(call, "quantized.batch_norm", (call.input.codes,), **args)


def norm(call: Call, _: str) -> Plan:
    """A norm by the statistics of its input: layer, group and instance norms."""
    node = call.node
    declined = not_quantized(call) or _float_parameters(node, (), ("weight", "bias"))
    if declined:
        return declined
    rank = len(node.fact.shape) if isinstance(node.fact, TensorFact) else 0
    if node.kind != "layer_norm" and rank < (batched_rank(node) or 3):
        return "the kernel takes inputs [batch, channels, ...] of at least three dimensions"
    if node.kind == "instance_norm" and node.get("use_input_stats") is not True:
        return "it norms by running statistics"
    names = {"layer_norm": ("normalized_shape",), "group_norm": ("num_groups",), "instance_norm": ()}[node.kind]
    args: dict[str, Any] = {name: node.get(name) for name in (*names, "weight", "bias", "eps")}
    if node.kind == "instance_norm":
        args["batched_rank"] = batched_rank(node)
    return kernel_node(call, f"quantized.{node.kind}", (call.input.codes,), output=call.output, **args)


def _float_parameters(node: Node, needed: tuple[str, ...], optional: tuple[str, ...]) -> str:
    """Why the parameters of a norm are not the kernel's; empty where they are."""
    if not all(isinstance(node.get(name), Expression) for name in needed):
        return "it has no running statistics of its own"
    given = [node.get(name) for name in optional]
    return "" if all(value is None or isinstance(value, Expression) for value in given) else "a factor is computed"
