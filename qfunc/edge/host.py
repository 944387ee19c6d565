"""What this machine's kernels do, found by running them: a value for `lower` to decide by, and for a recipe to keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import combinations
from types import MappingProxyType
from typing import TypeAlias, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from returns.result import Failure, Success
from torch import Tensor

from qfunc.config.arguments import wrong_arguments
from qfunc.config.host_report import HostReport
from qfunc.config.kernel import KernelRow
from qfunc.edge.decomposed import has_decomposed
from qfunc.edge.host_cache import forget, kept
from qfunc.edge.kernels.base import operator
from qfunc.edge.kernels.contract import check
from qfunc.edge.kernels.contracts import onednn_contracts, plain_contracts
from qfunc.edge.kernels.conv import ConvCall, OnednnConv
from qfunc.edge.kernels.linear import LinearCall, OnednnLinear
from qfunc.edge.kernels.own import check_own
from qfunc.edge.kernels.quantized import QUANTIZED_CONV, QConvCall, QuantizedLinear, TorchEngine
from qfunc.edge.kernels.quantized_contracts import as_quantized
from qfunc.edge.kernels.quantized_every_contract import every_quantized_contract
from qfunc.errors import several
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import UNPAIRED, PairLayout, PairLayouts
from qfunc.result import R

_ONEDNN_OPERATORS = (
    ("qconv_prepack", "default"),
    ("qconv_pointwise", "default"),
    ("qconv2d_pointwise", "binary"),
    ("qlinear_prepack", "default"),
    ("qlinear_pointwise", "default"),
)


def check_host(*, fresh: bool = False) -> HostReport:
    """Probe this CPU and check every kernel's contract on it: a second or less, once for each machine and version.

    The report is kept, for the process and in a file of the user's cache directory (`QFUNC_CACHE` names another one;
    empty, it keeps none), under all that it depends on: nothing but the time tells whether it was. With `fresh` all is
    checked again. Draws no global random numbers, and leaves torch's engine and warnings as they were.
    """
    if fresh:
        _known.cache_clear()
        forget()
    return _known()


@cache
def _known() -> HostReport:
    return kept(_probed)


def check_kernels(kernels: tuple[KernelRow, ...], host: HostReport | None = None) -> R[HostReport]:
    """A host report, by default of this machine, with the verdicts of kernels of the user's, which are run here.

    Returns:
        The report, or `BadConfig` for what is no such kernel.
    """
    known = check_host() if host is None else host
    problems = wrong_arguments(kernels=kernels, host=known)
    if problems:
        return Failure(several(problems))
    own = [row for row in kernels if row.own is not None]
    if not own:
        return Success(known)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        found = {row.name: check_own(row) for row in own}
    others = (verdict for verdict in known.verdicts if verdict.kernel not in found)
    verdicts = sorted((*others, *found.values()), key=lambda verdict: verdict.kernel)
    return Success(replace(known, verdicts=tuple(verdicts)))


def _probed() -> HostReport:
    torch_engines: tuple[TorchEngine, ...] = tuple(
        cast("TorchEngine", e) for e in sorted(torch.backends.quantized.supported_engines) if e != "none"
    )
    with torch.no_grad(), warnings.catch_warnings(), _one_thread():
        # torch announces the end of the quantized dtypes at the first quantized tensor of a process.
        warnings.filterwarnings("ignore", message=".*quint8.*")
        warnings.filterwarnings("ignore", message=".*not implemented for QNNPACK.*")
        onednn = _onednn_usable()
        plain = pair_layouts(_onednn_conv, _onednn_linear) if onednn else UNPAIRED
        layouts: tuple[tuple[TorchEngine, PairLayouts], ...] = tuple(
            (e, pair_layouts(partial(_quantized_conv, e), partial(_quantized_linear, e))) for e in torch_engines
        )
        contracts = (*(onednn_contracts(plain) if onednn else plain_contracts()), *every_quantized_contract(layouts))
        verdicts = tuple(sorted((check(contract) for contract in contracts), key=lambda verdict: verdict.kernel))
    usable = {"onednn": onednn, "quantized": bool(torch_engines), "decomposed": has_decomposed()}
    return HostReport(
        torch_version=torch.__version__,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        isa=_isa(),
        engines=tuple(name for name, usable in usable.items() if usable),
        quantized_engines=torch_engines,
        onednn_layouts=plain,
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

ConvRun: TypeAlias = Callable[[Tensor, Tensor, int, int], Tensor]
"""`uint8` input, `int8` weight, groups, padding with zeros -> the sums."""
LinearRun: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""`uint8` input, `int8` weight -> the same."""

_NARROWEST_FIRST: tuple[PairLayout, ...] = ("none", "channels", "flat", "any")
_FULL = 255 * (127 + 127)
_SIZE = 6
_MANY = 104  # torch's x86 engine gives more than 100 groups to another library
_CONV: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.conv1d, 2: F.conv2d, 3: F.conv3d})


@dataclass(frozen=True, slots=True)
class _Probe:
    """A kind of convolution that a library may have a kernel of its own for."""

    channels: int  # of a group
    kernel: int
    dims: int
    padding: int = 0
    groups: int = 1  # or as many more as there are pairs: each has a group to itself, unless there is one group


# Odd and even channel counts, one tap and many.
_DENSE = (
    *(_Probe(3, 3, 2), _Probe(8, 2, 2), _Probe(5, 1, 2), _Probe(3, 3, 1), _Probe(16, 1, 2), _Probe(3, 2, 3)),
    *(_Probe(2, 2, 2, padding=1, groups=16), _Probe(3, 2, 2, groups=_MANY)),
)
# fbgemm's depthwise kernels take square ones padded by half their size.
_DEPTHWISE = (
    *(_Probe(1, 3, 2, groups=16), _Probe(1, 3, 2, padding=1, groups=16), _Probe(1, 3, 2, padding=1, groups=_MANY)),
    *(_Probe(1, 3, 1, padding=1, groups=16), _Probe(1, 3, 1, padding=1, groups=_MANY)),
    *(_Probe(1, 5, 2, padding=2, groups=_MANY), _Probe(1, 3, 3, padding=1, groups=_MANY)),
)


def pair_layouts(conv: ConvRun, linear: LinearRun) -> PairLayouts:
    """Find which two weights a kernel adds in int16: all pairs of 127, one at a time, against activations of 255.

    An output channel holds one pair and zeros; a saturated one gives 32767 instead of 64770. The answer is, of each
    kind, the narrowest layout that explains all saturating pairs of all probes. A shape that a kernel refuses says
    nothing; a kind of which it refuses all is unknown.
    """
    dense = [_explained(probe, partial(_saturates, conv, probe)) for probe in _DENSE]
    dense.append(_explained(_Probe(33, 1, 0), partial(_linear_saturates, linear)))
    depthwise = [_explained(probe, partial(_saturates, conv, probe)) for probe in _DEPTHWISE]
    return PairLayouts(_narrowest(dense), _narrowest(depthwise))


def _explained(probe: _Probe, saturates: Callable[[Tensor], Tensor]) -> set[PairLayout] | None:
    """The layouts that explain what saturates; None where the kernel refuses the shape."""
    taps = probe.kernel**probe.dims
    try:
        return _explanations(_saturating_pairs(probe.channels * taps, saturates), probe.channels, taps)
    except RuntimeError:
        return None


def _narrowest(explanations: list[set[PairLayout] | None]) -> PairLayout:
    known = [layouts for layouts in explanations if layouts is not None]
    held: list[PairLayout] = [layout for layout in _NARROWEST_FIRST if all(layout in layouts for layouts in known)]
    return held[0] if known else _NARROWEST_FIRST[-1]


def _saturates(conv: ConvRun, probe: _Probe, rows: Tensor) -> Tensor:
    """For each row of weights, whether a sum of the convolution is wrong anywhere."""
    groups = probe.groups
    if groups > 1:
        # Some engines have a depthwise kernel for multiples of 8 or 16 channels only.
        groups = max(groups, len(rows) + -len(rows) % 16)
        rows = F.pad(rows, (0, 0, 0, groups - len(rows)))
    x = torch.full((1, groups * probe.channels, *[_SIZE] * probe.dims), 255, dtype=torch.uint8)
    weight = rows.reshape(-1, probe.channels, *[probe.kernel] * probe.dims)
    exact = _CONV[probe.dims](x.float(), weight.float(), None, 1, probe.padding, 1, groups)
    return _wrong(conv(x, weight, groups, probe.padding), exact).flatten(2).any(2)[0]


def _linear_saturates(linear: LinearRun, rows: Tensor) -> Tensor:
    x = torch.full((5, rows.shape[1]), 255, dtype=torch.uint8)
    return _wrong(linear(x, rows), F.linear(x.float(), rows.float())).any(0)


def _wrong(got: Tensor, exact: Tensor) -> Tensor:
    return (got - exact).abs() > 0.01 * _FULL


def _saturating_pairs(length: int, saturates: Callable[[Tensor], Tensor]) -> list[tuple[int, int]]:
    """Positions `i < j` that saturate; `saturates` takes weights `[pairs, length]` and answers for the first rows."""
    pairs = list(combinations(range(length), 2))
    rows = torch.zeros(len(pairs), length, dtype=torch.int8)
    rows.scatter_(1, torch.tensor(pairs), 127)
    return [pair for pair, is_saturated in zip(pairs, saturates(rows).tolist(), strict=False) if is_saturated]


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


def _onednn_conv(x: Tensor, weight: Tensor, groups: int, padding: int) -> Tensor:
    dims = x.dim() - 2
    call = ConvCall(1.0, 0, 1.0, 0, "float32", (1,) * dims, (padding,) * dims, (1,) * dims, groups)
    return OnednnConv(weight, torch.ones(weight.shape[0]), None, call)(x)  # type: ignore[no-any-return]


def _onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    call = LinearCall(1.0, 0, 1.0, 0, "float32")
    return OnednnLinear(weight, torch.ones(weight.shape[0]), None, call)(x)  # type: ignore[no-any-return]


def _quantized_conv(engine: TorchEngine, x: Tensor, weight: Tensor, groups: int, padding: int) -> Tensor:
    dims = x.dim() - 2
    call = QConvCall(_FULL / 200, 0, (1,) * dims, (padding,) * dims, (1,) * dims, groups)
    module = QUANTIZED_CONV[dims](weight, torch.ones(weight.shape[0]), None, call, engine)
    return module(as_quantized(x, Affine(1.0, 0))).dequantize()  # type: ignore[no-any-return]


def _quantized_linear(engine: TorchEngine, x: Tensor, weight: Tensor) -> Tensor:
    module = QuantizedLinear(weight, torch.ones(weight.shape[0]), None, Affine(_FULL / 200, 0), engine)
    return module(as_quantized(x, Affine(1.0, 0))).dequantize()  # type: ignore[no-any-return]
