"""What a user says about particular modules of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pyrsistent import pmap
from torch import fx, nn

from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_fusion import CustomFusion
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.errors import BadConfig, Problem, UnknownName


@dataclass(frozen=True, slots=True)
class Standalone:
    """The configuration of a standalone module: a region of the graph with rules of its own.

    Nothing is fused across its border; inside, its own `qconfig_mapping` and `backend` hold; `None` is the parent's. In
    its own mapping, names of modules are relative to it: `conv` inside the standalone module `sub` is `sub.conv`. The
    calls of one module at several sites are one region.

    >>> Standalone(QConfigMapping().set_module_name("conv", None)).backend is None
    True
    """

    qconfig_mapping: QConfigMapping | None = None
    backend: BackendConfig | None = None


@dataclass(frozen=True, slots=True)
class CustomModule:
    """How modules of exactly the type `float_type` are quantized: by other modules, which the user makes.

    `observed(module, qconfig)` makes, of a copy of the float module, one that observes what passes through it while
    the model is calibrated; `quantized(module)` makes, of a copy of the calibrated one, the one that takes its place.
    Both take and give plain float tensors, as the float module does: they quantize inside. Their results are copied,
    so they must survive `copy.deepcopy`.

    With `tensor_output=False` the module returns no single tensor (an `nn.LSTM` returns a tuple), and what it returns
    is quantized by those that read it alone.
    """

    float_type: type
    observed: Callable[[Any, QConfig], nn.Module]
    quantized: Callable[[Any], nn.Module]
    tensor_output: bool = True


@dataclass(frozen=True, slots=True)
class Swap:
    """That a module is to be quantized as a custom module, and with what configuration."""

    module: CustomModule
    qconfig: QConfig


@dataclass(frozen=True, slots=True)
class CustomConfig:
    """Exceptions for one model.

    `non_traceable_names` and `non_traceable_types` are modules to keep whole (leaves of the graph, in float);
    `concrete_args` fixes inputs of `forward` while tracing; `preserved_attributes` are attributes of the model that
    materialized modules are to have (plain data attributes always stay). A method among them becomes one of the new
    module; it finds there what the module has, but no layer that was fused away, and is lost by pickling.

    `fusions` are tried before the backend's own. Nothing is fused within the modules `unfused_names`, nor by the
    patterns `unfused_patterns` (`explain_fusion` prints their names).

    Standalone modules are named by `standalone_names` or chosen by exact type in `standalone_types`; the name is
    stronger, and of nested ones the innermost holds. `replacements` are functions that make, of modules of exactly a
    type, those that are traced in their place (`decomposed_attention` is one); they are given the user's own module,
    whose parameters their result may use, and must not change it. `custom_modules` are quantized by modules of the
    user's; they are leaves of the graph.

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
    standalone_names: Mapping[str, Standalone] = pmap()
    standalone_types: Mapping[type, Standalone] = pmap()
    replacements: Mapping[type, Callable[[Any], nn.Module]] = pmap()
    custom_modules: tuple[CustomModule, ...] = ()
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
