"""`reuse`: statistics that were measured for one configuration, for another one of the same graph."""

from __future__ import annotations

from returns.result import Failure, Success

from qfunc.errors import BadConfig, Problem, Unobserved, WrongStage, several
from qfunc.ir import structure_digest
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import Answers, Statistics
from qfunc.result import R


def reuse(prepared: Prepared, statistics: Statistics) -> R[Calibrated]:
    """The prepared graph with statistics of the same graph, whatever configuration they were measured for.

    A site is served by what was measured of its values with an observer of the same statistic, or with one that tells
    as much: histograms have the range, and serve every search over them.

    Returns:
        The calibrated stage; `Unobserved` for each value of which the statistics do not tell enough; `BadConfig` for
        statistics of another graph, and for custom modules, which keep what they observe in themselves; `WrongStage`.

    >>> import torch
    >>> from torch import nn
    >>> from qfunc import CPU, MeanSquaredError, MinMax, calibrate, convert, fuse, prepare, trace
    >>> graph = trace(nn.Sequential(nn.Linear(2, 2)).eval()).bind(fuse).unwrap()
    >>> measured = prepare(graph).bind(lambda stage: calibrate(stage, [torch.ones(1, 2)])).unwrap().statistics
    >>> head_float = CPU.qconfig_mapping.set_module_name("0", None)
    >>> prepare(graph, head_float).bind(lambda stage: reuse(stage, measured)).bind(convert).unwrap().backend
    'cpu'
    """
    kinds = ((prepared, Prepared), (statistics, Statistics))
    wrong = [WrongStage(type(given).__name__, kind.__name__) for given, kind in kinds if not isinstance(given, kind)]
    if wrong:
        return Failure(several(wrong))
    if statistics.graph != structure_digest(prepared.graph):
        remedy = "fuse the same model in the same way, or calibrate this one: calibrate(prepared, batches)"
        return Failure(BadConfig("statistics", "they were measured on another graph", remedy))
    problems: list[Problem] = [
        Unobserved(
            prepared.graph[fold.taps[0]].place,
            f"the statistics do not tell what {type(fold.observer).__name__} needs of {', '.join(fold.taps)}",
            "calibrate(prepared, batches) once more, if need be with statistics= these",
        )
        for fold in Answers(statistics).missing(prepared.folds)
    ]
    for id in (id for id in prepared.graph.order if id in prepared.swapped):
        reason = "it is a custom module, which keeps what it observes in itself: no statistics hold that"
        problems.append(
            BadConfig(prepared.graph[id].place, reason, "calibrate this stage: calibrate(prepared, batches)")
        )
    return Failure(several(problems)) if problems else Success(Calibrated(prepared, statistics))
