"""The `quantized` engine's layers that read floats: quantized or cast as the model runs, and tables of vectors."""

from __future__ import annotations

from typing import Any

from qfunc.config.kernel import Call, Plan, kernel_node
from qfunc.engines.post_op import breach, post_op
from qfunc.ir import Arg, Expression, Ref, TensorFact
from qfunc.numerics.qparams import QuantSpec
from qfunc.numerics.saturation import PairLayouts, pair_bound
from qfunc.numerics.unmeasured import Dynamic
from qfunc.params import CastWeight, DequantizeWeight, QuantizeWeight, loads


def linear_dynamic(call: Call, engine: str) -> Plan:
    """A linear layer whose input gets qparams of its own when the model runs."""
    how = call.input.how
    assert isinstance(how, Dynamic), how
    weight = _reduced(how.spec, engine) or _weight(call.node.get("weight"), how.spec, call.host.layouts(engine))
    if isinstance(weight, str):
        return weight
    return _linear(call, f"quantized.linear_dynamic[{engine}]", weight, how.spec.quant_max == 127, engine)


def linear_float16(call: Call, engine: str) -> Plan:
    """A linear layer whose input and weight are cast to float16."""
    weight = call.node.get("weight")
    if not isinstance(weight, CastWeight) or weight.dtype != "float16":
        return "its weight is not cast to float16"
    if 0 in next(loads(weight)).shape:
        return "its weight is empty"
    return _linear(call, f"quantized.linear_float16[{engine}]", weight, False, engine)


def _linear(call: Call, contract: str, weight: Expression, reduce_range: bool, engine: str) -> Plan:
    node = call.node
    post = post_op("quantized.linear_dynamic", node.post, call.output)
    if isinstance(post, str):
        return f"{post}: prepare with backend=X86 for this engine"
    fact, bias = node.fact, node.get("bias")
    if not isinstance(fact, TensorFact) or fact.dtype != "float32" or len(fact.shape) < 2:
        return "the kernel takes float32 with a batch dimension"
    if not (bias is None or isinstance(bias, Expression)):
        return "its bias is computed by the graph"
    broken = breach(call.host, contract)
    if broken:
        return broken
    args: dict[str, Any] = {"weight": weight, "bias": bias, "relu": post == ("relu",), "engine": engine}
    args |= {"reduce_range": reduce_range} if isinstance(weight, QuantizeWeight) else {}
    return kernel_node(call, contract.partition("[")[0], (call.input.value,), **args)


def _reduced(spec: QuantSpec, engine: str) -> str:
    """Why the kernel does not quantize its input so; empty where it does."""
    if (spec.dtype, spec.qscheme, spec.quant_min) != ("uint8", "per_tensor_affine", 0):
        return f"the kernel quantizes its input to uint8 codes from 0 on, not to {spec.dtype} {spec.qscheme}"
    if spec.quant_max not in ((255,) if engine == "qnnpack" else (255, 127)):
        return f"the kernel does not quantize its input to codes up to {spec.quant_max}"
    return ""


def _weight(weight: Arg, given: QuantSpec, layouts: PairLayouts) -> QuantizeWeight | str:
    if not isinstance(weight, DequantizeWeight):
        return "its weight is not quantized, or is computed by the graph"
    quantized, spec = weight.value, weight.value.observer.spec
    if spec.dtype != "int8" or not spec.symmetric or spec.ch_axis not in (0, None):
        return f"the kernel takes symmetric int8 weights, not {spec.dtype} {spec.qscheme}"
    if 0 in next(loads(quantized)).shape:
        return "its weight is empty"
    safe = pair_bound(given.quant_max) >= 2 * max(-spec.quant_min, spec.quant_max)
    return QuantizeWeight(quantized.value, quantized.observer, "none" if safe else layouts.dense, given.quant_max)


def embedding(call: Call, _: str) -> Plan:
    """A table of 8-bit codes: of vectors, or of vectors that are summed in bags."""
    node, weight = call.node, call.node.get("weight")
    if not isinstance(weight, DequantizeWeight):
        return "its weight is not quantized, or is computed by the graph"
    spec = weight.value.observer.spec
    if (spec.dtype, spec.qscheme, spec.ch_axis) != ("uint8", "per_channel_affine_float_qparams", 0):
        more = ": the kernel of 4 bits rounds scales to float16" if spec.dtype == "uint4" else ""
        return f"the kernel takes uint8 rows with float zero points, not {spec.dtype} {spec.qscheme}{more}"
    if 0 in next(loads(weight.value)).shape:
        return "its weight is empty"
    inputs = [node.get("input")]
    args: dict[str, Any] = {"weight": weight.value}
    if node.kind == "embedding_bag":
        inputs += [value for name in ("offsets", "per_sample_weights") if (value := node.get(name)) is not None]
        if node.get("mode") != "sum" or node.get("padding_idx") is not None:
            return "the kernel sums bags, of all their indices"
        if node.get("offsets") is None and node.get("per_sample_weights") is not None:
            return "the kernel takes factors of single indices with offsets only"
        args |= {"include_last_offset": node.get("include_last_offset")}
    if not all(isinstance(value, Ref) for value in inputs):
        return "its indices are no value of the graph"
    ids = tuple(value.id for value in inputs if isinstance(value, Ref))
    return kernel_node(call, f"quantized.{node.kind}", ids, **args)
