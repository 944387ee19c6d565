"""What training does at which time: measuring, rounding, learning of qparams, and statistics of batch norms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from pyrsistent import pmap
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qfunc.edge.switched import Switched
from qfunc.errors import BadConfig, Problem, several
from qfunc.result import QuantException

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_FIELDS: Mapping[str, str] = MappingProxyType(
    {
        "observe": "observer_enabled",
        "fake_quantize": "fake_quant_enabled",
        "learn": "learning_enabled",
        "freeze_norms": "frozen",
    }
)


@dataclass(frozen=True, slots=True)
class Switches:
    """What is on; None leaves a switch as it is.

    `observe`: fake quantizers measure what passes in training. `fake_quantize`: they round it. `learn`: learned qparams
    are trained, rather than measured. `freeze_norms`: batch norms use their running statistics, and keep them.

    >>> Switches(observe=False) | Switches(freeze_norms=True)
    Switches(observe=False, fake_quantize=None, learn=None, freeze_norms=True)
    """

    observe: bool | None = None
    fake_quantize: bool | None = None
    learn: bool | None = None
    freeze_norms: bool | None = None

    def __or__(self, other: Switches) -> Switches:
        """Both, of which the other one has the last word."""
        said = {field.name: value for field in fields(other) if (value := getattr(other, field.name)) is not None}
        return replace(self, **said)

    @property
    def names(self) -> dict[str, bool]:
        """What it says, by the names that the switches have in a `state_dict`."""
        return {name: value for field, name in _FIELDS.items() if (value := getattr(self, field)) is not None}


def switch(module: ModuleT, switches: Switches) -> ModuleT:
    """Turn the switches of a module that trains, in place; gives the module.

    Raises `QuantException` for norms to be frozen that have no switch: those that were made synchronous, and those in
    modules that were not traced.
    """
    if switches.freeze_norms and (unfrozen := list(_without_switch(module))):
        raise QuantException(several(unfrozen))
    for part in module.modules():
        if isinstance(part, Switched):
            for name, on in switches.names.items():
                part.switch(name, on)
    if switches.freeze_norms is not None:
        for part in module.modules():
            if isinstance(part, Switched) and "frozen" in part.on:
                part.train(module.training)
    return module


def _without_switch(module: nn.Module) -> Iterator[Problem]:
    """The batch norms that go on measuring whatever the switches say."""
    for path, part in module.named_modules():
        if isinstance(part, nn.SyncBatchNorm):
            reason = "a SyncBatchNorm took the place of the norm that can be frozen"
            remedy = "train without SyncBatchNorm.convert_sync_batchnorm where norms are to be frozen"
            yield BadConfig(path, reason, remedy)
        elif isinstance(part, _BatchNorm) and part.track_running_stats and not isinstance(part, Switched):
            reason = "it is in a module that was not traced, and has no switch"
            yield BadConfig(path, reason, "trace that module too, or switch the others: switch(module.part, switches)")


def switched(state: Mapping[str, Any], switches: Switches) -> dict[str, Any]:
    """The `state_dict` of a module that trains with its switches turned; pure.

    >>> state = {"conv.weight_fake_quant.observer_enabled": torch.tensor(1, dtype=torch.uint8)}
    >>> switched(state, Switches(observe=False))
    {'conv.weight_fake_quant.observer_enabled': tensor(0, dtype=torch.uint8)}
    """
    said = switches.names

    def value(name: str, held: Any) -> Any:
        leaf = name.rpartition(".")[2]
        is_switch = leaf in said and isinstance(held, Tensor) and held.dtype == torch.uint8
        return torch.full_like(held, said[leaf]) if is_switch else held

    return {name: value(name, held) for name, held in state.items()}


@dataclass(frozen=True, slots=True)
class Schedule:
    """Switches by the training step from which they hold, each until another entry says otherwise.

    >>> schedule = Schedule({0: Switches(observe=True), 800: Switches(observe=False), 900: Switches(freeze_norms=True)})
    >>> schedule.at(900)
    Switches(observe=False, fake_quantize=None, learn=None, freeze_norms=True)
    """

    entries: Mapping[int, Switches]

    def __post_init__(self) -> None:
        object.__setattr__(self, "entries", pmap(self.entries))  # the caller's dict may change, a schedule does not

    def at(self, step: int) -> Switches:
        """What holds at a step; the same whatever was done before, so that a run can be resumed anywhere."""
        found = Switches()
        for since in sorted(self.entries):
            if since <= step:
                found |= self.entries[since]
        return found

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.entries.items(), key=lambda entry: entry[0])))
