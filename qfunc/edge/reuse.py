"""`reuse`: statistics that were measured for one configuration, for another one of the same graph."""

from __future__ import annotations

from returns.result import Failure, Success

from qfunc.edge.columns import weight_columns
from qfunc.edge.content import statistics_of
from qfunc.edge.run import doubts
from qfunc.errors import Problem, Unobserved, WrongStage, several
from qfunc.passes.channels import wrong_channels
from qfunc.passes.custom_modules import kept_in_modules
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import Answers, Statistics, differences
from qfunc.result import R


def reuse(prepared: Prepared, statistics: Statistics) -> R[Calibrated]:
    """The prepared graph with statistics of the same graph, whatever configuration they were measured for.

    A site is served by what was measured of its values with an observer of the same statistic, or with one that tells
    as much: histograms have the range, and serve every search over them. Values that were measured on less data than
    others are told in the `warnings`.

    Returns:
        The calibrated stage; `Unobserved` for each value of which the statistics do not tell enough; `BadConfig` for
        statistics of another graph or of other weights, which are read to tell, and for custom modules, which keep what
        they observe in themselves; `WrongStage`.

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
    problems: list[Problem] = [
        *differences(statistics_of(prepared), statistics),
        *wrong_channels(prepared, statistics),
    ]
    if problems:
        return Failure(several(problems))
    answers, graph = Answers(statistics), prepared.graph
    problems += [
        Unobserved(
            graph[fold.taps[0]].place,
            f"the statistics do not tell what {type(fold.observer).__name__} needs",
            "measure it as well: calibrate(prepared, batches)",
        )
        for fold in answers.missing(prepared.folds)
    ]
    problems += kept_in_modules(prepared, "calibrate this stage: calibrate(prepared, batches)")
    if problems:
        return Failure(several(problems))
    warnings = tuple(doubts(prepared, statistics))
    return Success(Calibrated(prepared, statistics, warnings=warnings, columns=weight_columns(prepared)))
