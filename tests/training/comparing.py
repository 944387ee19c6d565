"""How near the tensors of two sides are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

CLOSE = 1e-5
"""How far, in the norm of their difference over that of what is expected, two tensors may be apart."""


def apart(found: Tensor, expected: Tensor) -> float:
    """The relative error of a tensor in norm; that of a tensor that should be zero is its norm."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not expected.numel():
        return 0.0
    difference = (found.double() - expected.double()).norm().item()
    return difference / (expected.double().norm().item() or 1.0)


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], within: float = CLOSE) -> None:
    """That both sides have the same tensors by name, and that each is near."""
    assert found.keys() == expected.keys()
    far = {name: error for name, value in expected.items() if not (error := apart(found[name], value)) <= within}
    assert not far, far


def gradients(output: Tensor, of: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The gradients of a random sum of an output, by the names of what they are of; zero where it does not depend."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed)).to(output.dtype)
    found = torch.autograd.grad(output, list(of.values()), weights, allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(of.items(), found, strict=True)
    }
