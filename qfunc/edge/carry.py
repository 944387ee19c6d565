"""Models in pickles: carried by value, once in a pickle, and untouched by it.

A pickler of another library does things to tensors: that of `multiprocessing` moves their memory to where both
processes write to it, and plain pickling ends the sharing of memory with materialized modules. So a model is pickled
here, into bytes, but for two things that stand beside them: its memory, as bytes, and its classes and functions, which
the outer pickler is to see, since some picklers can carry what others cannot.
"""

from __future__ import annotations

import ctypes
import io
import pickle
import weakref
from collections.abc import Callable, Mapping
from types import FunctionType, ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn

Replaced: TypeAlias = Mapping[str, tuple[nn.Module, tuple[Any, ...]]]
_CODE = (type, FunctionType, ModuleType)
# torch's stubs leave these out, or untyped.
_TYPED: Any = torch.TypedStorage
_UNTYPED: Any = torch.UntypedStorage
_ADDRESS: Callable[[torch.Tensor], int] = getattr(torch._C, "_data_address")  # noqa: B009


def memory(tensor: torch.Tensor, start: int, size: int) -> ctypes.Array[ctypes.c_char]:
    """`size` bytes of the storage of a tensor on the CPU, from `start` on; of use while the tensor lives.

    To ask for the ordinary address would be to announce a write, and end the sharing of the memory.
    """
    return (ctypes.c_char * size).from_address(_ADDRESS(tensor) + start)


class Carried:
    """A value that a pickler is to see as its structure, its code and its memory; the value itself comes out."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _restored, taken_apart(self.value)


class CarriedModel(weakref.ref[nn.Module]):
    """What a pickler sees of a model: `(model, original, replaced)` come out, see `qfunc.ir.Source`."""

    __slots__ = ("original", "replaced")
    original: nn.Module | None
    replaced: Replaced

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _restored, taken_apart((self(), self.original, dict(self.replaced)))


def carried_model(model: nn.Module, original: nn.Module, replaced: Replaced) -> CarriedModel:
    """The one such object that lives: a pickler, which holds it, meets the same for each source of the model."""
    # The interpreter's own list of weak references is where it is found: the model is not to be written to.
    for found in weakref.getweakrefs(model):
        if isinstance(found, CarriedModel):
            return found
    made = CarriedModel(model)
    made.original = None if original is model else original
    made.replaced = replaced
    return made


def taken_apart(value: Any) -> tuple[bytes, list[Any], list[_Memory]]:
    """A value as its structure, its code and its memory; raises what pickling it raises."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), list(pickler.code.values()), list(pickler.memory.values())


def _restored(structure: bytes, code: list[Any], memory: list[torch.UntypedStorage]) -> Any:
    return _Unpickler(structure, code, memory).load()


class _Pickler(pickle.Pickler):
    """Pickles the structure of a value; gathers its code and its memory."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.code: dict[int, Any] = {}
        self.memory: dict[int, _Memory] = {}
        self._places: dict[tuple[str, int], int] = {}

    def persistent_id(self, obj: Any) -> tuple[str, int, torch.dtype | None] | None:
        """Where what is not part of the structure is found."""
        if isinstance(obj, _CODE):
            self.code.setdefault(id(obj), obj)
            return "code", self._place("code", id(obj)), None
        match obj:
            case torch.TypedStorage():
                return "memory", self._memory(obj._untyped_storage), obj.dtype
            case torch.UntypedStorage():
                return "memory", self._memory(obj), None
            case _Memory():
                return "memory", self._memory(obj.storage), None
            case _:
                return None

    def _memory(self, storage: torch.UntypedStorage) -> int:
        # By the address of what torch holds: each time it is asked for a storage it makes another Python object.
        self.memory.setdefault(storage._cdata, _Memory(storage))
        return self._place("memory", storage._cdata)

    def _place(self, kind: str, key: int) -> int:
        return self._places.setdefault((kind, key), len(self.code if kind == "code" else self.memory) - 1)


class _Unpickler(pickle.Unpickler):
    def __init__(self, structure: bytes, code: list[Any], memory: list[torch.UntypedStorage]) -> None:
        super().__init__(io.BytesIO(structure))
        self._held: dict[str, list[Any]] = {"code": code, "memory": memory}

    def persistent_load(self, pid: tuple[str, int, torch.dtype | None]) -> Any:
        kind, index, dtype = pid
        found = self._held[kind][index]
        return found if dtype is None else _TYPED(wrap_storage=found, dtype=dtype, _internal=True)


class _Memory:
    """The memory of tensors, of which a pickler sees the bytes."""

    __slots__ = ("storage",)

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[bytes, str]]:
        storage = self.storage
        tensor = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()
        data = memory(tensor, 0, storage.nbytes()).raw if storage.nbytes() else b""
        return _filled, (data, str(storage.device))


def _filled(data: bytes, device: str) -> torch.UntypedStorage:
    storage: torch.UntypedStorage = _UNTYPED(len(data))
    ctypes.memmove(storage.data_ptr(), data, len(data))
    return storage if device == "cpu" else torch.empty(0, dtype=torch.uint8).set_(storage).to(device).untyped_storage()
