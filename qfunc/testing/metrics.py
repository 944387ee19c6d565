"""How far apart two outputs are. An output is a tensor, a number, or tuples, lists and dicts of such."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def sqnr(reference: object, actual: object) -> float:
    r"""Signal to quantization noise in dB: $20 \log_{10}(\|r\| / \|r - a\|)$ over all elements of all tensors together.

    Infinity where both are equal, minus infinity where the reference is zero and the other is not; NaN if either holds
    one. Computed in float64; `ValueError` if the structures or shapes differ.

    >>> round(sqnr(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.1])), 2)
    23.01
    >>> sqnr(torch.ones(2), torch.ones(2))
    inf
    """
    pairs = _pairs(reference, actual)
    signal = math.hypot(*(float(torch.linalg.vector_norm(a)) for a, _ in pairs))
    noise = math.hypot(*(float(torch.linalg.vector_norm(a - b)) for a, b in pairs))
    if noise == 0:
        return math.inf
    return 20 * math.log10(signal / noise) if signal else -math.inf


def max_abs_error(reference: object, actual: object) -> float:
    """The largest difference of two elements at the same place; 0.0 where there is none, NaN if either holds one.

    `ValueError` if the structures or shapes differ.

    >>> max_abs_error((torch.zeros(2), 1), (torch.tensor([0.0, -0.5]), 1))
    0.5
    """
    errors = [float((a - b).abs().max()) for a, b in _pairs(reference, actual) if a.numel()]
    return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)


def relative_error(reference: object, actual: object) -> float:
    """The largest difference of two elements at the same place, as a share of that tensor's largest in magnitude.

    Of several tensors, that of the worst. What is not finite must be the same in both, else the error is infinite; so
    it is where the reference is zero and the other is not. `ValueError` if the structures or shapes differ.

    >>> relative_error((torch.tensor([2.0, -4.0]), 1), (torch.tensor([3.0, -4.0]), 1))
    0.25
    """
    return max((_relative(a, b) for a, b in _pairs(reference, actual) if a.numel()), default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    same = (a == b) | (a.isnan() & b.isnan())
    error = torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf)).max().item()
    finite = a[a.isfinite()]
    size = finite.abs().max().item() if finite.numel() else 0.0
    return error / size if size else math.inf if error else 0.0


def same_bits(a: object, b: object) -> bool:
    """Whether both have one structure, and equal dtypes, shapes and elements, NaN being equal to NaN and 0.0 to -0.0.

    >>> same_bits({"y": torch.tensor([math.nan])}, {"y": torch.tensor([math.nan])})
    True
    >>> same_bits(torch.ones(1), torch.ones(1, dtype=torch.int64))
    False
    """
    ours, theirs = list(_leaves(a, ())), list(_leaves(b, ()))
    return len(ours) == len(theirs) and all(
        path == other and _equal(x, y) for (path, x), (other, y) in zip(ours, theirs, strict=True)
    )


def _equal(x: object, y: object) -> bool:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        return type(x) is type(y) and bool(x == y or (x != x and y != y))
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    floating = x.dtype.is_floating_point or x.dtype.is_complex
    return bool(torch.isclose(x, y, rtol=0, atol=0, equal_nan=True).all()) if floating else torch.equal(x, y)


def _pairs(reference: object, actual: object) -> list[tuple[Tensor, Tensor]]:
    ours, theirs = list(_leaves(reference, ())), list(_leaves(actual, ()))
    if [path for path, _ in ours] != [path for path, _ in theirs]:
        raise ValueError("the outputs differ in structure")
    pairs = [(_tensor(a), _tensor(b)) for (_, a), (_, b) in zip(ours, theirs, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        raise ValueError("the outputs differ in shape")
    return pairs


def _tensor(value: object) -> Tensor:
    return torch.as_tensor(0.0 if value is None else value).detach().to(torch.float64)


def _leaves(value: object, path: tuple[object, ...]) -> Iterator[tuple[tuple[object, ...], object]]:
    """The tensors and plain values of a nested output, each with its place."""
    match value:
        case dict():
            yield (*path, dict, len(value)), None
            for key, part in value.items():
                yield from _leaves(part, (*path, dict, key))
        case tuple() | list():
            kind = tuple if isinstance(value, tuple) else list  # fx has subclasses of its own
            yield (*path, kind, len(value)), None
            for index, part in enumerate(value):
                yield from _leaves(part, (*path, kind, index))
        case _:
            yield path, value
