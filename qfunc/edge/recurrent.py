"""A custom module for `nn.LSTM`: step by step, with integer weights and every value on the way rounded to its codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc.config.custom_config import CustomModule
from qfunc.config.qconfig import QConfig
from qfunc.edge.kernels.base import Kernel
from qfunc.edge.kernels.grid import DequantizeGrid, QuantizeGrid
from qfunc.edge.observer import ObserverError, guarded, observe_once
from qfunc.errors import Unobserved, UserFunctionFailed
from qfunc.numerics.affine import dequantize, quantize
from qfunc.numerics.grid import CODE_RANGE, Affine, literals
from qfunc.numerics.observers import Observer, finished
from qfunc.numerics.qparams import QParams
from qfunc.numerics.statistic import finite, state_is_finite
from qfunc.numerics.unmeasured import UNMEASURED, KeepFloat, Quantization

States = tuple[Tensor, Tensor]
Output = tuple[Tensor, States]


def observed_lstm(module: nn.LSTM, qconfig: QConfig) -> ObservedLSTM:
    """An `nn.LSTM` that computes the same, step by step, and shows what passes to the observers of `qconfig`.

    Observed are, for each layer and direction, its input, the sums that the gates are made of, the cell states and the
    hidden states; sigmoids and tanhs have fixed ranges. Dropout between layers is that of evaluation: none.

    Raises:
        NotImplementedError: for an LSTM with `proj_size`.
        TypeError: for weights that are not float32, and for a `qconfig` whose activations are neither observed nor
            float, or not of 8 bits.

    >>> from qfunc import CPU
    >>> lstm, x = nn.LSTM(4, 8), torch.randn(5, 2, 4)
    >>> observed = observed_lstm(lstm, CPU.qconfig_mapping.global_qconfig)
    >>> torch.allclose(observed(x)[0], lstm(x)[0], atol=1e-6)
    True
    >>> quantized_lstm(observed).cells[0].hidden.weight.dtype
    torch.int8
    """
    return ObservedLSTM(module, qconfig)


def quantized_lstm(observed: ObservedLSTM) -> QuantizedLSTM:
    """The LSTM with the weights as integers, and every observed value quantized and dequantized by its qparams.

    Raises:
        ObserverError: for a value that no data reached, or an observer of the user's that fails.
        ValueError: for NaN or infinity in a weight or in what was observed.
    """
    return QuantizedLSTM(observed)


QUANTIZABLE_LSTM = CustomModule(nn.LSTM, observed_lstm, quantized_lstm, tensor_output=False)
"""Static quantization of `nn.LSTM`: `CustomConfig(custom_modules=(QUANTIZABLE_LSTM,))`."""

POINTS = ("input", "gates", "cell", "states")
"""The values of a cell that are observed: its input, the sums for the gates, the cell and the hidden states."""


class Cell(nn.Module):
    """One direction of one layer: two linear maps to the four gates, and what is done with each value on the way."""

    def __init__(self, input: nn.Module, hidden: nn.Module, points: dict[str, nn.Module]) -> None:  # noqa: A002
        super().__init__()
        self.input, self.hidden = input, hidden
        self.points = nn.ModuleDict(points)

    def forward(self, x: Tensor, h: Tensor, c: Tensor, backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The hidden states `(L, N, H)` of all steps and the last states; `x` is `(L, N, features)`.

        A hidden state is rounded for the next step; what is given out is not, since whoever reads it rounds it.
        """
        at = self.points
        of_input = F.linear(at["input"](x), *self.input())
        weight, bias = self.hidden()
        h, c = at["states"](h), at["cell"](c)
        outputs: list[Tensor] = [h] * len(x)
        last = h
        for step in reversed(range(len(x))) if backward else range(len(x)):
            sums = at["gates"](of_input[step] + F.linear(h, weight, bias))
            i, f, g, o = sums.chunk(4, -1)
            i, f, o = (at["sigmoid"](torch.sigmoid(gate)) for gate in (i, f, o))
            c = at["cell"](f * c + i * at["tanh"](torch.tanh(g)))
            last = outputs[step] = o * at["tanh"](torch.tanh(c))
            h = at["states"](last)
        return torch.stack(outputs), last, c


class RecurrentLayers(nn.Module):
    """The layers and directions of an LSTM, whatever its cells are; takes and gives what `nn.LSTM` does."""

    def __init__(self, cells: list[Cell], *, bidirectional: bool, batch_first: bool, hidden_size: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)
        self.bidirectional, self.batch_first, self.hidden_size = bidirectional, batch_first, hidden_size

    def forward(self, x: Tensor, states: States | None = None) -> Output:
        """The hidden states of the last layer at all steps, and the last states of all layers.

        Raises:
            TypeError: for a packed sequence.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"an LSTM that is quantized takes a padded tensor, not a {type(x).__name__}")
        batched = x.dim() == 3
        x = x if batched else x.unsqueeze(1)
        x = x.transpose(0, 1) if batched and self.batch_first else x
        if states is None:
            h = c = x.new_zeros(len(self.cells), x.shape[1], self.hidden_size)
        else:
            h, c = states if batched else (states[0].unsqueeze(1), states[1].unsqueeze(1))
        x, (h, c) = self._layers(x, h, c)
        if not batched:
            return x.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return x.transpose(0, 1) if self.batch_first else x, (h, c)

    def _layers(self, x: Tensor, h: Tensor, c: Tensor) -> Output:
        last_h, last_c = list[Tensor](), list[Tensor]()
        directions = 2 if self.bidirectional else 1
        for first in range(0, len(self.cells), directions):
            results = [self.cells[i](x, h[i], c[i], i > first) for i in range(first, first + directions)]
            x = torch.cat([result[0] for result in results], -1)
            last_h += [result[1] for result in results]
            last_c += [result[2] for result in results]
        return x, (torch.stack(last_h), torch.stack(last_c))


class ObservedLSTM(RecurrentLayers):
    """What `observed_lstm` makes."""

    def __init__(self, module: nn.LSTM, qconfig: QConfig) -> None:
        if module.proj_size:
            raise NotImplementedError("an LSTM with proj_size cannot be quantized: keep it float")
        if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
            raise TypeError("an LSTM is quantized from float32: convert the model with .float()")
        given = {"input": qconfig.of_inputs, **dict.fromkeys(POINTS[1:], qconfig.of_output)}
        cells = []
        for suffix in _suffixes(module):
            of_input, of_hidden = (_gates(module, f"{kind}_{suffix}") for kind in ("ih", "hh"))
            points = {name: _point(given[name], f"the {name} of {suffix}") for name in POINTS}
            cells.append(Cell(of_input, of_hidden, {**points, "sigmoid": nn.Identity(), "tanh": nn.Identity()}))
        options = {"bidirectional": module.bidirectional, "batch_first": module.batch_first}
        super().__init__(cells, hidden_size=module.hidden_size, **options)
        self.qconfig = qconfig


class QuantizedLSTM(RecurrentLayers):
    """What `quantized_lstm` makes."""

    def __init__(self, observed: ObservedLSTM) -> None:
        qconfig, cells = observed.qconfig, []
        for cell in observed.cells:
            assert isinstance(cell, Cell)
            points = {name: _rounding(point) for name, point in cell.points.items()}
            if not isinstance(qconfig.of_output, KeepFloat):
                points |= _fixed(qconfig.of_output)
            cells.append(Cell(_integer(cell.input, qconfig.weight), _integer(cell.hidden, qconfig.weight), points))
        options = {"bidirectional": observed.bidirectional, "batch_first": observed.batch_first}
        super().__init__(cells, hidden_size=observed.hidden_size, **options)


class Gates(nn.Module):
    """The weight `(4 * hidden, features)` and bias of a linear map to the gates; a call gives both."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        return self.weight, self.bias


class IntegerGates(Kernel):
    """`Gates` with the weight as integers; a call dequantizes it."""

    weight_zero_point: Tensor

    def __init__(self, gates: Gates, observer: Observer[Any]) -> None:
        super().__init__()
        weight = gates.weight.detach()
        if not finite(weight):
            raise ValueError("a weight holds NaN or infinity")
        q = observe_once(observer, weight, "weight")
        spec, self._ch_axis = q.spec, q.spec.ch_axis
        bounds = (spec.quant_min, spec.quant_max, spec.torch_dtype)
        self.register_buffer("weight", quantize(weight, q.scale, q.zero_point, *bounds, ch_axis=spec.ch_axis))
        self.register_buffer("weight_scale", q.scale)
        self.register_buffer("weight_zero_point", q.zero_point)
        self.register_buffer("bias", None if gates.bias is None else gates.bias.detach().to(torch.float32))

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """Weight, dequantized, and bias."""
        return dequantize(self.weight, self.weight_scale, self.weight_zero_point, ch_axis=self._ch_axis), self.bias


class Observe(nn.Module):
    """Hands its input on and folds it into the state of an observer; `name` says what the value is."""

    def __init__(self, observer: Observer[Any], name: str) -> None:
        super().__init__()
        self.observer, self.name = observer, name
        self.state: Any = guarded(observer, name, observer.init)

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        self.state = guarded(self.observer, self.name, self.observer.update, self.state, x.detach())
        return x

    def qparams(self) -> QParams:
        """The qparams of what was seen."""
        if not state_is_finite(self.state):
            raise ValueError(f"NaN or infinity was observed in {self.name}")
        found = finished(self.observer, self.state)
        if isinstance(found, QParams):
            return found
        raise ObserverError(Unobserved(self.name) if found is None else UserFunctionFailed(self.name, found))

    def extra_repr(self) -> str:
        """What is observed, and by what."""
        return f"{self.name}: {self.observer!r}"


class Round(Kernel):
    """Real values rounded to those that codes stand for."""

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.affine = affine

    def forward(self, x: Tensor) -> Tensor:
        """`dequantize(quantize(x))`, in float32."""
        low, high = self.affine.bounds
        floats = x.to(torch.float32)
        return torch.fake_quantize_per_tensor_affine(floats, self.affine.scale, self.affine.zero_point, low, high)

    def extra_repr(self) -> str:
        """The qparams."""
        return str(self.affine)


def _suffixes(module: nn.LSTM) -> Iterator[str]:
    """How the parameters of each layer and direction are called, in order."""
    for layer in range(module.num_layers):
        yield f"l{layer}"
        if module.bidirectional:
            yield f"l{layer}_reverse"


def _gates(module: nn.LSTM, name: str) -> Gates:
    return Gates(getattr(module, f"weight_{name}"), getattr(module, f"bias_{name}", None))


def _point(quantization: Quantization, name: str) -> nn.Module:
    if isinstance(quantization, KeepFloat):
        return nn.Identity()
    if isinstance(quantization, UNMEASURED):
        raise TypeError(f"an LSTM is quantized with what observers find, not with {type(quantization).__name__}")
    if quantization.spec.dtype not in CODE_RANGE:
        raise TypeError(f"the values of an LSTM are quantized to 8 bits, not to {quantization.spec.dtype}")
    return Observe(quantization, name)


def _rounding(point: nn.Module) -> nn.Module:
    if not isinstance(point, Observe):
        return nn.Identity()
    qparams = literals(point.qparams())
    if isinstance(qparams, Affine):
        return Round(qparams)
    return nn.Sequential(QuantizeGrid(qparams), DequantizeGrid(qparams))


def _fixed(quantization: Quantization) -> dict[str, nn.Module]:
    """The ranges of a sigmoid and a tanh, on all codes."""
    assert not isinstance(quantization, UNMEASURED)
    low, high = CODE_RANGE[quantization.spec.dtype]
    dtype: Any = quantization.spec.dtype
    steps = high - low + 1
    sigmoid, tanh = Affine(1 / steps, low, dtype), Affine(2 / steps, low + steps // 2, dtype)
    return {"sigmoid": Round(sigmoid), "tanh": Round(tanh)}


def _integer(gates: nn.Module, weight: Any) -> nn.Module:
    assert isinstance(gates, Gates)
    if isinstance(weight, KeepFloat):
        return gates
    if isinstance(weight, UNMEASURED):
        raise TypeError(f"the weights of an LSTM are quantized by an observer, not by {type(weight).__name__}")
    return IntegerGates(gates, weight)
