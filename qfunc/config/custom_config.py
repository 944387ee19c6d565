"""What a user says about particular modules of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyrsistent import pmap

from qfunc.config.custom_fusion import CustomFusion


@dataclass(frozen=True, slots=True)
class CustomConfig:
    """Exceptions for one model.

    `non_traceable_names` and `non_traceable_types` are modules to keep whole (leaves of the graph, in float);
    `concrete_args` fixes inputs of `forward` while tracing; `preserved_attributes` are attributes of the model that
    materialized modules are to have, methods included (plain data attributes always stay).

    `fusions` are tried before the backend's own. Nothing is fused within the modules `unfused_names`, nor by the
    patterns `unfused_patterns` (`explain_fusion` prints their names).

    >>> CustomConfig(non_traceable_names=("head",)).non_traceable_names
    ('head',)
    """

    non_traceable_names: tuple[str, ...] = ()
    non_traceable_types: tuple[type, ...] = ()
    concrete_args: Mapping[str, Any] = pmap()
    preserved_attributes: tuple[str, ...] = ()
    fusions: tuple[CustomFusion, ...] = ()
    unfused_names: tuple[str, ...] = ()
    unfused_patterns: tuple[str, ...] = ()
