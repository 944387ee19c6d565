"""The `onednn` engine's rows for layers that read floats: quantized or cast as the model runs, or with weights alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qfunc.config.kernel import FLOATS, Call, KernelRow, Plan, kernel_node, module_node
from qfunc.config.weights import RECURRENT
from qfunc.engines.limits import clips, limited
from qfunc.engines.post_op import breach, contract_name, post_op
from qfunc.ir import Arg, Body, Expression, PostOp, Ref, map_arg, refs
from qfunc.ir.node import NamedArgs
from qfunc.numerics.grid import CODE_RANGE, Affine, Grid
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.params import CastWeight, DequantizeWeight, QuantizeWeight, loads

LINEAR_DYNAMIC = "onednn.linear_dynamic"
"""The kernel of linear layers, and of the matrices in recurrent layers, that quantize their input as the model runs."""

LAYERS = (*(f"conv{rank}d" for rank in (1, 2, 3)), *(f"conv_transpose{rank}d" for rank in (1, 2, 3)), "linear")

TABLE_DTYPES = ("uint8", "int8", "uint4")
"""The types of codes that tables of vectors may have."""


@dataclass(frozen=True, slots=True)
class FloatCall(Body):
    """A layer that computes in float: `kind` with `args`, and `posts` behind it.

    In the arguments `Ref("0")`, `Ref("1")`, ... stand for what the kernel is called with; `casts` names the smaller
    type that each is rounded to first, `""` for none; `output` is what the result becomes, None for float.
    """

    kind: str
    args: NamedArgs
    posts: tuple[PostOp, ...]
    casts: tuple[str, ...]
    output: Affine | None


def _most(spec: Dynamic) -> int | str:
    """The largest code that a kernel sees of an input quantized so, or why no kernel takes these codes."""
    held = str(spec.spec.torch_dtype).removeprefix("torch.")
    if spec.spec.per_channel or held not in CODE_RANGE:
        return f"the kernel takes 8-bit codes of one scale, not {spec.spec.dtype} {spec.spec.qscheme}"
    return spec.spec.quant_max - min(spec.spec.quant_min, 0)  # kernels shift int8 activations to uint8


def _weight(call: Call, weight: Arg, most: int) -> QuantizeWeight | str:
    if not isinstance(weight, DequantizeWeight):
        return "its weight is computed by the graph" if isinstance(weight, Ref) else "its weight is not quantized"
    if 0 in next(loads(weight.value)).shape:
        return "its weight is empty"
    return limited(call, weight.value, most, call.host.onednn_layouts)


def _bias(call: Call) -> str:
    bias = call.node.get("bias")
    return "" if bias is None or isinstance(bias, Expression) else "its bias is computed by the graph"


def _linear_dynamic(call: Call) -> Plan:
    node, how = call.node, call.input.how
    assert isinstance(how, Dynamic), how
    most = _most(how)
    weight = most if isinstance(most, str) else _weight(call, node.get("weight"), most)
    if isinstance(weight, str):
        return weight
    post = post_op("onednn.linear", node.post, call.output)
    if isinstance(post, str):
        return post
    declined = clips(call.output) or _bias(call) or breach(call.host, contract_name("onednn.linear", str(post[0])))
    if declined:
        return declined
    args: dict[str, Any] = {"weight": weight, "bias": node.get("bias"), "spec": how.spec}
    return kernel_node(call, LINEAR_DYNAMIC, (call.input.value,), **args, output=call.output, post_op=post)


def _sources(call: Call) -> Iterator[tuple[str, str]]:
    """The cast operands: the float value that the operator reads, and what that is the cast of."""
    for slot, operands in call.operands.items():
        index, _, name = slot.removeprefix("post.").partition(".")
        arg = dict(call.node.post[int(index)].args)[name] if slot.startswith("post.") else call.node.get(slot)
        for id, operand in zip(refs(arg), operands, strict=True):
            if isinstance(operand.how, Cast):
                yield id, operand.value


def _in_float(call: Call, kernel: str, **options: Arg) -> Plan:
    """The node of a kernel that does in float what the operator does, with parameters of its own as buffers."""
    sources = dict(_sources(call))
    dtypes = {o.value: o.how.dtype for found in call.operands.values() for o in found if isinstance(o.how, Cast)}
    inputs: list[str] = []
    casts: list[str] = []

    def taken(value: Arg) -> Arg:
        if not isinstance(value, Ref):
            return value
        inputs.append(sources.get(value.id, value.id))
        casts.append(dtypes[sources[value.id]] if value.id in sources else "")
        return Ref(str(len(inputs) - 1))

    node = call.node
    parameters = {name: value for name, value in node.args if isinstance(value, Expression)}
    args = tuple((name, map_arg(value, taken)) for name, value in node.args if name not in parameters)
    posts = tuple(
        PostOp(post.kind, tuple((name, map_arg(value, taken)) for name, value in post.args)) for post in node.post
    )
    if any(isinstance(value, Expression) for post in posts for _, value in post.args):
        return "what is fused behind it has parameters"
    body = FloatCall(node.kind, args, posts, tuple(casts), call.output)
    parameters |= {name: value for name, value in options.items() if isinstance(value, Expression)}
    return kernel_node(call, kernel, tuple(inputs), call=body, **parameters)


def _int8_linear(call: Call) -> Plan:
    weight = _weight(call, call.node.get("weight"), 0)
    if isinstance(weight, str):
        return weight
    loaded = {load.dtype for load in loads(weight)}
    if loaded != {"float32"}:
        return f"the kernel computes in float32, not in {', '.join(sorted(loaded))}"
    return _in_float(call, "int8_weight.linear", weight=weight)


def _with_dequantized(call: Call) -> Plan:
    weight = call.node.get("weight")
    if not isinstance(weight, DequantizeWeight):
        return "its weight is not quantized" if isinstance(weight, Expression) else "its weight is computed by the graph"
    return _in_float(call, "weight_only", weight=weight.value)


def _float16_linear(call: Call) -> Plan:
    weight = call.node.get("weight")
    if not isinstance(weight, CastWeight) or weight.dtype != "float16":
        return "its weight is not cast to float16"
    if {load.dtype for load in loads(weight)} != {"float32"} or 0 in next(loads(weight)).shape:
        return "the kernel computes in float32, with a weight that is not empty"
    return _in_float(call, "onednn.linear_float16", weight=weight)


def _with_cast(call: Call) -> Plan:
    weight = call.node.get("weight")
    if not isinstance(weight, CastWeight):
        return "its weight is not cast to a smaller type"
    return _in_float(call, "cast_weight", weight=weight)


def _table(call: Call) -> Plan:
    """Of an embedding; what it says of gradients (`sparse`, `scale_grad_by_freq`) is of no account here."""
    node = call.node
    weight = node.get("weight")
    if not isinstance(weight, DequantizeWeight):
        return "its weight is not quantized" if isinstance(weight, Expression) else "its weight is computed by the graph"
    spec = weight.value.observer.spec
    if spec.dtype not in TABLE_DTYPES:
        return f"the kernel looks up codes of 4 or 8 bits, not {spec.dtype}"
    if 0 in next(loads(weight.value)).shape:
        return "its weight is empty"
    names = {"embedding": ("input",), "embedding_bag": ("input", "offsets", "per_sample_weights")}[node.kind]
    inputs = tuple(node.get(name) for name in names)
    options = {name: node.get(name) for name in ("mode", "include_last_offset", "padding_idx") if node.has(name)}
    return module_node(call, f"codes.{node.kind}", inputs, weight=weight.value, output=call.output, **options)


def _recurrent_inputs(call: Call) -> tuple[Arg, Arg]:
    """What a recurrent layer is called with: the arguments for its input, and for its initial state."""
    node, written = call.node, call.node.origin.written
    assert written is not None, node
    given: dict[str, Arg] = {("input", "hx")[int(name)]: node.get(name) for name in written.args}
    given |= {keyword: node.get(name) for keyword, name in written.kwargs}
    return given["input"], given.get("hx")


def _recurrent(call: Call) -> Plan:
    x, state = _recurrent_inputs(call)
    (operand,) = next(iter(call.operands.values())) if isinstance(x, Ref) else (None,)
    weights = {name: value for name, value in call.node.args if isinstance(value, Expression)}
    written = call.node.origin.written
    if operand is None or written is None:
        return "its input is no tensor"
    options = {"module": written.target, "kind": call.node.kind, "output": call.output}
    match operand.how:
        case Dynamic(spec):
            most = _most(operand.how)
            if isinstance(most, str):
                return most
            found = {name: _weight(call, value, most) for name, value in weights.items()}
            wrong = [value for value in found.values() if isinstance(value, str)]
            broken = breach(call.host, LINEAR_DYNAMIC)
            if wrong or broken:
                return wrong[0] if wrong else broken
            return module_node(call, "recurrent_dynamic", (Ref(operand.value), state), **options, spec=spec, **found)
        case Cast(dtype) if all(isinstance(value, CastWeight) for value in weights.values()):
            return module_node(call, "recurrent_cast", (Ref(operand.value), state), **options, dtype=dtype, **weights)
        case _:
            return "its input is neither quantized nor cast when the model runs"


_ANY = (*FLOATS, Dynamic, Cast, Affine, Grid)

DYNAMIC_ROWS: tuple[KernelRow, ...] = (
    KernelRow(LINEAR_DYNAMIC, ("linear",), _linear_dynamic, takes=(Dynamic,)),
    KernelRow("int8_weight.linear", ("linear",), _int8_linear, takes=FLOATS),
    KernelRow("weight_only", LAYERS, _with_dequantized, checked=False, takes=FLOATS),
    KernelRow("onednn.linear_float16", ("linear",), _float16_linear, takes=(Cast,)),
    KernelRow("cast_weight", LAYERS, _with_cast, checked=False, takes=(*FLOATS, Cast)),
    *(KernelRow(kind, (kind,), _table) for kind in ("embedding", "embedding_bag")),
    KernelRow("recurrent_dynamic", tuple(sorted(RECURRENT)), _recurrent, takes=_ANY),
)
"""Those of linear layers, of weights that are integers or small floats alone, of embeddings and of recurrent layers."""
