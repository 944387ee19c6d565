"""Custom modules: which calls of a graph are of modules that the user quantizes, and the nodes that stand for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from pyrsistent import pmap

from qfunc.config.annotation import Annotations, Spec
from qfunc.config.custom_config import CustomConfig, CustomModule, Swap
from qfunc.config.qconfig import QConfig
from qfunc.errors import BadConfig, Problem, Unobserved
from qfunc.ir import Graph, Node, Note, Opaque, Origin, Token
from qfunc.ir.node import NamedArgs
from qfunc.numerics.unmeasured import UNMEASURED
from qfunc.ops import type_name
from qfunc.passes.rules import Rules
from qfunc.passes.stages import Calibrated, Prepared

KIND = "custom_module"
_INSIDE = "its custom module quantizes inside itself"


@dataclass(frozen=True, slots=True, eq=False)
class ToObserve:
    """A module to be made when the graph is materialized: what `swap` makes of the source's module at `path`."""

    swap: Swap
    path: str


@dataclass(frozen=True, slots=True, eq=False)
class ToQuantize:
    """A module to be made when the graph is materialized: what `swap` makes of the calibrated one."""

    swap: Swap
    path: str
    observed: Opaque


def with_custom_modules(
    graph: Graph, annotations: Annotations, rules: Iterable[Rules], custom: CustomConfig
) -> tuple[Annotations, list[Problem]]:
    """The annotations with the calls of custom modules that are quantized, and the problems.

    A result that is one tensor is quantized like that of any operator; what such a module is called with is for the
    module itself to quantize.
    """
    if not custom.custom_modules:
        return annotations, []
    calls = dict(custom_calls(graph, custom))
    swapped: dict[str, Swap] = {}
    outputs: dict[str, Spec] = {}
    floats, refused = annotations.floats, frozenset(annotations.refused.difference(calls))
    for rule in rules:
        for id in (id for id in rule.resolution.chosen if id in calls):
            qconfig = rule.resolution.chosen[id].qconfig
            if qconfig is None:
                floats = floats.set(id, "the configuration keeps it float")
                continue
            hindrance = _hindrance(graph, graph[id], qconfig)
            if hindrance:
                floats, refused = floats.set(id, hindrance), refused | {id}
                continue
            swapped[id] = Swap(calls[id], qconfig)
            floats = floats.set(id, _INSIDE)
            whole = calls[id].tensor_output and not isinstance(graph[id].fact, tuple) and not graph[id].aliased
            unmeasured = isinstance(qconfig.of_output, UNMEASURED)
            if whole and not unmeasured and rule.reads_quantized(id) and id not in rule.mapping.outputs:
                outputs[id] = qconfig.of_output  # type: ignore[assignment]
    found = replace(
        annotations,
        outputs=annotations.outputs.update(pmap(outputs)),
        floats=floats,
        refused=refused,
        notes=(*annotations.notes, *_unused(custom, calls.values())),
        swapped=pmap(swapped),
    )
    return found, list(_contradictions(graph, swapped))


def _hindrance(graph: Graph, node: Node, qconfig: QConfig) -> str:
    """Why a custom module cannot be quantized as configured; empty where it can."""
    fact = graph.modules.get(node.origin.module)
    if fact is not None and fact.own:
        return f"its module {fact.own}, which a custom module would not"
    return "custom modules are quantized statically" if qconfig.is_dynamic else ""


def custom_calls(graph: Graph, custom: CustomConfig) -> Iterator[tuple[str, CustomModule]]:
    """The calls of modules of exactly the types of custom modules, as leaves."""
    by_type = {type_name(module.float_type): module for module in custom.custom_modules}
    for node in graph:
        written = node.origin.written
        if written is not None and written.op == "call_module" and node.kind == node.origin.type in by_type:
            yield node.id, by_type[node.kind]


def _unused(custom: CustomConfig, called: Iterable[CustomModule]) -> Iterator[Note]:
    used = {module.float_type for module in called}
    for module in custom.custom_modules:
        if module.float_type not in used:
            place = f"custom_modules[{type_name(module.float_type)}]"
            yield Note(place, "matches no call of a module in the graph: trace the model with them, too")


def _contradictions(graph: Graph, swapped: Mapping[str, Swap]) -> Iterator[Problem]:
    """Modules that are called at several sites, with different configurations: there is one module for all."""
    first: dict[str, Swap] = {}
    for id in (id for id in graph.order if id in swapped):
        place = graph[id].place
        if first.setdefault(place, swapped[id]) != swapped[id]:
            reason = "it is a custom module and is called with different configurations"
            yield BadConfig(place, reason, "configure all its calls alike")


# Nodes ----------------------------------------------------------------------------------------------------------------


def custom_node(node: Node) -> Node:
    """The call of what the user makes of a module, in place of the call of that module."""
    written = node.origin.written
    assert written is not None
    keywords = tuple((keyword, node.get(name)) for keyword, name in written.kwargs)
    args: NamedArgs = (
        ("module", _token(written.target)),
        ("inputs", tuple(node.get(name) for name in written.args)),
        ("keywords", keywords),
    )
    origin = Origin(written.target, node.origin.type, line=node.origin.line)
    return Node(node.id, KIND, args, origin=origin, fact=node.fact)


def _token(path: str) -> Token:
    return Token(f"custom:{path}")


def to_observe(prepared: Prepared, modules: Mapping[str, Opaque]) -> dict[str, Opaque]:
    """What stands behind the nodes of a prepared graph: modules to be made, or calibrated already."""
    paths = {prepared.graph[id].place: swap for id, swap in prepared.swapped.items()}
    return {
        _token(path).id: modules[path] if path in modules else Opaque(ToObserve(swap, path))
        for path, swap in paths.items()
    }


def to_quantize(calibrated: Calibrated) -> dict[str, Opaque]:
    """What stands behind the nodes of a converted graph."""
    prepared, modules = calibrated.prepared, calibrated.modules
    paths = {prepared.graph[id].place: swap for id, swap in prepared.swapped.items()}
    return {_token(path).id: Opaque(ToQuantize(swap, path, modules[path])) for path, swap in paths.items()}


def uncalibrated(calibrated: Calibrated) -> Iterator[Problem]:
    """Custom modules that no data was run through."""
    prepared = calibrated.prepared
    for path in dict.fromkeys(prepared.graph[id].place for id in prepared.graph.order if id in prepared.swapped):
        if path not in calibrated.modules:
            reason = "this custom module was not calibrated: statistics do not hold what it observes"
            yield Unobserved(path, reason, "calibrate this stage itself: calibrate(prepared, batches)")


def kept_in_modules(prepared: Prepared, remedy: str) -> Iterator[Problem]:
    """The custom modules, where statistics are to be all that is measured: they observe in themselves."""
    for id in (id for id in prepared.graph.order if id in prepared.swapped):
        reason = "it is a custom module, which keeps what it observes in itself: no statistics hold that"
        yield BadConfig(prepared.graph[id].place, reason, remedy)
