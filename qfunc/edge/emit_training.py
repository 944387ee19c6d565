"""Emitting a graph that trains: layers with rounded weights, and batch norms that can be frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qfunc.edge.emit import Emitter
from qfunc.edge.fake_quantize import FakeQuantizer
from qfunc.edge.fake_quantizers import connect, fake_quantizer
from qfunc.edge.qat_layers import QAT_LAYERS, QAT_NORMS, Fold, RoundedParameter
from qfunc.ir import Arg, Node, PostOp
from qfunc.params import FakeQuantizeWeight, NormFactor
from qfunc.passes.fold import norms_behind


class TrainingEmitter(Emitter):
    """Emits a graph with fake quantization; a layer of torch's keeps its place, its names and its kind."""

    def emit(self) -> fx.Graph:
        """The fx graph; `root` holds what it refers to."""
        made = super().emit()
        connect(self.root)
        return made

    def _operator(self, node: Node) -> fx.Node:
        rounded = _rounded(node)
        written = node.origin.written
        if not rounded or written is None or written.op != "call_module":
            return super()._operator(node)
        if type(self._source_module(written.target)) not in QAT_LAYERS:
            return self._canonical(node.kind, node.args, node.id)
        weight = rounded.get("weight")
        norms = {} if weight is None else self._norms(weight)
        part = {"part": "float"} if weight is not None and weight.exact else {}
        return self._call_layer(node, node.id, **norms, **part)

    def _call_layer(self, node: Node, name: str, **options: Any) -> fx.Node:
        written = node.origin.written
        assert written is not None
        args, kwargs = self._written(node, written)
        path = self._layer(node, written.target)
        return self._fx.create_node("call_module", path, args, {**kwargs, **options}, name)

    def _behind(self, node: Node, post: PostOp, value: fx.Node) -> fx.Node:
        made = super()._behind(node, post, value)
        weight = _rounded(node).get("weight")
        if weight is None or not weight.exact or post is not norms_behind(node)[0]:
            return made
        # The error is that of the statistics as this batch has left them, so that it comes behind the norm.
        error = self._call_layer(node, f"{node.id}_error", part="error", **self._norms(weight))
        return self._fx.create_node("call_module", made.target, (value, made, error), {}, f"{node.id}_exact")

    def _norms(self, weight: FakeQuantizeWeight) -> dict[str, Any]:
        """What the norms behind a layer hand to it."""
        given = tuple(self._of_norm(norm) for norm in weight.norms)
        return {"norms": given} if given else {}

    def _of_norm(self, norm: NormFactor) -> tuple[Any, Any]:
        return (None if norm.gamma is None else self._arg(norm.gamma)), self._arg(norm.var)

    def _arg(self, arg: Arg) -> Any:
        if not isinstance(arg, FakeQuantizeWeight):
            return super()._arg(arg)
        parameter = self._arg(arg.value)
        name = f"{arg.value.name}_fake_quant"
        if arg.start.id not in self._made:
            made = RoundedParameter(self._fake_quantizer(arg), _fold(arg))
            self._made[arg.start.id] = self._attach(name, made)
        path = self._made[arg.start.id]
        return self._fx.create_node("call_module", path, (parameter,), self._norms(arg), name.replace(".", "_"))

    def _refilled(self, node: Node, path: str) -> nn.Module:
        rounded = _rounded(node)
        plain = node.with_args(**{name: value.value for name, value in rounded.items()})
        layer = super()._refilled(plain, path)
        if not rounded:
            return layer
        fake_quantizers = {name: self._fake_quantizer(value) for name, value in rounded.items()}
        fold = _fold(rounded["weight"]) if "weight" in rounded else Fold()
        return QAT_LAYERS[type(layer)].of(layer, fake_quantizers, fold)

    def _dressed(self, module: nn.Module) -> nn.Module:
        norm = QAT_NORMS.get(type(module))
        return module if norm is None else norm.of(module)

    def _fake_quantizer(self, weight: FakeQuantizeWeight) -> nn.Module:
        """The fake quantizer of a weight, which begins with the weight as it is, with the norms in it."""
        made = fake_quantizer(self._graph.objects[weight.start.id].value)
        if isinstance(made, FakeQuantizer):
            fold, value = _fold(weight), self._evaluator.tensor
            norms = tuple((None if n.gamma is None else value(n.gamma), value(n.var)) for n in weight.norms)
            with torch.no_grad():
                made.begin(fold.folded(value(weight.value), norms, fold.deviations(norms)))
        return made


def _rounded(node: Node) -> dict[str, FakeQuantizeWeight]:
    return {name: value for name, value in node.args if isinstance(value, FakeQuantizeWeight)}


def _fold(weight: FakeQuantizeWeight) -> Fold:
    return Fold(tuple(norm.eps for norm in weight.norms), weight.transpose, weight.groups)
