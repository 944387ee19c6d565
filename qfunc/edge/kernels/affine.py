"""Float to codes, codes to float, and any elementwise function from codes to codes by table."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qfunc.edge.kernels.base import TORCH_DTYPE, Kernel, inverse_scale, round_to_codes
from qfunc.numerics.grid import CODE_RANGE, Affine

# From here up a look-up of two codes at a time repays its table of 65536 pairs.
_PAIRS_FROM = 1 << 14


class Quantize(Kernel):
    """Real values to codes: `clamp(round_half_even(x * (1 / scale)) + zero_point)`, memory format kept.

    Bit for bit `qfunc.numerics.affine.quantize`, and so `torch.fake_quantize_per_tensor_affine`, but faster. Half and
    bfloat16 are widened first; infinities saturate, NaN gives an unspecified code.

    >>> Quantize(Affine(0.5, 10))(torch.tensor([-1.0, 0.26, 1e9])).tolist()
    [8, 11, 255]
    """

    def __init__(self, output: Affine) -> None:
        super().__init__()
        self.output = output
        self._inverse = inverse_scale(output.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Codes of `x`."""
        if x.dtype is not torch.float32:
            x = x.to(torch.float32)
        return round_to_codes(x.mul(self._inverse), self.output)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return str(self.output)


class Dequantize(Kernel):
    """Codes to float32: `(code - zero_point) * scale`, memory format kept.

    >>> Dequantize(Affine(0.5, 10))(torch.tensor([8, 11], dtype=torch.uint8)).tolist()
    [-1.0, 0.5]
    """

    def __init__(self, input: Affine) -> None:  # noqa: A002 - the field's name for it
        super().__init__()
        self.input = input

    def forward(self, x: Tensor) -> Tensor:
        """Real values of the codes `x`."""
        return x.to(torch.float32).sub_(self.input.zero_point).mul_(self.input.scale)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return str(self.input)


def all_codes(qparams: Affine) -> Tensor:
    """The 256 codes of a dtype, at the index of their bit pattern.

    >>> all_codes(Affine(1.0, 0, "int8"))[[0, 127, 128, 255]].tolist()
    [0, 127, -128, -1]
    """
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(TORCH_DTYPE[qparams.dtype])


class Table(Kernel):
    """An elementwise function on codes as 256 answers: `table[code]`, memory format kept.

    `table` is indexed by the bit pattern of the code (for `int8`: -1 is at 255) and has any dtype; it is computed from
    literals, so it is no state. Large inputs are looked up two codes at a time.
    """

    table: Tensor

    def __init__(self, table: Tensor, label: str = "table") -> None:
        super().__init__()
        assert table.shape == (256,), f"256 entries, not {tuple(table.shape)}"
        self.label = label
        self.register_buffer("table", table.contiguous(), persistent=False)
        self._bytes = table.element_size() == 1

    def _pairs(self) -> Tensor:
        entry: Tensor | None = self._packs.get("pairs")
        return self._packed("pairs", self._make_pairs) if entry is None else entry

    def _make_pairs(self) -> Tensor:
        codes = self.table.view(torch.uint8)
        index = torch.arange(65536, dtype=torch.int32)
        both = index.view(torch.uint8).view(-1, 4)[:, :2].to(torch.int32)
        return codes.index_select(0, both.reshape(-1)).view(torch.int16)

    def forward(self, x: Tensor) -> Tensor:
        """`table[x]`."""
        if torch.compiler.is_compiling():
            return self.table[x.view(torch.uint8).to(torch.int32)]
        dense = x if _is_dense(x) else x.contiguous()
        count = dense.numel()
        flat = dense.as_strided((count,), (1,))
        if self._bytes and count >= _PAIRS_FROM and count % 2 == 0 and dense.storage_offset() % 2 == 0:
            index = flat.view(torch.uint16).to(torch.int32)
            found = self._pairs().index_select(0, index).view(self.table.dtype)
        else:
            found = self.table.index_select(0, flat.view(torch.uint8).to(torch.int32))
        return found.as_strided(dense.shape, dense.stride())

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return self.label


def _is_dense(x: Tensor) -> bool:
    if x.is_contiguous():
        return True
    match x.dim():
        case 4:
            return x.is_contiguous(memory_format=torch.channels_last)
        case 5:
            return x.is_contiguous(memory_format=torch.channels_last_3d)
        case 3:  # what a 1d convolution returns: channels innermost
            return x.transpose(1, 2).is_contiguous()
        case _:
            return False


def tabulate(function: Callable[[Tensor], Tensor], given: Affine, output: Affine | None, label: str = "table") -> Table:
    """The `Table` of `quantize(function(dequantize(code)))`, or of float32 results where `output` is None.

    Exact: it is the reference subgraph itself, evaluated on all 256 codes.

    >>> tabulate(torch.relu, Affine(1.0, 100), Affine(0.5, 0))(torch.tensor([90, 101], dtype=torch.uint8)).tolist()
    [0, 2]
    """
    real = function(Dequantize(given)(all_codes(given)))
    return Table(real.to(torch.float32) if output is None else Quantize(output)(real), label)


def requantize(given: Affine, output: Affine) -> Table:
    """Codes of one affine grid as codes of another.

    >>> requantize(Affine(1.0, 0), Affine(2.0, 1))(torch.tensor([4], dtype=torch.uint8)).tolist()
    [3]
    """
    return tabulate(lambda x: x, given, output, f"requantize {given} -> {output}")


class Clamp(Kernel):
    """`clamp` in the integer domain, for equal qparams on both sides: bounds are codes.

    ReLU is `Clamp(zero_point, None)`.

    >>> Clamp(3, None)(torch.tensor([0, 9], dtype=torch.uint8)).tolist()
    [3, 9]
    """

    def __init__(self, low: int | None, high: int | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x: Tensor) -> Tensor:
        """Codes of `x` within the bounds."""
        return x.clamp(self.low, self.high)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"low={self.low}, high={self.high}"


def clamp_codes(low: float | None, high: float | None, qparams: Affine) -> Clamp:
    """The `Clamp` that stands for a clamp of real values to `[low, high]` without a change of qparams.

    Within half a step of the float clamp: the bounds are rounded to the grid.

    >>> clamp_codes(0.0, 6.0, Affine(0.1, 5)).extra_repr()
    'low=5, high=65'
    """

    def code(bound: float | None) -> int | None:
        if bound is None:
            return None
        return int(Quantize(qparams)(torch.tensor([bound]))[0])

    lowest, highest = CODE_RANGE[qparams.dtype]
    first, last = code(low), code(high)
    return Clamp(lowest if first is None else first, highest if last is None else last)
