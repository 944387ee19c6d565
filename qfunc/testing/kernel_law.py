"""Law 12: every kernel of a lowered graph against the piece of the reference graph that it stands for.

The reference graph, in which what only moves elements computes on codes, is run once, and gives the integer codes of
every operand. Then all kernels are cut out of the lowered graph, and all pieces `dequantize -> operator -> quantize` of
the reference graph, and both are fed those codes: errors do not add up, so that one step is all that a kernel may be
off. The pieces use the kernels' own weight expressions, so that limiting weights, a rewrite that `lower` names, is no
error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from pyrsistent import pmap
from torch import Tensor

from qfunc.edge.kernels.quantized_contracts import as_quantized
from qfunc.engines import ENGINES
from qfunc.ir import DictArg, Graph, Node, Origin, Ref, Written, users
from qfunc.numerics.grid import Affine
from qfunc.params import DequantizeWeight, QuantizeWeight
from qfunc.passes.lower import Lowered
from qfunc.passes.moves import moved_on_codes
from qfunc.passes.stages import Converted
from qfunc.testing.walk import made, run

_RELATIVE = 1e-4  # of the largest value, for float32 results
# The reference form keeps states float, which these kernels round at each step: to 255 steps of their range.
_OF_STATES = {"recurrent_dynamic": 0.05}


def kernels_off(converted: Converted, lowered: Lowered, data: Iterable[tuple[Any, ...]]) -> Iterator[str]:
    """How kernels differ from their reference by more than a step, on what the model computes of each input."""
    reference, moved = moved_on_codes(converted.graph, ENGINES[lowered.engine])
    pairs = _Pairs(reference, lowered, moved)
    if not pairs.kernels:
        return
    shown, pieces, kernels = made(_showing(reference, pairs.shown())), made(pairs.pieces()), made(pairs.alone())
    for inputs in data:
        values = run(shown, inputs)
        expected = run(pieces, tuple(values[name] for name in pairs.piece_inputs))
        got = run(kernels, tuple(pairs.operand(name, values) for name in pairs.kernel_inputs))
        for id in pairs.kernels:
            items = zip(_tensors(got[id]), _tensors(expected[id]), strict=True)
            for one, other in items:
                yield _difference(lowered.graph[id], one, other, pairs.output(id))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a result: recurrent layers give states as well, and packed sequences hold sizes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _difference(node: Node, got: Tensor, expected: Tensor, output: Affine | None) -> str:
    name = f"{node.id} ({node.kind})"
    codes = got.int_repr() if got.is_quantized else got
    if codes.shape != expected.shape or codes.dtype != expected.dtype:
        what = f"{expected.dtype} {tuple(expected.shape)}"
        return f"{name} gives {codes.dtype} {tuple(codes.shape)} instead of {what}"
    if not codes.numel():
        return ""
    error = (codes.double() - expected.double()).abs().max().item()
    if output is None:
        largest = max(expected.double().abs().max().item(), 1e-30)
        bound = _OF_STATES.get(node.kind, _RELATIVE)
        return "" if error <= bound * largest else f"{name} is off by {error / largest:.2g} of the largest value"
    return "" if error <= 1 else f"{name} is off by {error:.0f} steps of {output}"


class _Pairs:
    """The kernels of a lowered graph and what each stands for in the reference graph."""

    def __init__(self, reference: Graph, lowered: Lowered, moved: Mapping[str, Affine]) -> None:
        self.reference, self.lowered, self._moved = reference, lowered, moved
        self._users = users(reference)
        kernels = [entry for entry in lowered.certificate.entries if entry.kernel and entry.node not in moved]
        self.kernels = tuple(entry.node for entry in kernels)
        self._outputs = {e.node: e.output != "float32" for e in kernels}
        self.kernel_inputs = tuple(dict.fromkeys(used for id in self.kernels for used in lowered.graph[id].uses()))
        dequantized = [used for id in self.kernels for used in reference[id].uses()]
        self.piece_inputs = tuple(dict.fromkeys(map(self._before, dequantized)))

    def _before(self, id: str) -> str:
        """The codes of a dequantized value of the reference graph; any other value itself."""
        node = self.reference[id]
        return next(node.uses()) if node.kind == "dequantize" else id

    def twin(self, id: str) -> str:
        """The value of the reference graph that a value of the lowered one stands for."""
        return self._users[id][0] if self._outputs.get(id) else id

    def output(self, id: str) -> Affine | None:
        """The qparams of a kernel's result; None for float32."""
        found = self.reference[self.twin(id)].get("output") if self._outputs[id] else None
        return found if isinstance(found, Affine) else None

    def shown(self) -> tuple[str, ...]:
        """All values of the reference graph that kernels or pieces are fed with."""
        return tuple(dict.fromkeys((*map(self.twin, self.kernel_inputs), *self.piece_inputs)))

    def operand(self, id: str, values: dict[str, Any]) -> Any:
        """A value of the lowered graph, as its engine's kernels take it."""
        source = self.reference[self.twin(id)]
        value = values[source.id]
        affine = source.get("output") if source.kind == "quantize" else self._moved.get(source.id)
        if isinstance(affine, Affine) and affine.dtype == "uint8" and ENGINES[self.lowered.engine].conversions:
            return as_quantized(value, affine)
        return value

    def alone(self) -> Graph:
        """The kernels alone, side by side, fed with `kernel_inputs`."""
        graph = self.lowered.graph
        given = {id: f"given_{index}" for index, id in enumerate(self.kernel_inputs)}
        nodes = [graph[id].map(_renamed(given)) for id in self.kernels]
        return _graph(graph, given, nodes, {id: id for id in self.kernels})

    def pieces(self) -> Graph:
        """The reference of each kernel alone, side by side, fed with `piece_inputs`."""
        given = {id: f"given_{index}" for index, id in enumerate(self.piece_inputs)}
        nodes: dict[str, Node] = {}
        for id in self.kernels:
            node = self._with_weights(self.reference[id])
            sources = [self.reference[used] for used in node.uses()]
            nodes |= {source.id: source.map(_renamed(given)) for source in sources if source.kind == "dequantize"}
            others = {source.id: given[source.id] for source in sources if source.kind != "dequantize"}
            nodes[id] = node.map(_renamed(others))
            if self._outputs[id]:
                nodes[self.twin(id)] = self.reference[self.twin(id)]
        return _graph(self.reference, given, list(nodes.values()), {id: self.twin(id) for id in self.kernels})

    def _with_weights(self, node: Node) -> Node:
        kernel = self.lowered.graph[node.id]
        weights = {name: value for name, value in kernel.args if isinstance(value, QuantizeWeight)}
        return node.with_args(**{name: DequantizeWeight(value) for name, value in weights.items()})


def _renamed(names: dict[str, str]) -> Any:
    return lambda leaf: Ref(names[leaf.id]) if isinstance(leaf, Ref) and leaf.id in names else leaf


def _showing(graph: Graph, ids: tuple[str, ...]) -> Graph:
    """The graph that returns some of its values, by id."""
    output = graph[graph.order[-1]]
    shown = output.with_args(value=DictArg(tuple((id, Ref(id)) for id in ids)))
    return replace(graph, nodes=graph.nodes.set(output.id, shown))


def _graph(like: Graph, given: dict[str, str], nodes: list[Node], shown: dict[str, str]) -> Graph:
    """A graph of these nodes behind the inputs `given`, which returns what `shown` names."""
    inputs = [Node(id, "placeholder", origin=Origin(written=Written("placeholder", id))) for id in given.values()]
    results = DictArg(tuple((name, Ref(id)) for name, id in shown.items()))
    output = Node("output", "output", (("value", results),), origin=Origin(written=Written("output", "output")))
    everything = (*inputs, *nodes, output)
    order = tuple(node.id for node in everything)
    return replace(like, nodes=pmap({node.id: node for node in everything}), order=order)
