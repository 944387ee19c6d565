"""What this machine's kernels do, found by running them: a value for `lower` to decide by, and for a recipe to keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import combinations
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.config.host_report import HostReport
from qfunc.edge.kernels.base import operator
from qfunc.edge.kernels.contract import check
from qfunc.edge.kernels.contracts import onednn_contracts, plain_contracts
from qfunc.edge.kernels.conv import ConvCall, OnednnConv
from qfunc.edge.kernels.linear import LinearCall, OnednnLinear
from qfunc.edge.kernels.quantized import QUANTIZED_CONV, QConvCall, QuantizedLinear, TorchEngine
from qfunc.edge.kernels.quantized_contracts import as_quantized, quantized_contracts
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import PairLayout

_ONEDNN_OPERATORS = (
    ("qconv_prepack", "default"),
    ("qconv_pointwise", "default"),
    ("qconv2d_pointwise", "binary"),
    ("qlinear_prepack", "default"),
    ("qlinear_pointwise", "default"),
)


@cache
def check_host() -> HostReport:
    """Probe this CPU and check every kernel's contract on it; a second or less, once per process.

    Draws no global random numbers, and leaves torch's engine and warnings as they were.
    """
    torch_engines: tuple[TorchEngine, ...] = tuple(
        cast("TorchEngine", e) for e in sorted(torch.backends.quantized.supported_engines) if e != "none"
    )
    with torch.no_grad(), warnings.catch_warnings(), _one_thread():
        # torch announces the end of the quantized dtypes at the first quantized tensor of a process.
        warnings.filterwarnings("ignore", message=".*quint8.*")
        onednn = _onednn_usable()
        layout = pair_layout(_onednn_conv, _onednn_linear) if onednn else "none"
        layouts: tuple[tuple[TorchEngine, PairLayout], ...] = tuple(
            (e, pair_layout(partial(_quantized_conv, e), partial(_quantized_linear, e))) for e in torch_engines
        )
        contracts = (*(onednn_contracts(layout) if onednn else plain_contracts()), *quantized_contracts(layouts))
        verdicts = tuple(sorted((check(contract) for contract in contracts), key=lambda verdict: verdict.kernel))
    return HostReport(
        torch_version=torch.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        isa=_isa(),
        engines=(*(("onednn",) if onednn else ()), *(("quantized",) if torch_engines else ())),
        quantized_engines=torch_engines,
        onednn_layout=layout,
        quantized_layouts=layouts,
        verdicts=verdicts,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """The probes are tiny: starting threads for them costs more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _onednn_usable() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and all(  # type: ignore[no-untyped-call]
        operator("onednn", *name) for name in _ONEDNN_OPERATORS
    )


def _isa() -> tuple[str, ...]:
    found = torch.cpu.get_capabilities()
    names = ("avx2", "avx512_f", "avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "dot", "i8mm")
    return tuple(name for name in names if found.get(name) is True)


# Which pairs saturate -------------------------------------------------------------------------------------------------

ConvRun: TypeAlias = Callable[[Tensor, Tensor, int], Tensor]
"""`uint8` input, `int8` weight, groups -> per output channel, the least of its sums."""
LinearRun: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`uint8` input, `int8` weight -> the same."""

_NARROWEST_FIRST: tuple[PairLayout, ...] = ("none", "channels", "flat", "any")
_FULL = 255 * (127 + 127)
# (in_channels, kernel, dimensions): odd and even channel counts, one tap and many.
_PROBES = ((3, 3, 2), (8, 2, 2), (5, 1, 2), (3, 3, 1), (16, 1, 2), (3, 2, 3))


def pair_layout(conv: ConvRun, linear: LinearRun) -> PairLayout:
    """Find which two weights a kernel adds in int16: all pairs of 127, one at a time, against activations of 255.

    An output channel holds one pair and zeros; a saturated one gives 32767 instead of 64770. The answer is the
    narrowest layout that explains all saturating pairs of all probes. A shape that a kernel refuses says nothing.
    """
    rows = torch.full((5, 33), 255, dtype=torch.uint8)
    probes: list[tuple[int, int, Callable[[Tensor], Tensor]]] = [
        *((c, k**dims, partial(_dense, conv, c, k, dims)) for c, k, dims in _PROBES),
        (1, 9, partial(_depthwise, conv)),
        (33, 1, partial(linear, rows)),
    ]
    possible = set(_NARROWEST_FIRST)
    for channels, taps, run in probes:
        with suppress(RuntimeError):
            possible &= _explanations(_saturating_pairs(channels * taps, run), channels, taps)
    return next(layout for layout in _NARROWEST_FIRST if layout in possible)


def _dense(conv: ConvRun, channels: int, kernel: int, dims: int, rows: Tensor) -> Tensor:
    x = torch.full((1, channels, *[6] * dims), 255, dtype=torch.uint8)
    return conv(x, rows.reshape(-1, channels, *[kernel] * dims), 1)


def _depthwise(conv: ConvRun, rows: Tensor) -> Tensor:
    # Some engines have a depthwise kernel for multiples of 8 or 16 channels only.
    padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % 16))
    x = torch.full((1, padded.shape[0], 6, 6), 255, dtype=torch.uint8)
    return conv(x, padded.reshape(-1, 1, 3, 3), padded.shape[0])[: rows.shape[0]]


def _saturating_pairs(length: int, run: Callable[[Tensor], Tensor]) -> list[tuple[int, int]]:
    """Positions `i < j` that saturate; `run` takes weights `[pairs, length]` and gives the least sum of each row."""
    pairs = list(combinations(range(length), 2))
    rows = torch.zeros(len(pairs), length, dtype=torch.int8)
    rows.scatter_(1, torch.tensor(pairs), 127)
    saturated = run(rows) < 0.99 * _FULL
    return [pair for pair, is_saturated in zip(pairs, saturated.tolist(), strict=True) if is_saturated]


def _explanations(pairs: list[tuple[int, int]], channels: int, taps: int) -> set[PairLayout]:
    """The layouts that hold all these pairs of positions in a weight `[channels, taps]`."""
    places = [(divmod(first, taps), divmod(second, taps)) for first, second in pairs]
    layouts: set[PairLayout] = {"any"}
    if not places:
        layouts.add("none")
    if all(t == u and c // 2 == d // 2 for (c, t), (d, u) in places):
        layouts.add("channels")
    if all((t * channels + c) // 2 == (u * channels + d) // 2 for (c, t), (d, u) in places):
        layouts.add("flat")
    return layouts


def _onednn_conv(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    dims = x.dim() - 2
    call = ConvCall(1.0, 0, 1.0, 0, "float32", (1,) * dims, (0,) * dims, (1,) * dims, groups)
    out: Tensor = OnednnConv(weight, torch.ones(weight.shape[0]), None, call)(x)
    return out.flatten(2).amin((0, 2))


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    call = LinearCall(1.0, 0, 1.0, 0, "float32")
    out: Tensor = OnednnLinear(weight, torch.ones(weight.shape[0]), None, call)(x)
    return out.amin(0)


def _quantized_conv(engine: TorchEngine, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    dims = x.dim() - 2
    call = QConvCall(_FULL / 200, 0, (1,) * dims, (0,) * dims, (1,) * dims, groups)
    module = QUANTIZED_CONV[dims](weight, torch.ones(weight.shape[0]), None, call, engine)
    out: Tensor = module(as_quantized(x, Affine(1.0, 0)))
    return out.dequantize().flatten(2).amin((0, 2))


def _quantized_linear(engine: TorchEngine, x: Tensor, weight: Tensor) -> Tensor:
    module = QuantizedLinear(weight, torch.ones(weight.shape[0]), None, Affine(_FULL / 200, 0), engine)
    out: Tensor = module(as_quantized(x, Affine(1.0, 0)))
    return out.dequantize().amin(0)
