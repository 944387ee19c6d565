"""The reference form of what kernels do not take: any integer type, scales per channel, qparams chosen at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from qfunc.edge.kernels.base import Kernel, outside_compile
from qfunc.numerics.affine import dequantize, fake_quantize, quantize
from qfunc.numerics.grid import Grid
from qfunc.numerics.observers import MinMax, PerChannelMinMax
from qfunc.numerics.qparams import QuantSpec


class _OnGrid(Kernel):
    """Qparams as tensors: made of literals, so that they are no state."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        qparams = grid.qparams()
        self.register_buffer("scale", qparams.scale, persistent=False)
        self.register_buffer("zero_point", qparams.zero_point, persistent=False)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return str(self.grid)


class QuantizeGrid(_OnGrid):
    """Real values to codes, see `qfunc.numerics.affine.quantize`; for a grid per channel, `x.shape[ch_axis]` of them.

    >>> two = Grid((1.0, 10.0), (0, 0), QuantSpec("int16", -9, 9, "per_channel_symmetric", 1))
    >>> QuantizeGrid(two)(torch.tensor([[5.0, 52.0]]))
    tensor([[5, 5]], dtype=torch.int16)
    """

    def forward(self, x: Tensor) -> Tensor:
        """Codes of `x`."""
        spec = self.grid.spec
        codes = spec.quant_min, spec.quant_max, spec.torch_dtype
        return quantize(x, self.scale, self.zero_point, *codes, ch_axis=spec.ch_axis)


class DequantizeGrid(_OnGrid):
    """Codes to float32, see `qfunc.numerics.affine.dequantize`.

    >>> two = Grid((1.0, 10.0), (0, 0), QuantSpec("int16", -9, 9, "per_channel_symmetric", 1))
    >>> DequantizeGrid(two)(torch.tensor([[5, 5]], dtype=torch.int16))
    tensor([[ 5., 50.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Real values of the codes `x`."""
        return dequantize(x, self.scale, self.zero_point, ch_axis=self.grid.spec.ch_axis)


class QuantizeDynamically(Kernel):
    """Rounding of each tensor to codes whose qparams are made of its own least and largest value; float32.

    They are those that `MinMax` (or `PerChannelMinMax`) finds for this tensor alone. An empty tensor stays empty.

    >>> QuantizeDynamically(QuantSpec())(torch.tensor([0.0, 1.2, 255.0]))
    tensor([  0.,   1., 255.])
    """

    def __init__(self, spec: QuantSpec) -> None:
        super().__init__()
        self.spec = spec
        self.observer = PerChannelMinMax(spec) if spec.per_channel else MinMax(spec)

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid of its own range."""
        floats = x.to(torch.float32)
        # what runs outside a compiled graph loads the compiler at its first call
        compiling = torch.compiler.is_compiling()
        return _outside(floats, self.observer) if compiling else on_own_grid(floats, self.observer)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.spec.dtype} {self.spec.quant_min}..{self.spec.quant_max} {self.spec.qscheme}"


def on_own_grid(x: Tensor, observer: MinMax | PerChannelMinMax) -> Tensor:
    """`x` on the grid of its range; the code that finds that reads numbers, which breaks a compiled graph anyway."""
    spec = observer.spec
    if spec.ch_axis is not None and spec.ch_axis >= x.dim():
        raise IndexError(f"ch_axis {spec.ch_axis} is no axis of a tensor of shape {tuple(x.shape)}")
    qparams = observer.finish(observer.update(observer.init(), x))
    if qparams is None:
        return x
    codes = spec.quant_min, spec.quant_max
    return fake_quantize(x, qparams.scale, qparams.zero_point, *codes, ch_axis=spec.ch_axis)


_outside = outside_compile(on_own_grid)
