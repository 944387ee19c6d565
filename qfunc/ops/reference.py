"""Meanings that no single function of torch has, for the vocabulary's `call`s."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

Sizes = tuple[int, ...]


def padded_conv(
    input: Tensor,  # noqa: A002 - the field's name for it
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
    padding_mode: str,
) -> Tensor:
    """A convolution that pads with values of its input, as `torch.nn.ConvNd` with this `padding_mode` does.

    >>> x, w = torch.arange(4.0).reshape(1, 1, 4), torch.ones(1, 1, 3)
    >>> padded_conv(x, w, None, (1,), (1,), (1,), 1, "circular")
    tensor([[[4., 3., 6., 5.]]])
    """
    widths: list[int] = []
    for axis in reversed(range(len(stride))):  # F.pad begins with the last dimension
        if isinstance(padding, str):
            total = dilation[axis] * (weight.shape[axis + 2] - 1) if padding == "same" else 0
            widths += [total // 2, total - total // 2]
        else:
            widths += [padding[axis], padding[axis]]
    padded = F.pad(input, widths, mode=padding_mode)
    convolution = (F.conv1d, F.conv2d, F.conv3d)[len(stride) - 1]
    return convolution(padded, weight, bias, stride, 0, dilation, groups)


def identity(input: Tensor) -> Tensor:  # noqa: A002 - the field's name for it
    """The input itself."""
    return torch.dropout(input, 0.0, False)
