"""A converted model beside the one that was trained, operator by operator, each on the values of the trained one.

Rounding makes of a float's last bit a whole step now and then, and the operators behind it carry that on. Given the
same inputs, an operator of the converted model gives what it gave in training but for the bits of folding a batch norm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qfunc.config.annotation import Derived
from qfunc.config.weights import RECURRENT
from qfunc.edge.evaluate import Evaluator
from qfunc.edge.materialize import Emitted, emitted
from qfunc.ir import Expression, Graph, Node, Ref, Token
from qfunc.numerics.grid import Grid, literals
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.params import CastWeight, DequantizeWeight, FakeQuantizeWeight, QuantizeWeight
from qfunc.passes.stages import Calibrated, Converted
from qfunc.passes.training import Rounding, Start, with_fake_quantization
from qfunc.result import unwrap

_NEAR = 1e-5
_NEAR_SUMS = 4e-6
"""Of the sum of the magnitudes that a layer adds up."""
_HALF = 2e-4
"""How near to the middle between two codes the bits of folding may turn a weight to the other one."""


def differences(calibrated: Calibrated, converted: Converted, inputs: tuple[Any, ...]) -> Iterator[str]:
    """Which operators of the converted model give something else than those of the one that was trained, and how."""
    graph = with_fake_quantization(calibrated)
    trained, quantized = unwrap(emitted(graph, trains=True)), unwrap(emitted(converted.graph))
    recorded = _Recorded(trained)
    with torch.no_grad():
        recorded.run(*inputs)
    forced = _Forced(quantized, _Comparison(calibrated, graph, converted.graph, recorded.values))
    with torch.no_grad():
        forced.run(*inputs)
    yield from forced.wrong


class _Recorded(fx.Interpreter):
    """Keeps what each operator gives."""

    def __init__(self, made: Emitted) -> None:
        super().__init__(made.module.eval())
        self.values: dict[str, Any] = {}
        self._ids = {node: id for id, node in made.values.items()}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._ids:
            self.values[self._ids[n]] = value
        return value


class _Forced(fx.Interpreter):
    """Compares what each operator gives, and goes on with what it gave in training."""

    def __init__(self, made: Emitted, comparison: _Comparison) -> None:
        super().__init__(made.module.eval())
        self.wrong: list[str] = []
        self._ids = {node: id for id, node in made.values.items()}
        self._comparison = comparison

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        id = self._ids.get(n)
        known = None if id is None else self._comparison.known(id)
        if id is None or known is None:
            return value
        reason = self._comparison.wrong(id, known, value) if self._comparison.compares(id) else ""
        if reason:
            self.wrong.append(reason)
        return known


class _Comparison:
    """What is known of the values of a converted graph from those of the graph that was trained."""

    def __init__(self, calibrated: Calibrated, trained: Graph, converted: Graph, values: dict[str, Any]) -> None:
        self._prepared, self._trained, self._converted, self._values = (
            calibrated.prepared,
            trained,
            converted,
            values,
        )
        self._calibrated, self._evaluator = calibrated, Evaluator(converted.sources)
        rounding = [node for node in trained if node.kind == "fake_quantize" and self._start(node).rounds]
        derived = (node for node in rounding if isinstance(self._start(node).quantization, Derived))
        self._derived = {next(iter(node.uses())): node.id for node in derived}
        self._rounded = {(next(iter(node.uses())), repr(self._how(node))): node.id for node in rounding}

    def known(self, id: str) -> Any:
        """What the value was in training; None where it has no counterpart."""
        twin = self._twin(id)
        if twin is None or (twin == id and self._trained[id].kind == "output" and self._prepared.quantized_outputs):
            return None
        return self._values.get(twin)

    def compares(self, id: str) -> bool:
        """Whether the value is computed in training as it is in the end: some is only rounded then."""
        twin = self._twin(id)
        if id not in self._prepared.graph.nodes:
            return twin is not None and twin not in self._prepared.graph.nodes
        return not any(map(self._is_rounded_later, (id, *self._trained[id].uses())))

    def _is_rounded_later(self, id: str) -> bool:
        if id in self._prepared.swapped:
            return True
        given = (self._prepared.weights.get(id), self._prepared.biases.get(id))
        unrounded = any(each is not None and not isinstance(each, Rounding) for each in given)
        return unrounded or (given[0] is not None and self._prepared.graph[id].kind in RECURRENT)

    def _twin(self, id: str) -> str | None:
        """The same value in the graph that was trained: where it is decoded, that which is rounded there."""
        if id in self._prepared.graph.nodes:
            return id
        node = self._converted[id]
        match node.kind:
            case "dequantize":
                how: object = node.get("input")
                (before,) = node.uses()
                (source,) = self._converted[before].uses() if before not in self._prepared.graph.nodes else (before,)
            case "quantize_dynamically":
                how, source = Dynamic(node.get("spec")), next(iter(node.uses()))  # type: ignore[arg-type]
            case _:
                return None
        # what is only observed is read as it is
        return self._rounded.get((source, repr(how))) or self._derived.get(source, source)

    def _start(self, node: Node) -> Start:
        token = node.get("start")
        assert isinstance(token, Token)
        start: Start = self._trained.objects[token.id].value
        return start

    def _how(self, node: Node) -> object:
        """How a node of fake quantization is quantized in the end."""
        start = self._start(node)
        if isinstance(start.quantization, (Dynamic, Cast)):
            return start.quantization
        grids = (self._calibrated.qparams.get(owner) for owner in start.owners)
        return next((literals(grid.qparams(), headroom=False) for grid in grids if grid is not None), None)

    def wrong(self, id: str, known: Any, value: Any) -> str:
        """How a value is another one than it was; empty where it is not."""
        node = self._converted[id]
        if not (isinstance(known, Tensor) and isinstance(value, Tensor)):
            return "" if type(known) is type(value) else f"{id} is {type(value)}, in training it was {type(known)}"
        if known.shape != value.shape:
            return f"{id} has the shape {tuple(value.shape)}, in training it had {tuple(known.shape)}"
        x, y = known.to(torch.float64), value.to(torch.float64)
        # where half of the bits may be lost to infinity, both are lost alike
        error = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs())
        size = float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 0.0
        allowed = _NEAR * size + self._of_layer(node)
        worst = float(error.nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0
        return f"{node.kind} {id} is off by {worst:.2e}, {allowed:.2e} is allowed" if worst > allowed else ""

    def _of_layer(self, node: Node) -> float:
        """How far the sums of a layer may be off: by the bits of its weight, and by weights that are half-way."""
        weight = node.get("weight") if node.has("weight") else None
        given = node.get("input") if node.has("input") else None
        if not (isinstance(weight, Expression) and isinstance(given, Ref)):
            return 0.0
        x, w = self._values.get(self._twin(given.id) or ""), self._evaluator.tensor(weight)
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel() and w.numel() and w.dim() > 1):
            return 0.0
        most = float(x.abs().max())
        # of a transposed convolution any axis may be the one that is summed over
        sums = float(w.abs().sum()) if "transpose" in node.kind else float(w.abs().flatten(1).sum(1).max())
        return most * (_NEAR_SUMS * sums + self._turned(node.id, weight))

    def _turned(self, id: str, weight: Expression) -> float:
        """What all the weights that are half-way between two steps may change by, together."""
        rounded = self._trained[id].get("weight")
        if not (isinstance(rounded, FakeQuantizeWeight) and rounded.norms):
            return 0.0
        if isinstance(weight, CastWeight):
            return 1e-3 * float(self._evaluator.tensor(weight).abs().sum())
        if not (isinstance(weight, DequantizeWeight) and isinstance(weight.value.observer, Grid)):
            return 0.0
        quantized: QuantizeWeight = weight.value
        qparams = quantized.observer.qparams()  # type: ignore[union-attr]
        folded, axis = self._evaluator.tensor(quantized.value), qparams.spec.ch_axis
        shape = [1] * folded.dim()
        if axis is not None:
            shape[axis] = -1
        scale = qparams.scale.view(shape)
        codes = folded / scale
        half = ((codes - codes.floor()) - 0.5).abs() < _HALF
        return float((half * scale).sum())
