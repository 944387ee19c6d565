"""Tensors of models: naming them, sharing their memory safely, telling whether they changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from qfunc.ir import Source


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, in module order."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield prefix + name, tensor


def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """(version, storage identity): changes when the tensor is written in place or given other memory."""
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.untyped_storage()._cdata


def source_of(model: nn.Module, constants: Mapping[str, Tensor]) -> Source:
    """The source that a graph of `model` reads from; `constants` are tensors that its forward wrote inline."""
    tensors = {**dict(named_tensors(model)), **constants}
    table = {name: (tensor, fingerprint(tensor)) for name, tensor in tensors.items()}
    return Source(model, type(model).__name__, MappingProxyType(table))


def share(tensor: Tensor) -> Tensor:
    """A tensor of the same values whose memory is shared until either side is written to; autograd is left behind.

    Memory that cannot be shared so (memory-mapped, owned by numpy or by another process) is copied.
    """
    detached = tensor.detach()
    try:
        return torch._lazy_clone(detached)
    except RuntimeError:
        return detached.clone()
