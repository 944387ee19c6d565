"""The reference form with `dequantize` moved behind what only moves elements, which so computes on codes.

`move(dequantize(codes))` is `dequantize(move(codes))`, bit for bit; and codes that are dequantized and quantized again
with the same qparams are the same codes. Where codes of one scale become codes of another, one node does both.
"""

from __future__ import annotations

from dataclasses import replace

from pyrsistent import pmap

from qfunc.config.kernel import Engine
from qfunc.ir import Graph, Node, Origin, Ref, fresh_id, users
from qfunc.ir.node import fact_in, substitute
from qfunc.numerics.grid import Affine
from qfunc.ops.shapes import PARTS
from qfunc.passes.numbers import asks_size


def affine_of(conversion: Node) -> Affine | None:
    """The qparams of the codes that a conversion makes or reads; None where they are no kernel's."""
    name = {"quantize": "output", "dequantize": "input"}.get(conversion.kind)
    value = None if name is None else conversion.get(name)
    return value if isinstance(value, Affine) else None


def moved_on_codes(graph: Graph, engine: Engine) -> tuple[Graph, dict[str, Affine]]:
    """The graph in which what moves elements computes on codes, and the qparams of the codes that each then gives.

    A chain of such operators is moved over only if it ends in a quantization: for what reads floats nothing is gained.
    What asks for a size asks the codes.
    """
    if not (engine.moves or engine.requantizes):
        return graph, {}
    walk = _Moves(graph, engine)
    return walk.run(), walk.coded


class _Moves:
    """One walk over a reference graph, in which each node is written anew or kept."""

    def __init__(self, graph: Graph, engine: Engine) -> None:
        self.coded: dict[str, Affine] = {}
        self._graph = graph
        self._moves = engine.moves
        self._requantizes = engine.requantizes
        self._users = users(graph)
        self._wanted = self._read_by_quantization()
        self._codes: dict[str, tuple[str, Affine]] = {}
        """Values that stand for codes: the id of the codes, and their qparams."""
        self._instead: dict[str, str] = {}
        """Values that others read under another id."""
        self._nodes: dict[str, Node] = {}

    def run(self) -> Graph:
        """The moved graph, or the very same one."""
        turn = substitute(self._instead)
        for node in self._graph:
            affine = affine_of(node)
            source = self._codes.get(next(node.uses(), ""))
            if source is not None and node.id in self._wanted and node.kind in self._moves:
                self._move(node.map(turn), *source)
            elif source is not None and asks_size(node):
                name = next(name for name, value in node.args if isinstance(value, Ref))
                self._nodes[node.id] = node.map(turn).with_args(**{name: Ref(source[0])})
            elif source is not None and node.kind == "quantize" and affine is not None:
                self._quantize(node, *source, affine)
            else:
                self._nodes[node.id] = node.map(turn) if self._instead else node
                if node.kind == "dequantize" and affine is not None:
                    self._codes[node.id] = next(self._nodes[node.id].uses()), affine
        if all(self._nodes.get(id) is node for id, node in self._graph.nodes.items()):
            return self._graph
        return replace(self._graph, nodes=pmap(self._nodes), order=tuple(self._nodes))

    def _read_by_quantization(self) -> set[str]:
        """What is quantized, at once or behind a chain of moves; of a tuple of parts, all parts."""
        wanted: set[str] = set()
        for id in reversed(self._graph.order):
            node = self._graph[id]
            if (node.kind == "quantize" and affine_of(node) is not None) or (id in wanted and node.kind in self._moves):
                wanted.add(next(node.uses()))
        for id in [id for id in wanted if self._graph[id].kind in PARTS]:
            parts = [self._graph[user] for user in self._users[id]]
            if all(part.kind == "getitem" and isinstance(part.get("index"), int) for part in parts):
                wanted.update(part.id for part in parts)
            else:
                wanted.discard(id)
        return wanted

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
