"""The kinds of fake quantizers beside those of ranges, and which one is for what."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from pyrsistent import pmap
from torch import Tensor, nn

from qfunc.config.annotation import Derived
from qfunc.edge.fake_quantize import FakeQuantizer, FixedFakeQuantizer, FusedFakeQuantizer, RangeFakeQuantizer
from qfunc.edge.kernels.base import outside_compile
from qfunc.edge.observer import ObserverError, check_floats, guarded
from qfunc.edge.statistic_types import types_of_observers
from qfunc.edge.statistics_file import from_bytes, to_bytes
from qfunc.edge.switched import Switched
from qfunc.errors import UserFunctionFailed
from qfunc.numerics.derive import derived_qparams
from qfunc.numerics.fake_quantize import FakeQuantize, is_fixed
from qfunc.numerics.observers import (
    MinMax,
    MovingAverageMinMax,
    MovingAveragePerChannelMinMax,
    PerChannelMinMax,
    finished,
)
from qfunc.numerics.qparams import QParams, QuantSpec, qparams_of_range
from qfunc.numerics.statistic import finite
from qfunc.numerics.straight_through import cast_through, round_through
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.passes.statistics import Key, Measured, Statistics
from qfunc.passes.training import Start
from qfunc.result import unwrap


class StateFakeQuantizer(FakeQuantizer):
    """With any other observer. In the `state_dict` its state is bytes, in the form that files of statistics have.

    The buffer that stands for these stays empty otherwise: processes that train together expect equal sizes of it.
    """

    observer_state: Tensor

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self._state, self._has_state = start.state, start.state is not None
        self._device = torch.device("cpu")
        self.register_buffer("observer_state", torch.zeros(0, dtype=torch.uint8))

    @outside_compile
    def _measure(self, x: Tensor) -> None:
        if not finite(x):
            return
        before = self._state if self._has_state else guarded(self.observer, self.place, self.observer.init)
        if self._device != x.device:
            before, self._device = _moved(before, x.device), x.device
        self._state = guarded(self.observer, self.place, self.observer.update, before, x)
        self._has_state = True
        found = finished(self.observer, self._state)
        if isinstance(found, str):
            raise ObserverError(UserFunctionFailed(self.place, found))
        if found is not None:
            self._set(found.scale, found.zero_point)

    def state(self) -> Any:
        """What the observer has found; None as long as that is nothing."""
        return self._state if self._has_state else None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._has_state:
            here = _moved(self._state, torch.device("cpu"))
            written = to_bytes(_filed(self.observer, here), types=types_of_observers([self.observer]))
            # a state that no file can hold stays behind: the qparams, which it was for, are saved all the same
            data = bytearray(written.value_or(b""))
            held = torch.frombuffer(data, dtype=torch.uint8) if data else torch.zeros(0, dtype=torch.uint8)
            destination[f"{prefix}observer_state"] = held.to(self.observer_state.device)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        data = bytes(self.observer_state.cpu().numpy())
        self.observer_state.resize_(0)
        if data:
            found = unwrap(from_bytes(data, types=types_of_observers([self.observer]), place=self.place))[0]
            self._state, self._has_state = next(iter(found.measured.values())).state, True
            self._device = torch.device("cpu")


def _moved(state: Any, device: torch.device) -> Any:
    """A state with its tensors on a device."""
    match state:
        case Tensor():
            return state.to(device)
        case tuple() | list() if type(state) in (tuple, list):
            return type(state)(_moved(each, device) for each in state)
        case dict():
            return {name: _moved(each, device) for name, each in state.items()}
        case _ if is_dataclass(state) and not isinstance(state, type):
            return replace(state, **{f.name: _moved(getattr(state, f.name), device) for f in fields(state) if f.init})
        case _:
            return state


def _filed(observer: Any, state: Any) -> Statistics:
    key: Key = (("observed",), observer.statistic)
    return Statistics("", measured=pmap({key: Measured(state)}))


class DynamicFakeQuantizer(Switched):
    """Rounds each input for its own range, as it will be when the model runs."""

    SWITCHES: ClassVar = (("fake_quant_enabled", True),)

    def __init__(self, spec: QuantSpec, place: str) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        self.add_switches()

    def forward(self, x: Tensor, measure: bool = True) -> Tensor:  # noqa: ARG002 - there is nothing to measure
        """`x`, rounded."""
        check_floats(x, self.place)
        if not self.on["fake_quant_enabled"] or not x.numel():
            return x
        spec, seen = self.spec, x.detach()
        axis = spec.ch_axis
        low, high = torch.aminmax(seen) if axis is None else torch.aminmax(seen.movedim(axis, 0).flatten(1), dim=1)
        found = qparams_of_range(low.to(torch.float32), high.to(torch.float32), spec)
        return round_through(x, found.scale, found.zero_point, spec.quant_min, spec.quant_max, axis)


class CastFakeQuantizer(Switched):
    """Rounds to the numbers of a smaller floating-point type."""

    SWITCHES: ClassVar = (("fake_quant_enabled", True),)

    def __init__(self, dtype: str, place: str) -> None:
        super().__init__()
        self.dtype, self.place = dtype, place
        self.add_switches()

    def forward(self, x: Tensor, measure: bool = True) -> Tensor:  # noqa: ARG002 - there is nothing to measure
        """`x`, rounded."""
        check_floats(x, self.place)
        return cast_through(x, getattr(torch, self.dtype)) if self.on["fake_quant_enabled"] else x


class DerivedFakeQuantizer(Switched):
    """Rounds with qparams that a function makes of those that others have, once they all have some."""

    SWITCHES: ClassVar = (("fake_quant_enabled", True),)

    def __init__(self, start: Start) -> None:
        super().__init__()
        assert isinstance(start.quantization, Derived), start
        self.quantization, self.place, self.owners = start.quantization, start.place, start.owners
        self.sources = start.sources
        self.others: tuple[FakeQuantizer | DerivedFakeQuantizer, ...] = ()
        """Those whose qparams it takes; they are no parts of this module."""
        self.add_switches()

    def qparams(self) -> QParams | None:
        """What it rounds with."""
        of = [known for other in self.others if (known := other.qparams()) is not None]
        if len(of) < len(self.sources):
            return None
        made = derived_qparams(self.quantization.function, tuple(of), self.quantization.spec)
        if isinstance(made, str):
            raise ObserverError(UserFunctionFailed(self.place, made))
        return made

    def forward(self, x: Tensor, measure: bool = True) -> Tensor:  # noqa: ARG002 - there is nothing to measure
        """`x`, rounded."""
        check_floats(x, self.place)
        found = self.qparams() if self.on["fake_quant_enabled"] else None
        if found is None:
            return x
        spec = found.spec
        return round_through(x, found.scale, found.zero_point, spec.quant_min, spec.quant_max, spec.ch_axis)


def connect(root: nn.Module) -> None:
    """Tell the fake quantizers whose qparams derive from others' which those are."""
    parts = [module for module in root.modules() if isinstance(module, (FakeQuantizer, DerivedFakeQuantizer))]
    by_owner = {owner: module for module in parts for owner in module.owners}
    for module in parts:
        if isinstance(module, DerivedFakeQuantizer):
            module.others = tuple(by_owner[source] for source in module.sources if source in by_owner)


def fake_quantizer(start: Start) -> Switched:
    """The module for what is configured.

    >>> from qfunc.numerics.observers import MovingAverageMinMax
    >>> module = fake_quantizer(Start(FakeQuantize(MovingAverageMinMax()), "conv", ()))
    >>> module(torch.tensor([0.0, 2.55, 1.004])).tolist()[2]
    1.0
    """
    match start.quantization:
        case Dynamic(spec):
            return DynamicFakeQuantizer(spec, start.place)
        case Cast(dtype):
            return CastFakeQuantizer(dtype, start.place)
        case Derived():
            return DerivedFakeQuantizer(start)
        case FakeQuantize(observer) as fixed if is_fixed(fixed):
            return FixedFakeQuantizer(replace(start, qparams=fixed.finish(observer.init())))
        case FakeQuantize(fused=True):
            return FusedFakeQuantizer(start)
        case FakeQuantize(observer):
            return RangeFakeQuantizer(start) if type(observer) in _OF_RANGES else StateFakeQuantizer(start)


_OF_RANGES = (MinMax, PerChannelMinMax, MovingAverageMinMax, MovingAveragePerChannelMinMax)
