"""The whole way in one call, and `lower` for the machine at hand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from pyrsistent import pmap
from returns.result import Failure
from torch import nn

from qfunc.backends import CPU, X86
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.config.host_report import HostReport
from qfunc.config.kernel import KernelRow
from qfunc.config.qconfig import QConfigMapping
from qfunc.edge.calibrate import calibrate
from qfunc.edge.host import check_host
from qfunc.edge.trace import NOTHING, trace
from qfunc.errors import NoBatches
from qfunc.passes import lower as passes
from qfunc.passes.convert import convert
from qfunc.passes.fuse import fuse
from qfunc.passes.prepare import prepare
from qfunc.passes.stages import Converted
from qfunc.result import R

_BACKENDS = pmap({"quantized": X86})


def lower(
    converted: Converted,
    *,
    engine: str = "onednn",
    host: HostReport | None = None,
    kernels: tuple[KernelRow, ...] = (),
    strict: bool = False,
) -> R[passes.Lowered]:
    """The graph of kernels of `engine`, for `host` (by default this machine, whose kernels are checked once).

    See `qfunc.passes.lower.lower`, the pure function of graph and host report.
    """
    report = check_host() if host is None else host
    return passes.lower(converted, report, engine=engine, kernels=kernels, strict=strict)


def quantize(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    qconfig_mapping: QConfigMapping | None = None,
    backend: BackendConfig | None = None,
    engine: str = "onednn",
    host: HostReport | None = None,
    custom: CustomConfig = NOTHING,
    strict: bool = False,
    progress: bool | None = None,
) -> R[passes.Lowered]:
    """Static int8 post-training quantization: trace, fuse, prepare, calibrate, convert and lower.

    Args:
        model: a model in evaluation mode; it is not changed.
        batches: an iterable of calibration batches (a tensor, a tuple of inputs or a dict of keyword inputs each); the
            first also serves as the example of shapes.
        qconfig_mapping: what to quantize and how; by default the backend's own.
        backend: what can be quantized; by default what suits the engine.
        engine: whose kernels to use, see `lower`.
        host: the machine to lower for; by default this one.
        custom: modules to keep whole while tracing.
        strict: whether a fallback to float is an error.
        progress: whether to show a progress bar; by default on a terminal.

    Returns:
        The lowered stage, for `materialize`, or the errors of the step that failed.

    >>> import torch
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    >>> quantize(model, [torch.randn(1, 3, 8, 8)]).unwrap().certificate.in_int8
    1
    """
    first, whole = _first(batches)
    if first is None:
        return Failure(NoBatches())
    chosen = backend or _BACKENDS.get(engine, CPU)
    return (
        trace(model, first[0], custom=custom)
        .bind(lambda graph: fuse(graph, backend=chosen))
        .bind(lambda graph: prepare(graph, qconfig_mapping, backend=chosen))
        .bind(lambda prepared: calibrate(prepared, whole, progress=progress))
        .bind(convert)
        .bind(lambda converted: lower(converted, engine=engine, host=host, strict=strict))
    )


def _first(batches: Iterable[Any]) -> tuple[tuple[Any] | None, Iterable[Any]]:
    """The first batch, in a tuple, and all of them; what can be read once only is read once."""
    if not isinstance(batches, Iterator):
        return next(((batch,) for batch in batches), None), batches
    first = next(((batch,) for batch in batches), None)
    return first, chain(first or (), batches)
