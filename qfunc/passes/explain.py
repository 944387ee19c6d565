"""`explain_fusion`: what `fuse` makes one node, and for each operator that starts a pattern and stays alone, why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from returns.result import Failure, Success

from qfunc.backends.cpu import CPU
from qfunc.config.arguments import wrong_arguments
from qfunc.config.backend_config import BackendConfig
from qfunc.config.columns import aligned
from qfunc.config.custom_config import CustomConfig
from qfunc.errors import WrongStage, several
from qfunc.ir import Graph, Node
from qfunc.match import WRONG_KIND, NoMatch
from qfunc.ops import type_name
from qfunc.params import FoldBatchNorm
from qfunc.passes.fuse import NOTHING, training_modules, unknown_names
from qfunc.passes.fusing import Fusing
from qfunc.passes.fusion_log import Fused
from qfunc.passes.kept import kind_as_written, why_kept
from qfunc.result import R


@dataclass(frozen=True, slots=True)
class FusedChain:
    """Operators that become one node: the pattern's name, where they stand, and the module they amount to."""

    node: str
    pattern: str
    places: tuple[str, ...]
    module: str


@dataclass(frozen=True, slots=True)
class Unfused:
    """An operator that starts a pattern and is not fused."""

    node: str
    place: str
    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class FusionReport:
    """What fusion does to a graph; prints as two tables."""

    backend: str
    fused: tuple[FusedChain, ...]
    unfused: tuple[Unfused, ...]

    def __str__(self) -> str:
        plural = "" if len(self.fused) == 1 else "s"
        head = f"{self.backend}: {len(self.fused)} fusion{plural}, {len(self.unfused)} left alone"
        fused = [(f.node, " + ".join(f.places), f.pattern, f.module) for f in self.fused]
        unfused = [(u.node, u.place, u.operator, u.reason) for u in self.unfused]
        done = [("node", "fused", "pattern", "becomes"), *fused] if fused else []
        left = [("node", "left", "operator", "why"), *unfused] if unfused else []
        return "\n".join([head, *aligned(done), *aligned(left)])


def explain_fusion(
    graph: Graph, *, backend: BackendConfig = CPU, qat: bool = False, custom: CustomConfig = NOTHING
) -> R[FusionReport]:
    """What `fuse` with the same arguments does to a graph, and why it does no more; no fuser of the user's is called.

    Of a graph that is fused already, what was fused is told of as well.

    Returns:
        The report, or `UnknownName`, `BadConfig`, `WrongStage`; `CannotFuse`, `UserFunctionFailed` for a getter of the
        user's. A model in training mode is no error here: it is the reason why nothing is fused for evaluation. Nor are
        layers whose modes or features differ: that is why they are left alone, where `fuse` fails.
    """
    if not isinstance(graph, Graph):
        return Failure(WrongStage(type(graph).__name__, "Graph"))
    problems = wrong_arguments(backend=backend, qat=qat, custom=custom) or [*unknown_names(graph, backend, custom)]
    if problems:
        return Failure(several(problems))
    fusing = Fusing(graph, backend, custom, qat=qat, call_fuser=None)
    fusing.run()
    log = fusing.log
    if log.problems:
        return Failure(several(log.problems))
    blocked = {} if qat else {problem.node: problem.reason for problem in training_modules(graph)}
    position = {id: index for index, id in enumerate(graph.order)}
    fused = [*_earlier(graph), *([] if blocked else log.fused.values())]
    missed = {id: _reason(graph, id, miss) for id, miss in log.missed.items()}
    for id, (pattern, miss) in log.missed_own.items():
        reason = _reason(graph, id, miss)
        if id not in missed:
            missed[id] = f"{pattern}: {reason}"
        elif miss.reason != WRONG_KIND and reason != missed[id]:
            missed[id] = f"{missed[id]}; {pattern}: {reason}"
    roots = {node.id: fusing.rules.of(node).patterns for node in graph}
    kept = (node for node in graph if kind_as_written(node, graph) != node.kind)
    own = {type_name(module.float_type): "it is a custom module" for module in custom.custom_modules}
    missed |= {
        node.id: own.get(node.kind) or why_kept(node, graph)
        for node in kept
        if kind_as_written(node, graph) in roots[node.id]
    }
    if blocked:
        reason = "it is in training mode: call model.eval() and trace again, or fuse for training with qat=True"
        missed |= {node.id: reason for node in graph if node.kind in roots[node.id] and not _is_fused(node)}
    unfused = sorted((id for id in missed if id in position), key=position.__getitem__)
    return Success(
        FusionReport(
            backend.name,
            tuple(_row(chain, qat=qat) for chain in sorted(fused, key=lambda f: position.get(f.parts[0].id, -1))),
            tuple(Unfused(id, graph[id].place, graph[id].kind, missed[id]) for id in unfused),
        )
    )


def _is_fused(node: Node) -> bool:
    folded = node.has("weight") and isinstance(node.get("weight"), FoldBatchNorm)
    return bool(node.post) or folded or node.kind == "owned"


def _earlier(graph: Graph) -> list[Fused]:
    """What an earlier run has fused, as its nodes tell."""
    found = []
    for node in graph:
        if node.kind == "owned":
            found.append(Fused(node, str(node.get("pattern")), (node,), own=True))
        elif _is_fused(node):
            folds = list(_folds(node.get("weight") if node.has("weight") else None))
            before = ["batch_norm"] * sum(fold.before for fold in folds)
            behind = ["batch_norm"] * (len(folds) - len(before))
            chain = [*before, node.kind, *behind, *(post.kind for post in node.post)]
            found.append(Fused(node, " + ".join(chain), (node,)))
    return found


def _folds(weight: object) -> Iterator[FoldBatchNorm]:
    while isinstance(weight, FoldBatchNorm):
        yield weight
        weight = weight.weight


def _reason(graph: Graph, root: str, miss: NoMatch) -> str:
    node = graph.nodes.get(miss.node)
    if node is None or miss.node == root:
        return miss.reason
    if miss.reason != WRONG_KIND:
        return f"{node.place}{' ' if miss.reason.split()[0] in _VERBS else ': '}{miss.reason}"
    if kind_as_written(node, graph) in miss.wanted:
        return f"{node.place} behind it is kept as it was written: {why_kept(node, graph)}"
    if node.kind == "owned":
        return f"followed by {node.place}, which a fuser made"
    follows = "the model's output" if node.kind == "output" else node.place
    named = follows if node.kind in ("output", follows) else f"{follows} ({node.kind})"
    *others, last = miss.wanted
    return f"followed by {named}, not by {', '.join(others)}{' or ' if others else ''}{last}"


_VERBS = ("is", "shares", "reads", "does")
"""How reasons begin that go on a sentence about the operator."""


def _row(fused: Fused, *, qat: bool) -> FusedChain:
    kinds = [part.kind for part in fused.parts] if len(fused.parts) > 1 else fused.pattern.split(" + ")
    module = "what its fuser makes" if fused.own else module_name(kinds, qat=qat, rank=_rank(fused.node))
    return FusedChain(fused.node.id, fused.pattern, tuple(part.place for part in fused.parts), module)


_NAMES = {
    "linear": "Linear", "batch_norm": "Bn", "relu": "ReLU", "add": "Add", "mul": "Mul", "clamp": "Clamp",
    "hardswish": "Hardswish", "silu": "SiLU", "leaky_relu": "LeakyReLU", "tanh": "Tanh", "gelu": "GELU",
}  # fmt: skip


def _rank(root: Node) -> str:
    """How a batch norm's module is called after its rank, which its kind does not tell."""
    return root.origin.type[-2:] if root.origin.type.startswith("torch.nn.BatchNorm") else ""


def module_name(kinds: list[str], *, qat: bool, rank: str = "") -> str:
    """The field's name of the module that a chain of kinds amounts to; for training its batch norm stays in it.

    `rank` is that of a root whose kind is the same for every rank.

    >>> kinds = ["conv2d", "batch_norm", "relu"]
    >>> module_name(kinds, qat=False), module_name(kinds, qat=True)
    ('ConvReLU2d', 'ConvBnReLU2d')
    """
    root, *rest = kinds
    if root in ("dropout", "identity"):
        return "nothing"
    if rest == ["batch_norm"] and not root.startswith(("conv", "linear")):
        return f"batch_norm, then {root}"
    if root == "batch_norm" and any(kind.startswith(("conv", "linear")) for kind in rest):
        return module_name(rest, qat=qat)
    stem, rank = (root[:-2], root[-2:]) if root[-2:] in ("1d", "2d", "3d") else (root, rank)
    first = {"conv": "Conv", "conv_transpose": "ConvTranspose", "batch_norm": "BN"}.get(stem) or _NAMES.get(stem, stem)
    kept = [kind for kind in rest if qat or kind != "batch_norm"]
    if root == "linear" and "batch_norm" in kept:
        rank = "1d"
    return first + "".join(_NAMES.get(kind, kind) for kind in kept) + rank
