"""Fake quantization at work: modules that measure what passes while a model trains, and round it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, ClassVar

import torch
from pyrsistent import pmap
from torch import Tensor, distributed, nn
from torch.fx import Proxy

from qfunc.config.annotation import Derived
from qfunc.edge.checkpointed import computes_again
from qfunc.edge.observer import ObserverError, guarded, is_plain
from qfunc.edge.statistic_types import types_of_observers
from qfunc.edge.statistics_file import from_bytes, to_bytes
from qfunc.edge.switched import KeepsDType, Switched
from qfunc.errors import BadConfig, UnsupportedDType, UserFunctionFailed
from qfunc.numerics.derive import derived_qparams
from qfunc.numerics.fake_quantize import FakeQuantize, is_fixed
from qfunc.numerics.fused_range import fused_qparams_of_range
from qfunc.numerics.observers import (
    MinMax,
    MovingAverageMinMax,
    MovingAveragePerChannelMinMax,
    PerChannelMinMax,
    finished,
)
from qfunc.numerics.qparams import FLOAT_QPARAMS, QParams, QuantSpec, middle, qparams_of_range
from qfunc.numerics.statistic import RangeState, finite
from qfunc.numerics.straight_through import cast_through, round_and_learn, round_through
from qfunc.numerics.unmeasured import Cast, Dynamic, told
from qfunc.passes.statistics import Key, Measured, Statistics
from qfunc.passes.training import Start
from qfunc.result import unwrap


class FakeQuantizer(KeepsDType, Switched):
    """Rounds its input to the numbers that its integers stand for, and lets gradients straight through.

    In training it measures its input first, unless `observer_enabled` is off; in evaluation it never does. As long as
    there are no qparams (`scale` is 0), and while `fake_quant_enabled` is off, inputs pass as they are. Learned qparams
    are parameters that begin with what the first batch gives; while `learning_enabled` is off they follow the observer
    as others do. What was measured and the qparams are in the `state_dict`. A batch with NaN or infinity does not
    count. What a checkpointed part computes once more on the way back is rounded as it was on the way there, and not
    measured again.

    Raises `ObserverError` for an input that is no floating-point tensor, and for a user's observer that fails.
    """

    SWITCHES: ClassVar = (("observer_enabled", True), ("fake_quant_enabled", True), ("learning_enabled", True))
    scale: Tensor
    zero_point: Tensor

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.add_switches()
        assert isinstance(start.quantization, FakeQuantize), start
        self.quantization, self.place, self.owners, self.rounds = (
            start.quantization,
            start.place,
            start.owners,
            start.rounds,
        )
        self.observer, self.spec = start.quantization.observer, start.quantization.spec
        self.learned = start.quantization.learned
        known = start.qparams
        shape = (start.channels or 0,) if self.spec.per_channel else ()
        of_floats = self.learned or self.spec.qscheme == FLOAT_QPARAMS
        scale = torch.zeros(shape) if known is None else known.scale.clone()
        zero_point = torch.zeros(shape, dtype=torch.int64) if known is None else known.zero_point.clone()
        self._put("scale", scale, learned=self.learned)
        self._put(
            "zero_point",
            zero_point.to(torch.float32) if of_floats else zero_point,
            learned=self.learned and not self.spec.symmetric,
        )
        self.middle = middle(self.spec) if self.spec.symmetric else None
        self.ready = known is not None

    def _put(self, name: str, value: Tensor, *, learned: bool) -> None:
        if learned:
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def forward(self, x: Tensor, measure: bool = True) -> Tensor:
        """`x`, rounded where the module is switched on and knows qparams; not measured first unless `measure`."""
        _check(x, self.place)
        learns = self.learned and self.on["learning_enabled"] and self._is_ready()
        measures = measure and self.training and self.on["observer_enabled"] and not learns
        if measures and not computes_again():
            if x.numel():
                self._measure(x.detach())
            if self.learned and not torch.compiler.is_compiling():
                self._agree()
        if not (self.rounds and self.on["fake_quant_enabled"] and self._is_ready()):
            return x
        spec, axis = self.spec, self.spec.ch_axis
        if self.learned:
            learning = self.on["learning_enabled"]
            scale, shift = (v if learning else v.detach() for v in (self.scale, self.zero_point))
            # a scale that a step has made too small is taken for the least, and is pulled back by its gradient
            scale = scale + (scale.clamp(min=spec.eps) - scale).detach()
            given = (scale, shift, spec.quant_min, spec.quant_max, axis)
            return round_and_learn(x, *given, scale_gradient=self.quantization.scale_gradient)
        return round_through(x, *self._grid(), spec.quant_min, spec.quant_max, axis)

    def begin(self, x: Tensor) -> None:
        """Round as `x` asks for until something is measured, unless it is known what to round with."""
        if self.ready or not x.numel() or x.is_meta or not finite(x):
            return
        measured = guarded(self.observer, self.place, self.observer.update, self.observer.init(), x.detach())
        found = finished(self.observer, measured)
        if isinstance(found, QParams):
            self._set(found.scale, found.zero_point)

    def _grid(self) -> tuple[Tensor, Tensor | int]:
        """What it rounds with, as plain numbers where they are known beforehand."""
        return self.scale, self.zero_point if self.middle is None else self.middle

    def _is_ready(self) -> bool:
        """Whether there are qparams; others may have put some here (averages of models, process groups)."""
        if not self.ready and not torch.compiler.is_compiling() and not self.scale.is_meta:
            self.ready = self._knows()
        return self.ready

    def _knows(self) -> bool:
        # a learned scale may be below zero for some steps, and is taken for the least one
        return self.scale.numel() > 0 and bool((self.scale != 0).any().item())

    @torch.no_grad()
    def _agree(self) -> None:
        """Take the first rank's qparams: `DistributedDataParallel` hands on buffers, but what is learned only once."""
        wrapper = getattr(nn.parallel.DistributedDataParallel, "_active_ddp_module", None)
        if wrapper is None:
            return
        for held in (self.scale, self.zero_point):
            distributed.broadcast(held.detach(), group=wrapper.process_group, group_src=0)
        self.ready = self._knows()

    def _measure(self, x: Tensor) -> None:
        """Fold `x` into what was measured, and set the qparams."""
        raise NotImplementedError

    @torch.no_grad()
    def _set(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take new qparams, in the memory of the old ones: optimizers and process groups hold that."""
        for held, new in ((self.scale, scale), (self.zero_point, zero_point)):
            if held.shape != new.shape:
                _resize(held, new.shape)
            held.copy_(new)
        self.ready = True

    def qparams(self) -> QParams | None:
        """What it rounds with, in evaluation; None as long as it knows none."""
        if not self._is_ready():
            return None
        scale, zero_point = self.scale.detach().clone(), self.zero_point.detach()
        if self.learned:
            zero_point = zero_point.round().clamp(self.spec.quant_min, self.spec.quant_max).to(torch.int64)
            scale = scale.clamp(min=self.spec.eps)
        return QParams(scale, zero_point.clone(), self.spec)

    def state(self) -> Any:
        """What its observer has found; None where nothing is measured."""
        return None

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, held in (*self._parameters.items(), *self._buffers.items()):
            given = state_dict.get(f"{prefix}{name}")
            if held is not None and isinstance(given, Tensor) and given.shape != held.shape:
                _resize(held, given.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.ready = not self.scale.is_meta and self._knows()

    def extra_repr(self) -> str:
        """What `repr` shows."""
        off = "".join(f", {name}=False" for name, on in self.on.items() if not on)
        return f"{told(self.quantization)}, of {self.place}{off}"


class FixedFakeQuantizer(FakeQuantizer):
    """With qparams that are known beforehand."""

    def _measure(self, x: Tensor) -> None:
        pass


class RangeFakeQuantizer(FakeQuantizer):
    """With an observer of ranges, whose state is `min_val` and `max_val`: nothing here waits for a value."""

    min_val: Tensor
    max_val: Tensor

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        state = RangeState.unobserved() if start.state is None else start.state
        # of how many channels is not known, the first batch says
        shape = self.scale.shape if self.scale.numel() else torch.Size()
        self.register_buffer("min_val", state.minimum.expand(shape).clone() if shape else state.minimum.clone())
        self.register_buffer("max_val", state.maximum.expand(shape).clone() if shape else state.maximum.clone())

    def _measure(self, x: Tensor) -> None:
        before = RangeState(self.min_val, self.max_val)
        after = self.observer.update(before, x.to(torch.float32) if x.element_size() < 4 else x)
        sound = torch.isfinite(after.minimum).all() & torch.isfinite(after.maximum).all()
        waits = not (self.ready or torch.compiler.is_compiling() or x.is_meta)
        if waits and not sound:
            return  # as long as there is no range, this one is waited for: learned qparams would never leave it again
        pairs = ((self.min_val, before.minimum, after.minimum), (self.max_val, before.maximum, after.maximum))
        for held, old, new in pairs:
            if held.shape != new.shape:
                held.resize_(new.shape)
            held.copy_(torch.where(sound, new, old))
        found = self._found()
        self._set(found.scale, found.zero_point)

    def _found(self) -> QParams:
        """The qparams of the range."""
        return qparams_of_range(self.min_val, self.max_val, self.spec)

    def _has_measured(self) -> bool:
        return bool((self.min_val <= self.max_val).all())

    def state(self) -> RangeState | None:
        """The range; None as long as nothing was measured."""
        if not self._has_measured():
            return None
        return RangeState(self.min_val.clone(), self.max_val.clone())


class FusedFakeQuantizer(RangeFakeQuantizer):
    """With what torch's fused operator rounds with while it trains, and in evaluation with what its observer gives.

    `scale` and `zero_point` are those of training.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        if self._has_measured():
            found = self._found()
            self._set(found.scale, found.zero_point)

    def _grid(self) -> tuple[Tensor, Tensor | int]:
        if self.training or not self._has_measured():
            return self.scale, self.zero_point
        settled = super()._found()
        return settled.scale, settled.zero_point

    def _found(self) -> QParams:
        return fused_qparams_of_range(self.min_val, self.max_val, self.spec)

    def qparams(self) -> QParams | None:
        """What its observer gives, which a quantized model can have: zero is in the middle of what is symmetric."""
        return super()._found() if self._has_measured() else super().qparams()


_not_compiled: Any = torch.compiler.disable


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

    @_not_compiled  # type: ignore[untyped-decorator]
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
        _check(x, self.place)
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
        _check(x, self.place)
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
        _check(x, self.place)
        found = self.qparams() if self.on["fake_quant_enabled"] else None
        if found is None:
            return x
        spec = found.spec
        return round_through(x, found.scale, found.zero_point, spec.quant_min, spec.quant_max, spec.ch_axis)


def _resize(held: Tensor, shape: torch.Size) -> None:
    """Give a tensor another shape; torch refuses to, of what has gradients."""
    trains = held.requires_grad
    held.requires_grad_(False).resize_(shape).requires_grad_(trains)


def connect(root: nn.Module) -> None:
    """Tell the fake quantizers whose qparams derive from others' which those are."""
    parts = [module for module in root.modules() if isinstance(module, (FakeQuantizer, DerivedFakeQuantizer))]
    by_owner = {owner: module for module in parts for owner in module.owners}
    for module in parts:
        if isinstance(module, DerivedFakeQuantizer):
            module.others = tuple(by_owner[source] for source in module.sources if source in by_owner)


def _check(x: object, place: str) -> None:
    if isinstance(x, Proxy):
        remedy = "trace with a torch.fx.Tracer whose is_leaf_module takes qfunc's modules for leaves"
        raise ObserverError(BadConfig(place, "torch.fx traces through what trains with fake quantization", remedy))
    if not (isinstance(x, Tensor) and x.is_floating_point() and is_plain(x)):
        reason = f"{x.dtype if isinstance(x, Tensor) else type(x).__name__} came by, which is not quantized"
        raise ObserverError(UnsupportedDType(place, reason, "keep what uses it float"))


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
