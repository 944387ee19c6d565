"""Fusions of the user's own: each match becomes one node, whose module a fuser of the user's makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeAlias

from returns.result import Failure

from qfunc.config.custom_fusion import CustomFusion, compiled, nested
from qfunc.errors import CannotFuse, Problem, UserFunctionFailed, problems, told
from qfunc.ir import Draft, Graph, Node, Opaque, Origin, Ref, Token, users
from qfunc.ir.node import NamedArgs
from qfunc.match import Match, NoMatch, match
from qfunc.ops import type_name
from qfunc.passes.fold import is_folded
from qfunc.passes.fusion_log import FusionLog
from qfunc.result import R

CallFuser: TypeAlias = Callable[[Graph, CustomFusion, Any, Node, bool], R[Opaque]]
"""Calls a user's fuser: graph, fusion, the matched nodes nested as its pattern, the root, whether for training."""


def fuse_owned(
    graph: Graph,
    fusions: tuple[CustomFusion, ...],
    log: FusionLog,
    call_fuser: CallFuser | None,
    *,
    qat: bool,
    within: Callable[[Node], bool] | None = None,
) -> Graph:
    """The graph with the matches of the user's patterns made one node each, in the order of the patterns.

    Without `call_fuser` the nodes are made, but not their modules. Only the nodes that are `within` start a match.
    """
    draft, used, taken = Draft(graph), users(graph), set[str]()
    objects = dict[str, Opaque]()
    position = {id: index for index, id in enumerate(graph.order)}
    for fusion in fusions:
        pattern = compiled(fusion)
        for node in (node for node in graph if not is_folded(node) and (within is None or within(node))):
            found = match(graph, used, pattern, node)
            if isinstance(found, NoMatch):
                log.miss_own(node.id, pattern.name, found)
                continue
            if any(n.id in taken or is_folded(n) for n in found.nodes):
                continue
            hindrance = log.hindrance(pattern.name, found.nodes)
            if hindrance:
                log.miss_own(node.id, pattern.name, NoMatch(node.id, hindrance, len(found.parts)))
                continue
            chosen = _ends(graph, position, found, fusion, log)
            if chosen is None:
                continue
            root, extra = chosen
            module = None if call_fuser is None else call_fuser(graph, fusion, nested(graph, found), root, qat)
            if isinstance(module, Failure):
                log.problems += problems(module.failure())
                continue
            last = found.nodes[-1]
            made = _node(pattern.name, last, root, extra, None if module is None else module.unwrap())
            if module is not None:
                objects[f"fused:{last.id}"] = module.unwrap()
            draft.erase(n.id for n in found.nodes if n.id != last.id)
            draft.put(made)
            log.fuse(last, pattern.name, found.nodes, own=True)
            taken.update(n.id for n in found.nodes)
    fused = draft.commit()
    return replace(fused, objects=fused.objects.update(objects)) if objects else fused


def _ends(
    graph: Graph, position: Mapping[str, int], found: Match, fusion: CustomFusion, log: FusionLog
) -> tuple[Node, tuple[Node, ...]] | None:
    """The root and the extra inputs of a match, by the user's getters; what is wrong with them goes to the log."""
    nodes = nested(graph, found)
    try:
        root = _last(nodes) if fusion.root_node_getter is None else fusion.root_node_getter(nodes)
        extra = () if fusion.extra_inputs_getter is None else tuple(fusion.extra_inputs_getter(nodes))
    except Exception as error:  # noqa: BLE001 - the getters are the user's code
        log.problems.append(UserFunctionFailed(fusion.name, told(error)))
        return None
    problem = _wrong_root(found, fusion, root) or _wrong_extra(position, found, fusion, extra)
    if problem is not None:
        log.problems.append(problem)
        return None
    return root, extra


def _last(nodes: Any) -> Any:
    while isinstance(nodes, tuple):
        nodes = nodes[-1]
    return nodes


def _node(pattern: str, last: Node, root: Node, extra: tuple[Node, ...], module: Opaque | None) -> Node:
    """The call of the fused module: with the root's arguments, and the extra inputs behind them."""
    written = root.origin.written
    assert written is not None
    inputs = tuple(root.get(name) for name in written.args) + tuple(Ref(node.id) for node in extra)
    keywords = tuple((keyword, root.get(name)) for keyword, name in written.kwargs)
    args: NamedArgs = (
        ("pattern", pattern),
        ("module", Token(f"fused:{last.id}")),
        ("inputs", inputs),
        ("keywords", keywords),
    )
    type = root.origin.type if module is None else type_name(module.value.__class__)
    return Node(last.id, "owned", args, origin=Origin(root.origin.module, type, line=root.origin.line), fact=last.fact)


def _wrong_root(found: Match, fusion: CustomFusion, root: object) -> Problem | None:
    """Why a node cannot be the root, whose arguments the fused module is called with."""
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
        remedy = f"give {fusion.name} a root_node_getter that returns where a chain starts"
        return CannotFuse(root.place, reason, remedy)
    return None


def _wrong_extra(
    position: Mapping[str, int], found: Match, fusion: CustomFusion, extra: tuple[object, ...]
) -> Problem | None:
    """Why nodes cannot be extra inputs of the fused module."""
    matched = {node.id for node in found.nodes}
    last = found.nodes[-1]
    end = position[last.id]
    if all(isinstance(n, Node) and n.id not in matched and position.get(n.id, end) < end for n in extra):
        return None
    reason = "an extra input is no node of the graph before it, or is a part of the match"
    return CannotFuse(last.place, reason, f"mend the extra_inputs_getter of {fusion.name}")
