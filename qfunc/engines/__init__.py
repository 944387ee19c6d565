"""Engines: tables of kernels, as data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qfunc.config.kernel import KernelRow
from qfunc.engines.onednn import ONEDNN
from qfunc.engines.quantized import QUANTIZED

ENGINES: Mapping[str, tuple[KernelRow, ...]] = MappingProxyType(
    {"onednn": ONEDNN, "quantized": QUANTIZED, "reference": ()}
)
"""The kernels of each engine, the preferred ones first. The reference engine has none: it computes in float."""

__all__ = ["ENGINES", "ONEDNN", "QUANTIZED"]
