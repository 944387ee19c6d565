"""What scales each channel of plain codes on its own: batch norms that stand alone, and PReLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.arithmetic import ArithmeticPostOp, rounding
from qfunc.edge.kernels.base import Kernel, round_to_codes
from qfunc.numerics.grid import Affine


class BatchNorm(Kernel):
    """A batch norm in evaluation (+ ReLU) of codes with any number of spatial dimensions: `code * factor + offset`.

    `factor` and `offset` (`float32 [channels]`) are in steps of the output; `of` makes them of a norm's parameters.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, factor: Tensor, offset: Tensor, output: Affine, post_op: ArithmeticPostOp = "none") -> None:
        super().__init__()
        assert factor.dtype == offset.dtype == torch.float32, "float32 factors"
        assert factor.dim() == 1 and factor.shape == offset.shape, "one factor a channel"
        self.register_buffer("factor", factor)
        self.register_buffer("offset", offset)
        self.output, self.post_op = output, post_op
        self._rounding = rounding(output, post_op)

    @staticmethod
    def of(
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        given: Affine,
        output: Affine,
        post_op: ArithmeticPostOp = "none",
    ) -> BatchNorm:
        """The kernel of a norm with these parameters, from codes of `given` to codes of `output`.

        >>> zero, one = torch.zeros(1), torch.ones(1)
        >>> norm = BatchNorm.of(zero, 4 * one, one, one, 0.0, Affine(1.0, 2), Affine(0.5, 10))
        >>> norm(torch.tensor([[4]], dtype=torch.uint8)).item()  # (4 - 2) / 2 + 1 = 2, four steps above 10
        14
        """
        factor = torch.rsqrt(var.double() + eps)
        if weight is not None:
            factor = factor * weight.double()
        offset = -mean.double() * factor if bias is None else bias.double() - mean.double() * factor
        steps = factor * given.scale / output.scale
        shift = offset / output.scale - steps * given.zero_point
        return BatchNorm(steps.to(torch.float32), shift.to(torch.float32), output, post_op)

    def forward(self, x: Tensor) -> Tensor:
        """The codes of the norm of `x`."""
        if x.dim() < 2 or x.shape[1] != len(self.factor):
            raise RuntimeError(f"batch norm of {len(self.factor)} channels cannot take an input of {tuple(x.shape)}")
        shape = (-1, *[1] * (x.dim() - 2))
        scaled = x.to(torch.float32).mul_(self.factor.reshape(shape)).add_(self.offset.reshape(shape))
        return round_to_codes(scaled, self._rounding)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        post_op = "" if self.post_op == "none" else f", {self.post_op}"
        return f"{len(self.factor)} channels -> {self.output}{post_op}"


class PReLU(Kernel):
    """`prelu` of codes, with one slope for all (`slope` is `float32 [1]`) or one a channel (`float32 [channels]`).

    >>> prelu = PReLU(torch.tensor([0.5]), Affine(1.0, 4), Affine(0.5, 10))
    >>> prelu(torch.tensor([0, 4, 9], dtype=torch.uint8)).tolist()
    [6, 10, 20]
    """

    slope: Tensor

    def __init__(self, slope: Tensor, given: Affine, output: Affine) -> None:
        super().__init__()
        assert slope.dtype == torch.float32 and slope.dim() == 1, "float32 slopes"
        self.register_buffer("slope", slope)
        self.given, self.output = given, output
        self._ratio = given.scale / output.scale

    def forward(self, x: Tensor) -> Tensor:
        """The codes of the result."""
        real = x.to(torch.float32).sub_(self.given.zero_point)
        return round_to_codes(F.prelu(real, self.slope).mul_(self._ratio), self.output)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{len(self.slope)} slopes, {self.given} -> {self.output}"
