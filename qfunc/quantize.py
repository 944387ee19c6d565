"""The whole way in one call; `fuse` with fusers that run, and `lower` for the machine at hand."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from os import PathLike
from typing import Any

from pyrsistent import pmap
from returns.result import Failure, Success
from torch import nn

from qfunc.backends import CPU, FBGEMM, ONEDNN, QNNPACK, X86
from qfunc.config.arguments import wrong_arguments
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.config.host_report import HostReport
from qfunc.config.kernel import KernelRow
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.config.resolve import problems_of
from qfunc.edge.batches import length, not_batches, read
from qfunc.edge.calibrate import calibrate_on
from qfunc.edge.call_fuser import call_fuser
from qfunc.edge.host import check_host, check_kernels
from qfunc.edge.measure import Options, wrong_options
from qfunc.edge.run import BINDING, Policy
from qfunc.edge.trace import NOTHING, trace
from qfunc.engines.choice import AUTO, best_engine
from qfunc.errors import (
    BadBatch,
    BadExampleInputs,
    InTrainingMode,
    NotAModule,
    Problem,
    QuantError,
    WrongStage,
    several,
)
from qfunc.errors import problems as problems_in
from qfunc.ir import Graph
from qfunc.passes import fuse as fusing
from qfunc.passes import lower as passes
from qfunc.passes.convert import convert
from qfunc.passes.prepare import prepare
from qfunc.passes.stages import Converted, Prepared
from qfunc.passes.statistics import Statistics
from qfunc.result import R

_BACKENDS = pmap(
    {
        "quantized": X86,
        "quantized.x86": X86,
        "quantized.fbgemm": FBGEMM,
        "quantized.qnnpack": QNNPACK,
        "quantized.onednn": ONEDNN,
    }
)
"""What suits an engine; any other has `CPU`."""


def fuse(graph: Graph, *, backend: BackendConfig = CPU, qat: bool = False, custom: CustomConfig = NOTHING) -> R[Graph]:
    """The graph with every chain that `backend` or the user fuses made one node: see `qfunc.passes.fuse.fuse`.

    >>> graph = trace(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()).unwrap()
    >>> [node.kind for node in fuse(graph).unwrap()]
    ['placeholder', 'conv2d', 'output']
    """
    return fusing.fuse(graph, call_fuser, backend=backend, qat=qat, custom=custom)


def lower(
    converted: Converted,
    *,
    engine: str = "onednn",
    host: HostReport | None = None,
    kernels: tuple[KernelRow, ...] = (),
    strict: bool = False,
) -> R[passes.Lowered]:
    """The graph of kernels of `engine`, for `host` (by default this machine, whose kernels are checked once).

    Kernels of the user's are checked here where no `host` is given; a given one has their verdicts from
    `check_kernels`. See `qfunc.passes.lower.lower`, the pure function of graph and host report.
    """
    if not isinstance(converted, Converted):
        return Failure(WrongStage(type(converted).__name__, "Converted"))
    report = check_kernels(kernels) if host is None else Success(host)
    return report.bind(lambda known: passes.lower(converted, known, engine=engine, kernels=kernels, strict=strict))


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    qconfig_mapping: QConfigMapping | None = None,
    backend: BackendConfig | None = None,
    engine: str = "onednn",
    host: HostReport | None = None,
    kernels: tuple[KernelRow, ...] = (),
    custom: CustomConfig = NOTHING,
    strict: bool = False,
    statistics: Statistics | None = None,
    limit: int | None = None,
    policy: Policy = "fail",
    checkpoint: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> R[passes.Lowered]:
    """Post-training quantization in one call: trace, fuse, prepare, calibrate, convert and lower.

    Args:
        model: a model in evaluation mode; it is not changed.
        batches: an iterable of calibration batches (a tensor, a tuple of inputs or a dict of keyword inputs each),
            read once; the first also serves as the example of shapes. There may be none, `[]`, where the configuration
            measures nothing: dynamic quantization, casts, weights alone.
        qconfig_mapping: what to quantize and how; by default the backend's own.
        backend: what can be quantized; by default what suits the engine.
        engine: whose kernels to use, see `lower`; `"auto"` for the best that the machine runs.
        host: the machine to lower for; by default this one.
        kernels: kernels of the user's own, see `own_kernel`.
        custom: exceptions for the model.
        strict: whether a fallback to float, or a kernel that fails its contract, is an error.
        statistics: earlier ones, to go on from.
        limit: the most batches to read.
        policy: what to do about NaN, infinity and empty batches.
        checkpoint: a file that keeps what was measured; these four as for `calibrate`.
        progress: whether to show a progress bar; by default on a terminal.

    Returns:
        The lowered stage, for `materialize`, or the errors of the step that failed. What the arguments, the model and
        the configuration can be told wrong about is told at once, before any data runs.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    >>> quantize(model, [torch.randn(1, 3, 8, 8)]).unwrap().certificate.in_int8
    1
    """
    mapping = QConfigMapping() if qconfig_mapping is None else qconfig_mapping
    checked = check_kernels(kernels) if host is None else Success(host)
    report = checked.value_or(host or check_host())
    chosen = _suiting(engine, report) if backend is None else backend
    options = Options(statistics, limit=limit, policy=policy, checkpoint=checkpoint, progress=progress)
    problems = [
        *_wrong_model(model, mapping, custom),
        *not_batches(batches),
        *wrong_options(options),
        *passes.wrong_engine(engine, report),
        *(problems_in(checked.failure()) if isinstance(checked, Failure) else ()),
        *wrong_arguments(backend=chosen, qconfig_mapping=mapping, custom=custom),
    ]
    if problems:
        return Failure(several(problems))
    read_batches = read(batches)
    # without batches nothing can be measured; a configuration may measure nothing
    first = next(read_batches, None)
    if isinstance(first, Failure):
        return first
    example = None if first is None else first.unwrap()
    if first is not None and example is None:
        return Failure(BadBatch(0, "it is None", BINDING))
    total = length(batches)
    return (
        trace(model, example, custom=custom)
        .lash(_of_first_batch)
        .bind(lambda graph: _prepared(graph, qconfig_mapping, chosen, custom))
        .bind(lambda prepared: calibrate_on(prepared, chain(filter(None, [first]), read_batches), options, total=total))
        .bind(convert)
        .bind(lambda converted: lower(converted, engine=engine, host=report, kernels=kernels, strict=strict))
    )


def _suiting(engine: str, host: HostReport) -> BackendConfig:
    """The backend that suits an engine; for what is none, any."""
    if not isinstance(engine, str) or not isinstance(host, HostReport):
        return CPU
    name = best_engine(host)[0] if engine == AUTO else engine
    return _BACKENDS.get(name, CPU)


def _wrong_model(model: object, mapping: object, custom: object) -> list[Problem]:
    """What can be told of the model and its configuration before tracing."""
    if not isinstance(model, nn.Module):
        return [NotAModule(type(model).__name__)]
    training: list[Problem] = [InTrainingMode("model")] if model.training else []
    if getattr(custom, "replacements", None) or not isinstance(mapping, QConfigMapping):
        return training  # what modules there are is known once some are replaced
    return training + problems_of(mapping, [name for name, _ in model.named_modules(remove_duplicate=False)])


def _prepared(
    graph: Graph, mapping: QConfigMapping | None, backend: BackendConfig, custom: CustomConfig
) -> R[Prepared]:
    """The graph fused and prepared; where it cannot be fused, what `prepare` would report is reported as well."""
    fused = fuse(graph, backend=backend, custom=custom)
    prepared = prepare(fused.value_or(graph), mapping, backend=backend, custom=custom)
    errors = [result.failure() for result in (fused, prepared) if isinstance(result, Failure)]
    return Failure(several(errors)) if errors else prepared


def _of_first_batch(error: QuantError) -> R[Graph]:
    """What the first batch, which serves as the example, is to blame for is told of it."""
    found = [
        (BadBatch(0, p.reason, BINDING) if p.node == "example_inputs" else BadBatch(0, f"at {p.node}, {p.reason}"))
        if isinstance(p, BadExampleInputs)
        else p
        for p in problems_in(error)
    ]
    return Failure(several(found))
