"""The model classes of `torch.testing._internal.common_quantization`, found by introspection, with inputs for each."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

SOURCE = "torch.testing._internal.common_quantization"
_NEEDS = ("expecttest", "numpy", "torch.ao.quantization")


@dataclass(frozen=True, slots=True)
class CommonCase:
    """One class of the module, by its name there, with arguments for its constructor."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def build(self) -> tuple[nn.Module, tuple[object, ...]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: nn.Module = _class(self.name)(**dict(self.options)).eval()
            return model, tuple(_inputs(self.name, model))

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{name}={value}" for name, value in self.options)])


def available() -> bool:
    """Whether the module is there, and what it imports."""
    try:
        return all(importlib.util.find_spec(name) is not None for name in _NEEDS)
    except ModuleNotFoundError:
        return False


@cache
def source() -> ModuleType:
    """The module. It tries to import torchvision, which may be one for another torch, and does without."""
    hidden = "torchvision" not in sys.modules
    if hidden:
        sys.modules["torchvision"] = None  # type: ignore[assignment] - what makes an import fail
    try:
        return importlib.import_module(SOURCE)
    finally:
        if hidden:
            del sys.modules["torchvision"]


def model_classes() -> tuple[str, ...]:
    """The names of all model classes of the module, also of those inside other classes."""
    return tuple(_model_classes(source(), ""))


def _model_classes(owner: Any, prefix: str) -> Iterator[str]:
    for name, found in vars(owner).items():
        if inspect.isclass(found) and found.__module__ == SOURCE:
            if issubclass(found, nn.Module):
                yield prefix + name
            yield from _model_classes(found, f"{prefix}{name}.")


def _class(name: str) -> Any:
    found: Any = source()
    for part in name.split("."):
        found = getattr(found, part)
    return found


def cases() -> tuple[CommonCase, ...]:
    """Every class, with each of the arguments that `ARGUMENTS` lists for it."""
    return tuple(
        CommonCase(name, tuple(options.items()))
        for name in model_classes()
        for options in ARGUMENTS.get(name.rpartition(".")[2], ({},))
    )


def _inputs(name: str, model: Any) -> tuple[object, ...]:
    short = name.rpartition(".")[2]
    if short in INPUTS:
        return INPUTS[short]()
    if short in ("ConvWithBNRelu", "ConvTWithBNRelu"):
        layer = next(model.children())
        return (torch.rand(1, 3, *[6] * (layer.weight.dim() - 2)),)
    given = getattr(model, "get_example_inputs", None) or getattr(model, "example_inputs", None)
    if given is None:
        raise LookupError(f"{name} has no example inputs and stands in no table")
    return tuple(given())


def _image(channels: int, side: int, batch: int = 1) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.rand(batch, channels, side, side),)


def _rows(*sizes: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.rand(*sizes),)


def _bags() -> tuple[Tensor, Tensor]:
    return torch.tensor([1, 2, 4, 5, 4, 3]), torch.tensor([0, 2, 4])


_CELLS = ("GRUCell", "LSTMCell", "RNNReLU", "RNNTanh")
_FLAGS = (False, True)
_ADDS = ("with_bn", "with_relu", "left_conv", "two_conv", "use_torch_add")

ARGUMENTS: dict[str, tuple[dict[str, Any], ...]] = {
    "RNNDynamicModel": ({"mod_type": "GRU"}, {"mod_type": "LSTM"}),
    "RNNCellDynamicModel": tuple({"mod_type": kind} for kind in _CELLS),
    "AnnotatedConvModel": ({"qengine": "fbgemm"},),
    "AnnotatedConvTransposeModel": ({"qengine": "qnnpack"},),
    "AnnotatedNestedModel": ({"qengine": "fbgemm"},),
    "AnnotatedSkipQuantModel": ({"qengine": "fbgemm"},),
    "ManualLinearQATModel": ({"qengine": "fbgemm"},),
    "ManualDropoutQATModel": ({"qengine": "fbgemm"},),
    "ModelForFusion": ({"qconfig": None},),
    "LinearBnLeakyReluModel": tuple({"with_bn": flag} for flag in _FLAGS),
    "ConvBnAddReluModel": tuple(
        dict(zip(_ADDS, ((n >> i) % 2 == 1 for i in range(5)), strict=True)) for n in range(32)
    ),
    "EmbBagWrapper": ({"num_embeddings": 10, "embedding_dim": 5},),
    "DenseTopMLP": ({"dense_dim": 4, "dense_out": 2, "embedding_dim": 5, "top_out_in": 2, "top_out_out": 2},),
    "ConvWithBNRelu": tuple({"relu": r, "dim": d, "bn": b} for r in _FLAGS for d in (1, 2, 3) for b in _FLAGS),
    "ConvTWithBNRelu": tuple({"relu": r, "dim": d, "bn": b} for r in _FLAGS for d in (1, 2) for b in _FLAGS),
}
"""Constructor arguments of the classes that need some, or that build different models."""

INPUTS: dict[str, Callable[[], tuple[object, ...]]] = {
    "RNNDynamicModel": _rows(3, 1, 2),
    "RNNCellDynamicModel": _rows(1, 2),
    "LSTMwithHiddenDynamicModel": lambda: (torch.rand(3, 1, 2), (torch.rand(1, 1, 2), torch.rand(1, 1, 2))),
    "ActivationsTestModel": _rows(1, 5),
    "NormalizationTestModel": _rows(1, 5),
    **dict.fromkeys(
        ("NestedModel", "AnnotatedNestedModel", "AnnotatedSubNestedModel", "AnnotatedCustomConfigNestedModel"),
        _rows(1, 5),
    ),
    **dict.fromkeys(
        ("QuantSubModel", "InnerModule", "SkipQuantModel", "AnnotatedSkipQuantModel", "QuantStubModel"), _rows(1, 5)
    ),
    **dict.fromkeys(("ManualLinearQATModel", "ManualDropoutQATModel", "ManualLinearDynamicQATModel"), _rows(1, 5)),
    **dict.fromkeys(("ManualConvLinearQATModel", "ManualConvLinearSymmQATModel"), _image(3, 10)),
    "ManualEmbeddingBagLinear": _bags,
    "DeFusedEmbeddingBagLinear": lambda: (torch.tensor([[1, 2], [4, 5]]),),
    "SubModelForFusion": _image(2, 5),
    "SubModelWithoutFusion": _image(2, 5),
    "ModelForFusion": lambda: (torch.rand(1, 3, 1, 19),),
    "ConvBNReLU": _image(3, 5),
    "ModelWithSequentialFusion": _image(3, 10),
    "ModelForFusionWithBias": _image(3, 8),
    "ModelForLinearBNFusion": _rows(4, 20),
    "DummyObserver": _rows(1, 5),
    "ModelForConvTransposeBNFusion": _rows(1, 3, 6),
    "ModelWithFunctionals": _rows(1, 5),
    "ResNetBase": _image(3, 5),
    "ModelMultipleOps": _image(3, 8),
    "ModelMultipleOpsNoAvgPool": _image(3, 16),
    "EmbeddingBagModule": lambda: (*_bags(), torch.rand(6)),
    "EmbeddingModule": lambda: (torch.tensor([9, 6, 5, 7]),),
    "EmbeddingWithStaticLinear": lambda: (*_bags(), torch.rand(3, 4)),
    "DenseTopMLP": lambda: (torch.rand(3, 5), torch.rand(3, 4)),
    "EmbBagWrapper": _bags,
    "SparseNNModel": lambda: (*_bags(), torch.rand(3, 4)),
    "Conv2dPropAnnotaton": _image(3, 5),
    "Conv2dWithObsSharingOps": _image(3, 5),
    "Conv2dWithTwoLinearPermute": _image(3, 5),
    "Conv2dWithTwoLinear": lambda: (torch.rand(2, 3, 4, 4),),
    "ConvLinearWPermute": _image(3, 5),
    "ConvMaxPool2d": _image(2, 5),
    "ConvWithAdaptiveAvgPool2d": _image(3, 5),
    "Conv2dWithCat": lambda: (torch.rand(1, 3, 5, 5), torch.rand(1, 3, 5, 5)),
    "Conv2dWithTwoCat": lambda: (
        *(torch.rand(1, 3, 5, 5) for _ in range(2)),
        *(torch.rand(1, 6, 3, 3) for _ in range(2)),
    ),
    "ThreeAdd": lambda: tuple(torch.rand(1, 3) for _ in range(4)),
    "EmbeddingConvLinearModule": lambda: (torch.tensor([[9, 6, 5], [7, 1, 2]]),),
    "AddInplaceAdd": lambda: (torch.rand(1, 3), torch.rand(1, 3)),
    "MulInplaceMul": lambda: (torch.rand(1, 3), torch.rand(1, 3)),
    "AddMulScalar": _rows(1, 3),
    "ConvBnReLU2dAndLinearReLU": _image(3, 5),
    "LinearReluModel": _rows(1, 5),
}
"""Inputs of the classes that give no example."""
