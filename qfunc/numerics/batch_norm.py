"""Batch norm in evaluation mode, folded into the convolution or linear layer before it, or behind it.

    y  = gamma * (W x + b - mean) / sqrt(var + eps) + beta
       = W' x + b'
    f  = gamma / sqrt(var + eps)                              per output channel
    W' = f * W
    b' = f * (b - mean) + beta

Before the layer, where every product that the layer sums up is of a normed value (no zero padding):

    y  = W (gamma * (x - mean) / sqrt(var + eps) + beta) + b
       = W' x + b'
    c  = beta - f * mean                                      per input channel
    W' = W * f
    b' = b + sum(W * c)

A weight holds its output channels in axis 0. A transposed convolution's has shape `(in, out / groups, ...)`: output
channel `g * (out / groups) + j` of group g is column j of the g-th block of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    transpose: bool = False,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that computes the layer and the batch norm after it.

    An absent `bias` or `beta` is 0, an absent `gamma` 1. `transpose` and `groups` are those of the convolution
    (`groups` matters only if transposed). Computed in float64 and rounded once, to the type of `weight` and of `bias`
    (or of `weight` without one); the memory format of `weight` stays unless transposed in groups. No input changes.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.2.

    >>> one = torch.ones(1)
    >>> w, b = fold_batch_norm(torch.full((1, 1), 2.0), None, 3 * one, 4 * one, 0.0, one, one)
    >>> w.item(), b.item()
    (1.0, -0.5)
    """
    with torch.no_grad():
        factor = _factor(running_var, eps, gamma)
        shift = -running_mean.double() if bias is None else bias.double() - running_mean.double()
        shift = shift * factor
        if beta is not None:
            shift = shift + beta.double()
        folded = scaled_channels(weight.double(), factor, transpose, groups).to(weight.dtype)
        return folded, shift.to(weight.dtype if bias is None else bias.dtype)


def fold_batch_norm_before(
    weight: Tensor,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    eps: float,
    gamma: Tensor | None,
    beta: Tensor | None,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one layer that computes a batch norm and the convolution or linear layer behind it.

    `weight` is `[out_channels, in_channels / groups, *kernel]`, the batch norm has `in_channels` features. Computed in
    float64 and rounded once, as `fold_batch_norm`; the convolution must not pad with zeros, which are not normed.

    >>> one = torch.ones(1)
    >>> w, b = fold_batch_norm_before(torch.full((1, 1), 2.0), None, 3 * one, 4 * one, 0.0, one, one)
    >>> w.item(), b.item()
    (1.0, -1.0)
    """
    with torch.no_grad():
        factor = _factor(running_var, eps, gamma)
        shift = -running_mean.double() * factor
        if beta is not None:
            shift = shift + beta.double()
        outputs, inputs, *kernel = weight.shape
        per_input = (groups, 1, inputs, *[1] * len(kernel))
        blocks = weight.double().reshape(groups, -1, inputs, *kernel)
        offset = (blocks * shift.view(per_input)).flatten(2).sum(2).flatten()
        folded = (blocks * factor.view(per_input)).reshape(outputs, inputs, *kernel).to(weight.dtype)
        if bias is None:
            return folded, offset.to(weight.dtype)
        return folded, (bias.double() + offset).to(bias.dtype)


def _factor(running_var: Tensor, eps: float, gamma: Tensor | None) -> Tensor:
    """What a batch norm multiplies each channel with, in float64."""
    factor = torch.rsqrt(running_var.double() + eps)
    return factor if gamma is None else factor * gamma.double()


def scaled_channels(weight: Tensor, factor: Tensor, transpose: bool, groups: int) -> Tensor:
    """`weight` times `factor`, which has one number per output channel."""
    spatial = [1] * (weight.dim() - 2)
    if not transpose:
        return weight * factor.view(-1, 1, *spatial)
    blocks = weight.reshape(groups, -1, *weight.shape[1:])
    return (blocks * factor.view(groups, 1, -1, *spatial)).flatten(0, 1)
