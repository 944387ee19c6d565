"""Embeddings over tables of integer codes: rows are looked up as codes, and those alone are dequantized."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc.edge.kernels.affine import Quantize
from qfunc.edge.kernels.base import Kernel
from qfunc.numerics.grid import Affine
from qfunc.numerics.qparams import QParams

Mode = Literal["sum", "mean", "max"]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of 4 bits, two in a byte, the first in the low half: `uint8 [n, d]` to `uint8 [n, (d + 1) // 2]`.

    >>> pack_nibbles(torch.tensor([[1, 2, 15]], dtype=torch.uint8)).tolist()
    [[33, 15]]
    """
    even = F.pad(codes, (0, codes.shape[-1] % 2))
    return even[..., 0::2] | (even[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor, width: int) -> Tensor:
    """The inverse: the first `width` codes of each row.

    >>> unpack_nibbles(torch.tensor([[33, 15]], dtype=torch.uint8), 3).tolist()
    [[1, 2, 15]]
    """
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)[..., :width]


class _Table(Kernel):
    """A table `[num_embeddings, embedding_dim]` of codes; those of 4 bits are kept two in a byte.

    `weight_scale` and `weight_zero_point` are scalars, or one per row or column, as the spec's axis says. An index
    that no row has raises `IndexError`.
    """

    weight_zero_point: Tensor

    def __init__(self, codes: Tensor, qparams: QParams, dtype: torch.dtype, output: Affine | None) -> None:
        super().__init__()
        assert codes.dim() == 2 and codes.numel(), f"table {tuple(codes.shape)}"
        self._nibbles = qparams.spec.dtype == "uint4"
        self.register_buffer("weight", pack_nibbles(codes) if self._nibbles else codes)
        self.register_buffer("weight_scale", qparams.scale)
        self.register_buffer("weight_zero_point", qparams.zero_point)
        self.shape = tuple(codes.shape)
        self._axis, self._dtype = qparams.spec.ch_axis, dtype
        self._out_of = nn.Identity() if output is None else Quantize(output)

    def rows(self, index: Tensor) -> Tensor:
        """The float rows of flat indices, as the table dequantized has them, bit for bit."""
        codes = self.weight.index_select(0, index)
        scale, zero_point = self.weight_scale, self.weight_zero_point
        if self._axis == 0:
            scale, zero_point = (each.index_select(0, index)[:, None] for each in (scale, zero_point))
        codes = unpack_nibbles(codes, self.shape[1]) if self._nibbles else codes
        return (codes.to(torch.float32) - zero_point).mul_(scale).to(self._dtype)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.shape[0]}, {self.shape[1]}, {'uint4' if self._nibbles else self.weight.dtype}"


class CodesEmbedding(_Table):
    """`embedding`: indices of any shape to rows."""

    def forward(self, index: Tensor) -> Tensor:
        """The rows of `index`, along a new last axis."""
        found: Tensor = self._out_of(self.rows(index.reshape(-1)).view(*index.shape, self.shape[1]))
        return found


class CodesEmbeddingBag(_Table):
    """`embedding_bag`: the sum, mean or largest of each bag of rows, as torch's operator computes it in float."""

    def __init__(
        self,
        codes: Tensor,
        qparams: QParams,
        dtype: torch.dtype,
        output: Affine | None,
        *,
        mode: Mode = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(codes, qparams, dtype, output)
        self.mode = mode
        self.include_last_offset = include_last_offset
        self.padding = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + self.shape[0]

    def forward(self, index: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """One row per bag: bags are the rows of a 2-D `index`, or the stretches between `offsets` of a 1-D one."""
        flat = index.reshape(-1)
        rows = self.rows(flat) if flat.numel() else torch.zeros(1, self.shape[1], dtype=self._dtype)
        places = torch.arange(len(flat), dtype=index.dtype)
        padding = None
        if self.padding is not None and flat.numel():
            # all that is padding shares the place of the first, which the operator then leaves out
            padded = flat == self.padding
            first = int(padded.to(torch.uint8).argmax())
            if padded[first]:
                places, padding = places.masked_fill_(padded, first), first
        bags = F.embedding_bag(
            places.view(index.shape),
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )
        found: Tensor = self._out_of(bags)
        return found
