"""Input-weight equalization: the scale of each input channel of a layer, and what it makes of ranges and weights.

    y = W x = (W / s) (s x)                                   s per input channel, positive
    s = sqrt(range of the channel's weights / range of the channel)

Scaled so, each channel of the input has the range of its weights, `sqrt(both)`: neither wastes the codes of the other.

Source: Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qfunc.numerics.statistic import RangeState


def column_range(weight: Tensor, groups: int = 1) -> RangeState:
    """The least and largest weight that each input channel is multiplied with.

    `weight` is `(out, in / groups, *kernel)`; the range has `in` channels, zeros where there are no weights at all.

    >>> column_range(torch.tensor([[1.0, -4.0], [3.0, 2.0]])).maximum
    tensor([3., 2.])
    """
    columns = weight.shape[1]
    if weight.numel() == 0:
        return RangeState(*torch.zeros(2, columns * groups))
    blocks = weight.detach().reshape(groups, -1, columns, weight.shape[2:].numel()).float()
    return RangeState(blocks.amin((1, 3)).flatten(), blocks.amax((1, 3)).flatten())


def equalization_scale(inputs: RangeState, weights: RangeState) -> Tensor:
    """The scale of each input channel, float32, of shape `(channels,)`; 1 where a range is zero or not finite.

    Both ranges are taken with zero in them, as the grids that they are for have it: a channel that is nearly constant
    would be blown up otherwise, and ruin the range of the whole input.

    >>> one = torch.ones(2)
    >>> equalization_scale(RangeState(0 * one, 16 * one), RangeState(-one, torch.tensor([0.0, 3.0])))
    tensor([0.2500, 0.5000])
    """
    with torch.no_grad():
        scale = torch.sqrt(_width(weights) / _width(inputs)).float()
        return torch.where((scale > 0) & torch.isfinite(scale), scale, 1.0)


def _width(found: RangeState) -> Tensor:
    return found.maximum.double().clamp(min=0) - found.minimum.double().clamp(max=0)


def scaled_range(inputs: RangeState, scale: Tensor) -> RangeState:
    """The range of the whole input, of which each channel is scaled.

    >>> made = scaled_range(RangeState(torch.zeros(2), torch.tensor([2.0, 8.0])), torch.tensor([3.0, 0.5]))
    >>> made.maximum
    tensor(6.)
    """
    return RangeState((inputs.minimum * scale).amin(), (inputs.maximum * scale).amax())


def divide_columns(weight: Tensor, scale: Tensor, groups: int = 1) -> Tensor:
    """`weight`, `(out, in / groups, *kernel)`, with each input channel divided by its scale; rounded once.

    >>> divide_columns(torch.ones(2, 1), torch.tensor([2.0, 4.0]), groups=2)
    tensor([[0.5000],
            [0.2500]])
    """
    kernel = weight.shape[2:]
    blocks = weight.double().reshape(groups, -1, weight.shape[1], kernel.numel())
    return (blocks / scale.double().view(groups, 1, -1, 1)).reshape(weight.shape).to(weight.dtype)


def multiply_rows(parameter: Tensor, scale: Tensor) -> Tensor:
    """A weight or bias with each output channel, along axis 0, multiplied by its scale; rounded once.

    >>> multiply_rows(torch.ones(2), torch.tensor([2.0, 4.0]))
    tensor([2., 4.])
    """
    return (parameter.double() * scale.double().view(-1, *[1] * (parameter.dim() - 1))).to(parameter.dtype)
