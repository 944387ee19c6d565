"""Reading the weights of layers that are to be equalized."""

from __future__ import annotations

from pyrsistent import PMap, pmap

from qfunc.edge.evaluate import Evaluator
from qfunc.numerics.equalization import column_range
from qfunc.numerics.statistic import RangeState
from qfunc.passes.equalize import grouped_weight
from qfunc.passes.stages import Prepared


def weight_columns(prepared: Prepared) -> PMap[str, RangeState]:
    """The range of the weights of each layer to be equalized, by input channel, of layers by the ids of their nodes."""
    graph, found = prepared.graph, dict[str, RangeState]()
    for id in dict.fromkeys(edge.user for e in prepared.equalizations.values() for edge in e.edges):
        weight, groups = grouped_weight(graph[id])
        # One evaluator for each: what is computed of one weight is no more needed for the next.
        found[id] = column_range(Evaluator(graph.sources).tensor(weight), groups)
    return pmap(found)
