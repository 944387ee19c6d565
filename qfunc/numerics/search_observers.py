"""Observers that look for a part of the range in an exact histogram; those of equal bins and stride share one state.

What each looks for is told in `qfunc.numerics.range_search`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qfunc.numerics.exact_histogram import ExactHistogramState, ExactHistogramStatistic
from qfunc.numerics.folding import Folding
from qfunc.numerics.qparams import UINT8, QParams, QuantSpec, qparams_of_range
from qfunc.numerics.range_search import least_divergence_range, least_error_range, percentile_range


class _Searching(Folding[ExactHistogramState]):
    """The qparams of a part of the range, searched for in the histogram."""

    __slots__ = ()
    spec: QuantSpec
    bins: int
    stride: int

    @property
    def statistic(self) -> ExactHistogramStatistic:
        """The histogram."""
        return ExactHistogramStatistic(self.bins, self.stride)

    def merge(self, a: ExactHistogramState, b: ExactHistogramState) -> ExactHistogramState:
        """The state after all tensors of both; exact."""
        return self.statistic.merge(a, b)

    def finish(self, state: ExactHistogramState) -> QParams | None:
        """The qparams of the part, or None if nothing was seen; `state_is_finite(state)` is assumed."""
        return qparams_of_range(*self._part(state), self.spec) if state.range.observed else None

    def _part(self, state: ExactHistogramState) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Percentile(_Searching):
    """The range of `percentile` per cent of the values, which is more than 50 and at most 100; of |x| if symmetric.

    It is as fine as the bins, of which there are `bins` over all that was seen: one value that is larger than the
    others by orders of magnitude makes them coarse. Where most values are zero, so are most percentiles.

    >>> import torch
    >>> observer = Percentile(percentile=98.0)
    >>> qparams = observer.finish(observer.update(observer.init(), torch.linspace(-1, 3, 1001)))
    >>> round(qparams.scale.item() * 255, 2)
    3.92
    """

    spec: QuantSpec = UINT8
    percentile: float = 99.99
    bins: int = 4096
    stride: int = 1

    def _part(self, state: ExactHistogramState) -> tuple[Tensor, Tensor]:
        return percentile_range(state, self.percentile, self.spec.symmetric)


@dataclass(frozen=True, slots=True)
class MeanSquaredError(_Searching):
    """The range whose quantization to the levels of `spec` has the least expected squared error.

    >>> import torch
    >>> observer = MeanSquaredError(QuantSpec("uint8", 0, 15))
    >>> x = torch.cat([torch.linspace(0, 1, 100_000), torch.tensor([1.5])])
    >>> observer.finish(observer.update(observer.init(), x)).scale.item() * 15 < 1.1
    True
    """

    spec: QuantSpec = UINT8
    bins: int = 4096
    stride: int = 1

    def _part(self, state: ExactHistogramState) -> tuple[Tensor, Tensor]:
        return least_error_range(state, self.spec)


@dataclass(frozen=True, slots=True)
class Entropy(_Searching):
    """The range whose distribution diverges least from its quantized one, as in TensorRT's calibration.

    It looks at how often values are, not at how large: of probabilities, of which most are tiny and few matter, it may
    cut off those that do.

    >>> import torch
    >>> observer = Entropy()
    >>> x = torch.cat([torch.special.ndtri(torch.linspace(1e-6, 1 - 1e-6, 100_001)), torch.tensor([-60.0, 60.0])])
    >>> round(observer.finish(observer.update(observer.init(), x)).scale.item() * 255, 3)
    8.5
    """

    spec: QuantSpec = UINT8
    bins: int = 4096
    stride: int = 1

    def _part(self, state: ExactHistogramState) -> tuple[Tensor, Tensor]:
        return least_divergence_range(state, self.spec)
