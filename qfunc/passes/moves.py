"""The reference form with `dequantize` moved behind what only moves elements, which so computes on codes.

`move(dequantize(codes))` is `dequantize(move(codes))`, bit for bit; and codes that are dequantized and quantized again
with the same qparams are the same codes. Where codes of one scale become codes of another, one node does both.
"""

from __future__ import annotations

from dataclasses import replace

from pyrsistent import pmap

from qfunc.config.kernel import Engine
from qfunc.ir import Draft, Graph, Node, Origin, Ref, fresh_id, users
from qfunc.ir.node import NamedArgs, fact_in, substitute
from qfunc.numerics.grid import Affine
from qfunc.ops.shapes import PARTS
from qfunc.passes.exceptions import gives_tensor
from qfunc.passes.numbers import asks_size


def affine_of(conversion: Node) -> Affine | None:
    """The qparams of the codes that a conversion makes or reads; None where they are no kernel's."""
    name = {"quantize": "output", "dequantize": "input"}.get(conversion.kind)
    value = None if name is None else conversion.get(name)
    return value if isinstance(value, Affine) else None


def moved_on_codes(graph: Graph, engine: Engine) -> tuple[Graph, dict[str, Affine]]:
    """The graph in which what moves elements computes on codes, and the qparams of the codes that each then gives.

    That is so where a chain of such operators ends in a quantization, or where nothing else reads the floats, so that
    fewer bytes are moved. What asks for a size asks the codes.
    """
    if not (engine.moves or engine.requantizes):
        return graph, {}
    walk = _Moves(_quantized_before(graph, engine), engine)
    return walk.run(), walk.coded


def _quantized_before(graph: Graph, engine: Engine) -> Graph:
    """The graph in which what is moved in float, only to be quantized, is quantized before as well.

    `quantize(move(x))` is `quantize(move(dequantize(quantize(x))))`, of which the move then computes on codes.
    """
    readers = users(graph)
    wanted: dict[str, Affine] = {}
    draft = Draft(graph)
    for id in reversed(graph.order):
        node = graph[id]
        affine = affine_of(node) if node.kind == "quantize" else wanted.get(id)
        source = next(node.uses(), "")
        if affine is None or source not in graph.nodes or len(readers[source]) != 1:
            continue
        if graph[source].kind in engine.moves and not _takes_part(graph[source], graph):
            wanted[source] = affine
        elif node.kind != "quantize" and graph[source].kind not in (*_BORDERS, "dequantize"):
            codes, floats = draft.fresh(f"{source}_q"), draft.fresh(f"{source}_dq")
            fact = graph[source].fact
            args: NamedArgs = (("inputs", (Ref(source),)), ("output", affine))
            back: NamedArgs = (("inputs", (Ref(codes),)), ("input", affine))
            draft.insert_before(
                id, Node(codes, "quantize", args, fact=fact_in(fact, affine.dtype), origin=Origin(codes))
            )
            draft.insert_before(id, Node(floats, "dequantize", back, fact=fact, origin=Origin(floats)))
            draft.put(node.with_args(input=Ref(floats)))
    return draft.commit()


def _takes_part(node: Node, graph: Graph) -> bool:
    """Whether it is about a tuple of parts, of which others may be read otherwise."""
    source = graph[next(node.uses())]
    return node.kind in PARTS or source.kind in PARTS or (node.kind == "getitem" and not gives_tensor(source, graph))


_ENLARGING = frozenset({"expand", "repeat", "repeat_interleave", "index_select"})
_BORDERS = ("placeholder", "get_attr")
"""What has no kernel that could give codes."""


class _Moves:
    """One walk over a reference graph, in which each node is written anew or kept."""

    def __init__(self, graph: Graph, engine: Engine) -> None:
        self.coded: dict[str, Affine] = {}
        self._graph = graph
        self._moves = engine.moves
        self._shrinking = engine.moves - _ENLARGING
        self._requantizes = engine.requantizes
        self._users = users(graph)
        self._wanted = self._read_by_quantization()
        self._codes: dict[str, tuple[str, Affine]] = {}
        """Values that stand for codes: the id of the codes, and their qparams."""
        self._quantized: dict[str, str] = {}
        """Floats that are quantized: the id of the codes."""
        self._instead: dict[str, str] = {}
        """Values that others read under another id."""
        self._nodes: dict[str, Node] = {}

    def run(self) -> Graph:
        """The moved graph, or the very same one."""
        turn = substitute(self._instead)
        for node in self._graph:
            affine = affine_of(node)
            source = self._codes.get(next(node.uses(), ""))
            if source is not None and node.kind in self._moves and self._gains(node):
                self._move(node.map(turn), *source)
            elif asks_size(node) and (codes := self._asked(node)):
                name = next(name for name, value in node.args if isinstance(value, Ref))
                self._nodes[node.id] = node.map(turn).with_args(**{name: Ref(codes)})
            elif source is not None and node.kind == "quantize" and affine is not None:
                self._quantize(node, *source, affine)
            else:
                self._nodes[node.id] = node.map(turn) if self._instead else node
                if node.kind == "dequantize" and affine is not None:
                    self._codes[node.id] = next(self._nodes[node.id].uses()), affine
                elif node.kind == "quantize" and affine is not None:
                    self._quantized[next(node.uses())] = node.id
        if all(self._nodes.get(id) is node for id, node in self._graph.nodes.items()):
            return self._graph
        return replace(self._graph, nodes=pmap(self._nodes), order=tuple(self._nodes))

    def _asked(self, node: Node) -> str:
        """The codes that have the size of what a node asks; none where its value is in float alone."""
        value = next(node.uses(), "")
        return self._codes[value][0] if value in self._codes else self._quantized.get(value, "")

    def _read_by_quantization(self) -> set[str]:
        """What is quantized, at once or behind a chain of moves."""
        wanted: set[str] = set()
        for id in reversed(self._graph.order):
            node = self._graph[id]
            if (node.kind == "quantize" and affine_of(node) is not None) or (id in wanted and node.kind in self._moves):
                wanted.add(next(node.uses()))
        return wanted

    def _gains(self, node: Node) -> bool:
        """Whether codes are to be moved: they are read as such, or nothing else reads the floats."""
        source = self._graph[next(node.uses())]
        if source.kind in PARTS:
            return True  # the parts of codes are codes
        if node.kind in PARTS:
            parts = [self._graph[user] for user in self._users[node.id]]
            if not all(part.kind == "getitem" and isinstance(part.get("index"), int) for part in parts):
                return False
            if any(part.id in self._wanted for part in parts):
                return True
        return node.id in self._wanted or all(
            self._graph[user].kind in self._shrinking for user in self._users[source.id]
        )

    def _move(self, node: Node, codes: str, affine: Affine) -> None:
        self._nodes[node.id] = replace(node.with_args(input=Ref(codes)), fact=fact_in(node.fact, affine.dtype))
        self.coded[node.id] = affine
        self._codes[node.id] = node.id, affine
        if node.kind not in PARTS:  # of a tuple of codes each part is moved in its turn
            floats = fresh_id(f"{node.id}_dq", self._graph.nodes)
            args = (("inputs", (Ref(node.id),)), ("input", affine))
            self._nodes[floats] = Node(floats, "dequantize", args, fact=node.fact, origin=Origin(floats))
            self._instead[node.id] = floats

    def _quantize(self, node: Node, codes: str, given: Affine, output: Affine) -> None:
        if given == output:
            self._instead[node.id] = codes
            return
        args = (("inputs", (Ref(codes),)), ("given", given), ("output", output))
        if self._requantizes:
            self._nodes[node.id] = replace(node, kind="requantize", args=args)
        else:
            self._nodes[node.id] = node.map(substitute(self._instead))
