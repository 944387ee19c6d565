"""The `quantized` engine: torch's own kernels on quantized tensors, for its x86, fbgemm, qnnpack and onednn engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from qfunc.backends.cpu import MOVES
from qfunc.config.host_report import HostReport
from qfunc.config.kernel import Call, Engine, KernelRow, Plan
from qfunc.engines import quantized_dynamic as dynamic
from qfunc.engines import quantized_layers as layers
from qfunc.engines import quantized_operators as operators
from qfunc.engines.dynamic import DYNAMIC_ROWS
from qfunc.engines.island import open_island
from qfunc.engines.post_op import clips
from qfunc.engines.quantized_layers import Planner
from qfunc.ir import Node
from qfunc.numerics.unmeasured import Cast, Dynamic

TORCH_ENGINES = ("x86", "fbgemm", "onednn", "qnnpack")
"""torch's engines for quantized tensors, the preferred ones first."""

_POOLS = tuple(f"{kind}{rank}d" for kind in ("max_pool", "avg_pool", "adaptive_avg_pool") for rank in (1, 2, 3))
_TRANSPOSED = tuple(f"conv_transpose{rank}d" for rank in (1, 2, 3))
_CURVED, _NORMS = ("elu", "leaky_relu", "hardswish"), ("layer_norm", "group_norm", "instance_norm")

MOVES_OF_TENSORS = MOVES - {"roll"}
"""What aten moves in quantized tensors; their qparams stay."""

_CONVERSIONS = tuple((kind, f"quantized.{kind}") for kind in ("quantize", "dequantize"))


def torch_engine(host: HostReport, chosen: str = "") -> str:
    """The engine of torch's that packs and runs the kernels on a host: the chosen one, or the best there is.

    >>> from qfunc import check_host
    >>> torch_engine(check_host(), "qnnpack")
    'qnnpack'
    """
    return chosen or next(torch_engines(host))


def torch_engines(host: HostReport) -> Iterator[str]:
    """The engines of torch's that a host has, the best first."""
    return (engine for engine in TORCH_ENGINES if engine in host.quantized_engines)


def _row(name: str, kinds: tuple[str, ...], planner: Planner, chosen: str, *, checked: bool = False) -> KernelRow:
    """A row for `uint8` codes alone: plain `int8` ones are no quantized tensors."""

    def plan(call: Call) -> Plan:
        affines = [operand.affine for operands in call.operands.values() for operand in operands]
        dtypes = {affine.dtype for affine in (*affines, call.output) if affine is not None}
        if dtypes != {"uint8"}:
            return "the kernel takes and gives uint8 activations"
        engine = torch_engine(call.host, chosen)
        planned = planner(call, engine)
        return _ended(call, planner, engine) if isinstance(planned, str) and clips(call.output) else planned

    return KernelRow(name, kinds, plan, checked=checked)


def _ended(call: Call, planner: Planner, engine: str) -> Plan:
    """A kernel that gives codes of all 8 bits, which are clamped to a part of them behind it."""
    assert call.output is not None
    planned = planner(replace(call, output=replace(call.output, quant_min=None, quant_max=None)), engine)
    return planned.with_args(ends=call.output.bounds) if isinstance(planned, Node) else planned


def _static(chosen: str) -> tuple[KernelRow, ...]:
    """The rows of what is quantized with known qparams; one that is not `checked` asks for the verdicts it needs."""
    return (
        _row("quantized.weighted", ("conv1d", "conv2d", "conv3d", "linear"), layers.weighted, chosen),
        _row("quantized.transposed", _TRANSPOSED, layers.transposed, chosen),
        *(_row(f"quantized.{kind}", (kind,), operators.arithmetic, chosen, checked=True) for kind in ("add", "mul")),
        _row("quantized.matmul", ("matmul", "bmm"), operators.matmul, chosen, checked=True),
        *(_row(f"quantized.{kind}", (kind,), operators.joined, chosen, checked=True) for kind in ("cat", "stack")),
        *(_row(f"quantized.{kind}", (kind,), operators.curved, chosen) for kind in _CURVED),
        _row("quantized.softmax", ("softmax",), operators.softmax, chosen, checked=True),
        _row("quantized.sigmoid", ("sigmoid",), operators.sigmoid, chosen),
        _row("quantized.hardsigmoid", ("hardsigmoid",), operators.hardsigmoid, chosen),
        _row("quantized.tanh", ("tanh",), operators.tanh, chosen),
        _row("quantized.batch_norm", ("batch_norm",), operators.batch_norm, chosen, checked=True),
        *(_row(f"quantized.{kind}", (kind,), operators.norm, chosen, checked=True) for kind in _NORMS),
        _row("quantized.pad", ("pad",), operators.pad, chosen, checked=True),
        _row("quantized.interpolate", ("interpolate",), operators.interpolate, chosen),
        _row("quantized.aten", ("relu", "clamp", *_POOLS), operators.same_qparams, chosen),
        _row("quantized.mean", ("mean",), operators.mean, chosen),
    )


def _dynamic(chosen: str) -> tuple[KernelRow, ...]:
    """The rows of layers that read floats; what torch has no right kernel for is computed by the plain ones."""

    def bound(planner: Planner) -> Callable[[Call], Plan]:
        return lambda call: planner(call, torch_engine(call.host, chosen))

    names = ("embedding", "embedding_bag")
    own, halved = bound(dynamic.linear_dynamic), bound(dynamic.linear_float16)
    return (
        KernelRow("quantized.linear_dynamic", ("linear",), own, checked=False, takes=(Dynamic,), writes_floats=True),
        KernelRow("quantized.linear_float16", ("linear",), halved, checked=False, takes=(Cast,), writes_floats=True),
        *(KernelRow(f"quantized.{name}", (name,), bound(dynamic.embedding), writes_floats=True) for name in names),
        *(replace(row, writes_floats=True) for row in DYNAMIC_ROWS),  # whose codes would be no quantized tensors
    )


def _engine(chosen: str = "") -> Engine:
    name = f"quantized.{chosen}" if chosen else "quantized"
    return Engine(name, (*_static(chosen), *_dynamic(chosen), open_island()), MOVES_OF_TENSORS, _CONVERSIONS)


QUANTIZED = _engine()
"""The kernels of torch's quantized tensors, by the best of torch's engines that a host has."""

QUANTIZED_BY = tuple(_engine(chosen) for chosen in TORCH_ENGINES)
"""The same, by one of torch's engines that the user chooses."""
