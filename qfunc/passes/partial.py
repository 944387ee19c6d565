"""A calibrated stage of which a second mapping keeps parts float."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pyrsistent import pmap
from returns.result import Failure, Success

from qfunc.config.arguments import wrong_arguments
from qfunc.config.qconfig_mapping import QConfigMapping, selector_name, tables
from qfunc.errors import BadConfig, Problem, Unobserved, several
from qfunc.numerics.unmeasured import KeepFloat
from qfunc.passes.prepare import prepare
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.passes.statistics import Answers
from qfunc.result import R

_AGAIN = "prepare the graph with that mapping, and reuse the statistics: reuse(prepare(graph, mapping), statistics)"


def partly(calibrated: Calibrated, mapping: QConfigMapping) -> R[Calibrated]:
    """The stage as `mapping` would have prepared it, which may only keep float more than the first one did.

    Returns:
        The stage with the statistics of the first, or `BadConfig` for each entry that neither is that of the first
        mapping nor keeps float, for each that is missing, and for a stage that no mapping prepared; `Unobserved` for
        values that only the second stage quantizes, whatever `prepare` reports.
    """
    problems = wrong_arguments(qconfig_mapping=mapping)
    if problems:
        return Failure(several(problems))
    made = calibrated.prepared.configuration
    if made is None:
        reason = "the stage was prepared from annotations, or was pickled with a configuration that cannot be"
        return Failure(BadConfig("qconfig_mapping", reason, _AGAIN))
    problems += _changed(made.qconfig_mapping, mapping)
    if problems:
        return Failure(several(problems))
    if mapping == made.qconfig_mapping:
        return Success(calibrated)
    equalize = (lambda _: made.equalized) if made.equalized else None
    graph = calibrated.prepared.graph
    second = prepare(graph, mapping, backend=made.backend, custom=made.custom, equalize=equalize)
    return second.bind(lambda prepared: _observed(_with_second(calibrated, prepared)))


def _with_second(calibrated: Calibrated, second: Prepared) -> Calibrated:
    """The stage with another preparation of its graph; sites of the same values and observer have the same qparams."""
    first = calibrated.prepared
    named = {(site.taps, site.observer): id for id, site in first.sites.items()}
    old = {id: named.get((site.taps, site.observer)) for id, site in second.sites.items()}
    settled = {
        ("site", new): calibrated.qparams["site", id]
        for new, id in old.items()
        if id and ("site", id) in calibrated.qparams
    }
    others = {owner: grid for owner, grid in calibrated.qparams.items() if owner[0] != "site"}
    second = replace(second, folding=first.folding)
    return replace(calibrated, prepared=second, qparams=pmap({**others, **settled}))


def _observed(calibrated: Calibrated) -> R[Calibrated]:
    """The stage, if the statistics tell of all its sites."""
    prepared = calibrated.prepared
    missing = list(_missing(prepared, Answers(calibrated.statistics)))
    return Failure(several(missing)) if missing else Success(calibrated)


def _missing(prepared: Prepared, answers: Answers) -> Iterator[Problem]:
    reason = "this mapping quantizes it, the one that was calibrated did not"
    for fold in answers.missing(prepared.folds):
        remedy = "prepare the graph with this mapping, and calibrate that"
        yield Unobserved(prepared.graph[fold.taps[0]].place, reason, remedy)


def _changed(first: QConfigMapping, second: QConfigMapping) -> Iterator[Problem]:
    """The entries of a second mapping that are more than the first one's with some of them kept float."""
    remedy = "keep the entries of the mapping that was prepared, or set them, or new ones, to None"
    old, new = dict(_entries(first)), dict(_entries(second))
    for name in (name for name in old if name not in new):
        yield BadConfig(_named(name), "the mapping that was prepared has it, this one does not", remedy)
    for name, given in new.items():
        if not _keeps_float(given) and (name not in old or given != old[name]):
            told = "says something else" if name in old else "does not have it"
            yield BadConfig(_named(name), f"the mapping that was prepared {told}", remedy)
    both, mappings = old.keys() & new.keys(), (first, second)
    orders = [[text for text, _ in m.module_name_regexes if ("module_name_regexes", text) in both] for m in mappings]
    if orders[0] != orders[1]:
        reason = "they are in another order than in the mapping that was prepared, and the first that matches holds"
        yield BadConfig("module_name_regexes", reason, remedy)


def _entries(mapping: QConfigMapping) -> Iterator[tuple[tuple[str, Any], Any]]:
    yield ("global_qconfig", None), mapping.global_qconfig
    for name, table in tables(mapping):
        yield from (((name, key), table[key]) for key in sorted(table, key=repr))


def _keeps_float(given: object) -> bool:
    return given is None or isinstance(given, KeepFloat)


def _named(entry: tuple[str, Any]) -> str:
    field, key = entry
    if field == "global_qconfig":
        return field
    return f"{field}[{selector_name(key) if field == 'selections' else key!r}]"
