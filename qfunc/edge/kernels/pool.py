"""Pooling and averages on plain codes.

Maxima commute with the affine map, so they are exact on codes. Averages sum integers, exact in float32 up to windows of
65793 codes, and are rounded once to the output's grid; sums are of integers, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.base import Kernel, operator, outside_compile, round_to_codes
from qfunc.numerics.grid import Affine

_max_pool2d = operator("quantized", "max_pool2d")
_EXACT = 65793  # codes of up to 255 whose sum is below 2**24
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class MaxPool(Kernel):
    """Max pooling of plain `uint8` or `int8` codes in 1, 2 or 3 dimensions (`kernel_size` has one entry for each).

    Qparams stay. The result is channels-last; indices are not returned. `quantized.max_pool2d` takes plain `uint8` and
    is two orders faster than `aten.max_pool2d`; other ranks are views of the 2d case, `int8` is shifted by 128.
    """

    def __init__(
        self,
        kernel_size: tuple[int, ...],
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | None = None,
        dilation: tuple[int, ...] | None = None,
        *,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        dims = self._dims = len(kernel_size)
        assert dims in (1, 2, 3), f"{dims} spatial dimensions"
        self.kernel_size = list(kernel_size)
        self.stride = list(stride or kernel_size)
        self.padding = list(padding or (0,) * dims)
        self.dilation = list(dilation or (1,) * dims)
        self.ceil_mode = ceil_mode
        self._window = (self.kernel_size, self.stride, self.padding, self.dilation, ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        """The maxima of the codes `x`."""
        if torch.compiler.is_compiling():
            return self._uncompiled(x)
        if x.dtype is torch.int8:
            return self._pool(x.view(torch.uint8).bitwise_xor(128)).bitwise_xor_(128).view(torch.int8)
        return self._pool(x)

    @outside_compile
    def _uncompiled(self, x: Tensor) -> Tensor:
        return self.forward(x)

    def _pool(self, x: Tensor) -> Tensor:
        if x.dim() == self._dims + 1:
            return self._pool(x.unsqueeze(0)).squeeze(0)
        match self._dims:
            case 2:
                return _max_pool2d(x.contiguous(memory_format=torch.channels_last), *self._window)  # type: ignore[no-any-return]
            case 1:
                return _pool_along(x.unsqueeze(2), self._window, (0,)).squeeze(2)
            case _:
                return self._pool3d(x)

    def _pool3d(self, x: Tensor) -> Tensor:
        """A box's maximum is the maximum over depth of the maxima over height and width."""
        batch, _channels, depth = x.shape[:3]
        planes = x.movedim(2, 1).flatten(0, 1)
        planes = _pool_along(planes, self._window, (1, 2))
        height, width = planes.shape[2:]
        columns = planes.reshape(batch, depth, *planes.shape[1:]).movedim(2, 1).flatten(3)
        return _pool_along(columns, self._window, (0, None)).unflatten(3, (height, width))  # type: ignore[no-any-return, no-untyped-call]

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, ceil_mode={self.ceil_mode}"
        )


def _pool_along(x: Tensor, window: tuple[Any, ...], axes: tuple[int | None, ...]) -> Tensor:
    """2d max pooling with the window's entries `axes` in the last dimensions, and 1 in the others."""
    full = (None,) * (2 - len(axes)) + axes
    sizes = [[1 if a is None else entry[a] for a in full] for entry in (window[0], window[1])]
    padding = [0 if a is None else window[2][a] for a in full]
    dilation = [1 if a is None else window[3][a] for a in full]
    x = x.contiguous(memory_format=torch.channels_last)
    return _max_pool2d(x, *sizes, padding, dilation, window[4])  # type: ignore[no-any-return]


class Average(Kernel):
    """An average of codes, rounded once to the output's grid; the parent of all average kernels.

    `average` of float32 is linear; `weights_sum_to_one` says that the average of a constant is that constant, which
    moves the zero point out of the big tensor. Padding counts as real zero, so it needs the zero point taken first.
    """

    def __init__(self, given: Affine, output: Affine, *, weights_sum_to_one: bool) -> None:
        super().__init__()
        self.given = given
        self.output = output
        self._late = weights_sum_to_one
        self._ratio = given.scale / output.scale

    def average(self, x: Tensor) -> Tensor:
        """The float32 average."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The codes of the average of `x`."""
        real = x.to(torch.float32)
        if self._late:
            mean = self.average(real).sub_(self.given.zero_point)
        else:
            mean = self.average(real.sub_(self.given.zero_point))
        return round_to_codes(mean.mul_(self._ratio), self.output)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.given} -> {self.output}"


class AvgPool(Average):
    """`avg_pool1d`, `avg_pool2d` or `avg_pool3d` of codes, with all options of torch's."""

    def __init__(
        self,
        kernel_size: tuple[int, ...],
        given: Affine,
        output: Affine,
        *,
        stride: tuple[int, ...] | None = None,
        padding: tuple[int, ...] | None = None,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        dims = len(kernel_size)
        padding = padding or (0,) * dims
        super().__init__(
            given,
            output,
            weights_sum_to_one=not any(padding) and not ceil_mode and divisor_override is None,
        )
        assert dims in _AVG_POOL, f"{dims} spatial dimensions"
        assert dims > 1 or divisor_override is None, "avg_pool1d has no divisor_override"
        self.kernel_size = kernel_size
        options = (kernel_size, stride or kernel_size, padding, ceil_mode, count_include_pad)
        self._options = options if dims == 1 else (*options, divisor_override)
        self._function = _AVG_POOL[dims]

    def average(self, x: Tensor) -> Tensor:
        """The float32 average."""
        return self._function(x, *self._options)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self._options}, {super().extra_repr()}"


class AdaptiveAvgPool(Average):
    """`adaptive_avg_pool1d/2d/3d` of codes; `output_size` has one entry per dimension, None keeps the input's."""

    def __init__(self, output_size: tuple[int | None, ...], given: Affine, output: Affine) -> None:
        super().__init__(given, output, weights_sum_to_one=True)
        self.output_size = output_size
        self._function = _ADAPTIVE[len(output_size)]
        self._all = set(output_size) == {1}

    def average(self, x: Tensor) -> Tensor:
        """The float32 average."""
        if self._all:
            return x.mean(tuple(range(-len(self.output_size), 0)), keepdim=True)
        shape = x.shape[-len(self.output_size) :]
        return self._function(
            x, [given if size is None else size for size, given in zip(self.output_size, shape, strict=True)]
        )

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.output_size}, {super().extra_repr()}"


class Mean(Average):
    """`mean` of codes over `dim` (all dimensions where it is empty)."""

    def __init__(self, dim: tuple[int, ...], given: Affine, output: Affine, *, keepdim: bool = False) -> None:
        super().__init__(given, output, weights_sum_to_one=True)
        self.dim = dim
        self.keepdim = keepdim

    def average(self, x: Tensor) -> Tensor:
        """The float32 average."""
        return x.mean(self.dim or None, keepdim=self.keepdim)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"dim={self.dim}, keepdim={self.keepdim}, {super().extra_repr()}"


class Sum(Kernel):
    """`sum` of codes over `dim` (all dimensions where it is empty): exact, then rounded once to the output's grid.

    >>> Sum((), Affine(0.5, 1), Affine(1.0, 0))(torch.tensor([3, 5], dtype=torch.uint8)).item()
    3
    """

    def __init__(self, dim: tuple[int, ...], given: Affine, output: Affine, *, keepdim: bool = False) -> None:
        super().__init__()
        self.dim, self.keepdim = dim, keepdim
        self.given, self.output = given, output
        self._ratio = given.scale / output.scale

    def forward(self, x: Tensor) -> Tensor:
        """The codes of the sum of `x`."""
        dim = self.dim or tuple(range(x.dim()))
        count = 1
        for axis in dim:
            count *= x.shape[axis]
        if count <= _EXACT:
            total = x.to(torch.float32).sum(dim, keepdim=self.keepdim).sub_(count * self.given.zero_point)
        else:
            whole = x.sum(dim, keepdim=self.keepdim, dtype=torch.int64)
            total = whole.sub_(count * self.given.zero_point).to(torch.float32)
        return round_to_codes(total.mul_(self._ratio), self.output)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"dim={self.dim}, keepdim={self.keepdim}, {self.given} -> {self.output}"
