"""What the statistics of a calibrated stage make of its observers: qparams, or why there are none."""

from __future__ import annotations

from qfunc.errors import Problem, Unobserved, UserFunctionFailed
from qfunc.ir import structure_digest
from qfunc.numerics.derive import plain, wrong_qparams
from qfunc.numerics.observers import finished, is_own
from qfunc.numerics.qparams import QParams
from qfunc.passes.channels import wrong_channels
from qfunc.passes.stages import Calibrated, Prepared, measures
from qfunc.passes.statistics import Answers, Measured


def finish(calibrated: Calibrated) -> tuple[dict[str, QParams], list[Problem]]:
    """The qparams of each site that is measured, and what is wrong where there are none."""
    prepared, statistics = calibrated.prepared, calibrated.statistics
    if prepared.sites and statistics.graph != structure_digest(prepared.graph):
        reason = "the statistics were measured on another graph"
        remedy = "calibrate this one: calibrate(prepared, batches)"
        return {}, [Unobserved(_place(prepared, id), reason, remedy) for id in _in_order(prepared)]
    answers = Answers(statistics)
    found: dict[str, QParams] = {}
    problems: list[Problem] = []
    for id in _in_order(prepared):
        observer = prepared.sites[id].observer
        if not measures(observer):
            continue
        if ("site", id) in calibrated.qparams:
            found[id] = calibrated.qparams["site", id].qparams()
            continue
        held = answers.find(prepared.sites[id].folds)
        if held is not None and not isinstance(held, Measured):
            problems.append(held)
            continue
        qparams = None if held is None else finished(observer, held.state)
        if qparams is None:
            problems.append(Unobserved(_place(prepared, id)))
            continue
        if is_own(observer) and isinstance(qparams, QParams):
            found[id] = qparams  # right by construction
            continue
        wrong = wrong_qparams(qparams, observer.spec) if isinstance(qparams, QParams) else qparams
        if isinstance(qparams, QParams) and not wrong:
            found[id] = plain(qparams)
        else:
            problems.append(UserFunctionFailed(_place(prepared, id), wrong))
    problems += wrong_channels(prepared, statistics)
    return found, problems


def _in_order(prepared: Prepared) -> list[str]:
    position = {id: index for index, id in enumerate(prepared.graph.order)}
    return sorted(prepared.sites, key=lambda id: position[prepared.sites[id].taps[0]])


def _place(prepared: Prepared, site: str) -> str:
    return prepared.graph[prepared.sites[site].taps[0]].place
