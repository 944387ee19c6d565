"""How many multiply-adds an operator takes on the shapes of the example, and how many bytes parameters take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from types import MappingProxyType
from typing import TypeAlias

from qfunc.ir import Arg, Expression, Graph, Node, Ref, TensorFact
from qfunc.numerics.grid import Grid
from qfunc.ops import BY_NAME
from qfunc.params import (
    CastWeight,
    Constant,
    DequantizeWeight,
    DeriveQParams,
    DivideColumns,
    FakeQuantizeWeight,
    FoldBatchNorm,
    Load,
    MultiplyRows,
    QParamsPart,
    QParamsSource,
    QuantizeWeight,
    WeightCodes,
)

Shape: TypeAlias = tuple[int, ...]


def shape_of(expression: Expression) -> Shape:
    """The shape of a parameter; folding, rounding and quantizing keep that of a weight."""
    match expression:
        case Load():
            return expression.shape
        case FoldBatchNorm(part="weight", weight=weight):
            return shape_of(weight)
        case FoldBatchNorm(bias=None, mean=mean):
            return shape_of(mean)
        case FoldBatchNorm(bias=bias):
            assert bias is not None
            return shape_of(bias)
        case Constant(shape=shape):
            return shape
        case QuantizeWeight(value=value) | DequantizeWeight(value=value) | CastWeight(value=value) | WeightCodes(value):
            return shape_of(value)
        case DivideColumns(value) | MultiplyRows(value) | FakeQuantizeWeight(value):
            return shape_of(value)
        case QParamsPart(of=of):
            return _channels(of)
    raise AssertionError(expression)


def _channels(source: QParamsSource) -> Shape:
    """How many scales there are."""
    if isinstance(source, Grid):
        return (len(source.scale),)
    axis = source.observer.spec.ch_axis if isinstance(source, QuantizeWeight) else None
    return () if axis is None or not isinstance(source, QuantizeWeight) else (shape_of(source)[axis],)


# Multiply-adds --------------------------------------------------------------------------------------------------------


def multiply_adds(node: Node, graph: Graph) -> int | None:
    """The products that are summed by an operator, without those of a bias; None where they are not known.

    Layers, products of matrices, recurrent layers and attention have some. What only looks up, moves, pools or works
    element by element counts none, as is the custom.
    """
    counted = _COUNTED.get(node.kind)
    if counted is not None:
        return counted(node, graph)
    written = node.origin.written
    is_module = node.kind in ("owned", "custom_module") or (written is not None and written.op == "call_module")
    return None if is_module and node.kind not in BY_NAME and not _plain(node, graph) else 0


def _plain(node: Node, graph: Graph) -> bool:
    """Whether a module that qfunc does not know has no parameters, and so most likely no products either."""
    return node.kind not in ("owned", "custom_module") and not any(_tensors(node, graph))


def _shape(graph: Graph, value: Arg) -> Shape | None:
    """The shape of an operand, as far as it is known."""
    if isinstance(value, Expression):
        return shape_of(value)
    fact = graph[value.id].fact if isinstance(value, Ref) else None
    return fact.shape if isinstance(fact, TensorFact) else None


def _result(node: Node) -> Shape | None:
    return node.fact.shape if isinstance(node.fact, TensorFact) else None


def _layer(node: Node, graph: Graph) -> int | None:
    """Each element of the result is a sum over the weights of its channel."""
    weight, result = _shape(graph, node.get("weight")), _result(node)
    return None if weight is None or result is None else prod(result) * prod(weight[1:])


def _transposed(node: Node, graph: Graph) -> int | None:
    """Each element of the input is multiplied with the weights of its channel."""
    weight, given = _shape(graph, node.get("weight")), _shape(graph, node.get("input"))
    return None if weight is None or given is None else prod(given) * prod(weight[1:])


def _product(left: str) -> Count:
    """A product of matrices: each element of the result is a sum over the last axis of the left one."""

    def count(node: Node, graph: Graph) -> int | None:
        given, result = _shape(graph, node.get(left)) if node.has(left) else None, _result(node)
        return None if not given or result is None else prod(result) * given[-1]

    return count


def _attention(node: Node, graph: Graph) -> int | None:
    """Scores `L x S` over the width of the queries, and their products with the values."""
    query, key, value = (_shape(graph, node.get(name)) for name in ("input", "key", "value"))
    if not query or not value or key is None or len(key) < 2:
        return None
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _recurrent(node: Node, graph: Graph) -> int | None:
    """At each step of each sequence all matrices are multiplied once."""
    slot = next((name for name in ("0", "input") if node.has(name)), None)
    given = None if slot is None else _shape(graph, node.get(slot))
    matrices = [shape for shape, _ in _tensors(node, graph) if len(shape) == 2]
    return None if not given or not matrices else prod(given[:-1]) * sum(map(prod, matrices))


def _multihead(node: Node, graph: Graph) -> int | None:
    """Four projections, and the attention between the queries and keys of each item of the batch."""
    query, key = (_shape(graph, node.get(name)) if node.has(name) else None for name in ("0", "1"))
    if not query or not key or len(query) not in (2, 3):
        return None
    sizes = [prod(shape) for shape, _ in _tensors(node, graph) if len(shape) == 2]
    width = query[-1]
    tokens, others = prod(query[:-1]), prod(key[:-1])
    if not sizes:
        return None
    layer = graph.sources["model"].model.get_submodule(node.origin.module)
    batch = 1 if len(query) == 2 else query[0 if layer.batch_first else 1]
    own = 2 * width * width * tokens  # queries in, results out
    return own + (sum(sizes) - 2 * width * width) * others + 2 * (tokens // max(batch, 1)) * others * width


def _einsum(node: Node, graph: Graph) -> int | None:
    """Of two operands, one product for each combination of all indices."""
    equation, *operands = (value for _, value in node.args)
    if not isinstance(equation, str) or "." in equation or len(operands) != 2:
        return None
    sizes: dict[str, int] = {}
    for letters, operand in zip(equation.replace(" ", "").partition("->")[0].split(","), operands, strict=False):
        shape = _shape(graph, operand)
        if shape is None or len(shape) != len(letters):
            return None
        sizes |= dict(zip(letters, shape, strict=True))
    return prod(sizes.values())


def _unknown(_node: Node, _graph: Graph) -> int | None:
    """What sums products, but is rare."""
    return None


Count: TypeAlias = Callable[[Node, Graph], "int | None"]

_COUNTED: Mapping[str, Count] = MappingProxyType(
    {
        **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), _layer),
        **{f"conv_transpose{rank}d": _transposed for rank in (1, 2, 3)},
        **{kind: _product("input") for kind in ("matmul", "bmm", "addmm")},
        **{f"torch.{name}": _product("1") for name in ("baddbmm", "addbmm")},
        **{f"torch.{name}": _product("0") for name in ("mm", "mv", "dot")},
        "attention": _attention,
        **{f"torch.nn.{name}": _recurrent for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell")},
        "torch.nn.MultiheadAttention": _multihead,
        "torch.functional.einsum": _einsum,
        **dict.fromkeys(("torch.functional.tensordot", "torch.bilinear"), _unknown),
    }
)


# Bytes ----------------------------------------------------------------------------------------------------------------

_BITS: Mapping[str, int] = MappingProxyType({"uint4": 4, "quint4x2": 4, "int4": 4, "quint2x4": 2, "qint32": 32})


def _bytes(shape: Shape, dtype: str) -> int:
    name = dtype.removeprefix("torch.")
    digits = "".join(c if c.isdigit() else " " for c in name.partition("_")[0]).split()
    bits = _BITS.get(name) or (8 if name == "bool" or not digits else int(digits[-1]))
    return -(-prod(shape) * bits // 8)


def weight_bytes(graph: Graph) -> tuple[int, int]:
    """What the parameters of a graph take: as they are kept, and in float. Equal expressions are kept once."""
    kept: dict[object, int] = {}
    floats: dict[object, int] = {}
    for node in graph:
        for expression in _parameters(node):
            if isinstance(expression, QuantizeWeight):
                scales = (shape_of(expression) or (1,))[0]
                kept[expression] = _bytes(shape_of(expression), _dtype(expression)) + 4 * scales
            else:
                kept[expression] = _bytes(shape_of(expression), _dtype(expression))
            bare = _float(expression)
            if bare is not None:
                floats[bare] = _bytes(shape_of(bare), _dtype(bare))
        if node.kind not in BY_NAME:
            for index, (shape, dtype) in enumerate(_tensors(node, graph)):
                kept[node.origin.module, index] = floats[node.origin.module, index] = _bytes(shape, dtype)
    return sum(kept.values()), sum(floats.values())


def _parameters(node: Node) -> Iterator[Expression]:
    known = node.kind in BY_NAME or node.kind == "get_attr" or node.has("inputs")
    if known:
        given = (*node.args, *(arg for post in node.post for arg in post.args))
        yield from (
            value for _, value in given if isinstance(value, Expression) and not isinstance(value, DeriveQParams)
        )


def _float(expression: Expression) -> Expression | None:
    """The parameter of the float model; None for what that does not have."""
    match expression:
        case QuantizeWeight(value=value) | DequantizeWeight(value=value) | CastWeight(value=value) | WeightCodes(value):
            return _float(value)
        case DivideColumns(value) | MultiplyRows(value) | FakeQuantizeWeight(value):
            return _float(value)
        case QParamsPart() | Constant():
            return None
        case _:
            return expression


def _dtype(expression: Expression) -> str:
    """The dtype in which a parameter is kept."""
    match expression:
        case Load(dtype=dtype):
            return dtype
        case FoldBatchNorm(weight=weight):
            return _dtype(weight)
        case QuantizeWeight(observer=observer):
            return observer.spec.dtype
        case Constant(dtype=dtype):
            return dtype
        case CastWeight(value=value) | DivideColumns(value) | MultiplyRows(value) | FakeQuantizeWeight(value):
            return _dtype(value)
        case WeightCodes(CastWeight(dtype=dtype)):
            return dtype
        case WeightCodes(value):
            return _dtype(value)
        case QParamsPart(part=part):
            return "float32" if part == "scale" else "int64"
        case DequantizeWeight(value=value):
            return _dtype(value.value)
    raise AssertionError(expression)


def dtype_of(value: Arg) -> str:
    """The dtype of what a kernel has as its weight; empty for what is none.

    >>> dtype_of(Load("fc.weight", "float32", (2, 3))), dtype_of(None)
    ('float32', '')
    """
    match value:
        case Grid():
            return value.spec.dtype
        case Expression():
            return _dtype(value).removeprefix("torch.")
        case _:
            return ""


def _tensors(node: Node, graph: Graph) -> Iterator[tuple[Shape, str]]:
    """The shapes and dtypes of the tensors of a module of the source that is called as it is."""
    written, source = node.origin.written, graph.sources.get("model")
    if written is None or written.op != "call_module" or source is None:
        return
    prefix = f"{node.origin.module}."
    for name in sorted(source.tensors):
        if name.startswith(prefix):
            tensor = source.tensors[name][0]
            yield tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
