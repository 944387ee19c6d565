"""An observer that keeps what it sees, for looking at the values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qfunc.numerics.folding import Folding
from qfunc.numerics.qparams import UINT8, QParams, QuantSpec, qparams_of_range, same_values
from qfunc.numerics.statistic import MinMaxStatistic, RangeState


@dataclass(frozen=True, slots=True, eq=False)
class RecordingState:  # noqa: PLW1641 - compared, never a key
    """Copies of the tensors, of their own types and shapes, in the order in which they came."""

    tensors: tuple[Tensor, ...] = ()

    @property
    def range(self) -> RangeState:
        """Least and largest value of all."""
        return self.range_of(None)

    def range_of(self, ch_axis: int | None) -> RangeState:
        """Least and largest value of all, or with `ch_axis` of each channel."""
        statistic = MinMaxStatistic(ch_axis)
        state = statistic.init()
        for tensor in self.tensors:
            state = statistic.update(state, tensor)
        return state

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RecordingState):
            return NotImplemented
        return len(self.tensors) == len(other.tensors) and all(map(same_values, self.tensors, other.tensors))


@dataclass(frozen=True, slots=True)
class RecordingStatistic:
    """All tensors themselves. The order of them matters, so that there is no `merge`."""

    def init(self) -> RecordingState:
        """No tensors yet."""
        return RecordingState()

    def update(self, state: RecordingState, tensor: Tensor) -> RecordingState:
        """With a copy of `tensor`; an empty one changes nothing."""
        return state if tensor.numel() == 0 else RecordingState((*state.tensors, tensor.detach().clone()))


@dataclass(frozen=True, slots=True)
class Recording(Folding[RecordingState]):
    """Keeps a copy of every tensor; the qparams are those of the range of all values, or of each channel.

    >>> import torch
    >>> observer = Recording()
    >>> state = observer.update(observer.init(), torch.tensor([-1.0, 1.55]))
    >>> state.tensors, observer.finish(state).zero_point.item()
    ((tensor([-1.0000,  1.5500]),), 100)
    """

    spec: QuantSpec = UINT8

    @property
    def statistic(self) -> RecordingStatistic:
        """The tensors."""
        return RecordingStatistic()

    def finish(self, state: RecordingState) -> QParams | None:
        """The qparams of the range, or None if nothing was seen; `state_is_finite(state)` is assumed."""
        seen = state.range_of(self.spec.ch_axis)
        return qparams_of_range(seen.minimum, seen.maximum, self.spec) if seen.observed else None
