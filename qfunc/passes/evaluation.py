"""What was traced to be trained as it is in evaluation: batch norms in the weights before them, nothing that drops."""

from __future__ import annotations

from dataclasses import replace

from qfunc.ir import Draft, Graph, Node, PostOp
from qfunc.ir.node import NamedArgs
from qfunc.passes.fold import norms_behind, with_norms_folded


def folded(graph: Graph) -> Graph:
    """The graph whose layers have the batch norms behind them in their weights and biases; the ids are the same."""
    draft = Draft(graph)
    for node in graph:
        draft.put(with_norms_folded(node))
    return draft.commit()


def without_folded(graph: Graph) -> Graph:
    """The graph less the batch norms behind layers, whose weights have them already."""
    draft = Draft(graph)
    for node in graph:
        norms = norms_behind(node)
        if norms:
            draft.put(replace(node, post=node.post[len(norms) :]))
    return draft.commit()


def evaluating(graph: Graph) -> Graph:
    """The graph in evaluation mode, in which nothing drops."""
    draft = Draft(graph)
    for node in graph:
        post = tuple(PostOp(p.kind, _evaluating(p), p.origin) for p in node.post)
        changed = replace(node, args=_evaluating(node), post=post)
        if _hands_on(changed):
            draft.redirect(node.id, next(node.uses()))
            draft.erase([node.id])
        elif changed != node:
            draft.put(changed)
    modules = {path: replace(fact, training=False) for path, fact in graph.modules.items() if fact.training}
    return replace(draft.commit(), training=False, modules=graph.modules.update(modules))


def _evaluating(part: Node | PostOp) -> NamedArgs:
    follows = {"training"}
    if part.kind in ("batch_norm", "instance_norm") and part.get("running_mean") is None:
        follows = set()  # without statistics of its own it takes those of its input in evaluation as well
    elif part.origin.written is not None and part.origin.written.op == "call_module":
        follows.add("use_input_stats")
    return tuple((name, False if name in follows and value is True else value) for name, value in part.args)


def _hands_on(node: Node) -> bool:
    """Whether a dropout hands its input on."""
    return node.kind == "dropout" and not (node.aliased or node.post) and node.get("training") is False
