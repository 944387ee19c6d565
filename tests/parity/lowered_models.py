"""The models that are measured at the lowered level, and what is known of them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tests.conftest import load_shared
from tests.parity import common_models
from tests.parity.lowered_sides import SIDES, Batches, LoweredSides
from tests.zoo import ZOO

TORCHVISION = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121"),
    *("shufflenet_v2_x1_0", "googlenet", "regnet_y_400mf", "squeezenet1_1", "vit_b_16", "swin_t", "convnext_tiny"),
)
SIDE = {"vit_b_16": 224, "googlenet": 96}
"""Image sizes of the networks that do not take, or hardly see, 64 pixels."""


@dataclass(frozen=True)
class Measured:
    """A model and its data, by name."""

    name: str
    build: Callable[[], tuple[nn.Module, Batches]]

    def __str__(self) -> str:
        return self.name


def _of_zoo(case: Any) -> Measured:
    return Measured(case.name, lambda: (case.build()[0], case.batches(4, 16)))


def _of_common(case: common_models.CommonCase) -> Measured:
    return Measured(str(case), lambda: _with_more(*case.build()))


def _with_more(model: nn.Module, example: tuple[object, ...]) -> tuple[nn.Module, Batches]:
    """Seven more batches like the example, of other numbers; indices stay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = (
            tree_map_only(Tensor, lambda t: torch.rand_like(t) if t.is_floating_point() else t, example)
            for _ in range(7)
        )
        return model, [example, *drawn]


def _of_torchvision(name: str) -> Measured:
    def build() -> tuple[nn.Module, Batches]:
        with torch.random.fork_rng(devices=[]):
            model, _ = load_shared("zoo.py").build(name)
            torch.manual_seed(1)
            side = SIDE.get(name, 64)
            return model, [(torch.randn(2, 3, side, side),) for _ in range(2)]

    return Measured(name, build)


@cache
def sides(case: Measured) -> LoweredSides:
    return LoweredSides(*case.build())


ZOO_CASES = tuple(map(_of_zoo, ZOO))
COMMON_CASES = tuple(map(_of_common, common_models.cases())) if common_models.available() else ()
TORCHVISION_CASES = tuple(map(_of_torchvision, TORCHVISION))

UNTRACEABLE = {"TestHelperModules.ControlFlow": ("Untraceable", "common_quantization.py", "takes no traced value")}
"""What fails, and how: the error's class, its node, and its reason."""

CHAOTIC = {"NormalizationTestModel": "a norm over equal columns: its output is the rounding error of zero"}
"""What cannot be compared, and why."""

THEIRS_FAIL = {
    "conv1d": (TypeError, "must be tuple of ints"),
    "functional": (AssertionError, "Dequantize index 1 exceeded"),
    "many_inputs": (AttributeError, "'float' object has no attribute 'numel'"),
    "tied": (AttributeError, "'function' object has no attribute 't'"),
    "aliased": (RuntimeError, "view size is not compatible"),
    "padding_modes": (RuntimeError, "Expected a value of type 'List"),
    "TestHelperModules.Conv2dPropAnnotaton": (RuntimeError, "view size is not compatible"),
    "TestHelperModules.Conv2dWithObsSharingOps": (RuntimeError, "required rank 4 tensor to use channels_last"),
    "TestHelperModules.ControlFlow": (RuntimeError, "Mapped xs can only consist of tensors"),
}
"""What torch.ao fails on with its own default, where ours runs."""

RECURRENT = (
    *("RNNDynamicModel-mod_type=GRU", "RNNDynamicModel-mod_type=LSTM", "LSTMwithHiddenDynamicModel"),
    *(f"RNNCellDynamicModel-mod_type={kind}" for kind in ("GRUCell", "LSTMCell", "RNNReLU", "RNNTanh")),
)
LEAST_SHARE: dict[str, tuple[float, str]] = {
    "transformer": (0.94, "matrix products of two activations have no kernel"),
    "transformer_leaf": (0.51, "an attention module stays whole unless it is decomposed"),
    "tied": (0.66, "the transpose of a parameter is computed by the graph"),
    "aliased": (0.0, "its memory is changed in place"),
    "vit_b_16": (0.66, "an attention module stays whole unless it is decomposed"),
    "swin_t": (0.31, "its attention is a function that torch.fx does not look into"),
    **dict.fromkeys(RECURRENT, (0.0, "recurrent layers have no static kernel")),
    "ModelWithFunctionals": (0.0, "its only product is of two activations"),
}
"""The share of products that run on integers, where that is less than 0.995, and why. To be raised as kernels come."""


def main() -> None:
    """Print signal to noise in dB of each model, ours and torch.ao's, and the share of products on integers.

    Run as `python -m tests.parity.lowered_models [part of a name]...`.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{'':60}", *(f"{side:>16}" for side in (*SIDES, "torch.ao")), " share operators")
    for case in (*ZOO_CASES, *COMMON_CASES, *TORCHVISION_CASES):
        if not sys.argv[1:] or any(part in case.name for part in sys.argv[1:]):
            print(_row(case), flush=True)


def _row(case: Measured) -> str:
    found = LoweredSides(*case.build())  # not kept: large ones would fill the memory
    cells = [_told(lambda side=side: f"{found.noise(side):.2f}") for side in SIDES]
    cells.append(_told(lambda: f"{found.their_noise:.2f}"))
    cells.append(_told(lambda: f"{found.share_in_int8():.3f}")[:6])
    certificate = found.lowered("default").map(lambda stage: stage.certificate)
    counts = certificate.map(lambda c: f"{c.in_int8}/{c.total}").value_or("-")
    return " ".join([f"{case.name[:60]:60}", *(f"{cell:>16}" for cell in cells[:-1]), f"{cells[-1]:>6}", counts])


def _told(number: Callable[[], str]) -> str:
    try:
        return number()
    except Exception as error:  # noqa: BLE001 - whatever keeps a model from running stands in the table
        return type(error).__name__[:16]


if __name__ == "__main__":
    main()
