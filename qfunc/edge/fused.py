"""Modules of several layers that are quantized as one.

Each is an `nn.Sequential` of its parts, computes what they compute one after the other, and has their parameters under
`0.weight`, `1.weight` and so on. The names are the field's.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn


class FusedModule(nn.Sequential):
    """A sequence of parts of fixed types; other parts are a `TypeError`."""

    parts: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init__(self, *modules: nn.Module) -> None:
        _check(type(self), modules)
        super().__init__(*modules)

    def __getitem__(self, index: Any) -> Any:
        """The part at an index, or a plain `nn.Sequential` of those in a slice."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)


def _check(fused: type[FusedModule], given: tuple[object, ...]) -> None:
    if len(given) != len(fused.parts) or not all(map(isinstance, given, fused.parts)):
        types = [", ".join(type.__name__ for type in found) for found in (fused.parts, map(type, given))]
        raise TypeError(f"{fused.__name__} is made of ({types[0]}), not of ({types[1]})")


class ConvReLU1d(FusedModule):
    """A convolution and a ReLU."""

    parts = (nn.Conv1d, nn.ReLU)


class ConvReLU2d(FusedModule):
    """A convolution and a ReLU."""

    parts = (nn.Conv2d, nn.ReLU)


class ConvReLU3d(FusedModule):
    """A convolution and a ReLU."""

    parts = (nn.Conv3d, nn.ReLU)


class ConvBn1d(FusedModule):
    """A convolution and a batch norm, unfolded: both train."""

    parts = (nn.Conv1d, nn.BatchNorm1d)


class ConvBn2d(FusedModule):
    """A convolution and a batch norm, unfolded: both train."""

    parts = (nn.Conv2d, nn.BatchNorm2d)


class ConvBn3d(FusedModule):
    """A convolution and a batch norm, unfolded: both train."""

    parts = (nn.Conv3d, nn.BatchNorm3d)


class ConvBnReLU1d(FusedModule):
    """A convolution, a batch norm and a ReLU, unfolded: all train."""

    parts = (nn.Conv1d, nn.BatchNorm1d, nn.ReLU)


class ConvBnReLU2d(FusedModule):
    """A convolution, a batch norm and a ReLU, unfolded: all train."""

    parts = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)


class ConvBnReLU3d(FusedModule):
    """A convolution, a batch norm and a ReLU, unfolded: all train."""

    parts = (nn.Conv3d, nn.BatchNorm3d, nn.ReLU)


class LinearReLU(FusedModule):
    """A linear layer and a ReLU."""

    parts = (nn.Linear, nn.ReLU)


class LinearBn1d(FusedModule):
    """A linear layer and a batch norm, unfolded: both train."""

    parts = (nn.Linear, nn.BatchNorm1d)


class BNReLU2d(FusedModule):
    """A batch norm and a ReLU."""

    parts = (nn.BatchNorm2d, nn.ReLU)


class BNReLU3d(FusedModule):
    """A batch norm and a ReLU."""

    parts = (nn.BatchNorm3d, nn.ReLU)
