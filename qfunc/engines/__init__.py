"""Engines: tables of kernels, as data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qfunc.config.kernel import Engine
from qfunc.engines.onednn import ONEDNN
from qfunc.engines.quantized import QUANTIZED

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {engine.name: engine for engine in (ONEDNN, QUANTIZED, Engine("reference"))}
)
"""The engines, by name. The reference engine has no kernels: it computes in float."""

__all__ = ["ENGINES", "ONEDNN", "QUANTIZED"]
