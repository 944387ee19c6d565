"""One model through `quantize` on each engine and through torch.ao, on the same data: how far each is from float."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import qfunc
from qfunc import X86, Lowered, R, calibrate, convert, fuse, interpret, lower, materialize, prepare, trace, unwrap
from qfunc.config.backend_config import BackendConfig
from qfunc.ir import Graph
from qfunc.testing import oracle, sqnr

Batches = Sequence[tuple[object, ...]]

SIDES: dict[str, tuple[BackendConfig, str]] = {
    "default": (qfunc.CPU, "onednn"),
    "x86 on onednn": (X86, "onednn"),
    "x86 on quantized": (X86, "quantized"),
}
"""Our sides: backend and engine of each."""


def outputs(module: nn.Module, batches: Iterable[tuple[object, ...]]) -> list[Any]:
    with torch.no_grad():
        return [module(*batch) for batch in batches]


def multiply_adds(graph: Graph, batch: tuple[object, ...]) -> dict[str, int]:
    """The multiplications of every node on a batch that a matrix product or a convolution adds up, by torch's count."""
    counter, counts, before = FlopCounterMode(display=False), dict[str, int](), 0

    def count(id: str, _: Any) -> None:
        nonlocal before
        total = counter.get_total_flops()
        counts[id], before = (total - before) // 2, total

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operators, and oneDNN's recurrent ones, are not counted
    try:
        with counter, warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=False):
            unwrap(interpret(graph, batch, count))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counts


@dataclass(frozen=True)
class LoweredSides:
    """`model` quantized in several ways on `batches`, which are what the noise is measured on as well."""

    model: nn.Module
    batches: Batches
    _lowered: dict[str, R[Lowered]] = field(default_factory=dict)
    _noises: dict[str, float] = field(default_factory=dict)

    @cached_property
    def expected(self) -> list[Any]:
        return outputs(self.model, self.batches)

    @cached_property
    def traced(self) -> R[Graph]:
        return trace(self.model, self.batches[0])

    def lowered(self, side: str) -> R[Lowered]:
        """The stage that `quantize` gives, tracing once for all sides."""
        if side not in self._lowered:
            backend, engine = SIDES[side]
            self._lowered[side] = (
                self.traced.bind(lambda graph: fuse(graph, backend=backend))
                .bind(lambda graph: prepare(graph, backend=backend))
                .bind(lambda prepared: calibrate(prepared, self.batches, progress=False))
                .bind(convert)
                .bind(lambda converted: lower(converted, engine=engine))
            )
        return self._lowered[side]

    def noise(self, side: str) -> float:
        """Signal to noise in dB of one of `SIDES`."""
        if side not in self._noises:
            module = unwrap(self.lowered(side).bind(materialize))
            self._noises[side] = sqnr(self.expected, outputs(module, self.batches))
        return self._noises[side]

    @cached_property
    def their_noise(self) -> float:
        """Signal to noise in dB of torch.ao with x86's default; raises what it raises."""
        with warnings.catch_warnings(action="ignore"):
            return sqnr(self.expected, outputs(oracle.quantize(self.model, self.batches), self.batches))

    def share_in_int8(self, side: str = "default") -> float:
        """The share of the multiplications that are computed which run on integers; NaN where there are none."""
        fused = unwrap(self.traced.bind(lambda graph: fuse(graph, backend=SIDES[side][0])))
        counts = multiply_adds(fused, self.batches[0])
        entries = unwrap(self.lowered(side)).certificate.entries
        total = sum(counts[entry.node] for entry in entries)  # what nobody reads is not among them
        return sum(counts[entry.node] for entry in entries if entry.kernel) / total if total else math.nan
