"""Observers at work: as modules, for the time that data runs through them, and on weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from qfunc.edge.tally import Tally
from qfunc.errors import BadConfig, Unobserved, UnsupportedDType, UserFunctionFailed, told
from qfunc.numerics.observers import Observer, finished, is_own
from qfunc.numerics.qparams import QParams
from qfunc.numerics.statistic import RangeState, clipped
from qfunc.passes.statistics import Fold


class ObserverError(Exception):
    """An observer cannot take a value, or is the user's and failed; `problem` says it as a value."""

    def __init__(self, problem: UnsupportedDType | UserFunctionFailed | Unobserved | BadConfig) -> None:
        super().__init__(f"{problem.node}: {problem.reason}")
        self.problem = problem


class ObserverModule(nn.Module):
    """Hands its input on and folds it into the state of a fold, a value that is no part of the `state_dict`.

    While `clips`, NaN and infinity are replaced as `clipped` says. Raises `ObserverError` for what is no floating-point
    tensor, and for a user's observer that fails.
    """

    def __init__(self, fold: Fold) -> None:
        super().__init__()
        self.fold, self.observer = fold, fold.observer
        self.ch_axis: int | None = fold.observer.spec.ch_axis
        self.clips = False
        state = guarded(self.observer, self.tap, self.observer.init)
        self.tally = Tally(self.observer, state, self.observer.update if is_own(self.observer) else self._updated)

    @property
    def tap(self) -> str:
        """The first value that it observes."""
        return self.fold.taps[0]

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        check_floats(x, self.tap)
        if self.ch_axis is not None:
            self._check_channels(x, self.ch_axis)
        seen = x.detach()
        self.tally.add(clipped(seen.to(torch.float32)) if self.clips else seen)
        return x

    def _updated(self, before: Any, seen: Tensor) -> Any:
        """The next state of a user's observer, which may look at the tensor and not write to it."""
        version = _version(seen)
        state = guarded(self.observer, self.tap, self.observer.update, before, seen)
        if _version(seen) != version:
            reason = f"{type(self.observer).__name__}.update writes to the tensor that it is given"
            remedy = "have it work on a copy, tensor.clone(): the model goes on with this one"
            raise ObserverError(UserFunctionFailed(self.tap, reason, remedy))
        return state

    def _check_channels(self, x: Tensor, axis: int) -> None:
        """That every tensor has the axis, and as many channels along it as those before."""
        state = self.tally.state
        before = state.minimum if isinstance(state, RangeState) and state.minimum.dim() else None
        shape = tuple(x.shape)
        if axis >= x.dim():
            reason = f"ch_axis {axis} is no axis of its shape {shape}"
        elif before is not None and x.numel() and before.shape[0] != shape[axis]:
            reason = f"along ch_axis {axis} it has {before.shape[0]} channels in one batch, {shape[axis]} in another"
        else:
            return
        raise ObserverError(BadConfig(self.tap, reason, "choose the axis of the channels as ch_axis"))

    def extra_repr(self) -> str:
        """The observer, and what it observes."""
        return f"{self.observer!r}, taps={', '.join(self.fold.taps)}"


_UNKNOWN = "trace with example_inputs, so that such values are known and left alone, or keep the module float"


def observe_once(observer: Observer[Any], weight: Tensor, name: str) -> QParams:
    """The qparams of a weight; an `ObserverError` where there are none."""
    state = guarded(observer, name, lambda: observer.update(observer.init(), weight))
    qparams = finished(observer, state)
    if isinstance(qparams, str):
        raise ObserverError(UserFunctionFailed(name, qparams))
    if qparams is None:
        raise ObserverError(Unobserved(name, "this weight has no elements", "keep its module float"))
    return qparams


def guarded(observer: Observer[Any], place: str, function: Any, *args: Any) -> Any:
    """A call of an observer; failures of a user's are told apart from bugs of ours, which raise as they are."""
    try:
        return function(*args)
    except Exception as error:
        if is_own(observer):
            raise
        problem = UserFunctionFailed(place, f"{type(observer).__name__} raised {told(error)}")
        raise ObserverError(problem) from error


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def check_floats(x: object, place: str) -> None:
    """Raise an `ObserverError` for what is no dense floating-point tensor."""
    if isinstance(x, Proxy):
        remedy = "trace with a torch.fx.Tracer whose is_leaf_module takes qfunc's modules for leaves"
        raise ObserverError(BadConfig(place, "torch.fx traces through a module of qfunc's", remedy))
    if not isinstance(x, Tensor) or not x.is_floating_point() or not is_plain(x):
        raise ObserverError(UnsupportedDType(place, f"{_described(x)} came by, which is not quantized", _UNKNOWN))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense: not sparse, not nested, not in a layout of oneDNN's."""
    return tensor.layout == torch.strided and not tensor.is_nested


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{value!r:.60}"
    kind = "" if is_plain(value) else f" in the layout {str(value.layout).removeprefix('torch.')}"
    return f"a tensor of {str(value.dtype).removeprefix('torch.')}{kind}"
