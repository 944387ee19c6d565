"""What reads quantized values turned to them: the one way in which codes and fake quantization get into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qfunc.config.point import Edge, edges_by_slot, values_in
from qfunc.config.resolve import values_of
from qfunc.ir import Arg, Draft, Graph, Node, PostOp, Ref, map_arg
from qfunc.passes.stages import Prepared


def reroute(
    draft: Draft, prepared: Prepared, of_output: Callable[[Node, str], str], of_use: Callable[[Node, str], str]
) -> None:
    """Turn the users of each value with a site to what stands for it, in the draft of a prepared graph.

    Both functions take the node of a value and the name of a site, put nodes behind it and give the id of what is to be
    read instead, which may be the value's own: `of_output` for all users of a value, `of_use` for single uses, once for
    each pair of value and site.
    """
    graph = prepared.graph
    for value in (id for id in graph.order if id in prepared.outputs):
        stands_for = of_output(graph[value], prepared.outputs[value])
        if stands_for != value:
            draft.redirect(value, stands_for)
    pairs: dict[tuple[str, str], str] = {}
    turned: dict[str, dict[Edge, str]] = {}
    position = {id: index for index, id in enumerate(graph.order)}
    slots = edges_by_slot(prepared.inputs)
    for user, slot in sorted(slots, key=lambda key: (position[key[0]], key[1])):
        values = values_in(graph[user], slot)
        for edge in slots[user, slot]:
            pair = (values[edge.index], prepared.inputs[edge])
            if pair not in pairs:
                pairs[pair] = of_use(graph[pair[0]], pair[1])
            turned.setdefault(user, {})[edge] = pairs[pair]
    for user, edges in turned.items():
        draft.put(_turn(draft[user], edges))


def with_unrounded(prepared: Prepared, graph: Graph) -> Graph:
    """The graph in which some uses read the values that others read quantized."""
    draft, turned = Draft(graph), dict[str, dict[Edge, str]]()
    for edge, value in values_of(prepared.unrounded, prepared.graph).items():
        turned.setdefault(edge.user, {})[edge] = value
    for user, edges in turned.items():
        draft.put(_turn(graph[user], edges))
    return draft.commit()


def _turn(node: Node, edges: Mapping[Edge, str]) -> Node:
    """The node with some of its uses redirected."""
    args = tuple((name, _turn_arg(value, node.id, name, edges)) for name, value in node.args)
    post = tuple(
        PostOp(
            p.kind,
            tuple((name, _turn_arg(value, node.id, f"post.{i}.{name}", edges)) for name, value in p.args),
            p.origin,
        )
        for i, p in enumerate(node.post)
    )
    return Node(node.id, node.kind, args, post, node.origin, node.fact, node.aliased)


def _turn_arg(arg: Arg, user: str, slot: str, edges: Mapping[Edge, str]) -> Arg:
    count = -1

    def leaf(value: Arg) -> Arg:
        nonlocal count
        if not isinstance(value, Ref):
            return value
        count += 1
        return Ref(edges.get(Edge(user, slot, count), value.id))

    return map_arg(arg, leaf)
