"""What may be fused where: the patterns of a backend, and within a standalone module those of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from qfunc.backends.cpu import CONVOLUTIONS
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.config.custom_fusion import CustomFusion
from qfunc.ir import Graph, Node
from qfunc.match import Pattern
from qfunc.passes.regions import Regions

DROPPED = ("dropout", "identity")


@dataclass(frozen=True, slots=True)
class Rules:
    """What one backend fuses: with fusers of the user's, with patterns by the kind of their first step, and all names.

    Of the patterns for one kind the longest comes first.
    """

    backend: BackendConfig
    fusions: tuple[CustomFusion, ...]
    patterns: Mapping[str, tuple[Pattern, ...]]
    names: frozenset[str]


class FusionRules:
    """The rules for each node of a graph; `every` holds those of all backends concerned."""

    def __init__(self, graph: Graph, backend: BackendConfig, custom: CustomConfig, *, qat: bool = False) -> None:
        standalone = (*custom.standalone_names.values(), *custom.standalone_types.values())
        self._regions = Regions(graph, custom) if standalone else None
        backends = {id(given): given for given in (backend, *(s.backend for s in standalone)) if given is not None}
        # Two norms in a row train apart; and where a chain of them reaches across a border, the first may still fuse.
        once, both = qat, bool(standalone)
        self._rules = {key: _rules(given, custom, once=once, both=both) for key, given in backends.items()}
        self._outside = self._rules[id(backend)]
        self.every = tuple(self._rules.values())

    def of(self, node: Node) -> Rules:
        """The rules of the region that a node is in."""
        region = self._regions.of(node.origin.module) if self._regions is not None else None
        return self._outside if region is None or region.backend is None else self._rules[id(region.backend)]

    def border(self, nodes: tuple[Node, ...]) -> str:
        """The standalone module whose border parts some nodes, in words; empty where they are in one region."""
        if self._regions is None:
            return ""
        found = [self._regions.of(node.origin.module) for node in nodes]
        paths = dict.fromkeys(region.path for region in found if region is not None)
        if not paths or (len(paths) == 1 and None not in found):
            return ""
        return f"the border of the standalone module {max(paths, key=len)!r} is between"


def _rules(backend: BackendConfig, custom: CustomConfig, *, once: bool, both: bool) -> Rules:
    patterns = patterns_by_root(backend)
    if once:
        patterns = {kind: tuple(map(_once, each)) for kind, each in patterns.items()}
    elif both:
        patterns = {kind: _with_once(each) for kind, each in patterns.items()}
    return Rules(backend, custom_fusions(backend, custom), patterns, frozenset(pattern_names(backend, custom)))


def custom_fusions(backend: BackendConfig, custom: CustomConfig) -> tuple[CustomFusion, ...]:
    """The fusions with a fuser: those of the custom configuration, then those of the backend."""
    return (*custom.fusions, *(fusion for fusion in backend.fusions if isinstance(fusion, CustomFusion)))


def patterns_by_root(backend: BackendConfig) -> dict[str, tuple[Pattern, ...]]:
    """The patterns of qfunc's own fusion, by the kind of their first step, the longest first."""
    patterns = [pattern for pattern in backend.fusions if isinstance(pattern, Pattern)]
    by_root: dict[str, tuple[Pattern, ...]] = {}
    for pattern in sorted(patterns, key=lambda pattern: -len(pattern.steps)):
        for kind in pattern.steps[0].kinds:
            by_root[kind] = (*by_root.get(kind, ()), pattern)
    return by_root


def _once(pattern: Pattern) -> Pattern:
    return replace(pattern, steps=tuple(replace(step, repeats=False) for step in pattern.steps))


def _with_once(patterns: tuple[Pattern, ...]) -> tuple[Pattern, ...]:
    variants = ((pattern, _once(pattern)) for pattern in patterns)
    return tuple(p for pair in variants for p in dict.fromkeys(pair))


def pattern_names(backend: BackendConfig, custom: CustomConfig) -> tuple[str, ...]:
    """The names of all patterns that may apply with one backend."""
    names = [fusion.name for fusion in (*custom.fusions, *backend.fusions)]
    if backend.drop_identities:
        names += DROPPED
    if backend.move_norms:
        pools = [f"{kind}{rank}d" for kind in ("avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3)]
        names += [f"batch_norm + {kind}" for kind in (*CONVOLUTIONS, "linear")]
        names += [f"{kind} + batch_norm" for kind in (*pools, "mean")]
    return tuple(dict.fromkeys(names))
