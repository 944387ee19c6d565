"""An observer that keeps what it sees, for looking at the values."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from qfunc.numerics.folding import Folding
from qfunc.numerics.qparams import UINT8, QParams, QuantSpec, qparams_of_range, same_values
from qfunc.numerics.statistic import MinMaxStatistic, RangeState


@dataclass(frozen=True, slots=True, eq=False)
class RecordingState:  # noqa: PLW1641 - compared, never a key
    """Copies of the tensors, of their own types and shapes, in the order in which they came."""

    tensors: tuple[Tensor, ...] = ()
    range: RangeState = field(default_factory=RangeState.unobserved)
    """Least and largest value of all."""

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
        if tensor.numel() == 0:
            return state
        return RecordingState((*state.tensors, tensor.detach().clone()), MinMaxStatistic().update(state.range, tensor))


@dataclass(frozen=True, slots=True)
class Recording(Folding[RecordingState]):
    """Keeps a copy of every tensor; the qparams are those of the range of all values.

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
        seen = state.range
        return qparams_of_range(seen.minimum, seen.maximum, self.spec) if seen.observed else None
