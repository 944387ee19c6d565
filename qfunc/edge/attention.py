"""Multi-head attention as layers that can be quantized, for `CustomConfig.replacements`."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc.edge.replace_modules import LeafModule


def decomposed_attention(module: nn.MultiheadAttention) -> DecomposedAttention:
    """An `nn.MultiheadAttention` as linear layers, two matrix products and a softmax, which can be traced.

    `CustomConfig(replacements={nn.MultiheadAttention: decomposed_attention})` has every attention of a model traced
    so: its four projections are then quantized as any linear layer is. It computes what the module does, of tensors of
    either rank. The weights of the projections are views of the module's, so that no memory is spent and the module
    stays as it is.

    Two limits: whether the weights of the attention are asked for, and averaged, must be known when the model is
    traced; and where a mask leaves a query no key at all, the result is NaN, as the module's is with
    `need_weights=True`. `is_causal` is the hint that it is to the module: the mask given is what is applied.

    Raises:
        TypeError: for what is no `nn.MultiheadAttention`.

    >>> attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    >>> x = torch.randn(3, 5, 8)
    >>> torch.allclose(attention(x, x, x)[0], decomposed_attention(attention)(x, x, x)[0], atol=1e-6)
    True
    """
    if not isinstance(module, nn.MultiheadAttention):
        raise TypeError(f"expected an nn.MultiheadAttention, got a {type(module).__name__}")
    return DecomposedAttention(module)


class DecomposedAttention(nn.Module):
    """What `decomposed_attention` makes; takes and gives what `nn.MultiheadAttention` does."""

    def __init__(self, module: nn.MultiheadAttention) -> None:
        super().__init__()
        packed = module.in_proj_weight
        weights = (
            (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight) if packed is None else _thirds(packed)
        )
        biases = (None, None, None) if module.in_proj_bias is None else _thirds(module.in_proj_bias)
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias) for weight, bias in zip(weights, biases, strict=True)
        )
        self.out_proj = _linear(module.out_proj.weight, module.out_proj.bias)
        self.bias_k, self.bias_v = module.bias_k, module.bias_v
        self.add_zero_attn, self.batch_first = module.add_zero_attn, module.batch_first
        self.embed_dim, self.num_heads, self.head_dim = module.embed_dim, module.num_heads, module.head_dim
        # The scale is a part of the mask's module: a product with a number shares, for some backends, the qparams of
        # its operand, of whose codes few would then be left.
        extra = (module.bias_k is not None) + module.add_zero_attn
        self.mask = ScaleAndMask(math.sqrt(1.0 / module.head_dim), extra)
        self.dropout = module.dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention's output, and its weights where they are asked for; shapes as in `nn.MultiheadAttention`."""
        if is_causal is True and attn_mask is None:
            raise ValueError("is_causal is a hint that attn_mask is causal: give the mask as well")
        q, k, v = (self._heads(x) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        scores = torch.matmul(q, k.transpose(-2, -1))
        # As a function: for some backends the module has a fixed range, of which the weights of many keys use little.
        weights = F.softmax(self.mask(scores, attn_mask, key_padding_mask), dim=-1)
        if self.training and self.dropout > 0:
            weights = F.dropout(weights, self.dropout)
        output = self.out_proj(self._joined(torch.matmul(weights, v)))
        if not need_weights:
            return output, None
        return output, weights.mean(dim=-3) if average_attn_weights else weights

    def _heads(self, x: Tensor) -> Tensor:
        """`(..., heads, sequence, head_dim)` of projected values, whatever rank they have."""
        parted = torch.unflatten(x, -1, (self.num_heads, self.head_dim))
        return parted.transpose(-3, -2) if self.batch_first else parted.movedim(0, -2)

    def _joined(self, x: Tensor) -> Tensor:
        """The inverse of `_heads`."""
        parted = x.transpose(-3, -2) if self.batch_first else x.movedim(-2, 0)
        return parted.flatten(-2)

    def _extended(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values with the bias, and zeros, behind the sequence."""
        if bias is not None:
            row = bias.view(self.num_heads, 1, self.head_dim)
            x = torch.cat([x, row.expand_as(x[..., :1, :])], dim=-2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, batch_first={self.batch_first}"


class ScaleAndMask(LeafModule):
    """Scales and masks the scores of an attention; the last `extra` keys, which it added itself, are not masked.

    A mask of booleans hides where it is true, one of numbers is added; `None` does nothing.
    """

    def __init__(self, scale: float, extra: int) -> None:
        super().__init__()
        self.scale, self.extra = scale, extra

    def forward(self, scores: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor:
        """The scaled and masked scores.

        `scores` are `([N,] heads, L, S + extra)`, `attn_mask` `(L, S)` or `([N *] heads, L, S)`, `key_padding_mask`
        `([N,] S)`.
        """
        scores = scores * self.scale
        if attn_mask is not None:
            mask = self._additive(attn_mask, scores)
            if mask.dim() == 3 and scores.dim() == 4:
                mask = torch.unflatten(mask, 0, (-1, scores.shape[-3]))
            scores = scores + mask
        if key_padding_mask is not None:
            scores = scores + self._additive(key_padding_mask, scores)[..., None, None, :]
        return scores

    def _additive(self, mask: Tensor, scores: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=scores.dtype, device=scores.device).masked_fill(mask, -math.inf)
        return F.pad(mask, (0, self.extra))


def _thirds(packed: Tensor) -> tuple[nn.Parameter, ...]:
    """Views of a packed parameter, as parameters: writing to either is seen in both."""
    return tuple(nn.Parameter(part, packed.requires_grad) for part in packed.detach().chunk(3))


def _linear(weight: Any, bias: Any) -> nn.Linear:
    """A linear layer with these parameters themselves."""
    rows, columns = weight.shape
    made = nn.Linear(columns, rows, bias=bias is not None, device="meta")
    made.weight, made.bias = weight, bias
    return made
