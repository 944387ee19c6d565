"""What one run of fusion may do, has done, and has left, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from qfunc.config.custom_config import CustomConfig
from qfunc.errors import Problem
from qfunc.ir import Node
from qfunc.match import NoMatch
from qfunc.passes.fusion_rules import FusionRules

SWITCHED_OFF = "the custom configuration leaves it unfused here"


@dataclass(frozen=True, slots=True)
class Fused:
    """A chain that became one node: its pattern's name and its nodes, in order, as they were.

    `own` says that a fuser of the user's makes of it what it likes.
    """

    node: Node
    pattern: str
    parts: tuple[Node, ...]
    own: bool = False


class FusionLog:
    """The log of one run, and the user's switches.

    `fused` is by the id of the node that a chain became, `missed` by that of the node that starts a pattern, and
    `missed_own` by that of one that starts a pattern of the user's, whose name it holds. `problems`
    are faults of the user's functions, `unfit` the parts that cannot be trained together as they stand.
    """

    def __init__(self, custom: CustomConfig, rules: FusionRules) -> None:
        self.fused: dict[str, Fused] = {}
        self.missed: dict[str, NoMatch] = {}
        self.missed_own: dict[str, tuple[str, NoMatch]] = {}
        self.problems: list[Problem] = []
        self.unfit: list[Problem] = []
        self._rules, self._switched_off = rules, frozenset(custom.unfused_patterns)
        self._unfused = custom.unfused_names

    def allows(self, pattern: str, nodes: tuple[Node, ...]) -> bool:
        """Whether there is such a pattern, and the user lets it be applied to these nodes."""
        return not self.hindrance(pattern, nodes)

    def hindrance(self, pattern: str, nodes: tuple[Node, ...]) -> str:
        """Why a pattern is not to be applied to these nodes; empty where it is."""
        border = self._rules.border(nodes)
        if border:
            return border
        known = pattern in self._rules.of(nodes[0]).names and pattern not in self._switched_off
        off = not known or any(_within(node.origin.module, name) for name in self._unfused for node in nodes)
        return SWITCHED_OFF if off else ""

    def fuse(self, node: Node, pattern: str, parts: tuple[Node, ...], *, own: bool = False) -> None:
        """Note that `parts` became `node`; where it was a chain already, what comes before joins that."""
        earlier = self.fused.pop(node.id, None) if node.id == parts[-1].id else None
        if earlier is not None:
            parts = (*parts[:-1], *earlier.parts)
            pattern = " + ".join(part.kind for part in parts)
        self.fused[node.id] = Fused(node, pattern, parts, own)
        for part in parts:
            self.missed.pop(part.id, None)
            self.missed_own.pop(part.id, None)

    def miss(self, node: str, miss: NoMatch) -> None:
        """Note why an operator that starts a pattern is left alone; of two reasons, that of the closer miss stays."""
        if node not in self.missed or self.missed[node].depth <= miss.depth:
            self.missed[node] = miss

    def miss_own(self, node: str, pattern: str, miss: NoMatch) -> None:
        """Note why a pattern of the user's does not match where its first operator does."""
        if miss.depth and (node not in self.missed_own or self.missed_own[node][1].depth < miss.depth):
            self.missed_own[node] = (pattern, miss)


def _within(path: str, name: str) -> bool:
    return path == name or path.startswith(f"{name}.") or name == ""
