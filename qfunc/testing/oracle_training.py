"""The part of the oracle that trains: torch.ao's fake quantizers and its modules for training.

As `qfunc.testing.oracle`, it imports torch.ao inside its functions, which leave their arguments as they were.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import fx, nn


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that torch.ao gives about itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message="Please use quant_min and quant_max", category=UserWarning)
        yield


def named_fake_quantizers() -> dict[str, Any]:
    """The constructors of fake quantizers that torch.ao has names for."""
    with _quiet():
        module = import_module("torch.ao.quantization.fake_quantize")
        return {name: getattr(module, name) for name in module.__all__ if hasattr(getattr(module, name), "p")}


def fake_quantizer(name: str, observer: str, **options: Any) -> Any:
    """The constructor of a fake quantizer around an observer, both by the names of their classes."""
    with _quiet():
        place = "_learnable_fake_quantize" if name == "_LearnableFakeQuantize" else "fake_quantize"
        made = getattr(import_module(f"torch.ao.quantization.{place}"), name)
        observed = getattr(import_module("torch.ao.quantization.observer"), observer)
        return made.with_args(observer=observed, **options)


def prepare_qat(
    model: nn.Module,
    example_inputs: tuple[object, ...],
    mapping: Any,
    *,
    exact: bool = False,
    frozen: bool = False,
    **options: Any,
) -> fx.GraphModule:
    """`prepare_qat_fx` of a copy of a model; with `exact` its batch norms are folded by the slow path.

    With `frozen` they keep their statistics. `options` are `prepare_qat_fx`'s.
    """
    with _quiet():
        from torch.ao.quantization.quantize_fx import prepare_qat_fx

        prepared = prepare_qat_fx(copy.deepcopy(model), mapping, example_inputs, **options)
        parts: list[Any] = list(prepared.modules())
        for part in parts:
            if hasattr(part, "_enable_slow_path_for_better_numerical_stability"):
                part._enable_slow_path_for_better_numerical_stability = exact
            # its function for a whole model leaves linear layers out
            if frozen and hasattr(part, "freeze_bn_stats"):
                part.freeze_bn_stats()
        return prepared


def only_weights_rounded(prepared: fx.GraphModule) -> fx.GraphModule:
    """The prepared module, whose activations are measured no more and pass as they are."""
    for node in prepared.graph.nodes:
        if node.op == "call_module":
            part: Any = prepared.get_submodule(node.target)
            if hasattr(part, "disable_fake_quant"):
                part.disable_fake_quant()
                part.disable_observer()
    return prepared


def qconfig(activation: Any, weight: Any) -> Any:
    """A `QConfig` of torch.ao's; without an activation, those stay float."""
    with _quiet():
        from torch.ao.quantization import PlaceholderObserver, QConfig

        made: Any = QConfig
        return made(activation or PlaceholderObserver.with_args(dtype=torch.float32), weight)
