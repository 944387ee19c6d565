"""What a user says about particular modules of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyrsistent import pmap
from torch import fx, nn

from qfunc.config.custom_fusion import CustomFusion
from qfunc.errors import BadConfig, Problem, UnknownName


@dataclass(frozen=True, slots=True)
class CustomConfig:
    """Exceptions for one model.

    `non_traceable_names` and `non_traceable_types` are modules to keep whole (leaves of the graph, in float);
    `concrete_args` fixes inputs of `forward` while tracing; `preserved_attributes` are attributes of the model that
    materialized modules are to have (plain data attributes always stay). A method among them becomes one of the new
    module; it finds there what the module has, but no layer that was fused away, and is lost by pickling.

    `fusions` are tried before the backend's own. Nothing is fused within the modules `unfused_names`, nor by the
    patterns `unfused_patterns` (`explain_fusion` prints their names).

    The inputs `input_quantized_indexes` are given to the converted model as codes, and the items
    `output_quantized_indexes` of its output are codes, of the qparams that the converted stage tells. Calibration is
    with floats.

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
    input_quantized_indexes: tuple[int, ...] = ()
    output_quantized_indexes: tuple[int, ...] = ()


def preserved_problems(model: nn.Module, names: Iterable[str]) -> Iterator[Problem]:
    """Attributes to preserve that the model does not have, or that a `GraphModule` has of its own."""
    own = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph()))) if names else frozenset()
    for name in names:
        if name in own:
            reason = f"every GraphModule has a {name!r} of its own"
            yield BadConfig(f"preserved_attributes[{name!r}]", reason, "leave it out, or give it another name")
        elif not hasattr(model, name):
            yield UnknownName(name, "attribute", tuple(sorted(known for known in dir(model) if known[0] != "_")))
