"""One run of fusion over a graph: what matches is applied, what does not is remembered with its reason."""

from __future__ import annotations

from dataclasses import replace

from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.errors import CannotFuse
from qfunc.ir import Draft, Graph, Node, PostOp, TensorFact, users
from qfunc.ir.node import NamedArgs
from qfunc.match import WRONG_KIND, Match, Matched, NoMatch, Pattern, Users, match
from qfunc.passes.fold import (
    fold_norms_before,
    folded,
    is_folded,
    misaligned,
    move_norms_before_pools,
    off_axis,
    producer,
)
from qfunc.passes.fusion_log import FusionLog
from qfunc.passes.fusion_rules import DROPPED, FusionRules
from qfunc.passes.owned import CallFuser, fuse_owned


class Fusing:
    """One run over one graph: what identities part is joined, then the longest patterns are tried first.

    Without `call_fuser` the user's modules are not made. `log` holds what was done and what was left.
    """

    def __init__(
        self, graph: Graph, backend: BackendConfig, custom: CustomConfig, *, qat: bool, call_fuser: CallFuser | None
    ) -> None:
        self.rules = FusionRules(graph, backend, custom, qat=qat)
        self.log = FusionLog(custom, self.rules)
        self._graph, self._qat, self._call_fuser = graph, qat, call_fuser
        self._taken: set[str] = set()

    def run(self) -> Graph:
        """The fused graph."""
        graph, backends = self._owned(self._graph), [rules.backend for rules in self.rules.every]
        if any(backend.drop_identities for backend in backends):
            whole, graph = graph, self._without_identities(graph)
            # What an identity parted is one chain now, for the user's patterns as well.
            graph = graph if graph is whole else self._owned(graph)
        move = any(backend.move_norms for backend in backends) and not self._qat
        if move and any(node.kind == "batch_norm" for node in graph):
            graph = move_norms_before_pools(graph, self.log)
        graph = self._chains(graph)
        if move and any(node.kind == "batch_norm" for node in graph):
            graph = fold_norms_before(graph, self.log)
        return graph

    def _owned(self, graph: Graph) -> Graph:
        for rules in (rules for rules in self.rules.every if rules.fusions):
            within = None if len(self.rules.every) == 1 else lambda node, rules=rules: self.rules.of(node) is rules
            graph = fuse_owned(graph, rules.fusions, self.log, self._call_fuser, qat=self._qat, within=within)
        return graph

    def _without_identities(self, graph: Graph) -> Graph:
        """The graph without identity, and for evaluation without dropout, so that they part no chain."""
        draft = Draft(graph)
        for node in graph:
            if node.kind not in DROPPED[self._qat :] or node.aliased or not self.log.allows(node.kind, (node,)):
                continue
            # Whether a dropout drops may be an input of the model.
            if node.kind == "identity" or node.get("training") is False:
                draft.redirect(node.id, next(node.uses()))
                draft.erase([node.id])
                self.log.fuse(node, node.kind, (node,))
        return draft.commit()

    # chains -----------------------------------------------------------------------------------------------------------

    def _chains(self, graph: Graph) -> Graph:
        draft, used = Draft(graph), users(graph)
        for node in graph:
            if node.id not in self._taken and not node.post and not is_folded(node):
                patterns = self.rules.of(node).patterns
                if node.kind in patterns:
                    self._chain(draft, graph, used, node, patterns[node.kind])
        return draft.commit()

    def _chain(self, draft: Draft, graph: Graph, used: Users, root: Node, patterns: tuple[Pattern, ...]) -> None:
        """Apply the first pattern that fits."""
        misses, declined = list[NoMatch](), list[NoMatch]()
        for found in (match(graph, used, pattern, root) for pattern in patterns):
            if isinstance(found, NoMatch):
                misses.append(found)
                continue
            made = self._made(graph, used, found)
            if isinstance(made, Node):
                draft.erase(n.id for n in found.nodes[:-1])
                draft.put(made)
                self.log.fuse(made, found.pattern.name, found.nodes)
                self._taken.update(n.id for n in found.nodes)
                return
            declined.append(made)
        # Only what matched whole was looked at closely: its reason says more.
        self.log.miss(root.id, _deepest(declined or misses))

    def _made(self, graph: Graph, used: Users, found: Match) -> Node | NoMatch:
        """The fused node, or which part of the match declines and why."""
        root, last = found.nodes[0], found.nodes[-1]
        if self._qat and not found.pattern.trains:
            return NoMatch(root.id, f"{found.pattern.name} is fused for evaluation only", len(found.parts))
        hindrance = self.log.hindrance(found.pattern.name, found.nodes)
        if hindrance:
            return NoMatch(root.id, f"{found.pattern.name}: {hindrance}", len(found.parts))
        args, post = root.args, root.post
        for depth, part in enumerate(found.parts[1:], 1):
            if part.node.id in self._taken or (part.taken == "other" and self._fuses_left(graph, used, part.node)):
                return NoMatch(part.node.id, "is fused with the other operator that it reads", depth)
            behind = self._behind(graph, root, args, part)
            match behind:
                case str():
                    return NoMatch(part.node.id, behind, depth)
                case PostOp():
                    post = (*post, behind)
                case _:
                    args = behind
        return Node(last.id, root.kind, args, post, root.origin, last.fact)

    def _fuses_left(self, graph: Graph, used: Users, total: Node) -> bool:
        """Whether a sum is to be fused with its left operand, which goes first, as in the reference."""
        start = producer(graph, total)
        while start is not None and start.kind == "batch_norm":
            start = producer(graph, start)
        if start is None:
            return False
        found = (match(graph, used, pattern, start) for pattern in self.rules.of(start).patterns.get(start.kind, ()))
        sums = (each for each in found if isinstance(each, Match) and total in each.nodes)
        return any(isinstance(self._made(graph, used, each), Node) for each in sums)

    def _behind(self, graph: Graph, root: Node, args: NamedArgs, part: Matched) -> NamedArgs | PostOp | str:
        """What an operator behind the root becomes: a post-op, or the root's arguments with a norm folded in."""
        node, slot = part.node, part.taken
        if node.kind == "batch_norm" and not self._qat:
            return folded(root, args, node)
        reason = (
            self._unfit_for_training(graph, root, node) if node.kind == "batch_norm" else _declines(graph, root, node)
        )
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
            self.log.unfit.append(CannotFuse(place, reason, remedy))
        if graph.trains(root) is not (norm.get("training") is True):
            modes = tuple(
                "training" if trains else "evaluation" for trains in (graph.trains(root), norm.get("training"))
            )
            why = f"the layer is in {modes[0]} mode, the batch norm in {modes[1]} mode"
            remedy = "put both in one mode before tracing, or leave them apart: CustomConfig(unfused_names=...)"
            # A function is told its mode where it is called, and may well mean it.
            if norm.origin.written is not None and norm.origin.written.op == "call_module":
                self.log.unfit.append(CannotFuse(place, why, remedy))
            return reason or why
        return reason


def _deepest(misses: list[NoMatch]) -> NoMatch:
    """The pattern that came furthest; with all that the patterns would go on with, where that is the reason."""
    best = max(misses, key=lambda miss: (miss.depth, miss.reason != WRONG_KIND))
    alike = [m.wanted for m in misses if (m.node, m.depth, m.reason) == (best.node, best.depth, WRONG_KIND)]
    wanted = tuple(dict.fromkeys(kind for kinds in alike for kind in kinds))
    return replace(best, wanted=wanted)


def _declines(graph: Graph, root: Node, node: Node) -> str:
    """Why a sum or an activation cannot be a post-op here; empty when it can."""
    if node.kind != "add":
        if sum(1 for _ in node.uses()) > 1:
            return "one of its options is computed by the graph"
        # A layer's kernel clamps at any bounds; of a sum or product, the range of the codes does, which holds zero.
        layer = root.has("weight")
        return "" if layer or node.kind != "clamp" or _holds_zero(node) else "zero is not within its bounds"
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
    low, high = clamp.get("min"), clamp.get("max")
    low_fits = low is None or (isinstance(low, (int, float)) and low <= 0)
    return low_fits and (high is None or (isinstance(high, (int, float)) and high >= 0))
