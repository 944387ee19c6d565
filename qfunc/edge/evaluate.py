"""Computing parameter expressions: the one place where weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from qfunc.config.weights import RECURRENT, RECURRENT_KERNELS
from qfunc.edge.observer import ObserverError, observe_once
from qfunc.edge.tensors import is_current, share
from qfunc.errors import BadConfig, NonFinite, Problem, StaleSource, UserFunctionFailed
from qfunc.ir import Expression, Graph, Source
from qfunc.numerics.affine import dequantize, quantize
from qfunc.numerics.batch_norm import fold_batch_norm, fold_batch_norm_before
from qfunc.numerics.derive import derived_qparams, plain, wrong_qparams
from qfunc.numerics.equalization import divide_columns, multiply_rows
from qfunc.numerics.grid import Grid
from qfunc.numerics.qparams import QParams
from qfunc.numerics.saturation import channel_axis, limit_pair_sums
from qfunc.numerics.statistic import finite
from qfunc.params import (
    CastWeight,
    Constant,
    DequantizeWeight,
    DeriveQParams,
    DivideColumns,
    FoldBatchNorm,
    Load,
    MultiplyRows,
    QParamsPart,
    QParamsSource,
    QuantizeWeight,
    WeightCodes,
    loads,
)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """An integer weight and its qparams."""

    values: Tensor
    qparams: QParams


class Evaluator:
    """Computes expressions over the sources of one graph, each once; confined to one materialization."""

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self._sources = sources
        self._tensors: dict[Expression, Tensor] = {}
        self._quantized: dict[QuantizeWeight, QuantizedWeight] = {}
        self._derived: dict[DeriveQParams, QParams] = {}

    def source(self, load: Load) -> Tensor:
        """The source tensor itself, by identity."""
        return self._sources[load.source].tensors[load.name][0]  # type: ignore[no-any-return]

    def module(self, path: str) -> nn.Module:
        """A module of the source model itself, by identity."""
        model: nn.Module = self._sources["model"].model
        return model.get_submodule(path)

    def tensor(self, expression: Expression) -> Tensor:
        """The value of an expression, detached; loads share their source's memory."""
        if expression not in self._tensors:
            with torch.no_grad():
                self._tensors[expression] = self._compute(expression)
        return self._tensors[expression]

    def quantized(self, expression: QuantizeWeight) -> QuantizedWeight:
        """The integer values and qparams of a quantized weight."""
        if expression not in self._quantized:
            with torch.no_grad():
                self._quantized[expression] = self._quantize(expression)
        return self._quantized[expression]

    def qparams(self, source: QParamsSource) -> QParams:
        """The qparams that are known, found with a weight, or made of others; an `ObserverError` where that fails."""
        match source:
            case Grid():
                return source.qparams()
            case QuantizeWeight():
                return self.quantized(source).qparams
            case DeriveQParams(of, function, spec, place):
                if source not in self._derived:
                    made = derived_qparams(function, tuple(self.qparams(other) for other in of), spec)
                    if isinstance(made, str):
                        raise ObserverError(UserFunctionFailed(place, made))
                    self._derived[source] = made
                return self._derived[source]

    def _compute(self, expression: Expression) -> Tensor:
        match expression:
            case Load():
                return self.source(expression).detach()
            case FoldBatchNorm():
                return self._folded(expression)
            case DequantizeWeight(quantized):
                codes = self.quantized(quantized)
                q = codes.qparams
                floats = dequantize(codes.values, q.scale, q.zero_point, ch_axis=q.spec.ch_axis)
                return floats.to(self.tensor(quantized.value).dtype)
            case CastWeight(value, dtype):
                floats = self.tensor(value)
                return floats.to(getattr(torch, dtype)).to(floats.dtype)
            case WeightCodes(QuantizeWeight() as quantized):
                _check_spec(quantized, self.quantized(quantized).qparams)
                return self.quantized(quantized).values
            case WeightCodes(CastWeight(value, dtype)):
                return self.tensor(value).to(getattr(torch, dtype))
            case QParamsPart(part, of):
                found: Tensor = getattr(self.qparams(of), part)
                return found.clone(memory_format=torch.contiguous_format)
            case Constant() | DivideColumns() | MultiplyRows():
                return self._equalized(expression)
            case _:
                raise TypeError(f"no rule to compute {expression!r}")

    def _equalized(self, expression: Constant | DivideColumns | MultiplyRows) -> Tensor:
        match expression:
            case Constant(values, shape, dtype):
                return torch.tensor(values, dtype=getattr(torch, dtype)).view(shape)
            case DivideColumns(value, scale, groups):
                return divide_columns(self.tensor(value), torch.tensor(scale), groups)
            case MultiplyRows(value, scale):
                return multiply_rows(self.tensor(value), torch.tensor(scale))

    def _folded(self, fold: FoldBatchNorm) -> Tensor:
        """The weight or bias with the norm in it; both are computed, and the other is kept for its turn."""
        parts = (fold.weight, fold.bias, fold.mean, fold.var)
        weight, bias, mean, var = (self._optional(part) for part in parts)
        assert weight is not None and mean is not None and var is not None
        norm = (mean, var, fold.eps, self._optional(fold.gamma), self._optional(fold.beta))
        if fold.before:
            both = fold_batch_norm_before(weight, bias, *norm, groups=fold.groups)
        else:
            both = fold_batch_norm(weight, bias, *norm, transpose=fold.transpose, groups=fold.groups)
        for part, value in zip(("weight", "bias"), both, strict=True):
            self._tensors[replace(fold, part=part)] = value  # type: ignore[arg-type]
        return self._tensors[fold]

    def _optional(self, expression: Expression | None) -> Tensor | None:
        return None if expression is None else self.tensor(expression)

    def _quantize(self, expression: QuantizeWeight) -> QuantizedWeight:
        weight, observer = self.tensor(expression.value), expression.observer
        name = next(loads(expression)).name
        known = isinstance(observer, (Grid, DeriveQParams))
        qparams = self.qparams(observer) if known else observe_once(observer, weight, name)  # type: ignore[arg-type]
        _check_fit(qparams, weight, name)
        qparams = plain(qparams)
        spec = qparams.spec
        if expression.pairs != "none":
            scale = limit_pair_sums(
                weight.to(torch.float32),
                qparams.scale,
                expression.pairs,
                quant_max_activation=expression.activation_max,
                quant_min=spec.quant_min,
                quant_max=spec.quant_max,
            )
            # Limited, a weight has a scale per output channel even where its observer gives one for all.
            axis = channel_axis(expression.pairs)
            spec = replace(spec, qscheme="per_channel_symmetric", ch_axis=axis)
            qparams = QParams(scale, qparams.zero_point.expand(scale.shape), spec)
        values = quantize(
            weight,
            qparams.scale,
            qparams.zero_point,
            spec.quant_min,
            spec.quant_max,
            spec.torch_dtype,
            ch_axis=spec.ch_axis,
        )
        return QuantizedWeight(values, qparams)


def _check_fit(qparams: QParams, weight: Tensor, name: str) -> None:
    """That qparams can be meant, and are for a tensor of this shape; an `ObserverError` otherwise."""
    axis, shape = qparams.spec.ch_axis, tuple(weight.shape)
    if axis is not None and axis >= len(shape):
        reason = f"ch_axis {axis} is no axis of its shape {shape}"
        raise ObserverError(BadConfig(name, reason, "use ch_axis=0, the axis of the output channels"))
    wrong = wrong_qparams(qparams)
    if not wrong and axis is not None and len(qparams.scale) != shape[axis]:
        wrong = f"there are {len(qparams.scale)} scales for the {shape[axis]} channels along axis {axis} of {shape}"
    if wrong:
        raise ObserverError(UserFunctionFailed(name, f"its qparams cannot be meant: {wrong}"))


def _check_spec(expression: QuantizeWeight, qparams: QParams) -> None:
    """That the qparams are such as the graph was written for; an `ObserverError` otherwise."""
    meant, found = expression.observer.spec, qparams.spec
    if (meant.dtype, meant.per_channel, meant.ch_axis) != (found.dtype, found.per_channel, found.ch_axis):
        name = next(loads(expression)).name
        reason = (
            f"its observer is for {meant.dtype} {meant.qscheme}, and gives qparams for {found.dtype} {found.qscheme}"
        )
        raise ObserverError(UserFunctionFailed(name, reason))


def expressions(graph: Graph) -> Iterable[tuple[str, Expression]]:
    """Every parameter expression of a graph, with the node that holds it."""
    for node in graph:
        for args in (node.args, *(post.args for post in node.post)):
            for _, value in args:
                if isinstance(value, Expression):
                    yield node.id, value


def tensors_of(
    groups: Mapping[str, Mapping[str, Expression]], sources: Mapping[str, Source], *, copy: bool
) -> dict[str, dict[str, Tensor]]:
    """The values of groups of expressions by name; source tensors share their memory until either side writes to it."""
    evaluator = Evaluator(sources)

    def value(expression: Expression) -> Tensor:
        tensor = evaluator.tensor(expression)
        if isinstance(expression, Load):
            return tensor.clone() if copy else share(evaluator.source(expression))
        return tensor

    return {
        group: {name: value(parts[name]) for name in sorted(parts, reverse=True)}
        for group, parts in sorted(groups.items())
    }


def check_sources(graph: Graph) -> list[Problem]:
    """The source tensors that changed since tracing, and the weights to be quantized that are not finite."""
    found: dict[Problem, None] = {}
    for id, expression in expressions(graph):
        quantized = not isinstance(expression, (Load, FoldBatchNorm))
        for load in loads(expression):
            source = graph.sources[load.source]
            tensor, _ = source.tensors[load.name]
            if not is_current(source, load.name):
                found[StaleSource(load.name)] = None
            elif quantized:
                found.update(dict.fromkeys(unquantizable(tensor, load.name, graph[id].place)))
    found.update((StaleSource(name), None) for name in _biases(graph) if not is_current(graph.sources["model"], name))
    return list(found)


def _biases(graph: Graph) -> Iterator[str]:
    """Those of recurrent layers whose matrices are expressions: their module has them, and they are read with these."""
    layers: dict[str, None] = {}
    for node in graph:
        if node.kind in RECURRENT or node.kind in RECURRENT_KERNELS:
            matrices = (load for _, value in node.args if isinstance(value, Expression) for load in loads(value))
            layers.update((load.name.rpartition(".")[0], None) for load in matrices)
    for path in layers:
        prefix = f"{path}." if path else ""
        yield from (name for name in graph.sources["model"].tensors if name.startswith(f"{prefix}bias_"))


def unquantizable(weight: Tensor, name: str, place: str) -> Iterator[Problem]:
    """Why no scale can be found for a weight, if so: it holds no data, or NaN or infinity."""
    if weight.is_meta:
        remedy = "load the weights first: model.to_empty(device='cpu') and load_state_dict"
        yield NonFinite(place, f"{name} holds no data: it is on the meta device", remedy)
    elif not finite(weight):
        remedy = "mend the weights, or keep the module float: set_module_name(name, None)"
        yield NonFinite(place, f"{name} holds NaN or infinity", remedy)
