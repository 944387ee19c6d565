"""Laws 9 and 10, of statistics and of qparams, on an observer and the data it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qfunc.numerics.affine import dequantize, quantize
from qfunc.numerics.observers import Observer
from qfunc.numerics.qparams import QParams
from qfunc.testing.metrics import same_bits


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """An observer and tensors of finite numbers for it, alike but for their sizes.

    `mergeable` promises that the observer has `merge`; `splittable`, that its state does not depend on how values are
    split and ordered either. A `per_channel` observer is given tensors of one number of channels.
    """

    observer: Observer[Any]
    tensors: tuple[Tensor, ...]

    @property
    def mergeable(self) -> bool:
        """Whether the observer offers an exact `merge`."""
        return hasattr(self.observer, "merge")

    @property
    def splittable(self) -> bool:
        """Whether `merge` is exact within tensors too: not where only a part of a tensor's values is counted."""
        return self.mergeable and getattr(self.observer.statistic, "stride", 1) == 1

    def fold(self, tensors: Iterable[Tensor]) -> Any:
        """The state after some tensors."""
        state = self.observer.init()
        for tensor in tensors:
            state = self.observer.update(state, tensor)
        return state

    def qparams(self) -> QParams | None:
        """The qparams of all tensors."""
        return self.observer.finish(self.fold(self.tensors))


def _split_and_order(given: Measurement) -> str:
    if not given.splittable:
        return ""
    whole = given.fold(given.tensors)
    axis = 1 if given.observer.spec.ch_axis == 0 else 0
    pieces = [part for tensor in reversed(given.tensors) for part in reversed(_rows(tensor, axis))]
    return "" if given.fold(pieces) == whole else f"in pieces and backwards: {given.fold(pieces)}, at once: {whole}"


def _rows(tensor: Tensor, axis: int) -> tuple[Tensor, ...]:
    return torch.split(tensor, 1, axis) if axis < tensor.dim() else (tensor,)


def _merge(given: Measurement) -> str:
    if not given.mergeable:
        return ""
    merge: Callable[[Any, Any], Any] = given.observer.merge  # type: ignore[attr-defined]
    unit = given.observer.init()
    states = [given.fold((tensor,)) for tensor in given.tensors]
    for a in states:
        if merge(a, unit) != a or merge(unit, a) != a:
            return f"init is no unit of merge for {a}"
        for b in states:
            if merge(a, b) != merge(b, a):
                return f"merge does not commute on {a} and {b}"
            for c in states[:3]:
                if merge(merge(a, b), c) != merge(a, merge(b, c)):
                    return f"merge is not associative on {a}, {b} and {c}"
    joined = unit
    for state in states:
        joined = merge(joined, state)
    return "" if joined == given.fold(given.tensors) else "merged states differ from that of all tensors"


def _update_is_pure(given: Measurement) -> str:
    state = given.observer.init()
    for tensor in given.tensors:
        before, copy = given.observer.finish(state), tensor.clone()
        first, second = given.observer.update(state, tensor), given.observer.update(state, tensor)
        if first != second:
            return "updating twice gives two states"
        if given.observer.finish(state) != before or not same_bits(tensor, copy):
            return "update changes the state or the tensor that it is given"
        state = first
    return ""


def _zero_point_in_range(given: Measurement) -> str:
    q = given.qparams()
    if q is None:
        return ""
    low, high = q.spec.quant_min, q.spec.quant_max
    if not bool(((q.zero_point >= low) & (q.zero_point <= high)).all()):
        return f"zero point {q.zero_point.tolist()} outside of {low}..{high}"
    return "" if bool((torch.isfinite(q.scale) & (q.scale > 0)).all()) else f"scale {q.scale.tolist()}"


def _round_trip(q: QParams, x: Tensor) -> Tensor:
    spec, axis = q.spec, q.spec.ch_axis
    codes = quantize(x, q.scale, q.zero_point, spec.quant_min, spec.quant_max, spec.torch_dtype, axis)
    return dequantize(codes, q.scale, q.zero_point, axis)


def _zero_is_exact(given: Measurement) -> str:
    q = given.qparams()
    if q is None:
        return ""
    back = [_round_trip(q, torch.zeros_like(x)) for x in given.tensors]
    return "" if all(bool((x == 0).all()) for x in back) else "zero comes back as something else"


def _error_is_half_a_step(given: Measurement) -> str:
    q = given.qparams()
    if q is None:
        return ""
    for x in given.tensors:
        shape = [1 if axis != q.spec.ch_axis else -1 for axis in range(x.dim())]
        scale = (q.scale.reshape(shape) if q.scale.dim() else q.scale).double()
        zero_point = q.zero_point.reshape(shape) if q.zero_point.dim() else q.zero_point
        low, high = (q.spec.quant_min - zero_point) * scale, (q.spec.quant_max - zero_point) * scale
        exact = x.double()
        error = (exact - _round_trip(q, x.float()).double()).abs()
        # The rounding slack of `qfunc.numerics.affine`.
        bound = scale / 2 + 2.0**-21 * exact.abs()
        representable = torch.maximum(low.abs(), high.abs()) <= torch.finfo(torch.float32).max
        bad = (error > bound) & (exact >= low) & (exact <= high) & representable
        if bool(bad.any()):
            return f"{exact[bad][0].item()} comes back {error[bad][0].item()} off, with {q}"
    return ""


OBSERVER_LAW_TABLE: tuple[tuple[int, str, str, Callable[[Measurement], str]], ...] = (
    (9, "split and order", "Exact statistics do not depend on how values are split and ordered.", _split_and_order),
    (9, "merge", "merge is exact, associative and commutative, with init as unit.", _merge),
    (9, "pure updates", "update changes neither state nor tensor, and depends on nothing else.", _update_is_pure),
    (10, "zero point", "quant_min <= zero_point <= quant_max; scales are positive and finite.", _zero_point_in_range),
    (10, "zero", "Zero is exact.", _zero_is_exact),
    (10, "half a step", "|x - dq(q(x))| <= scale / 2 plus rounding slack, within the range.", _error_is_half_a_step),
)
"""Number, name, statement and check of each law."""
