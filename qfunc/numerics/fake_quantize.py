"""`FakeQuantize`: an observer that training rounds to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qfunc.numerics.observers import FixedQParams, Observer
from qfunc.numerics.qparams import QParams, QuantSpec


@dataclass(frozen=True, slots=True)
class FakeQuantize:
    """What an observer finds, to which values are rounded already while the model trains.

    `learned` qparams begin with what the observer finds in the first batch, and are parameters of the model from then
    on, trained like any other (see `qfunc.numerics.straight_through`); with `scale_gradient`, their gradients are
    divided by the root of how many values share them. Calibration, which only measures, takes it for its observer.

    `fused` rounds, while the model trains, with the qparams that torch's `fused_moving_avg_obs_fake_quant` takes for a
    moving average, which for symmetric schemes are not quite those that the observer gives (see
    `qfunc.numerics.fused_range`); evaluation and `convert` take the observer's, as the reference's `convert` does.

    >>> from qfunc.numerics.observers import MovingAverageMinMax
    >>> FakeQuantize(MovingAverageMinMax()).spec.dtype
    'uint8'
    """

    observer: Observer[Any]
    learned: bool = False
    scale_gradient: bool = True
    fused: bool = False

    @property
    def spec(self) -> QuantSpec:
        """How the tensor will be quantized."""
        return self.observer.spec

    @property
    def statistic(self) -> Any:
        """What is measured; observers with equal statistics share one state."""
        return self.observer.statistic

    def init(self) -> Any:
        """The state before any tensor."""
        return self.observer.init()

    def update(self, state: Any, tensor: Tensor) -> Any:
        """The state after `tensor`; pure."""
        return self.observer.update(state, tensor)

    def finish(self, state: Any) -> QParams | None:
        """The qparams of what was seen, or None if nothing was."""
        return self.observer.finish(state)


def is_fixed(quantization: object) -> bool:
    """Whether the qparams are known beforehand, in calibration and, wrapped in `FakeQuantize`, in training alike.

    >>> from qfunc.numerics.qparams import UINT8
    >>> is_fixed(FakeQuantize(FixedQParams(UINT8, 1 / 256, 0)))
    True
    """
    inner = quantization.observer if isinstance(quantization, FakeQuantize) else quantization
    return isinstance(inner, FixedQParams)
