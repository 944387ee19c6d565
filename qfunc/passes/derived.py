"""Qparams that functions of the user's make of those of other points: what they rest on, and what they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pyrsistent import pmap

from qfunc.config.annotation import Derived, ParameterSpec
from qfunc.config.point import Edge, Point, used
from qfunc.errors import BadConfig, Problem, UserFunctionFailed
from qfunc.ir import Expression
from qfunc.numerics.derive import derived_qparams
from qfunc.numerics.grid import Grid
from qfunc.numerics.observers import Observer
from qfunc.numerics.qparams import QParams
from qfunc.numerics.unmeasured import told
from qfunc.params import DeriveQParams, QParamsSource, QuantizeWeight
from qfunc.passes.stages import Owner, Prepared, SiteObserver, measures


def owner(prepared: Prepared, point: Point) -> Owner | None:
    """What a point has its qparams from; None where it is not quantized."""
    if isinstance(point, Edge) and point.slot == "weight" and point.user in prepared.weights:
        return "weight", point.user
    if isinstance(point, Edge):
        value = used(prepared.graph[point.user], point) if point.user in prepared.graph.nodes else None
        site = prepared.inputs.get(point) or (prepared.outputs.get(value) if value is not None else None)
    else:
        site = prepared.outputs.get(point)
    return None if site is None else ("site", site)


def _spec(prepared: Prepared, of: Owner) -> SiteObserver | ParameterSpec:
    kind, name = of
    if kind == "site":
        return prepared.sites[name].observer
    return (prepared.weights if kind == "weight" else prepared.biases)[name]


def place(prepared: Prepared, of: Owner) -> str:
    """Where a user finds what has qparams."""
    kind, name = of
    return prepared.graph[prepared.sites[name].taps[0] if kind == "site" else name].place


def _owners(prepared: Prepared) -> Iterator[Owner]:
    position = {id: index for index, id in enumerate(prepared.graph.order)}
    sites = sorted(prepared.sites, key=lambda id: position[prepared.sites[id].taps[0]])
    yield from (("site", id) for id in sites)
    for kind, table in (("weight", prepared.weights), ("bias", prepared.biases)):
        yield from ((kind, id) for id in sorted(table, key=position.__getitem__))


def wrong_derived(prepared: Prepared) -> Iterator[Problem]:
    """Points that derive from what has no qparams, and those that derive from themselves."""
    rests: dict[Owner, list[Owner]] = {}
    for of in _owners(prepared):
        spec = _spec(prepared, of)
        if not isinstance(spec, Derived):
            continue
        for point in spec.of:
            other = owner(prepared, point)
            if other is None:
                reason = f"it derives its qparams from {point}, which is not quantized"
                yield BadConfig(place(prepared, of), reason, "annotate that as well")
            elif not (measures(_spec(prepared, other)) or isinstance(_spec(prepared, other), Derived)):
                reason = f"it derives its qparams from {point}, which has none: it is {told(_spec(prepared, other))}"
                yield BadConfig(place(prepared, of), reason, "derive them from what an observer measures")
            else:
                rests.setdefault(of, []).append(other)
    for of in (of for of in rests if _reaches(rests, of)):
        remedy = "have an observer measure one of the points"
        yield BadConfig(place(prepared, of), "it derives its qparams from itself", remedy)


def _reaches(rests: Mapping[Owner, list[Owner]], start: Owner) -> bool:
    """Whether something rests on itself, through whatever others."""
    seen: set[Owner] = set()
    todo = list(rests[start])
    while todo:
        of = todo.pop()
        if of == start:
            return True
        if of not in seen:
            seen.add(of)
            todo += rests.get(of, ())
    return False


class Derivations:
    """The qparams of all that has some: known, or expressions where they rest on a weight's; without cycles.

    `measured` are those of the sites that observers have finished, `settled` those that training has, of whatever has
    some. `problems` are the functions that fail.
    """

    def __init__(
        self,
        prepared: Prepared,
        measured: Mapping[str, QParams],
        weights: Mapping[str, Mapping[str, Expression]],
        settled: Mapping[Owner, Grid] = pmap(),
    ) -> None:
        self.problems: list[Problem] = []
        self.settled = settled
        self._prepared = prepared
        self._measured = measured
        self._weights = weights
        self._known: dict[Owner, QParamsSource | None] = {}

    def of(self, kind: str, name: str) -> QParamsSource | None:
        """The qparams of a site, weight or bias; None where a problem is told."""
        key = kind, name
        if key not in self._known:
            self._known[key] = self._make(key)
        return self._known[key]

    def _make(self, key: Owner) -> QParamsSource | None:
        kind, name = key
        spec = _spec(self._prepared, key)
        if key in self.settled:
            return self.settled[key]
        if isinstance(spec, Derived):
            return self._derive(key, spec)
        if kind == "site":
            return Grid.of(self._measured[name]) if name in self._measured else None
        assert measures(spec), spec
        return self._weight(name, spec)

    def _weight(self, name: str, observer: Observer[Any]) -> QParamsSource | None:
        weights = self._weights.get(name, {})
        if len(weights) == 1:
            return QuantizeWeight(next(iter(weights.values())), observer)
        if weights:
            reason = f"its weights are {len(weights)}, of which each has qparams of its own"
            self.problems.append(BadConfig(self._prepared.graph[name].place, reason, "derive nothing from them"))
        return None

    def _derive(self, key: Owner, spec: Derived) -> QParamsSource | None:
        sources: list[QParamsSource | None] = []
        for point in spec.of:
            other = owner(self._prepared, point)
            assert other is not None, point
            sources.append(self.of(*other))
        known = tuple(source for source in sources if source is not None)
        if len(known) < len(sources):
            return None
        at = place(self._prepared, key)
        if not all(isinstance(source, Grid) for source in known):
            return DeriveQParams(known, spec.function, spec.spec, at)
        made = derived_qparams(spec.function, tuple(s.qparams() for s in known if isinstance(s, Grid)), spec.spec)
        if isinstance(made, str):
            self.problems.append(UserFunctionFailed(at, made))
            return None
        return Grid.of(made)
