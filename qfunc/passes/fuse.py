"""`fuse`: fold batch norms into the operators before them, and put activations and sums behind them, as one node."""

from __future__ import annotations

from collections.abc import Iterator

from returns.result import Failure, Success

from qfunc.backends.cpu import CPU
from qfunc.config.arguments import wrong_arguments
from qfunc.config.backend_config import BackendConfig
from qfunc.errors import InTrainingMode, Problem, WrongStage, several
from qfunc.ir import Draft, Expression, Graph, Node, PostOp, TensorFact, users
from qfunc.ir.node import NamedArgs
from qfunc.match import Match, match
from qfunc.params import FoldBatchNorm
from qfunc.passes.record import recorded
from qfunc.result import R


def fuse(graph: Graph, *, backend: BackendConfig = CPU) -> R[Graph]:
    """The graph with every chain that `backend` fuses made one node, for evaluation.

    A batch norm becomes a parameter expression of the operator before it, so that no weight is read. An activation or a
    residual sum becomes a post-op. The fused node keeps the id and the place of the chain's last node, whose value it
    computes. What does not fit is left alone with a note. Running it again changes nothing.

    Returns:
        The fused graph (the same object when nothing fused), or `InTrainingMode` for the model, or for each module of
        it that still trains; `BadConfig`, `WrongStage`.
    """
    if not isinstance(graph, Graph):
        return Failure(WrongStage(type(graph).__name__, "Graph"))
    problems = wrong_arguments(backend=backend) + list(_training(graph))
    if problems:
        return Failure(several(problems))
    bare = _without_identities(graph) if backend.drop_identities else graph
    return Success(recorded(graph, _fused(bare, backend), "fuse", f"backend={backend.name}"))


def _without_identities(graph: Graph) -> Graph:
    """The graph without dropout and identity, so that they part no chain."""
    draft = Draft(graph)
    for node in graph:
        if node.kind in ("dropout", "identity") and not node.aliased:
            draft.redirect(node.id, next(node.uses()))
            draft.erase([node.id])
    return draft.commit()


def _fused(graph: Graph, backend: BackendConfig) -> Graph:
    draft = Draft(graph)
    used = users(graph)
    patterns = sorted(backend.fusions, key=lambda pattern: -len(pattern.steps))
    by_root: dict[str, list[int]] = {}
    for index, pattern in enumerate(patterns):
        for kind in pattern.steps[0].kinds:
            by_root.setdefault(kind, []).append(index)
    taken: set[str] = set()
    for node in graph:
        if _is_fused(node):
            continue
        for index in by_root.get(node.kind, ()):
            found = match(graph, used, patterns[index], node)
            if isinstance(found, Match) and taken.isdisjoint(n.id for n in found.nodes) and _apply(draft, graph, found):
                taken.update(n.id for n in found.nodes)
                break
    return draft.commit()


def _is_fused(node: Node) -> bool:
    """Whether a norm is folded into the node: it is the result of an earlier run, or of an earlier chain."""
    return node.has("weight") and isinstance(node.get("weight"), FoldBatchNorm)


def _training(graph: Graph) -> Iterator[Problem]:
    if graph.training:
        yield InTrainingMode("model")
        return
    for node in graph:
        if node.kind in ("batch_norm", "dropout") and node.get("training") is True and not _own_statistics(node):
            yield InTrainingMode(node.place)


def _own_statistics(node: Node) -> bool:
    """A batch norm without running statistics uses the batch's in evaluation as well."""
    return node.kind == "batch_norm" and node.get("running_mean") is None


def _apply(draft: Draft, graph: Graph, found: Match) -> bool:
    """Replace a matched chain by one node; `False` when a part of it declines."""
    root, last = found.nodes[0], found.nodes[-1]
    args, post = found.nodes[0].args, found.nodes[0].post
    for node, slot in zip(found.nodes[1:], found.taken[1:], strict=True):
        if node.kind == "batch_norm":
            folded = _fold(root, args, node)
            if isinstance(folded, str):
                draft.note(node.id, f"not folded: {folded}")
                return False
            args = folded
        else:
            kept = tuple((key if key != "input" else slot, value) for key, value in node.args if key != slot)
            declined = _declines(graph, node)
            if declined:
                draft.note(node.id, f"not fused: {declined}")
                return False
            post = (*post, PostOp(node.kind, _other_last(kept), node.origin))
    draft.erase(n.id for n in found.nodes[:-1])
    draft.put(Node(last.id, root.kind, args, post, root.origin, last.fact))
    return True


def _other_last(args: NamedArgs) -> NamedArgs:
    """Of a commutative operator, the operand that is not the chain's is its `other`."""
    return tuple(("other" if key == "input" else key, value) for key, value in args)


def _declines(graph: Graph, node: Node) -> str:
    """Why a sum or clamp cannot be a post-op here; empty when it can."""
    if node.kind == "clamp" and not _holds_zero(node):
        return "the clamp has no room for zero, or its bounds are computed by the graph"
    if node.kind != "add":
        return ""
    if node.has("alpha") and node.get("alpha") != 1:
        return "the sum is scaled by alpha"
    facts = [graph[used].fact for used in node.uses()]
    if len(facts) != 2:
        return "one operand is not a value of the graph"
    shapes = {fact.shape if isinstance(fact, TensorFact) else None for fact in facts}
    if len(shapes) != 1 or None in shapes:
        return "the operands' shapes are unknown or differ"
    return ""


def _holds_zero(clamp: Node) -> bool:
    """Whether zero lies within the bounds: only then can the range of the codes, which holds it, do the clamping."""
    low, high = clamp.get("min"), clamp.get("max")
    low_fits = low is None or (isinstance(low, (int, float)) and low <= 0)
    return low_fits and (high is None or (isinstance(high, (int, float)) and high >= 0))


def _fold(root: Node, args: NamedArgs, norm: Node) -> NamedArgs | str:
    """The root's arguments with the batch norm folded into weight and bias, or why that is not possible."""
    values = dict(args)
    weight, bias, mean, var = values["weight"], values["bias"], norm.get("running_mean"), norm.get("running_var")
    gamma, beta, eps = norm.get("weight"), norm.get("bias"), norm.get("eps")
    if mean is None or var is None or norm.get("training"):
        return "the batch norm uses the statistics of the batch"
    tensors = (weight, mean, var)
    optional = (bias, gamma, beta)
    if not all(isinstance(t, Expression) for t in tensors) or not all(
        t is None or isinstance(t, Expression) for t in optional
    ):
        return "a weight is computed by the graph"
    if root.kind == "linear" and not (isinstance(root.fact, TensorFact) and len(root.fact.shape) == 2):
        return "batch norm acts on axis 1, which is the linear's output axis for 2-D input only"
    assert isinstance(eps, float)
    for part in ("weight", "bias"):
        values[part] = FoldBatchNorm(part, weight, bias, mean, var, gamma, beta, eps)  # type: ignore[arg-type]
    return tuple(values.items())
