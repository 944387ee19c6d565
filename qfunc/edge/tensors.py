"""Tensors of models: naming them, sharing their memory safely, telling whether they changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qfunc.edge.carry import Carried, carried_model
from qfunc.ir import Source


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer under every name it has, in module order."""
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    yield prefix + name, tensor


def fingerprint(tensor: Tensor) -> tuple[int, object]:
    """(version, identity of its memory): changes when the tensor is written in place or given other memory."""
    version = 0 if tensor.is_inference() else tensor._version
    # A weak reference keeps the identity, not the memory: no later storage is taken for this one.
    weak: Any = StorageWeakRef
    memory = weak(tensor.untyped_storage()) if tensor.layout is torch.strided else id(tensor)
    return version, memory


_COUNTED = ("running_mean", "running_var")


def _state(model: nn.Module, name: str, tensor: Tensor) -> object:
    """What changes with a tensor's values; of a batch norm's statistics, which are updated unnoticed, their count."""
    path, _, leaf = name.rpartition(".")
    count = _attribute(model, f"{path}.num_batches_tracked" if path else "num_batches_tracked")
    counted = leaf in _COUNTED and isinstance(count, Tensor)
    return fingerprint(tensor), fingerprint(count) if counted else None


def is_current(source: Source, name: str) -> bool:
    """Whether the model still has, under this name, the tensor that it had when traced, with the same values."""
    tensor, before = source.tensors[name]
    path = next((path for path in source.replaced if not path or name.startswith(f"{path}.")), None)
    model = source.original if path is None else source.model
    if before is None or (path is not None and not _is_unreplaced(source, path)):
        return before is None
    return _attribute(model, name) is tensor and _state(model, name, tensor) == before


def _is_unreplaced(source: Source, path: str) -> bool:
    """Whether the user's model still has the module that another was traced for, with the same tensors."""
    module, tensors = source.replaced[path]
    found = _attribute(source.original, path) if path else source.original
    if found is not module:
        return False
    now = tuple(tensor for _, tensor in named_tensors(module))
    return len(now) == len(tensors) and all(a is b for a, b in zip(now, tensors, strict=True))


def _attribute(model: nn.Module, name: str) -> Any:
    """What a dotted name of a model stands for; `None` where nothing does."""
    found: Any = model
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def is_saved(source: Source, name: str) -> bool:
    """Whether the tensor is in the model's `state_dict`: a parameter or a persistent buffer."""
    path, _, leaf = name.rpartition(".")
    module = source.model.get_submodule(path) if path else source.model
    persistent = leaf in module._buffers and leaf not in module._non_persistent_buffers_set
    return persistent or leaf in module._parameters


def source_of(
    model: nn.Module,
    others: Mapping[str, Tensor],
    original: nn.Module | None = None,
    replaced: Mapping[str, nn.Module] = MappingProxyType({}),
) -> Source:
    """The source that a graph of `model` reads from.

    Where `model` was made of `original` by replacing modules, `replaced` are those of the original by path.
    `others` are tensors that its forward reads but for parameters and buffers: plain attributes, and those that it made
    itself, which no name of the model stands for and nobody else can change.
    """
    tensors = {**dict(named_tensors(model)), **others}
    table = {
        name: (tensor, _state(model, name, tensor) if _attribute(model, name) is tensor else None)
        for name, tensor in tensors.items()
    }
    originals = {
        path: (module, tuple(tensor for _, tensor in named_tensors(module))) for path, module in replaced.items()
    }
    return ModelSource(model, type(model).__name__, MappingProxyType(table), original, MappingProxyType(originals))


class ModelSource(Source):
    """A source that can be pickled: as fresh where it arrives as it was where it left."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[..., Source], tuple[Any, ...]]:
        model = carried_model(self.model, self.original, self.replaced)
        # A tensor that the model still has comes with the model; one that it does not have comes along.
        others = {name: t for name, (t, _) in self.tensors.items() if _attribute(self.model, name) is not t}
        states = {name: _state_to_carry(self, name) for name in self.tensors}
        return _arrived, (model, self.title, states, Carried(others))


@dataclass(frozen=True, slots=True)
class _Outdated:
    """The state of a tensor that had changed when its source was pickled: equal to no state that a tensor can have."""

    before: object


_CURRENT = "current"


def _state_to_carry(source: Source, name: str) -> object:
    """What the state becomes: it holds identities of this process."""
    _, before = source.tensors[name]
    if before is None or isinstance(before, _Outdated):
        return before
    return _CURRENT if is_current(source, name) else _Outdated(_plain(before))


def _plain(state: Any) -> object:
    """A state in which a number stands for each identity."""
    if isinstance(state, StorageWeakRef):
        return state.cdata
    return tuple(map(_plain, state)) if isinstance(state, tuple) else state


def _arrived(
    parts: tuple[nn.Module, nn.Module | None, Mapping[str, Any]],
    title: str,
    states: Mapping[str, object],
    others: Mapping[str, Tensor],
) -> Source:
    """The source that was pickled, of the model that came with it: tensors that were current are so again."""
    model, original, replaced = parts
    table: dict[str, tuple[Tensor, object]] = {}
    for name, state in states.items():
        tensor = others[name] if name in others else _attribute(model, name)
        if not isinstance(tensor, Tensor):  # the user's own way of pickling left it out
            table[name] = torch.empty(0, device="meta"), _Outdated("")
        else:
            table[name] = tensor, _state(model, name, tensor) if state == _CURRENT else state
    return ModelSource(model, title, MappingProxyType(table), original, MappingProxyType(dict(replaced)))


def share(tensor: Tensor) -> Tensor:
    """A tensor of the same values whose memory is shared until either side is written to; autograd is left behind.

    Memory that cannot be shared so (memory-mapped, owned by numpy or by another process) is copied.
    """
    detached = tensor.detach()
    try:
        return torch._lazy_clone(detached)
    except RuntimeError:
        return detached.clone()
