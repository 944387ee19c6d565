"""States of observers at work, kept in memory that is asked for once.

A fold makes a new state for each tensor. While a model runs, such small tensors come to lie in the gaps that its large
ones leave, which then do not fit there any more: the process grows by hundreds of megabytes. So a state that goes on to
the next tensor is written to memory that was there before: its numbers as Python's, its counts in a buffer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qfunc.numerics.exact_histogram import ExactHistogramState, ExactHistogramStatistic
from qfunc.numerics.observers import Observer, is_own
from qfunc.numerics.statistic import (
    HistogramState,
    HistogramStatistic,
    MinMaxStatistic,
    RangeState,
    extremes,
    finite,
    range_in,
    state_is_finite,
)

Update = Callable[[Any, Tensor], Any]


class Cell:
    """Room for one state of an observer, and for how many elements it is of."""

    __slots__ = ("_buffers", "_kind", "_parts", "_views", "elements", "high", "low")
    _parts: tuple[Any, ...]

    def __init__(self, reserved: int) -> None:
        self._kind, self._parts = "plain", (None,)
        # in units of int64, which holds float32 as well
        self._buffers: list[Tensor] = [torch.empty(reserved, dtype=torch.int64)]
        self._views: list[Tensor] = [torch.empty(0)]
        self.low, self.high, self.elements = math.inf, -math.inf, 0

    def store(self, state: Any) -> None:
        """Keep a state; it may be one that this cell has given."""
        match state:
            case RangeState() if not state.minimum.dim():
                self._kind, self._parts = "range", ()
                self.low, self.high = state.minimum.item(), state.maximum.item()
            case RangeState(minimum, maximum):
                self._kind, self._parts = "channels", (self._copied(0, minimum), self._copied(1, maximum))
            case HistogramState(counts, seen):
                self._kind, self._parts = "histogram", (self._copied(0, counts),)
                self.low, self.high = seen.minimum.item(), seen.maximum.item()
            case ExactHistogramState(counts, exponent, seen):
                self._kind, self._parts = "exact", (self._copied(0, counts), exponent)
                self.low, self.high = seen.minimum.item(), seen.maximum.item()
            case _:
                self._kind, self._parts = "plain", (state,)

    def load(self) -> Any:
        """The state, in memory that is this cell's."""
        match self._kind:
            case "range":
                return self._range()
            case "channels":
                return RangeState(*self._parts)
            case "histogram":
                return HistogramState(self._parts[0], self._range())
            case "exact":
                counts, exponent = self._parts
                return ExactHistogramState(counts, exponent, self._range())
            case _:
                return self._parts[0]

    def take(self, other: Cell) -> None:
        """Hold what another cell does."""
        self.low, self.high, self.elements, self._kind = other.low, other.high, other.elements, other._kind
        if self._kind in ("plain", "range"):
            self._parts = other._parts
            return
        self._parts = tuple(
            self._copied(place, part) if isinstance(part, Tensor) else part for place, part in enumerate(other._parts)
        )

    def _range(self) -> RangeState:
        return RangeState(torch.tensor(self.low), torch.tensor(self.high))

    def _copied(self, place: int, tensor: Tensor) -> Tensor:
        """The tensor in a buffer of this cell, which is made larger where it must be."""
        if len(self._buffers) == place:
            self._buffers.append(torch.empty(tensor.numel(), dtype=torch.int64))
            self._views.append(torch.empty(0))
        if self._views[place].shape != tensor.shape or self._views[place].dtype != tensor.dtype:
            if self._buffers[place].numel() < tensor.numel():
                self._buffers[place] = torch.empty(tensor.numel(), dtype=torch.int64)
            self._views[place] = self._buffers[place].view(tensor.dtype)[: tensor.numel()].view(tensor.shape)
        return self._views[place].copy_(tensor)


class Tally:
    """What an observer has folded: a state that is settled, and one that goes on from there, in two cells.

    The cell with the index `settled` is not written to; which of the two it is, is said by who runs the observer, so
    that many tallies can be settled at once.
    """

    __slots__ = ("_all_finite", "_cells", "_ranges", "_tells", "_update", "_working")

    def __init__(self, observer: Observer[Any], state: Any, update: Update) -> None:
        statistic = observer.statistic
        self._update = update
        reserved = statistic.bins if isinstance(statistic, (HistogramStatistic, ExactHistogramStatistic)) else 0
        self._cells = Cell(reserved), Cell(reserved)
        self._ranges = is_own(observer) and statistic == MinMaxStatistic()
        self._tells = range_in(state) is not None
        self.start(state)

    def start(self, state: Any) -> None:
        """Hold this state as settled, in the first cell, and go on from it."""
        self._cells[0].store(state)
        self._cells[0].elements = 0
        self.go_on(0)

    def go_on(self, settled: int) -> None:
        """Begin anew from what is settled."""
        self._working, self._all_finite = self._cells[1 - settled], True
        self._working.take(self._cells[settled])

    def add(self, tensor: Tensor) -> None:
        """Fold one more tensor."""
        cell = self._working
        cell.elements += tensor.numel()
        if not self._tells:
            self._all_finite &= finite(tensor)
        if not self._ranges:
            cell.store(self._update(cell.load(), tensor))
        elif tensor.numel():
            low, high = extremes(tensor)
            # NaN is less than nothing, and nothing is less than NaN: it stays
            cell.low = low if low < cell.low or low != low else cell.low
            cell.high = high if high > cell.high or high != high else cell.high

    @property
    def is_finite(self) -> bool:
        """Whether neither NaN nor infinity was folded since what is settled, and before."""
        cell = self._working
        if self._ranges:
            return (math.isfinite(cell.low) and math.isfinite(cell.high)) or cell.low > cell.high
        return self._all_finite and (not self._tells or state_is_finite(cell.load()))

    @property
    def state(self) -> Any:
        """The state after all that was folded; of use until the next tensor."""
        return self._working.load()

    def settled(self, index: int) -> tuple[Any, int]:
        """What the cell with this index holds, in memory of its own, and how many elements it is of."""
        cell = Cell(0)
        cell.take(self._cells[index])
        return cell.load(), cell.elements
