"""Digests of contents: of the batches that were read, and of a model's tensors."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from qfunc.edge.carry import memory
from qfunc.ir import Graph, structure_digest
from qfunc.passes.stages import Prepared
from qfunc.passes.statistics import Statistics


def batch_digest(inputs: tuple[Any, ...]) -> int:
    """The SHA-256 of what a batch holds, as a number: dtypes, shapes and values of its tensors, whatever their layout.

    What is no tensor counts as it is pickled, or, where it cannot be, by its type. Sums of such numbers modulo 2**256
    are digests of multisets of batches (Clarke et al., "Incremental Multiset Hash Functions", 2003; against accidents,
    not against adversaries).

    >>> x = torch.arange(6.0).view(2, 3)
    >>> batch_digest((x,)) == batch_digest((x.t().contiguous().t(),)), batch_digest((x,)) == batch_digest((-x,))
    (True, False)
    """
    leaves, spec = tree_flatten(inputs)
    found = hashlib.sha256(str(spec).encode())
    for leaf in leaves:
        for part in _parts(leaf) if isinstance(leaf, Tensor) else (_pickled(leaf),):
            found.update(part)
    return int.from_bytes(found.digest(), "big")


def _pickled(value: object) -> bytes:
    try:
        return pickle.dumps(value, protocol=4)
    except Exception:  # noqa: BLE001 - the user's object: anything may come out of it
        return type(value).__qualname__.encode()


def statistics_of(prepared: Prepared) -> Statistics:
    """The statistics of no data: those of its graph and weights, of which every run of this stage begins."""
    return Statistics(structure_digest(prepared.graph), weights_digest(prepared.graph))


def weights_digest(graph: Graph) -> str:
    """The SHA-256 of all tensors of the models that a graph was traced from: names, dtypes, shapes and values."""
    found = hashlib.sha256()
    for key, source in sorted(graph.sources.items()):
        for name, (tensor, _) in sorted(source.tensors.items()):
            found.update(f"{key} {name} ".encode())
            for part in _parts(tensor):
                found.update(part)
    return found.hexdigest()


def _parts(tensor: Tensor) -> Iterator[Any]:
    """What a tensor is and holds, in row-major order, without a copy where it lies so."""
    yield f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    if tensor.is_meta or not tensor.numel():
        return
    dense = tensor.detach() if tensor.layout == torch.strided else tensor.detach().to_dense()
    plain = dense.cpu().resolve_conj().resolve_neg()
    held = (plain.int_repr() if plain.is_quantized else plain).contiguous()
    size = held.element_size()
    yield memory(held, int(held.storage_offset()) * size, held.numel() * size)
