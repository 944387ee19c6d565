"""Engine `"quantized"`: `torch.ops.quantized.*` on torch's quantized tensors (`quint8` activations).

Pooling, averages, ReLU, clamps, reshapes and fixed-range activations are plain aten operators on quantized tensors and
need no module. These modules can be scripted with `torch.jit.script`. A packed weight belongs to the engine it was
packed under and runs whatever engine is active later; the active engine is left as it was found. Importing this module
is silent, but torch warns once when a process makes its first quantized tensor: the dtypes are deprecated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from qfunc.edge.kernels.base import check_weight, keeping_dtype
from qfunc.edge.kernels.conv import is_thin, thickened
from qfunc.edge.kernels.quantized_tensors import pad_quantized, with_codes
from qfunc.numerics.grid import Affine

TorchEngine: TypeAlias = Literal["x86", "fbgemm", "qnnpack", "onednn"]

_ENGINE_LOCK = threading.RLock()


@contextmanager
def active_engine(engine: TorchEngine) -> Iterator[None]:
    """Pack or run under `engine`, then restore the engine that was active.

    It is global to the process, hence the lock, also where it seems to be active: another thread may be about to
    restore its own.
    """
    with _ENGINE_LOCK:
        before = torch.backends.quantized.engine
        torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


@dataclass(frozen=True, slots=True)
class QConvCall:
    """The literals of a convolution on quantized tensors.

    `padding` are the zeros on both sides of each spatial dimension that the kernel adds; `pad` is what is padded before
    it, as `F.pad` takes it, by `padding_mode`.
    """

    output_scale: float
    output_zero_point: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    relu: bool = False
    pad: tuple[int, ...] = ()
    padding_mode: str = "zeros"


class Packed(nn.Module):
    """Weights as `int8` and float32 buffers, and torch's packed object, made from them and never part of the state."""

    if TYPE_CHECKING:  # torch.jit.script would read these annotations as attributes, and not understand them
        weight: Tensor
        weight_scale: Tensor
        bias: Tensor | None

    def __init__(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, engine: TorchEngine) -> None:
        super().__init__()
        self._check(weight, weight_scale, bias)
        self.training = False
        self.engine: str = engine
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)

    @torch.jit.unused
    def _check(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        check_weight(weight, weight_scale)
        assert bias is None or (bias.dtype == torch.float32 and bias.shape == weight_scale.shape), (
            "one float32 bias a channel"
        )

    @torch.jit.unused
    def _quantized_weight(self) -> Tensor:
        scale = self.weight_scale.double()
        zeros = torch.zeros(scale.shape[0], dtype=torch.int64)
        return torch._make_per_channel_quantized_tensor(self.weight, scale, zeros, 0)

    @torch.jit.unused
    def _pack(self) -> Any:
        raise NotImplementedError

    @torch.jit.unused
    def repack(self) -> None:
        """Pack the present buffers anew."""
        with active_engine(cast("TorchEngine", self.engine)):
            self.packed = self._pack()

    @torch.jit.unused
    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state.pop("packed", None)
        return state

    @torch.jit.unused
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.repack()

    @torch.jit.unused
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.repack()

    @torch.jit.unused
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        return super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]


_CONV_PREPACK = {
    1: torch.ops.quantized.conv1d_prepack,
    2: torch.ops.quantized.conv2d_prepack,
    3: torch.ops.quantized.conv3d_prepack,
}


_ONEDNN = ("x86", "onednn")
"""torch's engines that run convolutions with oneDNN, of which 3.12 is wrong on some small shapes (see `OnednnConv`)."""


def _extents(call: QConvCall, weight: Tensor) -> list[int]:
    """The sizes of the window."""
    return [step * (size - 1) + 1 for step, size in zip(call.dilation, weight.shape[2:], strict=True)]


def _guarded(call: QConvCall, weight: Tensor, engine: TorchEngine) -> QConvCall:
    """The call, padded beforehand where padding holds a whole window."""
    held = any(pad >= extent for pad, extent in zip(call.padding, _extents(call, weight), strict=True))
    if engine not in _ONEDNN or not held:
        return call
    assert not any(call.pad), "either the kernel pads, or what is before it"
    pad = tuple(width for width in reversed(call.padding) for _ in range(2))
    return replace(call, pad=pad, padding=(0,) * len(call.padding), padding_mode="zeros")


def _least(call: QConvCall, weight: Tensor, engine: TorchEngine) -> list[int]:
    """The smallest spatial sizes that are right: of a padded window, and of two windows where they have a stride."""
    if engine not in _ONEDNN:
        return [0] * len(call.stride)
    return [
        max(extent if pad else 0, extent + stride - 2 * pad if stride > 1 else 0)
        for extent, stride, pad in zip(_extents(call, weight), call.stride, call.padding, strict=True)
    ]


class PackedConv(Packed):
    """A convolution: its literals, and the padding before it."""

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, call: QConvCall, engine: TorchEngine
    ) -> None:
        super().__init__(weight, weight_scale, bias, engine)
        dims = weight.dim() - 2
        assert len(call.stride) == len(call.padding) == len(call.dilation) == dims, f"{dims} spatial dimensions"
        # torch divides by these, and a division by zero ends the process
        assert call.groups > 0 and min(*call.stride, *call.dilation) > 0, f"{call}"
        assert len(call.pad) % 2 == 0 and len(call.pad) <= 2 * dims, f"{dims} spatial dimensions"
        call = _guarded(call, weight, engine)
        self.stride = list(call.stride)
        self.padding = list(call.padding)
        self.dilation = list(call.dilation)
        self.groups: int = call.groups
        self.pads: bool = any(call.pad)
        self.pad = list(call.pad) or [0, 0]  # TorchScript does not know the type of an empty list
        self.padding_mode: str = call.padding_mode
        self.least = _least(call, weight, engine)
        self.guarded: bool = any(self.least)
        self.thin: bool = engine in _ONEDNN and is_thin(weight, call.groups)
        self.relu: bool = call.relu
        self.scale: float = call.output_scale
        self.zero_point: int = call.output_zero_point
        self.repack()

    @torch.jit.unused
    def _pack(self) -> Any:
        prepack = _CONV_PREPACK[self.weight.dim() - 2]
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return prepack(self._quantized_weight(), self.bias, *geometry)

    @torch.jit.unused
    def _quantized_weight(self) -> Tensor:
        weight = super()._quantized_weight()
        if not self.thin:
            return weight
        scale, zeros = self.weight_scale.double(), torch.zeros(self.weight.shape[0], dtype=torch.int64)
        return torch._make_per_channel_quantized_tensor(thickened(self.weight), scale, zeros, 0)

    def _before(self, x: Tensor) -> Tensor:
        """The input, padded as it is before the operator."""
        return pad_quantized(x, self.pad, self.padding_mode) if self.pads else x

    def _given(self, x: Tensor) -> Tensor:
        """What the operator is called with, of an input that is padded before."""
        if self.guarded:
            x = self._grown(x)
        if self.thin:
            x = x.repeat_interleave(2, 1)
        return x

    def _grown(self, x: Tensor) -> Tensor:
        """A small input with so many zeros behind it that the operator is right."""
        first = x.dim() - len(self.least)
        grow = [0, 0] * len(self.least)
        for axis, least in enumerate(self.least):
            grow[2 * (len(self.least) - 1 - axis) + 1] = max(least - x.size(first + axis), 0)
        return pad_quantized(x, grow, "constant") if sum(grow) > 0 and self._fits(x) else x

    def _fits(self, x: Tensor) -> bool:
        """Whether the result has any values; the operator refuses what has none."""
        return min(self._sizes(x)) > 0

    def _sizes(self, x: Tensor) -> list[int]:
        """The spatial sizes of the result of an input that is padded before."""
        sizes: list[int] = []
        for axis, stride in enumerate(self.stride):
            extent = self.dilation[axis] * (self.weight.size(axis + 2) - 1) + 1
            given = x.size(x.dim() - len(self.stride) + axis) + 2 * self.padding[axis]
            sizes.append((given - extent) // stride + 1)
        return sizes

    def _shown(self, out: Tensor, x: Tensor) -> Tensor:
        """The part of a result that is of the input `x`, padded before, and not of the zeros behind it."""
        if not self.guarded:
            return out
        sizes = self._sizes(x)
        first = out.dim() - len(sizes)
        cut = False
        for axis, size in enumerate(sizes):
            if out.size(first + axis) > size:
                out = out.narrow(first + axis, 0, size)
                cut = True
        return with_codes(out.int_repr().contiguous(), out) if cut else out  # aten copies no part of five axes

    def extra_repr(self) -> str:
        """What `repr` shows."""
        padded = f", pad={self.pad} ({self.padding_mode})" if self.pads else ""
        return (
            f"{tuple(self.weight.shape)}, stride={self.stride}, padding={self.padding}{padded}, "
            f"dilation={self.dilation}, "
            f"groups={self.groups}, relu={self.relu}, scale={self.scale:.6g}, zero_point={self.zero_point}, "
            f"engine={self.engine}"
        )


class QuantizedConv1d(PackedConv):
    """`quantized.conv1d` (+ ReLU)."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        x = self._before(x)
        if self.relu:
            fused: Tensor = torch.ops.quantized.conv1d_relu(self._given(x), self.packed, self.scale, self.zero_point)
            return self._shown(fused, x)
        out: Tensor = torch.ops.quantized.conv1d(self._given(x), self.packed, self.scale, self.zero_point)
        return self._shown(out, x)


class QuantizedConv2d(PackedConv):
    """`quantized.conv2d` (+ ReLU)."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        x = self._before(x)
        if self.relu:
            fused: Tensor = torch.ops.quantized.conv2d_relu(self._given(x), self.packed, self.scale, self.zero_point)
            return self._shown(fused, x)
        out: Tensor = torch.ops.quantized.conv2d(self._given(x), self.packed, self.scale, self.zero_point)
        return self._shown(out, x)


class QuantizedConv3d(PackedConv):
    """`quantized.conv3d` (+ ReLU)."""

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        x = self._before(x)
        if self.relu:
            fused: Tensor = torch.ops.quantized.conv3d_relu(self._given(x), self.packed, self.scale, self.zero_point)
            return self._shown(fused, x)
        out: Tensor = torch.ops.quantized.conv3d(self._given(x), self.packed, self.scale, self.zero_point)
        return self._shown(out, x)


QUANTIZED_CONV = {1: QuantizedConv1d, 2: QuantizedConv2d, 3: QuantizedConv3d}


class QuantizedLinear(Packed):
    """`quantized.linear` (+ ReLU) over the last dimension."""

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        output: Affine,
        engine: TorchEngine,
        *,
        relu: bool = False,
    ) -> None:
        super().__init__(weight, weight_scale, bias, engine)
        assert output.dtype == "uint8", "activations are quint8"
        self.scale: float = output.scale
        self.zero_point: int = output.zero_point
        self.relu: bool = relu
        self.repack()

    @torch.jit.unused
    def _pack(self) -> Any:
        return torch.ops.quantized.linear_prepack(self._quantized_weight(), self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The quantized result."""
        if self.relu:
            fused: Tensor = torch.ops.quantized.linear_relu(x, self.packed, self.scale, self.zero_point)
            return fused
        out: Tensor = torch.ops.quantized.linear(x, self.packed, self.scale, self.zero_point)
        return out

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return (
            f"{self.weight.shape[1]}, {self.weight.shape[0]}, relu={self.relu}, scale={self.scale:.6g}, "
            f"zero_point={self.zero_point}, engine={self.engine}"
        )


class QuantizedAdd(nn.Module):
    """`quantized.add` (+ ReLU): the operands carry their own qparams."""

    def __init__(self, output: Affine, *, relu: bool = False) -> None:
        super().__init__()
        self.scale: float = output.scale
        self.zero_point: int = output.zero_point
        self.relu: bool = relu

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The quantized result."""
        # The operator sizes its result by the first operand, and warns where the second is larger.
        if x.numel() < y.numel():
            x, y = y, x
        if self.relu:
            fused: Tensor = torch.ops.quantized.add_relu(x, y, self.scale, self.zero_point)
            return fused
        out: Tensor = torch.ops.quantized.add(x, y, self.scale, self.zero_point)
        return out

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"relu={self.relu}, scale={self.scale:.6g}, zero_point={self.zero_point}"


class QuantizedMul(nn.Module):
    """`quantized.mul` (+ ReLU)."""

    def __init__(self, output: Affine, *, relu: bool = False) -> None:
        super().__init__()
        self.scale: float = output.scale
        self.zero_point: int = output.zero_point
        self.relu: bool = relu

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The quantized result."""
        if x.numel() < y.numel():
            x, y = y, x
        if self.relu:
            fused: Tensor = torch.ops.quantized.mul_relu(x, y, self.scale, self.zero_point)
            return fused
        out: Tensor = torch.ops.quantized.mul(x, y, self.scale, self.zero_point)
        return out

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"relu={self.relu}, scale={self.scale:.6g}, zero_point={self.zero_point}"


class QuantizedCat(nn.Module):
    """`quantized.cat`: inputs are requantized to the output's qparams."""

    def __init__(self, output: Affine, dim: int = 0) -> None:
        super().__init__()
        self.scale: float = output.scale
        self.zero_point: int = output.zero_point
        self.dim: int = dim

    def forward(self, tensors: list[Tensor]) -> Tensor:
        """The quantized result."""
        out: Tensor = torch.ops.quantized.cat(tensors, self.dim, self.scale, self.zero_point)
        return out

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"dim={self.dim}, scale={self.scale:.6g}, zero_point={self.zero_point}"
