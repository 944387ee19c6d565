"""Adaptive maxima, padding and resizing of plain codes, whose qparams stay.

What repeats or chooses elements is exact on codes. An interpolation is an average whose weights add up to one: of codes
it is that of the values, in steps; it is computed in float32 and rounded once. (aten interpolates `uint8` in fixed
point, up to a step away.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.affine import Quantize
from qfunc.edge.kernels.base import Kernel, round_to_codes
from qfunc.edge.kernels.pool import MaxPool
from qfunc.numerics.grid import Affine

_ADAPTIVE: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_max_pool1d,
    2: F.adaptive_max_pool2d,
    3: F.adaptive_max_pool3d,
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_NEAREST = ("nearest", "nearest-exact")


def like(x: Tensor, given: Tensor) -> Tensor:
    """`x` channels-last where `given` is."""
    memory = _CHANNELS_LAST.get(given.dim())
    return x if memory is None or not given.is_contiguous(memory_format=memory) else x.contiguous(memory_format=memory)


class AdaptiveMaxPool(Kernel):
    """`adaptive_max_pool1d/2d/3d` of codes; `output_size` has one entry per dimension, None keeps the input's.

    Where sizes divide, it is a max pool of equal windows; else it runs in float32, in which codes are exact.

    >>> AdaptiveMaxPool((2,))(torch.tensor([[3, 9, 200, 1]], dtype=torch.uint8)).tolist()
    [[9, 200]]
    """

    def __init__(self, output_size: tuple[int | None, ...]) -> None:
        super().__init__()
        self.output_size = output_size
        self._dims = len(output_size)
        assert self._dims in _ADAPTIVE, f"{self._dims} spatial dimensions"

    def forward(self, x: Tensor) -> Tensor:
        """The maxima of the codes `x`."""
        given = x.shape[-self._dims :]
        sizes = [own if size is None else size for size, own in zip(self.output_size, given, strict=True)]
        whole = x.dim() in (self._dims + 1, self._dims + 2) and min(given) > 0 and min(sizes) > 0
        if whole and set(sizes) == {1}:
            return x.amax(tuple(range(-self._dims, 0)), keepdim=True)
        if whole and all(own % size == 0 for own, size in zip(given, sizes, strict=True)):
            return MaxPool(tuple(own // size for own, size in zip(given, sizes, strict=True)))(x)  # type: ignore[no-any-return]
        return _ADAPTIVE[self._dims](x.to(torch.float32), sizes).to(x.dtype)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.output_size}"


class Pad(Kernel):
    """`F.pad` of codes: with the code of `value`, or by a mode that repeats codes.

    The widths may be known when the module is called.

    >>> Pad((1, 0), "constant", None, Affine(0.5, 7))(torch.tensor([9], dtype=torch.uint8)).tolist()
    [7, 9]
    """

    def __init__(self, pad: tuple[int, ...] | None, mode: str, value: float | None, given: Affine) -> None:
        super().__init__()
        self.pad, self.mode, self.value = None if pad is None else list(pad), mode, value
        self.code = int(Quantize(given)(torch.tensor([value or 0.0]))[0])

    def forward(self, x: Tensor, pad: Any = None) -> Tensor:
        """The padded codes."""
        widths: Any = self.pad if pad is None else pad
        if self.mode == "constant":
            return F.pad(x, widths, value=self.code)
        return like(F.pad(x, widths, mode=self.mode), x)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.pad}, {self.mode}" + (f", value={self.value}, code {self.code}" * (self.mode == "constant"))


class Interpolate(Kernel):
    """`F.interpolate` of codes, but bicubic, which leaves the range of its input.

    The size may be known when the module is called.

    >>> Interpolate(Affine(0.5, 7), "linear", {"scale_factor": 2})(torch.tensor([[[3, 9]]], dtype=torch.uint8)).tolist()
    [[[3, 4, 8, 9]]]
    """

    def __init__(self, given: Affine, mode: str, options: dict[str, Any]) -> None:
        super().__init__()
        assert mode != "bicubic", "bicubic interpolation leaves the range of its input"
        self.given, self.mode = given, mode
        self.options = {"mode": mode, **options}
        # Bounds in units of codes: a scale of one, and no zero point.
        low, high = given.bounds
        self._codes = Affine(1.0, min(max(low, 0), high), given.dtype, low, high)

    def forward(self, x: Tensor, size: Any = None) -> Tensor:
        """The resized codes."""
        options = self.options if size is None else {**self.options, "size": size}
        if self.mode in _NEAREST:  # aten has no kernel for int8
            return like(F.interpolate(x.view(torch.uint8), **options), x).view(x.dtype)
        scaled = F.interpolate(x.to(torch.float32), **options)
        return round_to_codes(scaled.sub_(self._codes.zero_point), self._codes)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return ", ".join(f"{name}={value}" for name, value in self.options.items() if value is not None)
