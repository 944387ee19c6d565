"""The rows of layers that read floats: quantized or cast as the model runs, or weights alone.

The `onednn` engine has them, and the `quantized` one behind rows of its own, since they take and can give floats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qfunc.config.kernel import FLOATS, Call, KernelRow, Plan, kernel_node, module_node
from qfunc.config.weights import RECURRENT
from qfunc.engines.post_op import breach, clips, contract_name, post_op
from qfunc.engines.weights import limited, unfit
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


def _quantized(weight: Arg) -> QuantizeWeight | str:
    """The integer weight of a layer, or why there is none for a kernel."""
    if not isinstance(weight, DequantizeWeight):
        return "its weight is computed by the graph" if isinstance(weight, Ref) else "its weight is not quantized"
    return "its weight is empty" if 0 in next(loads(weight.value)).shape else weight.value


def _limited(call: Call, weight: Arg, most: int) -> QuantizeWeight | str:
    found = _quantized(weight)
    return found if isinstance(found, str) else limited(call, found, most, call.host.onednn_layouts)


def _bias(call: Call) -> str:
    bias = call.node.get("bias")
    return "" if bias is None or isinstance(bias, Expression) else "its bias is computed by the graph"


def _linear_dynamic(call: Call) -> Plan:
    node, how = call.node, call.input.how
    assert isinstance(how, Dynamic), how
    most = _most(how)
    weight = most if isinstance(most, str) else _limited(call, node.get("weight"), most)
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
    weight = _quantized(call.node.get("weight"))
    if isinstance(weight, str) or unfit(weight):
        return weight if isinstance(weight, str) else unfit(weight)
    loaded = {load.dtype for load in loads(weight)}
    if loaded != {"float32"}:
        return f"the kernel computes in float32, not in {', '.join(sorted(loaded))}"
    return _bias(call) or _in_float(call, "int8_weight.linear", weight=weight)


def _with_dequantized(call: Call) -> Plan:
    weight = _quantized(call.node.get("weight"))
    return weight if isinstance(weight, str) else _in_float(call, "weight_only", weight=weight)


def _float16_linear(call: Call) -> Plan:
    weight = call.node.get("weight")
    if not isinstance(weight, CastWeight) or weight.dtype != "float16":
        return "its weight is not cast to float16"
    if {load.dtype for load in loads(weight)} != {"float32"} or 0 in next(loads(weight)).shape:
        return "the kernel computes in float32, with a weight that is not empty"
    return _bias(call) or _in_float(call, "onednn.linear_float16", weight=weight)


def _with_cast(call: Call) -> Plan:
    weight = call.node.get("weight")
    if not isinstance(weight, CastWeight):
        return "its weight is not cast to a smaller type"
    return _in_float(call, "cast_weight", weight=weight)


def _table(call: Call) -> Plan:
    """Of an embedding; what it says of gradients (`sparse`, `scale_grad_by_freq`) is of no account here."""
    node = call.node
    weight = _quantized(node.get("weight"))
    if isinstance(weight, str):
        return weight
    if weight.observer.spec.dtype not in TABLE_DTYPES:
        return f"the kernel looks up codes of 4 or 8 bits, not {weight.observer.spec.dtype}"
    names = {"embedding": ("input",), "embedding_bag": ("input", "offsets", "per_sample_weights")}[node.kind]
    inputs = tuple(node.get(name) for name in names)
    options = {name: node.get(name) for name in ("mode", "include_last_offset", "padding_idx") if node.has(name)}
    return module_node(call, f"codes.{node.kind}", inputs, weight=weight, output=call.output, **options)


def _recurrent_slots(call: Call) -> tuple[str, str | None]:
    """The arguments of a recurrent layer that are its input and its initial state."""
    written = call.node.origin.written
    assert written is not None, call.node
    slots = {("input", "hx")[int(name)]: name for name in written.args} | dict(written.kwargs)
    return slots["input"], slots.get("hx")


def _recurrent(call: Call) -> Plan:
    slot, state_slot = _recurrent_slots(call)
    operand = call.operands[slot][0] if isinstance(call.node.get(slot), Ref) else None
    state = None if state_slot is None else call.node.get(state_slot)
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
            found = {name: _limited(call, value, most) for name, value in weights.items()}
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

ATEN_KERNELS = frozenset({"int8_weight.linear", "weight_only", "cast_weight", "recurrent_cast"})
"""The kinds of nodes whose arithmetic is aten's."""

FLOAT_KERNELS = ATEN_KERNELS | {
    *("onednn.linear_float16", "quantized.linear_float16"),
    *(f"{codes}.{kind}" for codes in ("codes", "quantized") for kind in ("embedding", "embedding_bag")),
}
"""The kinds of nodes whose weights are integers or small floats, and whose arithmetic is float."""
