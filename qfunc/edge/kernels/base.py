"""What every kernel module shares: float32 state that stays float32, and packed weights that are not state.

Kernels compute on plain `uint8`/`int8` tensors: a real value is `(code - zero_point) * scale`. Activation qparams are
literals of the module; weights (`int8`), their scales and the bias (`float32`) are buffers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from qfunc.numerics.grid import Affine

OutputDType: TypeAlias = Literal["uint8", "int8", "float32"]

TORCH_DTYPE: dict[str, torch.dtype] = {"uint8": torch.uint8, "int8": torch.int8, "float32": torch.float32}

# 1.5 * 2**23: adding it to a float32 below 2**22 leaves round-half-even(x) in the low mantissa bits.
_MAGIC = 12582912.0
_MAGIC_BITS = 0x4B400000

_Function = TypeVar("_Function", bound=Callable[..., Any])

PACKS_KEPT = 8
"""How many packed forms (one per spatial shape) a kernel keeps."""


def inverse_scale(scale: float) -> float:
    """`1 / scale` in float32 arithmetic, as quantization multiplies by it."""
    return float(torch.tensor(1.0) / torch.tensor(scale, dtype=torch.float32))


def round_to_codes(scaled: Tensor, qparams: Affine) -> Tensor:
    """Codes of `scaled = real / scale` (float32, owned by the caller: it is overwritten), rounded half to even.

    Clamping before rounding is the same as after it, because the bounds are integers; rounding by adding `1.5 * 2**23`
    is exact below `2**22`, and the integer left in the mantissa converts to a byte much faster than a float does.
    NaN gives an unspecified code.

    >>> round_to_codes(torch.tensor([-9.0, 0.5, 1.5, 999.0]), Affine(1.0, 1)).tolist()
    [0, 1, 3, 255]
    """
    return clamped_codes(scaled, qparams.zero_point, *qparams.bounds, TORCH_DTYPE[qparams.dtype])


def clamped_codes(scaled: Tensor, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
    """The same for qparams that are no literals."""
    scaled.clamp_(low - zero_point, high - zero_point).add_(_MAGIC)
    return scaled.view(torch.int32).sub_(_MAGIC_BITS - zero_point).to(dtype)


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` does to tensors, where it leaves their dtype; of the rest only the move to a device.

    >>> keeping_dtype(lambda tensor: tensor.half())(torch.ones(1)).dtype
    torch.float32
    """

    def moved(tensor: Tensor) -> Tensor:
        given = fn(tensor)
        return given if given.dtype == tensor.dtype else tensor.to(given.device)

    return moved


class Kernel(nn.Module):
    """A leaf module over plain codes. Its float32 buffers keep their dtype and bits through `.half()` and `.to(dtype)`.

    Packed weights live in `_packs`: at most `PACKS_KEPT`, filled under a lock, read without one, never part of the
    state; `deepcopy`, pickling, `load_state_dict` and `_apply` drop them. Weights are constants: after changing a
    buffer in place call `drop_packs`.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    _packs: dict[Hashable, Any]

    def __init__(self) -> None:
        super().__init__()
        self.training = False
        self._fresh_packs()

    def _fresh_packs(self) -> None:
        self._packs = {}
        self._packs_lock = threading.Lock()

    def drop_packs(self) -> None:
        """Forget all packed weights; the next call packs again."""
        with self._packs_lock:
            self._packs = {}

    def _packed(self, key: Hashable, pack: Callable[[], Any]) -> Any:
        """The entry for `key`, packed at most once however many threads ask; the oldest entry makes room."""
        with self._packs_lock:
            entry = self._packs.get(key)
            if entry is None:
                entry = pack()
                kept = list(self._packs.items())[-(PACKS_KEPT - 1) :]
                # A new dict: readers do not take the lock.
                self._packs = dict([*kept, (key, entry)])
            return entry

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_packs"], state["_packs_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._fresh_packs()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.drop_packs()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Kernel:
        result = super()._apply(keeping_dtype(fn), recurse)  # type: ignore[no-untyped-call]
        self.drop_packs()
        return cast("Kernel", result)

    def _constants(self, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        """Register the weight (`int8`, output channels first), its scales and the bias as buffers, after checking them.

        The oneDNN primitives read out of bounds or stop the process on some of what is refused here.
        """
        check_weight(weight, weight_scale)
        assert bias is None or (bias.dtype == torch.float32 and bias.shape == weight_scale.shape), (
            "one float32 bias a channel"
        )
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)


def check_weight(weight: Tensor, weight_scale: Tensor) -> None:
    """Assert that a weight is non-empty `int8` with one float32 scale per output channel."""
    assert weight.dtype == torch.int8, f"weight is {weight.dtype}"
    assert weight.numel() > 0, f"weight is empty: {tuple(weight.shape)}"
    assert weight_scale.dtype == torch.float32, f"weight_scale is {weight_scale.dtype}"
    assert weight_scale.shape == weight.shape[:1], f"weight_scale {tuple(weight_scale.shape)}"


def outside_compile(function: _Function) -> _Function:
    """Run `function` as eager code inside `torch.compile`: a graph break, with the same numbers.

    Packed weights are opaque oneDNN tensors, which a compiler cannot trace. `torch.compiler.disable` would do, but it
    loads the compiler at once, which takes longer than everything else that qfunc imports.
    """
    return cast("_Function", _disable_dynamo(function))


def operator(namespace: str, name: str, overload: str = "default") -> Any:
    """`torch.ops.<namespace>.<name>.<overload>`, or None where this build of torch has no such operator.

    >>> operator("onednn", "no_such_kernel") is None
    True
    """
    packet = getattr(getattr(torch.ops, namespace), name, None)
    return getattr(packet, overload, None)
