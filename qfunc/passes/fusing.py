"""One run of fusion over a graph: what matches is applied, what does not is remembered with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from returns.result import Failure

from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.config.custom_fusion import CustomFusion, compiled, nested
from qfunc.errors import CannotFuse, Problem, UserFunctionFailed, told
from qfunc.ir import Draft, Expression, Graph, Node, Opaque, Origin, PostOp, Ref, TensorFact, Token, users
from qfunc.ir.node import NamedArgs
from qfunc.match import WRONG_KIND, Match, Matched, NoMatch, Pattern, match
from qfunc.ops import type_name
from qfunc.params import Load
from qfunc.passes.fold import (
    CONVOLUTIONS,
    fold_norms_before,
    folded,
    misaligned,
    move_norms_before_pools,
    off_axis,
)
from qfunc.result import R

_DROPPED = ("dropout", "identity")
FUSED_ELSEWHERE = "is fused with the other operator that it reads"


@dataclass(frozen=True, slots=True)
class Fused:
    """A chain that became one node: its pattern's name and its nodes, in order, as they were.

    `own` says that a fuser of the user's makes of it what it likes.
    """

    node: Node
    pattern: str
    parts: tuple[Node, ...]
    own: bool = False


class Fusing:
    """One run over one graph.

    `problems` are the user's functions' faults, `unfit` the parts that cannot be trained together as they stand.
    Without `call_fuser` the user's modules are not made. What the user's switches allow is tried:
    the user's patterns first, in their order, then the longest of the backend's.
    """

    def __init__(
        self,
        graph: Graph,
        backend: BackendConfig,
        custom: CustomConfig,
        *,
        qat: bool,
        call_fuser: Callable[[Graph, CustomFusion, Any, Node, bool], R[Opaque]] | None,
    ) -> None:
        self.fused: list[Fused] = []
        self.missed: dict[str, NoMatch] = {}
        self.problems: list[Problem] = []
        self.unfit: list[Problem] = []
        self._graph, self._backend, self._custom, self._qat, self._call_fuser = graph, backend, custom, qat, call_fuser
        self._names = frozenset(pattern_names(backend, custom))

    def run(self) -> Graph:
        """The fused graph."""
        graph, backend = self._owned(self._graph), self._backend
        if backend.drop_identities:
            whole, graph = graph, self._without_identities(graph)
            # What an identity parted is one chain now, for the user's patterns as well.
            graph = graph if graph is whole else self._owned(graph)
        move = backend.move_norms and not self._qat
        if move and any(node.kind == "batch_norm" for node in graph):
            graph = move_norms_before_pools(graph, self._allowed, self._report)
        graph = self._chains(graph)
        if move and any(node.kind == "batch_norm" for node in graph):
            graph = fold_norms_before(graph, self._allowed, self._report)
        return graph

    def _report(self, node: Node, pattern: str, parts: tuple[Node, ...], *, own: bool = False) -> None:
        earlier = next((chain for chain in self.fused if chain.node.id == node.id == parts[-1].id), None)
        if earlier is not None:  # a norm before a chain joins it
            self.fused.remove(earlier)
            whole = (*parts[:-1], *earlier.parts)
            pattern, parts = " + ".join(part.kind for part in whole), whole
        self.fused.append(Fused(node, pattern, parts, own))
        for part in parts:
            self.missed.pop(part.id, None)

    def _allowed(self, pattern: str, nodes: Sequence[Node]) -> bool:
        custom = self._custom
        if pattern not in self._names or pattern in custom.unfused_patterns:
            return False
        names = custom.unfused_names
        return not names or not any(_within(node.origin.module, name) for node in nodes for name in names)

    def _without_identities(self, graph: Graph) -> Graph:
        """The graph without identity, and for evaluation without dropout, so that they part no chain."""
        draft = Draft(graph)
        for node in graph:
            if node.kind not in _DROPPED[self._qat :] or node.aliased or not self._allowed(node.kind, (node,)):
                continue
            # Whether a dropout drops may be an input of the model.
            if node.kind == "identity" or node.get("training") is False:
                draft.redirect(node.id, next(node.uses()))
                draft.erase([node.id])
                self._report(node, node.kind, (node,))
        return draft.commit()

    # chains -----------------------------------------------------------------------------------------------------------

    def _chains(self, graph: Graph) -> Graph:
        draft, used, taken = Draft(graph), users(graph), set[str]()
        by_root = patterns_by_root(self._backend)
        if self._qat:  # two norms in a row train apart
            by_root = {kind: [_once(pattern) for pattern in patterns] for kind, patterns in by_root.items()}
        for node in graph:
            if node.id not in taken and node.kind in by_root and not node.post and not _is_folded(node):
                taken.update(self._chain(draft, graph, by_root[node.kind], used, taken, node))
        return draft.commit()

    def _chain(
        self,
        draft: Draft,
        graph: Graph,
        patterns: list[Pattern],
        used: dict[str, tuple[str, ...]],
        taken: set[str],
        root: Node,
    ) -> tuple[str, ...]:
        """Apply the first pattern that fits; gives the ids of its nodes."""
        misses, declined = list[NoMatch](), list[NoMatch]()
        for pattern in patterns:
            found = match(graph, used, pattern, root)
            if isinstance(found, NoMatch):
                misses.append(found)
                continue
            made = self._made(graph, found, taken)
            if isinstance(made, Node):
                draft.erase(n.id for n in found.nodes[:-1])
                draft.put(made)
                self._report(made, pattern.name, found.nodes)
                return tuple(n.id for n in found.nodes)
            declined.append(made)
        # Only what matched whole was looked at closely: its reason says more.
        self.missed[root.id] = _deepest(declined or misses)
        return ()

    def _made(self, graph: Graph, found: Match, taken: set[str]) -> Node | NoMatch:
        """The fused node, or which part of the match declines and why."""
        root, last = found.nodes[0], found.nodes[-1]
        if self._qat and not found.pattern.trains:
            return NoMatch(root.id, f"{found.pattern.name} is fused for evaluation only", len(found.parts))
        if not self._allowed(found.pattern.name, found.nodes):
            reason = f"the custom configuration leaves {found.pattern.name} unfused here"
            return NoMatch(root.id, reason, len(found.parts))
        args, post = root.args, root.post
        for depth, part in enumerate(found.parts[1:], 1):
            if part.node.id in taken:
                return NoMatch(part.node.id, FUSED_ELSEWHERE, depth)
            behind = self._behind(graph, root, args, part)
            match behind:
                case str():
                    return NoMatch(part.node.id, behind, depth)
                case PostOp():
                    post = (*post, behind)
                case _:
                    args = behind
        return Node(last.id, root.kind, args, post, root.origin, last.fact)

    def _behind(self, graph: Graph, root: Node, args: NamedArgs, part: Matched) -> NamedArgs | PostOp | str:
        """What an operator behind the root becomes: a post-op, or the root's arguments with a norm folded in."""
        node, slot = part.node, part.taken
        if node.kind == "batch_norm" and not self._qat:
            return folded(root, args, node)
        reason = self._unfit_for_training(graph, root, node) if node.kind == "batch_norm" else _declines(graph, node)
        if reason:
            return reason
        # Of a sum, the operand that is not the chain's is the `other`, on whichever side it stands.
        kept = tuple((slot if key == "input" else key, value) for key, value in node.args if key != slot)
        return PostOp(node.kind, kept, node.origin)

    def _unfit_for_training(self, graph: Graph, root: Node, norm: Node) -> str:
        """Why a batch norm cannot be fused with the layer before it for training; modes must agree, and features."""
        if norm.get("running_mean") is None:
            return "the batch norm has no running statistics, which training with folded weights needs"
        reason = off_axis(root, norm)
        if reason:
            return reason
        reason = misaligned(root, norm)
        place = f"{root.place} + {norm.place}"
        if reason:
            remedy = "give the batch norm as many features as the layer has output channels"
            self.unfit.append(CannotFuse(place, reason, remedy))
        if _trains(graph, root) is not (norm.get("training") is True):
            modes = tuple(
                "training" if trains else "evaluation" for trains in (_trains(graph, root), norm.get("training"))
            )
            why = f"the layer is in {modes[0]} mode, the batch norm in {modes[1]} mode"
            remedy = "put both in one mode before tracing, or leave them apart: CustomConfig(unfused_names=...)"
            # A function is told its mode where it is called, and may well mean it.
            if norm.origin.written is not None and norm.origin.written.op == "call_module":
                self.unfit.append(CannotFuse(place, why, remedy))
            return reason or why
        return reason

    # the user's own ---------------------------------------------------------------------------------------------------

    def _owned(self, graph: Graph) -> Graph:
        """The graph with the matches of the user's patterns made one node each."""
        draft, used, taken = Draft(graph), users(graph), set[str]()
        objects = dict[str, Opaque]()
        for fusion in custom_fusions(self._backend, self._custom):
            pattern = compiled(fusion)
            for node in graph:
                found = match(graph, used, pattern, node)
                if not isinstance(found, Match) or not taken.isdisjoint(n.id for n in found.nodes):
                    continue
                if self._allowed(pattern.name, found.nodes) and self._own(draft, graph, found, fusion, objects):
                    taken.update(n.id for n in found.nodes)
        made = draft.commit()
        return replace(made, objects=made.objects.update(objects)) if objects else made

    def _own(self, draft: Draft, graph: Graph, found: Match, fusion: CustomFusion, objects: dict[str, Opaque]) -> bool:
        """Put the module that a user's fuser makes in place of a match; `False` when it cannot be."""
        nodes, last = nested(graph, found), found.nodes[-1]
        try:
            root = _root(nodes) if fusion.root_node_getter is None else fusion.root_node_getter(nodes)
            extra = () if fusion.extra_inputs_getter is None else tuple(fusion.extra_inputs_getter(nodes))
        except Exception as error:  # noqa: BLE001 - the getters are the user's code
            self.problems.append(UserFunctionFailed(fusion.name, told(error)))
            return False
        problem = _wrong_root(graph, found, fusion, root, extra)
        if problem is not None:
            self.problems.append(problem)
            return False
        self._report(last, found.pattern.name, found.nodes, own=True)
        token, origin = Token(f"fused:{last.id}"), root.origin
        if self._call_fuser is not None:
            made = self._call_fuser(graph, fusion, nodes, root, self._qat)
            if isinstance(made, Failure):
                self.problems.append(made.failure())
                return False
            objects[token.id] = made.unwrap()
            origin = Origin(root.origin.module, type_name(type(made.unwrap().value)), line=root.origin.line)
        written = root.origin.written
        assert written is not None
        inputs = tuple(root.get(name) for name in written.args) + tuple(Ref(node.id) for node in extra)
        keywords = tuple((keyword, root.get(name)) for keyword, name in written.kwargs)
        args: NamedArgs = (("module", token), ("inputs", inputs), ("keywords", keywords))
        draft.erase(n.id for n in found.nodes if n.id != last.id)
        draft.put(Node(last.id, "owned", args, origin=origin, fact=last.fact))
        return True


def custom_fusions(backend: BackendConfig, custom: CustomConfig) -> tuple[CustomFusion, ...]:
    """The fusions with a fuser: those of the custom configuration, then those of the backend."""
    return (*custom.fusions, *(fusion for fusion in backend.fusions if isinstance(fusion, CustomFusion)))


def patterns_by_root(backend: BackendConfig) -> dict[str, list[Pattern]]:
    """The patterns of qfunc's own fusion, by the kind of their first step, the longest first."""
    patterns = [pattern for pattern in backend.fusions if isinstance(pattern, Pattern)]
    by_root: dict[str, list[Pattern]] = {}
    for pattern in sorted(patterns, key=lambda pattern: -len(pattern.steps)):
        for kind in pattern.steps[0].kinds:
            by_root.setdefault(kind, []).append(pattern)
    return by_root


def _once(pattern: Pattern) -> Pattern:
    return replace(pattern, steps=tuple(replace(step, repeats=False) for step in pattern.steps))


def pattern_names(backend: BackendConfig, custom: CustomConfig) -> tuple[str, ...]:
    """The names of all patterns that may apply."""
    names = [fusion.name for fusion in (*custom.fusions, *backend.fusions)]
    if backend.drop_identities:
        names += _DROPPED
    if backend.move_norms:
        pools = [f"{kind}{rank}d" for kind in ("avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3)]
        names += [f"batch_norm + {kind}" for kind in (*CONVOLUTIONS, "linear")]
        names += [f"{kind} + batch_norm" for kind in (*pools, "mean")]
    return tuple(dict.fromkeys(names))


def _root(nodes: Any) -> Any:
    while isinstance(nodes, tuple):
        nodes = nodes[-1]
    return nodes


def _wrong_root(
    graph: Graph, found: Match, fusion: CustomFusion, root: object, extra: tuple[object, ...]
) -> Problem | None:
    """Why the nodes that a user's getters gave cannot be the fused module's root and inputs."""
    matched = {node.id for node in found.nodes}
    if not isinstance(root, Node) or root.id not in matched or root.origin.written is None:
        given = repr(root.id) if isinstance(root, Node) else repr(root)
        reason = f"the root must be one of the matched nodes, not {given}"
        return CannotFuse(found.nodes[-1].place, reason, f"give {fusion.name} a root_node_getter that returns one")
    if root.origin.written.op != "call_module":
        reason = f"its root {root.id!r} is no call of a module"
        return CannotFuse(root.place, reason, f"give {fusion.name} a root_node_getter that returns a call of a module")
    if not matched.isdisjoint(root.uses()):
        reason = "its root is called with a value that is a part of the match"
        return CannotFuse(
            root.place, reason, f"give {fusion.name} a root_node_getter that returns where a chain starts"
        )
    position = {id: index for index, id in enumerate(graph.order)}
    last = position[found.nodes[-1].id]
    if not all(isinstance(n, Node) and n.id not in matched and position.get(n.id, last) < last for n in extra):
        reason = "an extra input is no node of the graph before it, or is a part of the match"
        return CannotFuse(root.place, reason, f"mend the extra_inputs_getter of {fusion.name}")
    return None


def _deepest(misses: list[NoMatch]) -> NoMatch:
    """The pattern that came furthest; with all that the patterns would go on with, where that is the reason."""
    best = max(misses, key=lambda miss: (miss.depth, miss.reason != WRONG_KIND))
    alike = [m.wanted for m in misses if (m.node, m.depth, m.reason) == (best.node, best.depth, WRONG_KIND)]
    wanted = tuple(dict.fromkeys(kind for kinds in alike for kind in kinds))
    return replace(best, wanted=wanted)


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.") or name == ""


def _is_folded(node: Node) -> bool:
    """Whether a norm is folded into the node: it is the result of an earlier run."""
    return (
        node.has("weight") and isinstance(node.get("weight"), Expression) and not isinstance(node.get("weight"), Load)
    )


def _trains(graph: Graph, node: Node) -> bool:
    """Whether the module that a call is of, or that contains it, is in training mode."""
    fact = graph.modules.get(node.origin.module)
    return graph.training if fact is None else fact.training


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
    if None in shapes:
        return "the operands' shapes are unknown: trace with example_inputs"
    return "the operands' shapes differ" if len(shapes) != 1 else ""


def _holds_zero(clamp: Node) -> bool:
    """Whether zero lies within the bounds: only then can the range of the codes, which holds it, do the clamping."""
    low, high = clamp.get("min"), clamp.get("max")
    low_fits = low is None or (isinstance(low, (int, float)) and low <= 0)
    return low_fits and (high is None or (isinstance(high, (int, float)) and high >= 0))
