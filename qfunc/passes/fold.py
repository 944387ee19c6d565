"""Batch norms folded into the weights of their neighbours, as parameter expressions; nothing reads a weight here."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

from qfunc.backends.cpu import CONVOLUTIONS, TRANSPOSED
from qfunc.ir import Draft, Expression, Graph, ListArg, Node, PostOp, Ref, TensorFact, users
from qfunc.ir.node import Fact, NamedArgs
from qfunc.match import NoMatch, Users
from qfunc.params import FoldBatchNorm, Load
from qfunc.passes.fusion_log import FusionLog

_CLOSE = 2
"""How close a miss of a norm is that stands beside its layer or pool: closer than any pattern that starts with it."""
_COMPUTED_GROUPS = "the number of groups is computed by the graph"
_REAL = ("float32", "float64", "float16", "bfloat16")


def folded(root: Node, args: NamedArgs, norm: Node) -> NamedArgs | str:
    """The arguments of a layer with the batch norm behind it folded in, or why that is not possible.

    `root` is the layer as it stands in the graph, `args` its arguments after earlier folds.
    """
    transpose = root.kind in TRANSPOSED
    groups = _groups(root) if transpose else 1  # else an output channel is a row of the weight, whatever the groups
    if groups is None:
        return _COMPUTED_GROUPS
    reason = _unfit(norm, root.get("weight"), root.get("bias")) or misaligned(root, norm)
    return reason or _with_norm(args, norm, transpose=transpose, groups=groups)


def is_folded(node: Node) -> bool:
    """Whether a norm is folded into the node: it is the result of an earlier run."""
    weight = node.get("weight") if node.has("weight") else None
    return isinstance(weight, Expression) and not isinstance(weight, Load)


def misaligned(root: Node, norm: Node) -> str:
    """Why a batch norm does not act on the output channels of the layer before it; empty where it does."""
    features, channels = features_of(norm), out_channels(root)
    differ = features is not None and channels is not None and features != channels
    of_them = f"the batch norm has {features} features, the layer {channels} output channels"
    return off_axis(root, norm) or (of_them if differ else "")


def off_axis(root: Node, norm: Node) -> str:
    """Why axis 1, on which a batch norm acts, may not be that of the output channels of the layer before it."""
    if root.kind == "linear":
        if not isinstance(root.fact, TensorFact):
            return "a batch norm acts on axis 1, and the linear's shape is unknown: trace with example_inputs"
        if len(root.fact.shape) != 2:
            return f"a batch norm acts on axis 1, and the linear's output has its features in the last of {_rank(root)}"
    elif not _is_batched(root.fact, root, norm):
        return "a batch norm acts on axis 1, and the convolution's output has no batch axis"
    return ""


def _is_batched(fact: Fact, convolution: Node, norm: Node) -> bool:
    """Whether a convolution's value, of which `fact` tells, has a batch axis; else a norm's module tells its rank."""
    rank = int(convolution.kind[-2])
    if isinstance(fact, TensorFact):
        return len(fact.shape) == rank + 2
    written = norm.origin.written
    return written is None or written.op != "call_module" or norm.origin.type == f"torch.nn.BatchNorm{rank}d"


def _rank(node: Node) -> str:
    assert isinstance(node.fact, TensorFact)
    return f"{len(node.fact.shape)} axes"


def out_channels(layer: Node) -> int | None:
    """How many output channels a layer has, where its weight is a parameter."""
    shape = _shape(layer.get("weight"))
    if shape is None:
        return None
    if layer.kind not in TRANSPOSED:
        return shape[0]
    groups = _groups(layer)
    return None if groups is None else shape[1] * groups


def features_of(norm: Node) -> int | None:
    """How many features a batch norm has, where its statistics are buffers."""
    shape = _shape(norm.get("running_mean"))
    return None if shape is None else shape[0]


def _shape(value: object) -> tuple[int, ...] | None:
    while isinstance(value, FoldBatchNorm):
        value = value.weight
    return value.shape if isinstance(value, Load) else None


def _groups(layer: Node) -> int | None:
    """The number of groups of a layer, where it is not computed by the graph."""
    groups = layer.get("groups") if layer.has("groups") else 1
    return groups if isinstance(groups, int) else None


def _unfit(norm: Node, weight: object, bias: object) -> str:
    """Why a batch norm or the layer it is to be folded into cannot be folded, whatever their shapes."""
    mean, var = norm.get("running_mean"), norm.get("running_var")
    if mean is None or var is None or norm.get("training"):
        return "the batch norm uses the statistics of the batch"
    tensors, optional = (weight, mean, var), (bias, norm.get("weight"), norm.get("bias"))
    present = [value for value in (*tensors, *optional) if value is not None]
    if len(present) < len(tensors) or not all(isinstance(value, Expression) for value in present):
        return "a weight is computed by the graph"
    wrong = {load.dtype for load in present if isinstance(load, Load)} - {*_REAL}
    return f"a weight is {min(wrong)}" if wrong else ""


def _with_norm(
    args: NamedArgs, norm: Node | PostOp, *, transpose: bool, groups: int, before: bool = False
) -> NamedArgs:
    values = dict(args)
    mean, var, gamma, beta = (norm.get(name) for name in ("running_mean", "running_var", "weight", "bias"))
    weight, bias, eps = values["weight"], values["bias"], norm.get("eps")
    for part in ("weight", "bias"):
        fold = FoldBatchNorm(part, weight, bias, mean, var, gamma, beta, eps, transpose, groups, before)  # type: ignore[arg-type]
        values[part] = fold
    return tuple(values.items())


def norms_behind(layer: Node) -> tuple[PostOp, ...]:
    """The batch norms that stay behind a layer for training, which come first of all that is fused there."""
    return tuple(takewhile(lambda post: post.kind == "batch_norm", layer.post)) if layer.has("weight") else ()


def with_norms_folded(layer: Node) -> Node:
    """The layer with the batch norms behind it in its weight and bias, as in evaluation; itself if there are none."""
    norms = norms_behind(layer)
    groups = _groups(layer) if layer.kind in TRANSPOSED else 1
    if not norms or groups is None:
        return layer
    args = layer.args
    for norm in norms:
        args = _with_norm(args, norm, transpose=layer.kind in TRANSPOSED, groups=groups)
    return replace(layer, args=args, post=layer.post[len(norms) :])


# A norm before a layer ------------------------------------------------------------------------------------------------


def fold_norms_before(graph: Graph, log: FusionLog) -> Graph:
    """Fold each batch norm that stands before a convolution or linear layer into that layer, where this is exact."""
    draft, used = Draft(graph), users(graph)
    for layer in graph:
        made = layer
        while made.kind in (*CONVOLUTIONS, "linear") and not made.aliased:
            norm, pattern = producer(graph, made), f"batch_norm + {made.kind}"
            if norm is None or norm.kind != "batch_norm" or norm.post or not log.allows(pattern, (norm, made)):
                break
            groups = _groups(made)
            reason = hindrance_before(norm, made, len(used[norm.id]))
            if reason or groups is None:
                log.miss(norm.id, NoMatch(norm.id, f"not folded into {made.place}: {reason}", _CLOSE))
                break
            args = _with_norm(made.args, norm, transpose=False, groups=groups, before=True)
            turned = tuple((key, norm.get("input") if key == "input" else value) for key, value in args)
            parts = (norm, made)
            made = Node(made.id, made.kind, turned, made.post, made.origin, made.fact)
            draft.erase([norm.id])
            log.fuse(made, pattern, parts)
        if made is not layer:
            draft.put(made)
    return draft.commit()


def hindrance_before(norm: Node, layer: Node, readers: int) -> str:
    """Why a batch norm cannot be folded into the layer that reads it; empty where it can."""
    weight = layer.get("weight")
    if norm.aliased:
        return "it shares memory with a value that is changed in place"
    if readers != 1:
        return f"its value has {readers} users"
    if sum(used == norm.id for used in layer.uses()) != 1:
        return "what is added behind the layer reads it as well"
    reason = _unfit(norm, weight, layer.get("bias"))
    if reason:
        return reason
    shape, fact, groups = _shape(weight), norm.fact, _groups(layer)
    if groups is None:
        return _COMPUTED_GROUPS
    channels = None if shape is None else shape[1] * groups
    if layer.kind != "linear" and _pads_zeros(layer):
        return "the convolution pads with zeros, which the batch norm does not see"
    known = isinstance(fact, TensorFact) and len(fact.shape) == 2
    if not (known if layer.kind == "linear" else _is_batched(fact, layer, norm)):
        return "a batch norm acts on axis 1, which is not known to be the layer's input channels"
    return "" if features_of(norm) == channels else "its features are not the layer's input channels"


def _pads_zeros(convolution: Node) -> bool:
    padding = convolution.get("padding")
    none = padding == "valid" or (isinstance(padding, tuple) and not any(padding))
    return not none and convolution.get("padding_mode") == "zeros"


# A norm behind an average pool ----------------------------------------------------------------------------------------


def move_norms_before_pools(graph: Graph, log: FusionLog) -> Graph:
    """Have each batch norm behind an average change places with it, where it is then folded into the layer before.

    An average over positions whose weights sum to 1 commutes with what is affine in each channel.
    """
    while (moved := _moved_once(graph, users(graph), log)) is not graph:
        graph = moved  # a norm behind the one that moved now follows the pool itself
    return graph


def _moved_once(graph: Graph, used: Users, log: FusionLog) -> Graph:
    draft = Draft(graph)
    for norm in graph:
        pool = producer(graph, norm) if norm.kind == "batch_norm" else None
        before = None if pool is None else producer(graph, pool)
        if pool is None or before is None or not (pool.kind == "mean" or "pool" in pool.kind):
            continue
        reason = _hindrance_to_move(graph, used, log, norm, pool)
        if reason:
            log.miss(norm.id, NoMatch(norm.id, f"not moved before {pool.place}: {reason}", _CLOSE))
            continue
        early = draft.fresh(f"{norm.id}_{pool.kind}")
        moved = Node(early, "batch_norm", norm.args, origin=norm.origin, fact=before.fact)
        draft.insert_before(pool.id, moved.with_args(input=Ref(before.id)))
        made = Node(norm.id, pool.kind, pool.args, origin=pool.origin, fact=norm.fact).with_args(input=Ref(early))
        draft.put(made)
        draft.erase([pool.id])
        log.fuse(made, f"{pool.kind} + batch_norm", (pool, norm))
    return draft.commit()


def _hindrance_to_move(graph: Graph, used: Users, log: FusionLog, norm: Node, pool: Node) -> str:
    """Why a batch norm cannot change places with the pool before it, to be folded into the layer before that."""
    before = producer(graph, pool)
    assert before is not None
    if norm.aliased or pool.aliased:
        return "it shares memory with a value that is changed in place"
    if len(used[pool.id]) != 1:
        return f"the pool's value has {len(used[pool.id])} users"
    if not _averages(pool, before):
        return "the pool is no average, with weights that sum to 1, of each channel"
    layer, *norms = _chain_before(graph, used, pool) or (None,)
    if layer is None:
        return "no layer before the pool can take it"
    reasons = [reason for each in (*norms, norm) if isinstance(reason := folded(layer, layer.args, each), str)]
    if reasons:
        return reasons[0]
    patterns = ((f"{pool.kind} + batch_norm", (pool, norm)), (f"{layer.kind} + batch_norm", (layer, *norms, norm)))
    return next((hindrance for pattern in patterns if (hindrance := log.hindrance(*pattern))), "")


def _chain_before(graph: Graph, used: Users, pool: Node) -> tuple[Node, ...]:
    """The layer that a norm before the pool would be folded into, and the norms between; empty where there is none."""
    norms: tuple[Node, ...] = ()
    node = producer(graph, pool)
    while node is not None and len(used[node.id]) == 1 and not (node.aliased or node.post):
        if node.kind in (*CONVOLUTIONS, *TRANSPOSED):
            return (node, *norms) if isinstance(node.get("weight"), Load) else ()
        norms = (node, *norms)
        node = producer(graph, node) if node.kind == "batch_norm" else None
    return ()


def _averages(pool: Node, averaged: Node) -> bool:
    """Whether a node averages over positions of each channel, with weights that sum to 1."""
    if pool.kind.startswith("adaptive_avg_pool"):
        return True
    if pool.kind.startswith("avg_pool"):
        padded = pool.get("padding") not in (0, (0,) * int(pool.kind[-2])) and pool.get("count_include_pad")
        return not padded and not (pool.has("divisor_override") and pool.get("divisor_override") is not None)
    return pool.kind == "mean" and pool.get("dtype") is None and _keeps_channels(pool, averaged.fact)


def _keeps_channels(mean: Node, fact: Fact) -> bool:
    """Whether a mean is over axes that are known to stand behind the channels."""
    dim = mean.get("dim")
    dims = dim.items if isinstance(dim, ListArg) else dim if isinstance(dim, tuple) else (dim,)
    if not isinstance(fact, TensorFact):
        return False
    rank = len(fact.shape)
    return all(isinstance(axis, int) and (axis if axis >= 0 else axis + rank) >= 2 for axis in dims)


def producer(graph: Graph, node: Node) -> Node | None:
    """The node that computes the input of a node."""
    given = node.get("input") if node.has("input") else None
    return graph[given.id] if isinstance(given, Ref) else None
