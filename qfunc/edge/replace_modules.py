"""Replacing modules before tracing, in a copy of the model's structure: the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from returns.result import Failure, Success
from torch import nn

from qfunc.config.custom_config import CustomConfig
from qfunc.config.resolve import ancestors
from qfunc.edge.read import own_behaviour
from qfunc.edge.unchanged import unchanged
from qfunc.errors import Problem, UserFunctionFailed, several, told
from qfunc.ir import Note
from qfunc.ops import type_name
from qfunc.result import R


class LeafModule(nn.Module):
    """A module of qfunc's own that is one operator of a graph: what it decides, it decides when it runs."""


@dataclass(frozen=True, slots=True, eq=False)
class Replaced:
    """The model to trace, the user's, and those modules of the user's that others stand for, by path."""

    model: nn.Module
    original: nn.Module
    originals: Mapping[str, nn.Module]
    notes: tuple[Note, ...] = ()


def replace_modules(model: nn.Module, custom: CustomConfig) -> R[Replaced]:
    """The model with the modules that `custom.replacements` names replaced; the model itself where there are none.

    Modules around a replaced one are copied, their tensors and all other modules are the model's own. A module at two
    paths is replaced once. One that is kept whole by its name, that is inside a module which is kept whole, or whose
    call does more than its class's forward, is not replaced; the last two have notes.

    Returns:
        The model, or `UserFunctionFailed` for each function that raises or gives no module.
    """
    found: dict[str, nn.Module] = {}
    notes: list[Note] = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, module in modules.items():
        if type(module) not in custom.replacements or path in custom.non_traceable_names:
            continue
        around = list(ancestors(path))[1:]
        if any(outer in found for outer in around):
            continue
        hindrance = own_behaviour(module)
        whole = next((outer for outer in around if _is_whole(outer, modules[outer], custom)), None)
        if whole is not None:
            hindrance = f"is inside {whole!r}, a {type(modules[whole]).__name__}, which is kept whole"
        if hindrance:
            notes.append(Note(path or "model", f"is not replaced: it {hindrance}"))
        else:
            found[path] = module
    types = {type(module) for module in model.modules()}
    unused = (type_name(cls) for cls in custom.replacements if cls not in types)
    notes += (Note(f"replacements[{name}]", "matches no module of the model") for name in unused)
    made: dict[int, nn.Module] = {}
    problems: list[Problem] = []
    with unchanged(model.modules()):
        for path, module in found.items():
            if id(module) not in made:
                new = _called(custom.replacements[type(module)], module, path)
                if isinstance(new, UserFunctionFailed):
                    problems.append(new)
                    continue
                made[id(module)] = new
    if problems:
        return Failure(several(problems))
    return Success(Replaced(_rebuilt(model, made) if made else model, model, found, tuple(notes)))


def _is_whole(path: str, module: nn.Module, custom: CustomConfig) -> bool:
    """Whether a module around others is one call of the graph, whose code may read anything of those inside."""
    library = type(module).__module__.startswith("torch.nn")
    container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    chosen = path in custom.non_traceable_names or isinstance(module, custom.non_traceable_types)
    return chosen or (library and not container)


def _called(function: Any, module: nn.Module, path: str) -> nn.Module | UserFunctionFailed:
    place = path or "model"
    try:
        new = function(module)
    except Exception as error:  # noqa: BLE001 - the function is the user's code
        return UserFunctionFailed(place, f"the replacement of {type(module).__name__} raised {told(error)}")
    if not isinstance(new, nn.Module) or new is module:
        given = "the module itself" if new is module else f"a {type(new).__name__}, not a torch.nn.Module"
        return UserFunctionFailed(place, f"the replacement of {type(module).__name__} gave {given}")
    return new.train(module.training)


def _rebuilt(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """The module with its replaced parts; `made` holds, by id, what modules become, and is filled on the way."""
    if id(module) in made:
        return made[id(module)]
    children = {name: child and _rebuilt(child, made) for name, child in module._modules.items()}
    made[id(module)] = module
    if any(children[name] is not child for name, child in module._modules.items()):
        copied: nn.Module = object.__new__(type(module))
        vars(copied).update({name: _attribute(value, made) for name, value in vars(module).items()})
        vars(copied)["_modules"] = children
        made[id(module)] = copied
    return made[id(module)]


def _attribute(value: Any, made: dict[int, nn.Module]) -> Any:
    """A plain attribute that holds modules, with what became of them."""
    if type(value) in (list, tuple) and any(id(item) in made for item in value):
        return type(value)(made.get(id(item), item) for item in value)
    if type(value) is dict and any(id(item) in made for item in value.values()):
        return {key: made.get(id(item), item) for key, item in value.items()}
    return value
