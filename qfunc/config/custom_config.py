"""What a user says about particular modules of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyrsistent import pmap


@dataclass(frozen=True, slots=True)
class CustomConfig:
    """Exceptions for one model.

    `non_traceable_names` and `non_traceable_types` are modules to keep whole (leaves of the graph, in float);
    `concrete_args` fixes inputs of `forward` while tracing.

    >>> CustomConfig(non_traceable_names=("head",)).non_traceable_names
    ('head',)
    """

    non_traceable_names: tuple[str, ...] = ()
    non_traceable_types: tuple[type, ...] = ()
    concrete_args: Mapping[str, Any] = pmap()
