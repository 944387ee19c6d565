"""What observers that fold a statistic have in common."""

from __future__ import annotations

from typing import Generic

from torch import Tensor

from qfunc.numerics.statistic import State, Statistic


class Folding(Generic[State]):
    """`init` and `update` of the statistic."""

    __slots__ = ()

    @property
    def statistic(self) -> Statistic[State]:
        """What is measured; observers with equal statistics share one state."""
        raise NotImplementedError

    def init(self) -> State:
        """The state before any tensor."""
        return self.statistic.init()

    def update(self, state: State, tensor: Tensor) -> State:
        """The state after `tensor`; an empty tensor changes nothing."""
        return self.statistic.update(state, tensor)
