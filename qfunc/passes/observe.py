"""The graph of a prepared stage with its observers written in, and the graph with them erased again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pyrsistent import pmap

from qfunc.ir import Draft, Graph, Node, Opaque, Origin, Ref, Token
from qfunc.passes.custom_modules import custom_node, to_observe
from qfunc.passes.evaluation import evaluating
from qfunc.passes.stages import Prepared


def with_observers(prepared: Prepared, modules: Mapping[str, Opaque] = pmap()) -> Graph:
    """The graph in which an `observe` node follows every observed value; it hands its input on unchanged.

    A call of a custom module becomes one of the module that observes; `modules` are those calibrated already.
    What one fold is of carries one module path, so that it is one module. What is prepared for training is observed as
    it is in evaluation.
    """
    graph = prepared.graph
    draft = Draft(graph)
    objects = graph.objects
    for index, fold in enumerate(prepared.folds):
        path = f"activation_post_process_{index}"
        token = Token(f"observer:{path}")
        objects = objects.set(token.id, Opaque(fold))
        for tap in fold.taps:
            id = draft.fresh(f"{tap}_observed")
            args = (("inputs", (Ref(tap),)), ("fold", token))
            draft.insert_after(tap, Node(id, "observe", args, origin=Origin(path)))
    for id in prepared.swapped:
        draft.put(custom_node(draft[id]))
    made = replace(draft.commit(), objects=objects.update(to_observe(prepared, modules)))
    return made if prepared.folding is None else evaluating(made)


def erase_observers(graph: Graph) -> Graph:
    """The graph without `observe` nodes: the inverse of `with_observers`, but for its side table."""
    draft = Draft(graph)
    draft.erase(node.id for node in graph if node.kind == "observe")
    return draft.commit()
