"""The float parameters of layers whose weights become integers."""

from __future__ import annotations

from collections import Counter

from pyrsistent import PMap, pmap

from qfunc.config.annotation import Derived
from qfunc.config.weights import weights_of
from qfunc.ir import Expression, Node, fresh_id
from qfunc.passes.stages import Prepared, measures


def original_weights(prepared: Prepared) -> PMap[str, PMap[str, Expression]]:
    """The weights and biases of the layers whose weights are to be integers, by module path or the id of the node.

    The id of a second call of `fc` may be the path of another layer, `fc_1`: then the path is that layer's, and the
    call has a name that is neither a path nor an id.
    """
    graph = prepared.graph
    calls = Counter(path for node in graph if (path := _path(node)))
    taken = {*calls, *graph.nodes}
    found: dict[str, PMap[str, Expression]] = {}
    for node in (graph[id] for id in graph.order if id in prepared.weights):
        spec, path = prepared.weights[node.id], _path(node)
        if measures(spec) or isinstance(spec, Derived):
            bias = node.get("bias") if node.has("bias") else None
            parts = {**weights_of(graph, node), **({"bias": bias} if isinstance(bias, Expression) else {})}
            id = fresh_id(node.id, taken) if calls[node.id] == 1 else node.id
            found[path if calls[path] == 1 else id] = pmap(parts)
    return pmap(found)


def _path(node: Node) -> str:
    """The path of the module that a node calls; empty where it calls none."""
    written = node.origin.written
    return node.origin.module if written is not None and written.op == "call_module" else ""
