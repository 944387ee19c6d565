"""Recurrent layers and cells whose matrices are integers, or small floats.

A layer of integers quantizes what it multiplies on its own range as the model runs: the whole sequence for the
projections of the input, which are one product for all steps, and the hidden state at each step. Gates and states are
float32. torch's own dynamic layers take the same ranges, but 7 bits of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from qfunc.edge.kernels.affine import Quantize
from qfunc.edge.kernels.base import Kernel, check_weight, outside_compile
from qfunc.edge.kernels.dynamic import OwnCodes, Packed, check_features, own_codes, pack, product
from qfunc.numerics.grid import Affine
from qfunc.numerics.qparams import QuantSpec

Mode: TypeAlias = Literal["LSTM", "GRU", "RNN_TANH", "RNN_RELU"]
States: TypeAlias = tuple[Tensor, ...]
"""The hidden state, and for an LSTM the cell state."""


@dataclass(frozen=True, slots=True)
class RecurrentCall:
    """The literals of a recurrent layer; a `cell` is one step of one layer. Only the result of a cell can be codes."""

    mode: Mode
    input_size: int
    hidden_size: int
    num_layers: int = 1
    bidirectional: bool = False
    batch_first: bool = False
    proj_size: int = 0
    cell: bool = False
    output: Affine | None = None

    @property
    def directions(self) -> int:
        """How many ways a layer reads its sequence."""
        return 1 + self.bidirectional

    @property
    def state_sizes(self) -> tuple[int, ...]:
        """The widths of the states."""
        hidden = self.proj_size or self.hidden_size
        return (hidden, self.hidden_size) if self.mode == "LSTM" else (hidden,)

    def suffixes(self) -> Iterator[str]:
        """What the names of the parameters end in, layer by layer, the reverse direction behind the other."""
        if self.cell:
            yield ""
            return
        for layer in range(self.num_layers):
            yield from (f"_l{layer}{direction}" for direction in ("", "_reverse")[: self.directions])


class Recurrent(Kernel):
    """Called as torch's layer or cell of that name: with an input, batched or not or packed, and an initial state."""

    def __init__(self, call: RecurrentCall, biases: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.call = call
        for name, value in biases.items():
            self.register_buffer(name, value)
        self._biased = bool(biases)
        self._out_of = nn.Identity() if call.output is None else Quantize(call.output)

    def forward(self, x: Any, state: Any = None) -> Any:
        """What torch's layer or cell returns."""
        if torch.compiler.is_compiling():
            return self._uncompiled(x, state)
        given = None if state is None else tuple(state) if self.call.mode == "LSTM" else (state,)
        if self.call.cell:
            return self._cell(x, given)
        return self._packed_sequence(x, given) if isinstance(x, PackedSequence) else self._padded(x, given)

    @outside_compile
    def _uncompiled(self, x: Any, state: Any) -> Any:
        return self.forward(x, state)

    def _cell(self, x: Tensor, given: States | None) -> Any:
        single = _rank(x, (1, 2)) == 1
        x = x[None] if single else x
        given = tuple(each[None] for each in given) if single and given is not None else given
        states = self._step(x, self._checked(given, (x.shape[0],)))
        states = tuple(each[0] for each in states) if single else states
        return states if self.call.mode == "LSTM" else self._out_of(states[0])

    def _padded(self, x: Tensor, given: States | None) -> Any:
        single, batch = _rank(x, (2, 3)) == 2, 0 if self.call.batch_first else 1
        if single:
            x = x.unsqueeze(batch)
            given = None if given is None else tuple(each.unsqueeze(1) for each in given)
        sequence = x.transpose(0, 1) if self.call.batch_first else x
        if not sequence.shape[0]:
            raise RuntimeError("recurrent layer is given a sequence of no steps")
        layers = self.call.num_layers * self.call.directions
        result, states = self._layers(sequence, None, self._checked(given, (layers, sequence.shape[1])))
        result = result.transpose(0, 1) if self.call.batch_first else result
        if single:
            result, states = result.squeeze(batch), tuple(each.squeeze(1) for each in states)
        return result, (states if self.call.mode == "LSTM" else states[0])

    def _packed_sequence(self, x: PackedSequence, given: States | None) -> Any:
        data, sizes, order, back = x
        if given is not None and order is not None:
            given = tuple(each.index_select(1, order) for each in given)
        layers = self.call.num_layers * self.call.directions
        result, states = self._layers(data, sizes, self._checked(given, (layers, int(sizes[0]))))
        if back is not None:
            states = tuple(each.index_select(1, back) for each in states)
        return PackedSequence(result, sizes, order, back), (states if self.call.mode == "LSTM" else states[0])

    def _checked(self, given: States | None, leading: tuple[int, ...]) -> States:
        """The initial states, zeros by default; `leading` are the sizes of all but the last axis."""
        wanted = [(*leading, size) for size in self.call.state_sizes]
        if given is None:
            return tuple(torch.zeros(shape) for shape in wanted)
        shapes = [tuple(each.shape) for each in given]
        if shapes != wanted:
            raise RuntimeError(f"recurrent layer is given states of shape {shapes}, not {wanted}")
        return given

    def _layers(self, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        """Results and last states of a sequence `[steps, batch, features]`, or of a packed one with its batch sizes."""
        raise NotImplementedError

    def _step(self, x: Tensor, states: States) -> States:
        raise NotImplementedError

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return str(self.call)


def _rank(x: Tensor, ranks: tuple[int, int]) -> int:
    if x.dim() not in ranks:
        raise RuntimeError(f"recurrent layer takes a tensor of {ranks[0]} or {ranks[1]} axes, not {x.dim()}")
    return x.dim()


# Integers -------------------------------------------------------------------------------------------------------------

Product: TypeAlias = Callable[[Tensor], Tensor]


def _lstm(given: Tensor, states: States, hidden: Product, project: Product | None) -> States:
    i, f, g, o = (given + hidden(states[0])).chunk(4, 1)
    cell = f.sigmoid() * states[1] + i.sigmoid() * g.tanh()
    out = o.sigmoid() * cell.tanh()
    return (out if project is None else project(out)), cell


def _gru(given: Tensor, states: States, hidden: Product, _: Product | None) -> States:
    (i_r, i_z, i_n), (h_r, h_z, h_n) = given.chunk(3, 1), hidden(states[0]).chunk(3, 1)
    new = (i_n + (i_r + h_r).sigmoid() * h_n).tanh()
    return ((states[0] - new) * (i_z + h_z).sigmoid() + new,)


def _rnn(function: Product, given: Tensor, states: States, hidden: Product, _: Product | None) -> States:
    return (function(given + hidden(states[0])),)


_STEP: Mapping[Mode, Callable[[Tensor, States, Product, Product | None], States]] = MappingProxyType(
    {
        "LSTM": _lstm,
        "GRU": _gru,
        "RNN_TANH": partial(_rnn, torch.tanh),
        "RNN_RELU": partial(_rnn, torch.relu),
    }
)


class RecurrentDynamic(Recurrent):
    """The layer with `int8` matrices, symmetric per row, over inputs that are quantized as `spec` says.

    `weights` maps the names that torch gives the matrices to their codes and float32 scales; buffers are called so,
    and `..._scale`.
    """

    def __init__(
        self,
        call: RecurrentCall,
        weights: Mapping[str, tuple[Tensor, Tensor]],
        biases: Mapping[str, Tensor],
        spec: QuantSpec,
    ) -> None:
        super().__init__(call, biases)
        self.spec = spec
        self._matrices = tuple(weights)
        for name, (codes, scale) in weights.items():
            check_weight(codes, scale)
            self.register_buffer(name, codes)
            self.register_buffer(f"{name}_scale", scale)

    def _packs_of_all(self) -> dict[str, Packed]:
        found: dict[str, Packed] | None = self._packs.get(0)
        return self._packed(0, self._pack) if found is None else found

    def _pack(self) -> dict[str, Packed]:
        def packed(name: str) -> Packed:
            bias = getattr(self, name.replace("weight", "bias"), None)
            return pack(getattr(self, name), getattr(self, f"{name}_scale"), bias)

        return {name: packed(name) for name in self._matrices}

    def _codes(self, x: Tensor) -> OwnCodes:
        return own_codes(x, self.spec)

    def _multiply(self, packed: Packed, x: Tensor) -> Tensor:
        return product(self._codes(x), packed) if x.numel() else torch.zeros(*x.shape[:-1], packed[1].shape[0])

    def _functions(self, suffix: str) -> tuple[Packed, Callable[[Tensor, States], States]]:
        """The packed matrix of the input, and one step, which is given its product and the states before."""
        packs = self._packs_of_all()
        projection = packs.get(f"weight_hr{suffix}")
        project = None if projection is None else partial(self._multiply, projection)
        hidden = partial(self._multiply, packs[f"weight_hh{suffix}"])
        step = _STEP[self.call.mode]
        return packs[f"weight_ih{suffix}"], lambda given, states: step(given, states, hidden, project)

    def _step(self, x: Tensor, states: States) -> States:
        check_features(x, self.call.input_size)
        matrix, step = self._functions("")
        return step(self._multiply(matrix, x), states)

    def _layers(self, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        check_features(x, self.call.input_size)
        rows = [x.shape[1]] * x.shape[0] if sizes is None else sizes.tolist()
        data = x.reshape(sum(rows), x.shape[-1])
        last: list[States] = []
        directions = self.call.directions
        for layer in range(self.call.num_layers):
            codes = self._codes(data) if data.numel() else None
            results: list[Tensor] = []
            for index in range(directions):
                number = layer * directions + index
                matrix, step = self._functions(f"_l{layer}{'_reverse' * index}")
                given = torch.zeros(0, matrix[1].shape[0]) if codes is None else product(codes, matrix)
                read = _backward if index else _forward
                result, final = read(given, rows, tuple(each[number] for each in states), step)
                results.append(result)
                last.append(final)
            data = results[0] if directions == 1 else torch.cat(results, 1)
        shape = data.shape if sizes is not None else (*x.shape[:-1], data.shape[-1])
        return data.view(shape), tuple(torch.stack(each) for each in zip(*last, strict=True))


def _forward(
    given: Tensor, rows: list[int], states: States, step: Callable[[Tensor, States], States]
) -> tuple[Tensor, States]:
    """The results of all steps and the last states of each sequence; `rows[t]` sequences, never more, have step t."""
    results: list[Tensor] = []
    ended: list[States] = []
    for part in torch.split(given, rows):
        if len(part) < len(states[0]):
            ended.append(tuple(each[len(part) :] for each in states))
            states = tuple(each[: len(part)] for each in states)
        states = step(part, states)
        results.append(states[0])
    ended.append(states)
    return torch.cat(results), tuple(torch.cat(each) for each in zip(*reversed(ended), strict=True))


def _backward(
    given: Tensor, rows: list[int], states: States, step: Callable[[Tensor, States], States]
) -> tuple[Tensor, States]:
    """The same from the last step to the first, at which shorter sequences join in."""
    results: list[Tensor] = []
    current = tuple(each[:0] for each in states)
    for part in reversed(torch.split(given, rows)):
        held = len(current[0])
        if len(part) > held:
            current = tuple(torch.cat([a, b[held : len(part)]]) for a, b in zip(current, states, strict=True))
        current = step(part, current)
        results.append(current[0])
    return torch.cat(results[::-1]), current


# Small floats ---------------------------------------------------------------------------------------------------------

_LAYER: Mapping[Mode, Callable[..., Any]] = MappingProxyType(
    {"LSTM": torch.lstm, "GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}
)
_CELL: Mapping[Mode, Callable[..., Any]] = MappingProxyType(
    {"LSTM": torch.lstm_cell, "GRU": torch.gru_cell, "RNN_TANH": torch.rnn_tanh_cell, "RNN_RELU": torch.rnn_relu_cell}
)


class RecurrentCast(Recurrent):
    """torch's own float layer over matrices of a smaller float type, widened at each call; the input is cast, too."""

    def __init__(
        self, call: RecurrentCall, weights: Mapping[str, Tensor], biases: Mapping[str, Tensor], dtype: torch.dtype
    ) -> None:
        super().__init__(call, biases)
        for name, value in weights.items():
            self.register_buffer(name, value)
        self._dtype = dtype

    def _flat(self, suffix: str) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if self._biased else ()))
        names = (*names, "weight_hr") if self.call.proj_size else names
        return [getattr(self, f"{name}{suffix}").to(torch.float32) for name in names]

    def _rounded(self, x: Tensor) -> Tensor:
        return x.to(self._dtype).to(torch.float32)

    def _step(self, x: Tensor, states: States) -> States:
        given = states if self.call.mode == "LSTM" else states[0]
        result = _CELL[self.call.mode](self._rounded(x), given, *self._flat(""))
        return result if self.call.mode == "LSTM" else (result,)

    def _layers(self, x: Tensor, sizes: Tensor | None, states: States) -> tuple[Tensor, States]:
        call = self.call
        flat = [tensor for suffix in call.suffixes() for tensor in self._flat(suffix)]
        given = states if call.mode == "LSTM" else states[0]
        options = (flat, self._biased, call.num_layers, 0.0, False, call.bidirectional)
        if sizes is None:
            result, *last = _LAYER[call.mode](self._rounded(x), given, *options, False)
        else:
            result, *last = _LAYER[call.mode](self._rounded(x), sizes, given, *options)
        return result, tuple(last)
