"""Keep pairs of products inside int16, for CPUs whose kernels add them there with saturation.

Without VNNI, x86 kernels multiply `uint8` activations with `int8` weights by `vpmaddubsw`: it adds *two neighbouring*
products in int16, and saturates. With weights `p, q` and activations `0 <= a, b <= A`:

    -A * (max(-p, 0) + max(-q, 0))  <=  a*p + b*q  <=  A * (max(p, 0) + max(q, 0))

and both bounds are attained, so a pair is safe exactly when the sum of its positive parts, and that of its negative
parts, is at most `B = floor(32767 / A)`: 128 for `A = 255`. A single weight of 127 is always safe.

Rounding moves each weight by at most half a step, so `P / s + 1 <= B` suffices for a pair of float weights whose
positive (or negative) parts add to `P`: a channel whose codes are unsafe at its scale is safe at

    s = max over pairs of P / (B - 1)

Which weights are neighbours depends on the kernel (`PairLayout`); found by probing each pair (`qfunc.edge.host`).
VNNI does not settle it: fbgemm has one depthwise kernel for all CPUs, which adds in int16 (`PairLayouts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

PairLayout: TypeAlias = Literal["none", "channels", "flat", "any", "any of axis 1"]
"""Which weights of an output channel `[in_channels / groups, *kernel]` a kernel adds in int16.

- `none`: no pair (VNNI, or wider arithmetic);
- `channels`: input channels `2k` and `2k + 1` of the group, at the same kernel tap (oneDNN);
- `flat`: entries `2k` and `2k + 1` of the weight laid out taps first, channels last (fbgemm: for odd channel counts and
  depthwise convolutions a pair spans two taps);
- `any`: unknown, so any two;
- `any of axis 1`: any two of a weight whose output channels are its axis 1, as a transposed convolution's are.
"""


@dataclass(frozen=True, slots=True)
class PairLayouts:
    """The pair layouts of an engine, which has a kernel of its own for depthwise convolutions."""

    dense: PairLayout
    """Of linear layers, and of convolutions of more than one channel per group."""
    depthwise: PairLayout
    """Of convolutions of one channel per group, with any number of output channels for each."""

    def of(self, shape: tuple[int, ...], groups: int = 1) -> PairLayout:
        """The layout of a weight `[out_channels, in_channels / groups, *kernel]`.

        >>> layouts = PairLayouts("none", "flat")
        >>> layouts.of((96, 1, 3, 3), groups=96), layouts.of((96, 2, 3, 3), groups=48), layouts.of((96, 1, 3, 3))
        ('flat', 'none', 'none')
        """
        return self.depthwise if groups > 1 and shape[1] == 1 else self.dense

    @property
    def saturates(self) -> bool:
        """Whether any kernel adds pairs in int16."""
        return (self.dense, self.depthwise) != ("none", "none")


UNPAIRED = PairLayouts("none", "none")
"""No kernel adds in int16."""

_INT16_MAX = 32767


def channel_axis(layout: PairLayout) -> int:
    """The axis of the output channels of a weight of this layout."""
    return 1 if layout == "any of axis 1" else 0


def pair_bound(quant_max_activation: int = 255) -> int:
    """The largest safe sum of two weight codes of one sign.

    >>> pair_bound(255), pair_bound(127)
    (128, 258)
    """
    return _INT16_MAX // quant_max_activation


def largest_pair_sums(weight: Tensor, layout: PairLayout) -> Tensor:
    """Per output channel, the largest sum of the positive, or of the negative, parts of two weights that meet.

    >>> w = torch.tensor([[3.0, 5.0, -2.0, 9.0], [1.0, -7.0, -6.0, -1.0]])
    >>> largest_pair_sums(w, "channels").tolist(), largest_pair_sums(w, "any").tolist()
    ([9.0, 7.0], [14.0, 13.0])
    """
    if layout == "any of axis 1":
        weight, layout = weight.transpose(0, 1), "any"
    rows = weight.reshape(*weight.shape[:2], -1)
    both = torch.stack([rows.clamp(min=0), (-rows).clamp(min=0)])
    sign, channels, inputs, taps = both.shape
    match layout:
        case "none":
            return both.new_zeros(channels)
        case "any":
            flat = both.reshape(sign, channels, -1)
            sums = flat.topk(min(2, flat.shape[-1]), dim=-1).values.sum(-1, keepdim=True)
        case "flat":
            sums = _neighbours(both.transpose(2, 3).reshape(sign, channels, taps * inputs, 1))
        case "channels":
            sums = _neighbours(both)
    return sums.amax(-1).amax(0)


def _neighbours(parts: Tensor) -> Tensor:
    odd = parts.shape[2] % 2
    padded = torch.nn.functional.pad(parts, (0, 0, 0, odd)) if odd else parts
    return (padded[:, :, 0::2] + padded[:, :, 1::2]).flatten(2)


def saturating_channels(codes: Tensor, layout: PairLayout, quant_max_activation: int = 255) -> Tensor:
    """For each output channel of `int8` codes, whether some activations make a pair of products saturate.

    >>> saturating_channels(torch.tensor([[127, 2], [127, 1], [127, -127]], dtype=torch.int8), "channels").tolist()
    [True, False, False]
    """
    return largest_pair_sums(codes.to(torch.int32), layout) > pair_bound(quant_max_activation)


def limit_pair_sums(
    weight: Tensor,
    scale: Tensor,
    layout: PairLayout,
    *,
    quant_max_activation: int = 255,
    quant_min: int = -128,
    quant_max: int = 127,
) -> Tensor:
    """The scales (`[out_channels]`) at which no pair saturates: `scale` where it is safe, else the smallest known safe.

    `weight` is float `[out_channels, in_channels / groups, *kernel]`, or as the layout says; it is quantized
    symmetrically as `clamp(round(weight / scale), quant_min, quant_max)`. `scale` may be one value for all channels.
    The result is never below `scale`, and limiting again changes nothing.

    >>> w = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    >>> limit_pair_sums(w, torch.tensor([1 / 127, 1 / 127]), "channels").mul(127).round(decimals=4).tolist()
    [2.0, 1.0]
    """
    bound = pair_bound(quant_max_activation)
    assert bound > 1, f"no scale is safe for activations up to {quant_max_activation}"
    axis = channel_axis(layout)
    per_channel = scale.expand(weight.shape[axis])
    shape = [-1 if at == axis else 1 for at in range(weight.dim())]
    codes = (weight / per_channel.reshape(shape)).round().clamp(quant_min, quant_max)
    unsafe = largest_pair_sums(codes, layout) > bound
    # One float32 step above the bound, so that rounding in `weight / scale` cannot undo it.
    floor = largest_pair_sums(weight, layout) / (bound - 1) * (1 + 2**-22)
    return torch.where(unsafe, torch.maximum(per_channel, floor.to(scale.dtype)), per_channel)
