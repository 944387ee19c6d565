"""How far a quantized model may be from the float one: what its roundings come to, element by element.

A walk over the reference graph carries, for each value, the float model's value `x` and a bound `e` of the error:

- rounding to a grid of step `s` gives `|q(x) - x|`, and what came in with the value: `e + s`, since `q` is monotone and
  moves a value by a step at most relative to the one beside it;
- a layer with the weight `W`, quantized `V`, gives `|V| e + |V - W| |x|`;
- a sum adds the errors, a product gives `|x| f + |y| e + e f`, a function of the Lipschitz
  constant `L` gives `L e`;
- what is on the grid already stays where it is;
- what no error comes into gives none.

Nothing in it is chosen: the steps are those that the model was given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from qfunc import Lowered, interpret, unwrap
from qfunc.edge.evaluate import Evaluator
from qfunc.ir import Expression, Graph, Node, Ref
from qfunc.numerics.affine import dequantize, quantize
from qfunc.numerics.grid import Affine
from qfunc.ops.reference import padded_conv
from qfunc.params import DequantizeWeight, QuantizeWeight
from qfunc.passes.certificate import quantized_weights
from qfunc.passes.stages import Converted

LIPSCHITZ = {"relu": 1.0, "clamp": 1.0, "hardswish": 1.5, "torch.cumsum": 8.0}
MOVES: dict[str, Callable[..., Any]] = {
    "cat": lambda node, errors: torch.cat(errors, node.get("dim")),
    "reshape": lambda node, errors: errors[0],
}
"""Operators that only move elements move their errors."""


class _Walk:
    def __init__(self, converted: Converted, lowered: Lowered, values: dict[str, Any]) -> None:
        self.graph, self.values, self.errors = converted.graph, dict(values), dict[str, Tensor]()
        self._on = dict[str, Affine]()  # the grids of the values that are on one
        self._weights = Evaluator(self.graph.sources)
        self._used: dict[Expression, list[QuantizeWeight]] = {}
        for node in lowered.graph:
            for weight in quantized_weights(node):
                self._used.setdefault(weight.value, []).append(weight)

    def run(self) -> None:
        for node in self.graph:
            if node.kind in ("quantize", "dequantize", "quantize_dynamically"):
                self.values[node.id] = self.values[next(node.uses())]
            if node.kind != "output" and isinstance(value := self.values[node.id], Tensor):
                self.errors[node.id] = self._error(node).expand(value.shape)
                self._keep_grid(node)

    def _keep_grid(self, node: Node) -> None:
        """A value on a grid is still on it when it is moved, or its negative part is zero."""
        grids = {self._on.get(used) for used in node.uses()}
        if node.kind == "dequantize":
            grids = {node.get("input")}
        elif node.kind not in ("relu", *MOVES) or len(grids) > 1 or node.post:
            return
        grid = grids.pop()
        if isinstance(grid, Affine):
            self._on[node.id] = grid

    def _error(self, node: Node) -> Tensor:
        if not any(self.errors[used].any() for used in node.uses() if used in self.errors):
            incoming = torch.zeros(())
            if node.kind not in ("quantize", "quantize_dynamically", "conv2d", "linear", "prelu"):
                return incoming
        error = self._of_operator(node)
        for post in node.post:
            error = error + self._of(post.get("other")) if post.kind == "add" else LIPSCHITZ[post.kind] * error
        return error

    def _of(self, arg: Any) -> Tensor:
        return self.errors[arg.id] if isinstance(arg, Ref) else torch.zeros(())

    def _value(self, arg: Any) -> Tensor:
        return self.values[arg.id] if isinstance(arg, Ref) else torch.as_tensor(arg)

    def _of_operator(self, node: Node) -> Tensor:
        errors = [self.errors[used] for used in node.uses() if used in self.errors]
        match node.kind:
            case "quantize":
                return self._rounded(node, errors[0])
            case "quantize_dynamically":
                x = self.values[node.id]
                step = (x.max().clamp(min=0) - x.min().clamp(max=0) + 2 * errors[0].max()) / 255
                return errors[0] + step
            case "dequantize":
                return errors[0]
            case "conv2d" | "linear":
                return self._of_layer(node)
            case "add" | "sub":
                return self._of(node.get("input")) + abs(node.get("alpha")) * self._of(node.get("other"))
            case "mul":
                left, right = (self._of(node.get(name)) for name in ("input", "other"))
                x, y = (self._value(node.get(name)).abs() for name in ("input", "other"))
                return x * right + y * left + left * right
            case "prelu":
                largest, moved = self._weight(node)
                x = self._value(node.get("input")).abs()
                return self._of(node.get("input")) * largest.max().clamp(min=1) + moved.max() * x
            case kind if kind in LIPSCHITZ:
                return LIPSCHITZ[kind] * errors[0]
            case kind:
                return MOVES[kind](node, errors)

    def _rounded(self, node: Node, error: Tensor) -> Tensor:
        grid, x = node.get("output"), self.values[node.id]
        assert isinstance(grid, Affine)
        if self._on.get(next(node.uses())) == grid:
            return error
        q = (torch.tensor(grid.scale), torch.tensor(grid.zero_point))
        codes = quantize(x, *q, *grid.bounds, dtype=getattr(torch, grid.dtype))
        own = (dequantize(codes, *q) - x).abs()
        return own + torch.where(error > 0, error + grid.scale, 0.0)

    def _of_layer(self, node: Node) -> Tensor:
        given = node.get("input")
        x, error = self._value(given).abs(), self._of(given).expand(self._value(given).shape)
        largest, moved = self._weight(node)
        return _layer(node, error, largest) + _layer(node, x, moved)

    def _weight(self, node: Node) -> tuple[Tensor, Tensor]:
        """Of each element the magnitude, quantized, and how far quantizing moves it; the most, where hosts limit it."""
        given = node.get("weight")
        if not isinstance(given, DequantizeWeight):
            weight = self._value(given) if isinstance(given, Ref) else self._weights.tensor(given)
            return weight.abs(), torch.zeros_like(weight)
        exact = self._weights.tensor(given.value.value)
        forms = [given.value, *self._used.get(given.value.value, ())]
        used = torch.stack([self._weights.tensor(DequantizeWeight(form)) for form in forms])
        return used.abs().amax(0), (used - exact).abs().amax(0)


def _layer(node: Node, x: Tensor, weight: Tensor) -> Tensor:
    if node.kind == "linear":
        return F.linear(x, weight)
    names = ("stride", "padding", "dilation", "groups", "padding_mode")
    options = [node.get(name) for name in names]
    return padded_conv(x, weight, None, *options[:-1], {"zeros": "constant"}.get(options[-1], options[-1]))


def error_bounds(traced: Graph, converted: Converted, lowered: Lowered, batch: Any) -> list[Tensor]:
    """The bound for each element of each output, in their order; `lowered` is asked for the weights that it limited."""
    values: dict[str, Any] = {}
    unwrap(interpret(traced, batch, lambda id, value: values.__setitem__(id, value)))
    walk = _Walk(converted, lowered, values)
    with torch.no_grad():
        walk.run()
    output = next(node for node in converted.graph if node.kind == "output")
    return [walk.errors[used] for used in output.uses()]
