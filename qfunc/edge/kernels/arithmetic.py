"""Sums, differences and products of two code tensors, and joins, each operand with its own qparams.

Computed in float32 with one rounding at the end. oneDNN's own `qadd.tensor` and `qmul.tensor` are not used: they are an
order slower, wrong where the operands' memory formats differ, and on AVX-512 wrong for codes from 128 up.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qfunc.edge.kernels.affine import requantize
from qfunc.edge.kernels.base import Kernel, round_to_codes
from qfunc.numerics.grid import Affine

ArithmeticPostOp: TypeAlias = Literal["none", "relu"]


def rounding(output: Affine, post_op: ArithmeticPostOp) -> Affine:
    """What to round to, so that a post-op is done as well: ReLU on the output's grid is a higher lower bound.

    >>> rounding(Affine(0.5, 3), "relu").bounds
    (3, 255)
    """
    assert post_op in ("none", "relu"), post_op
    low, high = output.bounds
    if post_op == "none":
        return output
    return Affine(output.scale, output.zero_point, output.dtype, max(low, output.zero_point), high)


class _Arithmetic(Kernel):
    def __init__(self, left: Affine, right: Affine, output: Affine, post_op: ArithmeticPostOp = "none") -> None:
        super().__init__()
        self.left, self.right, self.output = left, right, output
        self.post_op = post_op
        self._rounding = rounding(output, post_op)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        post_op = "" if self.post_op == "none" else f", {self.post_op}"
        return f"{self.left}, {self.right} -> {self.output}{post_op}"


class Add(_Arithmetic):
    """`left + alpha * right` (+ ReLU) of codes, with broadcasting; the memory format is the larger operand's.

    A difference is a sum with `alpha=-1`.

    >>> add = Add(Affine(0.5, 0), Affine(1.0, 2), Affine(0.5, 1))
    >>> add(torch.tensor([4], dtype=torch.uint8), torch.tensor([5], dtype=torch.uint8)).tolist()
    [11]
    """

    def __init__(
        self, left: Affine, right: Affine, output: Affine, post_op: ArithmeticPostOp = "none", *, alpha: float = 1.0
    ) -> None:
        super().__init__(left, right, output, post_op)
        self.alpha = alpha
        self._left = left.scale / output.scale
        self._right = alpha * right.scale / output.scale
        self._shift = -(left.zero_point * self._left + right.zero_point * self._right)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The codes of the sum."""
        a = x.to(torch.float32)
        b = y.to(torch.float32)
        a.mul_(self._left)
        # The shift goes to the smaller operand; a sum of equal shapes is taken in place.
        if a.numel() < b.numel():
            total = a.add_(self._shift).add(b, alpha=self._right)
        elif a.shape == b.shape:
            total = a.add_(b, alpha=self._right).add_(self._shift)
        else:
            total = a.add(b.mul_(self._right).add_(self._shift))
        return round_to_codes(total, self._rounding)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return super().extra_repr() + ("" if self.alpha == 1 else f", alpha={self.alpha:g}")


class Mul(_Arithmetic):
    """`left * right` (+ ReLU) of codes, with broadcasting.

    >>> mul = Mul(Affine(0.5, 0), Affine(1.0, 2), Affine(0.5, 1))
    >>> mul(torch.tensor([4], dtype=torch.uint8), torch.tensor([5], dtype=torch.uint8)).tolist()
    [13]
    """

    def __init__(self, left: Affine, right: Affine, output: Affine, post_op: ArithmeticPostOp = "none") -> None:
        super().__init__(left, right, output, post_op)
        self._ratio = left.scale * right.scale / output.scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The codes of the product."""
        a = x.to(torch.float32).sub_(self.left.zero_point)
        b = y.to(torch.float32).sub_(self.right.zero_point)
        # The scale goes to the smaller operand: a squeeze-and-excite gate is a thousandth of what it scales.
        product = a.mul_(self._ratio).mul(b) if a.numel() < b.numel() else a.mul(b.mul_(self._ratio))
        return round_to_codes(product, self._rounding)


class Cat(Kernel):
    """Concatenation of codes; inputs whose qparams differ from the output's are requantized first.

    >>> cat = Cat((Affine(1.0, 0), Affine(0.5, 0)), Affine(1.0, 0), dim=0)
    >>> cat([torch.tensor([3], dtype=torch.uint8), torch.tensor([8], dtype=torch.uint8)]).tolist()
    [3, 4]
    """

    def __init__(self, inputs: tuple[Affine, ...], output: Affine, dim: int = 0) -> None:
        super().__init__()
        self.inputs, self.output, self.dim = inputs, output, dim
        self._tables = torch.nn.ModuleList(
            torch.nn.Identity() if _same_grid(given, output) else requantize(given, output) for given in inputs
        )
        self._plain = all(_same_grid(given, output) for given in inputs)

    _join = staticmethod(torch.cat)

    def forward(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
        """The joined codes."""
        if self._plain:
            return self._join(tensors, self.dim)
        return self._join([table(x) for table, x in zip(self._tables, tensors, strict=True)], self.dim)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{len(self.inputs)} tensors -> {self.output}, dim={self.dim}"


class Stack(Cat):
    """A stack of codes along a new dimension; inputs whose qparams differ from the output's are requantized first.

    >>> stack = Stack((Affine(1.0, 0), Affine(0.5, 0)), Affine(1.0, 0), dim=0)
    >>> stack([torch.tensor([3], dtype=torch.uint8), torch.tensor([8], dtype=torch.uint8)]).tolist()
    [[3], [4]]
    """

    _join = staticmethod(torch.stack)


def _same_grid(given: Affine, output: Affine) -> bool:
    return (given.scale, given.zero_point, given.dtype) == (output.scale, output.zero_point, output.dtype) and (
        output.bounds[0] <= given.bounds[0] and given.bounds[1] <= output.bounds[1]
    )
