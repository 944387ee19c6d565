"""Engines: tables of kernels, as data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from qfunc.config.kernel import Engine
from qfunc.engines.decomposed import DECOMPOSED
from qfunc.engines.onednn import ONEDNN
from qfunc.engines.quantized import QUANTIZED, QUANTIZED_BY

ENGINES: Mapping[str, Engine] = MappingProxyType(
    {engine.name: engine for engine in (ONEDNN, QUANTIZED, *QUANTIZED_BY, DECOMPOSED, Engine("reference"))}
)
"""The engines, by name. The last two have no kernels: they compute in float."""

__all__ = ["DECOMPOSED", "ENGINES", "ONEDNN", "QUANTIZED"]
