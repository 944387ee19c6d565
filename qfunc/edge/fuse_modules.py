"""`fuse_modules` and `fuse_modules_qat`: layers of a model that follow each other made one module, without a trace."""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from returns.result import Failure, Success
from torch import Tensor, nn

from qfunc.config.arguments import shown
from qfunc.edge.fusers import Fusers, fuse_known_modules
from qfunc.edge.groups import Groups, group_problems, groups_of
from qfunc.edge.hooks import give, taken
from qfunc.edge.tensors import named_tensors, share
from qfunc.errors import (
    BadConfig,
    CannotFuse,
    InTrainingMode,
    NotAModule,
    Problem,
    QuantError,
    UserFunctionFailed,
    problems,
    several,
    told,
)
from qfunc.result import QuantException, R

FuserFunction: TypeAlias = Callable[[list[nn.Module], bool, Fusers | None], Sequence[nn.Module]]
"""`fuser_func(modules, is_qat, extra_fusers)` gives as many modules, the fused one first."""


def fuse_modules(
    model: nn.Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    *,
    fuser_func: FuserFunction = fuse_known_modules,
    extra_fusers: Fusers | None = None,
) -> R[nn.Module]:
    """A copy of `model` with each group of modules fused for evaluation: the first is the fused one, the rest identity.

    A batch norm is folded into the layer before it, which leaves a plain layer; with a ReLU the layer becomes a
    `ConvReLU2d` or its like. The model's own code is not looked at: a group must be modules that are called once each,
    one right after the other. Where that cannot be relied on, `trace` and `fuse` find what fuses by themselves.

    A linear layer's batch norm is folded along the last axis. That is right for 2-D input. For 3-D input, where batch
    norm takes axis 1 for the channels, it is wrong, and the shapes are not known here: leave such a pair out.

    The given model is not changed; its memory is shared until either side writes to it, ties between parameters are
    kept. Hooks go with the modules; forward pre-hooks of a group's first module and forward hooks of its last become
    the fused module's.

    Args:
        model: evaluating, where batch norms are to be folded.
        modules_to_fuse: dotted names of the modules of one group, or a list of such groups.
        fuser_func: what makes the modules of a group into as many others.
        extra_fusers: more fusers, by the tuple of types that they fuse: `fuser(is_qat, *modules)`.

    Returns:
        The fused model; or all that is wrong with all groups: `CannotFuse` for types that do not fuse, other hooks, and
        modules with more places in the model than one; `InTrainingMode` for a batch norm that trains; `UnknownName`,
        `BadConfig`, `NotAModule`, `UserFunctionFailed`.

    >>> from qfunc import unwrap
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> fused = unwrap(fuse_modules(model, ["0", "1", "2"]))
    >>> [type(part).__name__ for part in fused]
    ['ConvReLU2d', 'Identity', 'Identity']
    """
    return _fuse(model, modules_to_fuse, False, fuser_func, extra_fusers)


def fuse_modules_qat(
    model: nn.Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    *,
    fuser_func: FuserFunction = fuse_known_modules,
    extra_fusers: Fusers | None = None,
) -> R[nn.Module]:
    """`fuse_modules` for quantization-aware training: batch norms are not folded, but become parts that train on.

    The model may be in either mode. A transposed convolution and its batch norm, and batch norms without affine
    parameters or running statistics, are `CannotFuse`.

    >>> from qfunc import unwrap
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    >>> type(unwrap(fuse_modules_qat(model, [["0", "1", "2"]]))[0]).__name__
    'ConvBnReLU2d'
    """
    return _fuse(model, modules_to_fuse, True, fuser_func, extra_fusers)


def _fuse(model: Any, modules_to_fuse: Any, is_qat: bool, fuser_func: Any, extra_fusers: Any) -> R[nn.Module]:
    found = _wrong_arguments(model, fuser_func, extra_fusers)
    groups = groups_of(modules_to_fuse)
    if isinstance(groups, BadConfig):
        return Failure(several([*found, groups]))
    if isinstance(model, nn.Module):
        found += group_problems(model, groups)
    if found:
        return Failure(several(found))
    try:
        made = _copied(model)
    except Exception as error:  # noqa: BLE001 - the copying of a user's object is the user's code
        return Failure(UserFunctionFailed("model", f"it cannot be copied: {told(error)}"))
    failed = _replace(made, groups, fuser_func, is_qat, extra_fusers)
    return Failure(several(failed)) if failed else Success(made)


def _wrong_arguments(model: object, fuser_func: object, extra_fusers: object) -> list[Problem]:
    found: list[Problem] = []
    if not isinstance(model, nn.Module):
        found.append(NotAModule(type(model).__name__))
    if not callable(fuser_func):
        remedy = "pass a function of (modules, is_qat, extra_fusers), or leave it out"
        found.append(BadConfig("fuser_func", f"expected a function, got {shown(fuser_func)}", remedy))
    remedy = "pass a dict such as {(nn.Linear, nn.Tanh): fuser}, or leave it out"
    if not isinstance(extra_fusers, (Mapping, type(None))):
        found.append(BadConfig("extra_fusers", f"expected a dict, got {shown(extra_fusers)}", remedy))
    for types, fuser in extra_fusers.items() if isinstance(extra_fusers, Mapping) else ():
        if not isinstance(types, tuple) or not all(isinstance(item, type) for item in types):
            found.append(BadConfig("extra_fusers", f"expected a tuple of classes, got {shown(types)}", remedy))
        if not callable(fuser):
            found.append(BadConfig("extra_fusers", f"expected a function, got {shown(fuser)}", remedy))
    return found


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers share the model's memory until either side writes to it."""
    memo: dict[int, Any] = {}
    computed = (t for m in model.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf)
    for tensor in (*(t for _, t in named_tensors(model)), *computed):
        if id(tensor) not in memo and type(tensor) in (Tensor, nn.Parameter):
            made = share(tensor)
            made = nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
            made.requires_grad_(tensor.requires_grad and tensor.is_leaf)
            vars(made).update(vars(tensor))
            memo[id(tensor)] = made
    return copying.deepcopy(model, memo)


def _replace(
    model: nn.Module, groups: Groups, fuser_func: FuserFunction, is_qat: bool, extra_fusers: Fusers | None
) -> list[QuantError]:
    """Put the modules that `fuser_func` makes of each group in its place; gives what went wrong."""
    failed: list[QuantError] = []
    for group in groups:
        modules = [model.get_submodule(name) for name in group]
        hooks = taken(modules)
        made = _made(fuser_func, modules, is_qat, extra_fusers, " + ".join(group))
        if not isinstance(made, list):
            failed.append(made)
            continue
        give(made[0], hooks)
        for name, old, new in zip(group, modules, made, strict=True):
            new.training = old.training
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path)._modules[leaf] = new
    return failed


def _made(
    fuser_func: FuserFunction, modules: list[nn.Module], is_qat: bool, extra_fusers: Fusers | None, node: str
) -> list[nn.Module] | QuantError:
    try:
        made: Any = fuser_func(list(modules), is_qat, extra_fusers)
    except QuantException as error:
        return several(_placed(problem, node) for problem in problems(error.error))
    except Exception as error:
        if fuser_func is fuse_known_modules:
            raise
        return UserFunctionFailed(node, f"fuser_func raised {told(error)}")
    if not isinstance(made, (list, tuple)) or not all(isinstance(module, nn.Module) for module in made):
        return UserFunctionFailed(node, f"fuser_func gave {shown(made)}, not a list of modules")
    if len(made) != len(modules):
        return UserFunctionFailed(node, f"fuser_func gave {len(made)} modules for {len(modules)}")
    return list(made)


def _placed(problem: Problem, node: str) -> Problem:
    """A problem of a group of types as one of the modules' names."""
    match problem:
        case CannotFuse() | InTrainingMode() | UserFunctionFailed():
            return replace(problem, node=node)
        case _:
            return problem
