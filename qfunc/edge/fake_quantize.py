"""Fake quantization at work: modules that measure what passes while a model trains, and round it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, distributed, nn

from qfunc.edge.checkpointed import computes_again
from qfunc.edge.observer import check_floats, guarded
from qfunc.edge.switched import KeepsDType, Switched
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.fused_range import fused_qparams_of_range
from qfunc.numerics.observers import finished
from qfunc.numerics.qparams import FLOAT_QPARAMS, QParams, middle, qparams_of_range
from qfunc.numerics.statistic import RangeState, finite
from qfunc.numerics.straight_through import round_and_learn, round_through
from qfunc.numerics.unmeasured import told
from qfunc.passes.training import Start


class FakeQuantizer(KeepsDType, Switched):
    """Rounds its input to the numbers that its integers stand for, and lets gradients straight through.

    In training it measures its input first, unless `observer_enabled` is off; in evaluation it never does. As long as
    there are no qparams (`scale` is 0), and while `fake_quant_enabled` is off, inputs pass as they are. Learned qparams
    are parameters that begin with what the first batch gives; while `learning_enabled` is off they follow the observer
    as others do. What was measured and the qparams are in the `state_dict`. A batch with NaN or infinity does not
    count. What a checkpointed part computes once more on the way back is not measured again, and is rounded as when it
    last ran on the way there.

    Raises `ObserverError` for an input that is no floating-point tensor, and for a user's observer that fails.
    """

    SWITCHES: ClassVar = (("observer_enabled", True), ("fake_quant_enabled", True), ("learning_enabled", True))
    scale: Tensor
    zero_point: Tensor

    def __init__(self, start: Start) -> None:
        super().__init__()
        self.add_switches()
        assert isinstance(start.quantization, FakeQuantize), start
        self.quantization, self.place = start.quantization, start.place
        self.owners, self.rounds = start.owners, start.rounds
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
        check_floats(x, self.place)
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
            scale = scale.detach().clamp(min=spec.eps) + (scale - scale.detach())
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

    def state(self) -> Any:
        """That of its observer, which needs no data."""
        return self.observer.init()


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


def _resize(held: Tensor, shape: torch.Size) -> None:
    """Give a tensor another shape; torch refuses to, of what has gradients."""
    trains = held.requires_grad
    held.requires_grad_(False).resize_(shape).requires_grad_(trains)
