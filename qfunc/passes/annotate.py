"""`annotate`: what a configuration and a backend quantize in a graph, use by use and value by value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from returns.result import Failure, Success

from qfunc.backends.cpu import CPU
from qfunc.config.annotation import Annotations, combine
from qfunc.config.arguments import wrong_arguments
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.resolve import Entry, Lookup, places_of, problems_of
from qfunc.errors import BadConfig, Problem, WrongStage, several
from qfunc.ir import Graph, Note
from qfunc.passes.borders import quantized_outputs, with_borders
from qfunc.passes.custom_modules import custom_calls, with_custom_modules
from qfunc.passes.regions import Region, region_notes, region_problems, regions
from qfunc.passes.rules import Rules, Surroundings, with_places, with_reused
from qfunc.passes.unmatched import has_kept_places, unmatched, without_effect
from qfunc.result import R, unwrap

NOTHING = CustomConfig()


def annotate(
    graph: Graph,
    qconfig_mapping: QConfigMapping | None = None,
    *,
    backend: BackendConfig = CPU,
    custom: CustomConfig = NOTHING,
) -> R[Annotations]:
    """What is quantized in a graph by the rules of `backend` and the configuration.

    The operands of a quantized operator are, and its result, unless it shares its input's qparams. A value whose memory
    is changed in place, or that is not floating point, never is. Where the dtypes of a configuration do not suit an
    operator, that stays float. Each standalone module is annotated for itself, by its own configuration and backend: a
    value that crosses its border is written quantized or float by the one side, and quantized for its use by the other.

    Args:
        graph: a traced, usually fused graph.
        qconfig_mapping: what to quantize, and how; by default the backend's own.
        backend: what can be quantized.
        custom: exceptions for the model: its standalone and custom modules, and what of it is to be codes.

    Returns:
        The annotations, with a note for each entry of the configuration that matches or changes nothing; or all of:
        `UnknownName` for a module or node that does not exist or an unknown dtype, `BadConfig` for impossible
        observers, for fused operators with different configurations and for outputs that cannot be codes,
        `UnsupportedDType` for an entry whose dtypes suit no operator that it names, `UserFunctionFailed` for a selector
        that raises.
    """
    if not isinstance(graph, Graph):
        return Failure(WrongStage(type(graph).__name__, "Graph"))
    asked = QConfigMapping() if qconfig_mapping is None else qconfig_mapping
    problems = wrong_arguments(backend=backend, qconfig_mapping=asked, custom=custom)
    if problems:
        return Failure(several(problems))
    mapping = backend.qconfig_mapping if qconfig_mapping is None else qconfig_mapping
    found = regions(graph, custom)
    parts = _parts(graph, mapping, backend, found)
    problems = [*problems_of(mapping, graph.modules), *places_of(mapping, graph), *region_problems(graph, custom)]
    others = {id(part.mapping): part.mapping for part in parts if part.mapping is not mapping}
    problems += [problem for other in others.values() for problem in places_of(other, graph)] if not problems else ()
    problems += _misplaced(parts, graph) if found and not problems else ()
    if problems:
        return Failure(several(problems))
    rules = _rules(graph, parts, custom)
    fits: dict[int, set[tuple[Entry, bool]]] = {}
    for one in rules:
        fits.setdefault(id(one.mapping), set()).update(one.fits)
    for one in rules:
        problems += (*one.problems, *one.useless_entries(fits[id(one.mapping)]))
    ruled, wrong = _ruled(graph, rules, custom)
    notes = (*region_notes(graph, custom, found), *_notes(graph, rules, custom, mapping, asked))
    annotations, more = with_borders(graph, replace(ruled, notes=(*notes, *ruled.notes)), mapping, custom)
    problems += (*wrong, *more)
    return Failure(several(problems)) if problems else Success(annotations)


@dataclass(frozen=True, slots=True)
class _Part:
    """A region of the graph, or what is in none, and what holds there."""

    region: Region | None
    mapping: QConfigMapping
    backend: BackendConfig
    own: tuple[str, ...] | None = None
    """Its nodes, in graph order."""

    @property
    def base(self) -> str:
        return "" if self.region is None else self.region.base


def _parts(graph: Graph, mapping: QConfigMapping, backend: BackendConfig, found: dict[str, Region]) -> list[_Part]:
    """The part outside of all standalone modules, then the regions in the order of their first nodes."""
    if not found:
        return [_Part(None, mapping, backend)]
    inside: dict[str, list[str]] = {}
    held: dict[str, Region] = {}
    for id, region in found.items():
        inside.setdefault(region.path, []).append(id)
        held[region.path] = region
    outside = _Part(None, mapping, backend, tuple(id for id in graph.order if id not in found))
    return [
        outside,
        *(
            _Part(region, region.qconfig_mapping or mapping, region.backend or backend, tuple(inside[path]))
            for path, region in held.items()
        ),
    ]


def _rules(graph: Graph, parts: list[_Part], custom: CustomConfig) -> list[Rules]:
    """The decisions about each part; a mapping's selectors run once for all parts with its names of modules."""
    held: dict[tuple[int, str], list[str]] = {}
    for part in parts:
        held.setdefault((id(part.mapping), part.base), []).extend(part.own or ())
    position = {id: index for index, id in enumerate(graph.order)} if len(parts) > 1 else {}
    lookups: dict[tuple[int, str], Lookup] = {}
    for part in parts:
        key = (id(part.mapping), part.base)
        if key not in lookups:
            own = None if part.own is None else tuple(sorted(held[key], key=position.__getitem__))
            lookups[key] = Lookup.of(part.mapping, graph, own)
    surroundings = Surroundings.of(graph)
    claimed = frozenset(id for id, _ in custom_calls(graph, custom))
    demanded = frozenset(quantized_outputs(graph, custom).values())
    return [
        Rules(
            graph,
            lookups[id(part.mapping), part.base],
            part.backend,
            surroundings,
            base=part.base,
            own=part.own,
            demanded=demanded,
            claimed=claimed,
        )
        for part in parts
    ]


def _ruled(graph: Graph, rules: list[Rules], custom: CustomConfig) -> tuple[Annotations, list[Problem]]:
    """What rules make of a graph and its custom modules, and the problems of these."""
    given = [one.annotations() for one in rules]
    ruled = unwrap(combine(*given)) if len(given) > 1 else given[0]
    for mapping in {id(one.mapping): one.mapping for one in rules}.values():
        ruled = with_places(ruled, mapping)
    ruled, problems = with_custom_modules(graph, ruled, rules, custom)
    inputs = [node.id for node in graph if node.kind == "placeholder"]
    codes = {inputs[index] for index in custom.input_quantized_indexes if 0 <= index < len(inputs)}
    return with_reused(ruled, rules, graph.order, codes), problems


def _misplaced(parts: list[_Part], graph: Graph) -> Iterator[Problem]:
    """Nodes and uses that a mapping names where the mapping of another part of the graph holds."""
    held: dict[int, set[str]] = {}
    for part in parts:
        held.setdefault(id(part.mapping), set()).update(part.own or ())
    for mapping in {id(part.mapping): part.mapping for part in parts}.values():
        named = (*mapping.nodes, *mapping.outputs, *(edge.user for edge in mapping.edges))
        for node in dict.fromkeys(named):
            if node not in held[id(mapping)]:
                reason = (
                    "it is not in the part of the model that this configuration is for: a standalone module parts them"
                )
                yield BadConfig(graph[node].place, reason, "name it in the configuration of the part that it is in")


def _notes(
    graph: Graph, rules: list[Rules], custom: CustomConfig, mapping: QConfigMapping, asked: QConfigMapping
) -> Iterator[Note]:
    """Notes of entries that match or change nothing, once for each mapping; of standalone modules' own, with a path.

    And of the layers for which a configuration that is meant for many means another axis than it says.
    """
    turned = [id for one in rules for id in one.turned]
    if turned:
        more = f", and {len(turned) - 1} more" if turned[1:] else ""
        yield Note(turned[0], f"has scales along axis 1, its output channels, where the configuration says 0{more}")
    held: dict[int, list[Rules]] = {}
    for one in rules:
        held.setdefault(id(one.mapping), []).append(one)
    places = any(has_kept_places(one.mapping) for one in rules)
    bare = _ruled(graph, [one.without_places() for one in rules], custom)[0] if places else Annotations()
    for of_one in held.values():
        own = of_one[0].mapping
        if own is mapping:
            yield from (*unmatched(asked, of_one), *without_effect(asked, of_one, bare))
            continue
        paths = list(dict.fromkeys(repr(one.base) for one in of_one))
        more = f" and {len(paths) - 6} more" if len(paths) > 6 else ""
        where = f"standalone module{'s' if paths[1:] else ''} {', '.join(paths[:6])}{more}"
        for note in (*unmatched(own, of_one), *without_effect(own, of_one, bare)):
            yield Note(f"{where}: {note.node}", note.text)
