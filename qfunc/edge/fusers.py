"""`fuse_known_modules`: which sequences of modules fuse, and into what."""

from __future__ import annotations

import copy as copying
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from qfunc.edge import fused as made_of
from qfunc.edge.hooks import give, movable, unmovable
from qfunc.errors import CannotFuse, InTrainingMode, Problem, UserFunctionFailed, several, told
from qfunc.numerics.batch_norm import fold_batch_norm
from qfunc.result import QuantException

Fuser: TypeAlias = Callable[..., nn.Module]
"""`fuser(is_qat, *modules)` gives the one module for all of them."""

Fusers: TypeAlias = Mapping[tuple[type, ...], Fuser]

_SWITCH = "call model.eval() or model.train() first, so that all parts are in one mode"


def fuse_known_modules(
    modules: Sequence[nn.Module], is_qat: bool, extra_fusers: Fusers | None = None
) -> list[nn.Module]:
    """The fused module of `modules`, and an `nn.Identity` for each but the first.

    What fuses is told by the exact types: a convolution or linear layer and a batch norm, a ReLU or both; a transposed
    convolution and a batch norm; a batch norm (2d, 3d) and a ReLU. For evaluation the batch norm is folded away; for
    training (`is_qat`) it stays a part. The given modules are not changed, but become parts of the fused one where they
    have no hooks. Forward pre-hooks of the first and forward hooks of the last are hooks of the fused module.

    Args:
        modules: at least two, in the order in which they are called.
        is_qat: whether to fuse for quantization-aware training.
        extra_fusers: more fusers, by the tuple of types that they fuse; they go before qfunc's own.

    Raises:
        QuantException: with `CannotFuse`, with `InTrainingMode` for a batch norm that cannot be folded since it
            trains, or with `UserFunctionFailed` for an extra fuser; the node is the types' names.

    >>> [type(m).__name__ for m in fuse_known_modules([nn.Linear(2, 2), nn.ReLU()], False)]
    ['LinearReLU', 'Identity']
    """
    types = tuple(map(type, modules))
    extra = (extra_fusers or {}).get(types)
    fuser = FUSERS.get(types) if extra is None else extra
    for part in modules:
        if "forward" in vars(part):
            reason = f"its {type(part).__name__} has a forward of its own, which would be lost"
            _refuse(modules, reason, "make it a module type, and pass extra_fusers for that; or leave it out")
    parametrized = [part for part in modules if is_parametrized(part)]
    if parametrized:
        reason = f"a parameter of its {type(parametrized[0]).__bases__[0].__name__} is computed by a parametrization"
        _refuse(modules, reason, "call torch.nn.utils.parametrize.remove_parametrizations(module, name) first")
    if fuser is None:
        known = "; subclasses do not count" if any(_is_subclass(type) for type in types) else ""
        remedy = f"pass extra_fusers={{({', '.join(_names(modules))}): fuser}}, or list modules that fuse"
        _refuse(modules, f"no fuser is known for these types{known}", remedy)
    problems = [*unmovable(modules, _names(modules)), *_mixed(modules)]
    if problems:
        raise QuantException(several(problems))
    bare = [_bare(part) for part in modules]
    fused = fuser(is_qat, *bare) if extra is None else _called(extra, is_qat, bare)
    give(fused, {name: table.copy() for name, table in movable(modules).items()})
    rest = [nn.Identity() for _ in modules[1:]]
    for module in (fused, *rest):
        module.training = modules[0].training
    return [fused, *rest]


def _names(modules: Sequence[object]) -> list[str]:
    return [type(module).__name__ for module in modules]


def _node(modules: Sequence[object]) -> str:
    return " + ".join(_names(modules))


def _refuse(modules: Sequence[object], reason: str, remedy: str) -> NoReturn:
    raise QuantException(CannotFuse(_node(modules), reason, remedy))


def _is_subclass(type: type) -> bool:
    return any(issubclass(type, known) and type is not known for types in FUSERS for known in types)


def _mixed(modules: Sequence[nn.Module]) -> Iterator[Problem]:
    if len({part.training for part in modules}) > 1:
        modes = ", ".join(f"{type(part).__name__} {'trains' if part.training else 'evaluates'}" for part in modules)
        yield CannotFuse(_node(modules), f"its parts are in different modes: {modes}", _SWITCH)


def _called(extra: Fuser, is_qat: bool, modules: Sequence[nn.Module]) -> nn.Module:
    """What a fuser of the user's gives."""
    try:
        fused: Any = extra(is_qat, *modules)
    except QuantException:
        raise
    except Exception as error:
        raise QuantException(UserFunctionFailed(_node(modules), f"its fuser raised {told(error)}")) from error
    if not isinstance(fused, nn.Module):
        reason = f"its fuser gave a {type(fused).__name__}, not an nn.Module"
        raise QuantException(UserFunctionFailed(_node(modules), reason))
    return fused


def _bare(module: nn.Module) -> nn.Module:
    """The module without the hooks that move: itself where it has none, or else a new one of the same parameters."""
    tables = movable([module])
    if not any(tables.values()):
        return module
    made = _again(module)
    vars(made).update({name: OrderedDict() for name in tables})
    return made


def _again(module: nn.Module) -> nn.Module:
    """A new module that shares parameters, buffers and submodules, but no table of them."""
    made = copying.copy(module)
    vars(made).update({k: v.copy() for k, v in vars(made).items() if type(v) in (dict, set, OrderedDict)})
    return made


# The fusers


def _sequence(fused: Fuser) -> Fuser:
    """All parts become parts of the fused module."""
    return lambda _is_qat, *modules: fused(*modules)


def _normed(trained: Fuser, evaluated: Fuser | None = None) -> Fuser:
    """A layer, its batch norm, and what may follow: parts for training, folded for evaluation."""

    def fuser(is_qat: bool, layer: Any, norm: Any, *rest: nn.Module) -> nn.Module:
        modules = (layer, norm, *rest)
        problems = [*_norm_problems(modules), *(_untrainable(modules) if is_qat else _unfoldable(modules))]
        if problems:
            raise QuantException(several(problems))
        if is_qat:
            return trained(*modules)
        folded = _folded(layer, norm, transpose=False)
        return evaluated(folded, *rest) if evaluated is not None else folded

    return fuser


def _transposed(is_qat: bool, layer: Any, norm: Any) -> nn.Module:
    if is_qat:
        remedy = "leave it out of modules_to_fuse: the two train as they are; or fuse them after training"
        _refuse((layer, norm), "a transposed convolution and a batch norm cannot be fused for training", remedy)
    problems = [*_norm_problems((layer, norm)), *_unfoldable((layer, norm))]
    if problems:
        raise QuantException(several(problems))
    return _folded(layer, norm, transpose=True)


def _norm_problems(modules: Sequence[Any]) -> Iterator[Problem]:
    layer, norm = modules[:2]
    channels = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    if norm.num_features != channels:
        reason = f"the batch norm is of {norm.num_features} features, but the layer gives {channels} channels"
        yield CannotFuse(_node(modules), reason, "list modules that follow each other in the model")


def _untrainable(modules: Sequence[Any]) -> Iterator[Problem]:
    norm = modules[1]
    follows = not norm.track_running_stats or norm.running_mean is None
    lacking = {"affine=False": not norm.affine, "track_running_stats=False": follows}
    for option in (option for option, lacks in lacking.items() if lacks):
        reason = f"the batch norm has {option}, which is not fused for training"
        yield CannotFuse(_node(modules), reason, "leave it out of modules_to_fuse: its modules train as they are")


def _unfoldable(modules: Sequence[Any]) -> Iterator[Problem]:
    layer, norm = modules[:2]
    if norm.training:
        yield InTrainingMode(_node(modules))
    if norm.running_mean is None or norm.running_var is None:
        reason = "the batch norm has no running statistics, so that it always follows the batch"
        yield CannotFuse(_node(modules), reason, "leave it out of modules_to_fuse: it computes as it is")
        return
    if layer._parameters.get("weight") is None:
        remedy = "make it a parameter first: remove the weight norm or pruning"
        yield CannotFuse(_node(modules), "the layer's weight is not a parameter of its own", remedy)
    elif layer.weight.device != norm.running_mean.device:
        reason = f"its weights are on {layer.weight.device} and on {norm.running_mean.device}"
        yield CannotFuse(_node(modules), reason, "move the whole model to one device first: model.to('cpu')")


def _folded(layer: Any, norm: Any, *, transpose: bool) -> nn.Module:
    """A layer of the same type and options that computes both."""
    groups = layer.groups if transpose else 1
    parameters = (layer.weight, layer.bias, norm.weight, norm.bias)
    statistics = (norm.running_mean, norm.running_var, norm.eps)
    folded = fold_batch_norm(*parameters[:2], *statistics, *parameters[2:], transpose, groups)
    trained = any(p.requires_grad for p in parameters if p is not None)
    made = _again(layer)
    for name, tensor in zip(("weight", "bias"), folded, strict=True):
        made._parameters[name] = nn.Parameter(tensor, trained)
    return made


_CONVS: tuple[tuple[Any, ...], ...] = (
    (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d, made_of.ConvReLU1d, made_of.ConvBn1d, made_of.ConvBnReLU1d),
    (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, made_of.ConvReLU2d, made_of.ConvBn2d, made_of.ConvBnReLU2d),
    (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d, made_of.ConvReLU3d, made_of.ConvBn3d, made_of.ConvBnReLU3d),
)

FUSERS: Fusers = MappingProxyType(
    {
        **{(conv, norm): _normed(conv_bn) for conv, _, norm, _, conv_bn, _ in _CONVS},
        **{(conv, norm, nn.ReLU): _normed(all_three, relu) for conv, _, norm, relu, _, all_three in _CONVS},
        **{(conv, nn.ReLU): _sequence(relu) for conv, _, _, relu, _, _ in _CONVS},
        **{(transposed, norm): _transposed for _, transposed, norm, _, _, _ in _CONVS},
        (nn.Linear, nn.BatchNorm1d): _normed(made_of.LinearBn1d),
        (nn.Linear, nn.ReLU): _sequence(made_of.LinearReLU),
        (nn.BatchNorm2d, nn.ReLU): _sequence(made_of.BNReLU2d),
        (nn.BatchNorm3d, nn.ReLU): _sequence(made_of.BNReLU3d),
    }
)
"""Exact types, and how modules of them fuse."""
