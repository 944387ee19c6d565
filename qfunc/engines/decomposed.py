"""The `decomposed` form: quantization written with torch's `quantized_decomposed` operators, for export and compilers.

Nothing is computed on integers here. Each quantization of the reference form becomes an operator that `torch.export`
keeps and that a compiler looks for: `quantize_per_tensor` and `dequantize_per_tensor` with qparams as literals,
`..._per_channel` with scales and zero points as buffers, `choose_qparams` where they are found when the model runs,
`convert_element_type` for casts. A weight is a buffer of integer codes, `<module>.weight`, with the buffers
`<module>.weight_scale` and `<module>.weight_zero_point`, and an operator that dequantizes it; also where it has one
scale, since that is known only when weights are read. Its layer becomes the function that the layer calls.

The operators round as `qfunc.numerics.affine` does, so that the result is the reference form's bit for bit; except for
codes of 32 bits, which they compute in float32. What they cannot say, or would choose otherwise, is an error here.
They take float32, and quantize float16 and bfloat16; they refuse float64. Scales are plain buffers: do not call
`.half()` on such a module, which would round them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from types import MappingProxyType
from typing import TypeAlias

from qfunc.config.kernel import Engine
from qfunc.config.weights import RECURRENT
from qfunc.errors import Problem, UnsupportedDType
from qfunc.ir import Arg, Draft, Expression, Graph, Node, Origin, Ref, Written, users
from qfunc.ir.node import NamedArgs
from qfunc.ir.value import Name
from qfunc.numerics.grid import Affine, Grid, bounds_of
from qfunc.numerics.qparams import FLOAT_QPARAMS, QuantSpec
from qfunc.ops import BY_NAME
from qfunc.params import (
    CastWeight,
    DequantizeWeight,
    DeriveQParams,
    FoldBatchNorm,
    Load,
    QParamsPart,
    QuantizeWeight,
    WeightCodes,
    loads,
)

NAMESPACE = "torch.ops.quantized_decomposed."
"""Where the operators are, once torch has registered them."""

CONSUMER = "it is float between its conversions: whoever compiles the graph chooses what runs it"
KEPT_MODULE = "its weights are no values of the graph: its module stays, with the floats that its integers stand for"

_LARGEST_INT32 = 2**31 - 128
"""The largest float32 that int32 holds: the operator clamps in float32, where 2**31 - 1 would overflow."""


def why_float(node: Node) -> str:
    """What the certificate says of an operator that is meant to run on integers."""
    return KEPT_MODULE if node.kind in RECURRENT else CONSUMER


def uses_decomposed(graph: Graph) -> bool:
    """Whether a graph calls operators that torch must have registered."""
    return any(node.kind.startswith(NAMESPACE) for node in graph)


def decomposed(graph: Graph) -> tuple[Graph, list[Problem]]:
    """A reference graph in the decomposed form, and what of it torch's operators cannot say, as `UnsupportedDType`."""
    problems = [problem for node in graph for problem in _unsupported(graph, node)]
    if problems:
        return graph, problems
    draft = Draft(graph)
    for node in graph:
        write = _CONVERSIONS.get(node.kind, _with_weights)
        write(draft, node)
    draft.erase(_dead_reads(graph))
    return draft.commit(), []


def _dead_reads(graph: Graph) -> list[str]:
    """Reads of float weights that nobody uses, since layers hold them by themselves: only the integers are to stay."""
    used = users(graph)
    rewritten = {load for node in graph if _is_rewritten(node) for _, value in node.args for load in _loads(value)}
    reads = (node for node in graph if node.kind == "get_attr" and not used[node.id])
    return [node.id for node in reads if node.get("value") in rewritten]


# What the operators cannot say ----------------------------------------------------------------------------------------


def _unsupported(graph: Graph, node: Node) -> Iterator[Problem]:
    reason = ""
    match node.kind:
        case "quantize":
            reason = _not_quantized(_spec(node.get("output")))
        case "dequantize" if graph[next(node.uses())].kind != "quantize":
            reason = _not_dequantized(_spec(node.get("input")))
        case "quantize_dynamically":
            spec = node.get("spec")
            assert isinstance(spec, QuantSpec)
            reason = _not_chosen(spec)
        case _ if _is_rewritten(node):
            specs = (value.value.observer.spec for _, value in node.args if isinstance(value, DequantizeWeight))
            reason = next(filter(None, map(_not_dequantized, specs)), "")
    if reason:
        remedy = "configure another dtype or scheme for it, or lower with engine='reference'"
        place = graph[next(node.uses())].place if node.kind in _CONVERSIONS else node.place
        yield UnsupportedDType(place, f"torch's decomposed operators {reason}", remedy)


def _spec(how: Arg) -> QuantSpec | None:
    """The spec of qparams that are no `Affine`, which always fits."""
    return how.spec if isinstance(how, (Grid, DeriveQParams)) else None


def _not_dequantized(spec: QuantSpec | None) -> str:
    if spec is None:
        return ""
    if spec.dtype == "uint32":
        return "have no uint32"
    return "have no uint16 with scales per channel" if spec.dtype == "uint16" and spec.per_channel else ""


def _not_quantized(spec: QuantSpec | None) -> str:
    if spec is not None and spec.qscheme == FLOAT_QPARAMS:
        return "round before they add a zero point, which is wrong where that is a float"
    return _not_dequantized(spec)


def _not_chosen(spec: QuantSpec) -> str:
    """Why qparams cannot be chosen when the model runs, so that they are those of `qfunc.numerics.qparams`."""
    if spec.per_channel:
        return "choose one scale for a tensor, none per channel"
    codes = (spec.dtype, spec.quant_min, spec.quant_max)
    if spec.symmetric and not spec.torch_dtype.is_signed and codes != ("uint8", 0, 255):
        return "choose 128 as the zero point of symmetric uint8 and 0 of uint16, which is not the middle of these codes"
    if not spec.symmetric and spec.dtype == "int32":
        return "choose zero points in 32 bits, which overflow for affine int32"
    return _not_dequantized(spec)


# Conversions ----------------------------------------------------------------------------------------------------------


def _quantize(draft: Draft, node: Node) -> None:
    """A quantization with qparams that are known, now or with the weights."""
    how, (value,) = node.get("output"), node.uses()
    draft.put(_call(node, *_overload("quantize", draft, node, how, node.id), Ref(value)))


def _dequantize(draft: Draft, node: Node) -> None:
    how, (codes,) = node.get("input"), node.uses()
    draft.put(_call(node, *_overload("dequantize", draft, node, how, codes), Ref(codes)))


def _overload(verb: str, draft: Draft, node: Node, how: Arg, name: str) -> tuple[str, NamedArgs]:
    """The operator for qparams, and its arguments behind the first; buffers have the name of the codes."""
    match how:
        case Affine(scale, zero_point, dtype):
            return f"{verb}_per_tensor.default", _args(scale, zero_point, None, how.bounds, dtype)
        case Grid(scales, zero_points, spec) if not spec.per_channel:
            bounds = (spec.quant_min, spec.quant_max)
            return f"{verb}_per_tensor.default", _args(scales[0], int(zero_points[0]), None, bounds, _held(spec))
        case Grid() | DeriveQParams():
            return _with_buffers(verb, draft, node, how, name)
        case _:
            raise TypeError(f"{how!r} are no qparams")


Qparams: TypeAlias = Grid | DeriveQParams | QuantizeWeight


def _with_buffers(verb: str, draft: Draft, node: Node, how: Qparams, name: str) -> tuple[str, NamedArgs]:
    """The operator that takes qparams as tensors, in front of which these are read."""
    spec = how.observer.spec if isinstance(how, QuantizeWeight) else how.spec
    scale = _buffer(draft, node, f"{name}_scale", QParamsPart("scale", how))
    zero_point = _buffer(draft, node, f"{name}_zero_point", QParamsPart("zero_point", how))
    overload = f"{verb}_per_channel.default" if spec.per_channel else f"{verb}_per_tensor.tensor"
    bounds = bounds_of(spec) if isinstance(how, DeriveQParams) else (spec.quant_min, spec.quant_max)
    return overload, _args(Ref(scale), Ref(zero_point), spec.ch_axis, bounds, _held(spec))


def _quantize_dynamically(draft: Draft, node: Node) -> None:
    """Qparams of the value's own range, then the value rounded to codes and back.

    The range is that of the value and a zero: Inductor's own `choose_qparams` does not widen ranges to hold zero, and
    would saturate values that are all positive, or all negative. An empty value has a range, too, with it.
    """
    spec, (value,) = node.get("spec"), node.uses()
    assert isinstance(spec, QuantSpec)
    given, dtype = Ref(value), _held(spec)
    symmetric = "_symmetric" if spec.symmetric else ""
    bounds: NamedArgs = (("quant_min", spec.quant_min), ("quant_max", spec.quant_max))
    flat = _insert(draft, node, "flat", "torch.flatten", (("input", given),))
    zero = _insert(draft, node, "with_zero", "torch.nn.functional.pad", (("input", Ref(flat)), ("pad", (0, 1))))
    choice: NamedArgs = (("input", Ref(zero)), *bounds, ("eps", spec.eps), ("dtype", Name(f"torch.{dtype}")))
    chosen = _insert(draft, node, "qparams", f"{NAMESPACE}choose_qparams{symmetric}.tensor", choice)
    parts = [
        _insert(draft, node, name, "operator.getitem", (("input", Ref(chosen)), ("index", index)))
        for index, name in enumerate(("scale", "zero_point"))
    ]
    args = _args(Ref(parts[0]), Ref(parts[1]), None, (spec.quant_min, spec.quant_max), dtype)
    quantize = f"{NAMESPACE}quantize_per_tensor.tensor"
    codes = _insert(draft, node, "q", quantize, (("input", given), *args))
    draft.put(_call(node, "dequantize_per_tensor.tensor", args, Ref(codes)))


def _cast(draft: Draft, node: Node) -> None:
    """A cast that no compiler drops together with the one back."""
    (value,) = node.uses()
    draft.put(_call(node, "convert_element_type.no_fuse", (("dtype", node.get("dtype")),), Ref(value)))


# Weights --------------------------------------------------------------------------------------------------------------


def _with_weights(draft: Draft, node: Node) -> None:
    """A layer whose parameters are values of the graph, the quantized ones dequantized; it is no module any more."""
    if not _is_rewritten(node):
        return
    written = node.origin.written
    is_module = written is not None and written.op == "call_module"
    changes: dict[str, Arg] = {}
    for name, value in node.args:
        path = f"{written.target}.{name}" if is_module and written is not None else _path(value)
        match value:
            case DequantizeWeight(quantized):
                changes[name] = Ref(_dequantized(draft, node, quantized, path))
            case CastWeight(of):
                small = _buffer(draft, node, path, WeightCodes(value))
                changes[name] = Ref(_converted(draft, node, path, small, next(loads(of)).dtype))
            case Expression():
                changes[name] = Ref(_buffer(draft, node, path, value))
    origin = replace(node.origin, written=None) if is_module else node.origin
    draft.put(replace(node.with_args(**changes), origin=origin))


def _is_rewritten(node: Node) -> bool:
    """Whether a node has quantized parameters, and a function that takes them."""
    stored = (DequantizeWeight, CastWeight)
    return node.kind in BY_NAME and not node.aliased and any(isinstance(value, stored) for _, value in node.args)


def _path(value: Arg) -> str:
    """The name in the model of what a parameter is made of; a bias that is a norm's alone is named after the weight."""
    gained = isinstance(value, FoldBatchNorm) and value.part == "bias" and value.bias is None
    return "".join([*(load.name for load in islice(_loads(value), 1)), "_bias" * gained])


def _loads(value: Arg) -> Iterator[Load]:
    return loads(value) if isinstance(value, Expression) else iter(())


def _dequantized(draft: Draft, node: Node, quantized: QuantizeWeight, path: str) -> str:
    """Read a parameter's codes and dequantize them, to the type that the parameter had."""
    codes = _buffer(draft, node, path, WeightCodes(quantized))
    overload, args = _with_buffers("dequantize", draft, node, quantized, path)
    floats = _insert(draft, node, f"{_leaf(path)}_dq", NAMESPACE + overload, (("input", Ref(codes)), *args))
    dtype = next(loads(quantized.value)).dtype
    return floats if dtype == "float32" else _converted(draft, node, path, floats, dtype)


def _converted(draft: Draft, node: Node, path: str, value: str, dtype: str) -> str:
    """A parameter in another floating-point type."""
    args: NamedArgs = (("input", Ref(value)), ("dtype", Name(f"torch.{dtype}")))
    return _insert(draft, node, f"{_leaf(path)}_{dtype}", f"{NAMESPACE}convert_element_type.no_fuse", args)


# Nodes ----------------------------------------------------------------------------------------------------------------


def _args(scale: Arg, zero_point: Arg, axis: int | None, bounds: tuple[int, int], dtype: str) -> NamedArgs:
    low, high = bounds
    high = min(high, _LARGEST_INT32) if dtype == "int32" else high
    channel: NamedArgs = () if axis is None else (("axis", axis),)
    codes: NamedArgs = (("quant_min", low), ("quant_max", high), ("dtype", Name(f"torch.{dtype}")))
    return (("scale", scale), ("zero_point", zero_point), *channel, *codes)


def _held(spec: QuantSpec) -> str:
    """The plain dtype of the codes: 8 bits hold 4."""
    return str(spec.torch_dtype).removeprefix("torch.")


def _call(node: Node, operator: str, args: NamedArgs, given: Ref) -> Node:
    """The node in which `operator` computes the value of another."""
    named: NamedArgs = (("input", given), *args)
    return replace(_node(node.id, NAMESPACE + operator, named, node.origin), fact=node.fact)


def _insert(draft: Draft, node: Node, suffix: str, target: str, args: NamedArgs) -> str:
    """Put a call in front of a node; gives its id."""
    id = draft.fresh(f"{node.id}_{suffix}")
    draft.insert_before(node.id, _node(id, target, args, node.origin))
    return id


def _node(id: str, target: str, args: NamedArgs, origin: Origin) -> Node:
    written = Written("call_function", target, tuple(name for name, _ in args))
    return Node(id, target, args, origin=Origin(origin.module, origin.type, written))


def _buffer(draft: Draft, node: Node, path: str, value: Expression) -> str:
    """Read a tensor that the module holds under `path`, in front of a node."""
    id = draft.fresh(f"{node.id}_{_leaf(path)}")
    origin = Origin(node.origin.module, written=Written("get_attr", path))
    draft.insert_before(node.id, Node(id, "get_attr", (("value", value),), origin=origin))
    return id


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


_CONVERSIONS: Mapping[str, Callable[[Draft, Node], None]] = MappingProxyType(
    {
        "quantize": _quantize,
        "dequantize": _dequantize,
        "quantize_dynamically": _quantize_dynamically,
        "cast": _cast,
    }
)
"""How each kind of conversion is written."""

DECOMPOSED = Engine("decomposed", why_none=why_float, write=decomposed)
"""No kernels, and a form of its own."""
