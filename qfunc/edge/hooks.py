"""Hooks of modules that are fused: which of them can go on with the fused module, and moving those."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from torch import nn

from qfunc.errors import CannotFuse, Problem

Hooks: TypeAlias = dict[str, "OrderedDict[int, Any]"]
"""Tables of hooks, by the attribute of `nn.Module` that holds them."""

_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_KINDS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_state_dict_hooks": "state-dict hook",
    "_state_dict_pre_hooks": "state-dict pre-hook",
    "_load_state_dict_pre_hooks": "load-state-dict pre-hook",
    "_load_state_dict_post_hooks": "load-state-dict post-hook",
}


def unmovable(modules: Sequence[nn.Module], names: Sequence[str]) -> Iterator[Problem]:
    """A `CannotFuse` for each hook that has no place on the module fused of `modules`.

    Forward pre-hooks of the first module and forward hooks of the last one have: the fused module takes the same input
    and gives the same output. Those of torch's own weight norms and pruning have not: they make the module's weight.
    What a parametrization registers is left to whoever fuses a parametrized module.
    """
    for index, (module, name) in enumerate(zip(modules, names, strict=True)):
        for attribute, kind in _KINDS.items():
            at_edge = (attribute in _BEFORE and index == 0) or (attribute in _AFTER and index == len(modules) - 1)
            for hook in getattr(module, attribute, {}).values():
                if getattr(hook, "__module__", "").startswith("torch.nn.utils.parametriz"):
                    continue
                if not at_edge or type(hook).__module__.startswith("torch.nn.utils."):
                    yield CannotFuse(
                        " + ".join(names),
                        f"the {kind} {_hook_name(hook)} of {name} would be lost",
                        "remove it first; only forward pre-hooks of the first module and forward hooks of the last "
                        "go over to the fused one",
                    )


def _hook_name(hook: Any) -> str:
    return getattr(hook, "__name__", None) or type(hook).__name__


def taken(modules: Sequence[nn.Module]) -> Hooks:
    """Take the hooks that can move off the modules; the tables themselves, so that their handles stay good."""
    hooks = movable(modules)
    for module, tables in ((modules[0], _BEFORE), (modules[-1], _AFTER)):
        vars(module).update({name: OrderedDict() for name in tables})
    return hooks


def movable(modules: Sequence[nn.Module]) -> Hooks:
    """The tables of hooks that can move."""
    ends = ((modules[0], _BEFORE), (modules[-1], _AFTER))
    return {name: getattr(module, name) for module, tables in ends for name in tables}


def give(module: nn.Module, hooks: Hooks) -> None:
    """Put hooks on a module, around those that it has: pre-hooks before its own, forward hooks after."""
    for name, table in hooks.items():
        own, given = vars(module)[name], list(table)
        table.update(own)
        for key in given if name in _AFTER else ():
            table.move_to_end(key)
        vars(module)[name] = table
