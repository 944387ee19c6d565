"""Eager fusion: what cannot be is told, all at once; fusers of the user's own."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfunc import fuse_known_modules, fuse_modules, fuse_modules_qat, unwrap
from qfunc.errors import BadConfig, CannotFuse, InTrainingMode, NotAModule, UnknownName, UserFunctionFailed
from qfunc.result import QuantException
from qfunc.testing import oracle, same_bits
from tests.edge.eager import (
    FOLDED,
    ROWS,
    TRAINED,
    chain,
    close,
    data,
    found_in,
    names_of,
    net,
    only,
    run,
    scripted,
    sequence,
    spy,
)

# Errors


def mixed(index: int) -> nn.Sequential:
    model = chain((nn.Conv2d, nn.BatchNorm2d, nn.ReLU))
    model[index].train()
    return model


class MyConv(nn.Conv2d):
    """Another type than its base."""


def parametrized() -> nn.Sequential:
    return sequence(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), nn.ReLU())


def plain_weight() -> nn.Sequential:
    model = chain((nn.Conv2d, nn.BatchNorm2d))
    weight = model[0].weight.detach()
    del model[0].weight
    model[0].weight = weight
    return model


def on_two_devices() -> nn.Sequential:
    model = chain((nn.Conv2d, nn.BatchNorm2d))
    model[1].to("meta")
    return model


BOTH = (fuse_modules, fuse_modules_qat)
UNFUSABLE: tuple[tuple[str, Any, Any, type, str], ...] = (
    *((f"modes {i}", BOTH, functools.partial(mixed, i), CannotFuse, "different modes: Conv2d ") for i in range(3)),
    ("order", BOTH, lambda: chain((nn.ReLU, nn.Conv2d)), CannotFuse, "no fuser is known for these types"),
    ("subclass", BOTH, lambda: sequence(MyConv(4, 8, 3), nn.ReLU()), CannotFuse, "subclasses do not count"),
    ("ReLU6", BOTH, lambda: sequence(nn.Conv2d(4, 8, 3), nn.ReLU6()), CannotFuse, "no fuser"),
    ("ranks", BOTH, lambda: chain((nn.Conv2d, nn.BatchNorm1d)), CannotFuse, "no fuser"),
    ("parametrized", BOTH, parametrized, CannotFuse, "a parameter of its Conv2d is computed by a parametrization"),
    ("channels", BOTH, lambda: sequence(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(8)), CannotFuse, "of 8 features, but"),
    ("features", BOTH, lambda: sequence(nn.Linear(4, 6), nn.BatchNorm1d(8)), CannotFuse, "gives 6 channels"),
    (
        "channels of a transposed",
        (fuse_modules,),
        lambda: sequence(nn.ConvTranspose2d(8, 4, 3), nn.BatchNorm2d(8)),
        CannotFuse,
        "gives 4 channels",
    ),
    (
        "statistics",
        (fuse_modules,),
        lambda: chain((nn.Conv2d, nn.BatchNorm2d), track_running_stats=False),
        CannotFuse,
        "no running statistics",
    ),
    (
        "statistics, trained",
        (fuse_modules_qat,),
        lambda: chain((nn.Conv2d, nn.BatchNorm2d, nn.ReLU), track_running_stats=False),
        CannotFuse,
        "track_running_stats=False",
    ),
    (
        "affine, trained",
        (fuse_modules_qat,),
        lambda: chain((nn.Linear, nn.BatchNorm1d), affine=False),
        CannotFuse,
        "affine=False",
    ),
    *(
        ("transposed, trained", (fuse_modules_qat,), functools.partial(chain, types), CannotFuse, "for training")
        for types in ROWS
        if types not in TRAINED
    ),
    ("plain weight", (fuse_modules,), plain_weight, CannotFuse, "not a parameter of its own"),
    ("devices", (fuse_modules,), on_two_devices, CannotFuse, "on cpu and on meta"),
    *(
        ("training", (fuse_modules,), lambda types=types: chain(types).train(), InTrainingMode, "in training mode")
        for types in FOLDED
    ),
)


@pytest.mark.parametrize(("functions", "build", "kind", "words"), [row[1:] for row in UNFUSABLE], ids=[
    f"{row[0]}-{index}" for index, row in enumerate(UNFUSABLE)])  # fmt: skip
def test_what_cannot_fuse_is_told(functions, build, kind, words):
    for function in functions:
        model = build()
        problem = only(function(model, names_of(model)), kind, words)
        assert problem.node == " + ".join(names_of(model))
        with pytest.raises(QuantException) as raised:
            fuse_known_modules(list(model), function is fuse_modules_qat)
        types = [type(part).__name__ for part in model]
        assert raised.value.error.node == " + ".join(types)
        assert raised.value.error.reason == problem.reason


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
def test_the_reference_refuses_these_too():
    for name, functions, build, _, _ in UNFUSABLE:
        if name not in ("parametrized", "modes 2", "plain weight", "devices", "features", "channels of a transposed"):
            model = build()
            for function in functions:
                if name != "channels" or function is fuse_modules_qat:
                    with pytest.raises(Exception):  # noqa: B017, PT011 - of many types
                        oracle.fuse_modules(model, names_of(model), qat=function is fuse_modules_qat)


LISTS = (
    ("text", "conv", BadConfig, ("modules_to_fuse", "expected a list, got 'conv'")),
    ("number", 3, BadConfig, ("modules_to_fuse", "got 3")),
    ("nothing", [], BadConfig, ("modules_to_fuse", "it is empty")),
    ("mixture", ["a", ["b"]], BadConfig, ("modules_to_fuse", "expected a list of str in it, got 'a'")),
    ("numbers", [[1, 2]], BadConfig, ("modules_to_fuse", "got [1, 2]")),
    ("one", ["a"], BadConfig, ("modules_to_fuse", "a group of one module, 'a'")),
    ("one of them", [["a", "relu"], ["b"]], BadConfig, ("modules_to_fuse[1]", "'b'")),
    ("empty", [["a", "relu"], []], BadConfig, ("modules_to_fuse[1]", "an empty group")),
    ("unknown", ["a", "relux"], UnknownName, ("relux", "no module 'relux'")),
    ("the model", ["", "relu"], UnknownName, ("no module ''",)),
    ("tensor", ["a.weight", "relu"], UnknownName, ("a.weight",)),
    ("twice in a group", ["a", "relu", "relu"], BadConfig, ("relu", "listed 2 times")),
    ("in two groups", [["a", "relu"], ["b", "relu"]], BadConfig, ("relu", "listed 2 times")),
)


@pytest.mark.parametrize(("given", "kind", "words"), [row[1:] for row in LISTS], ids=[row[0] for row in LISTS])
def test_wrong_lists_are_told(given, kind, words):
    only(fuse_modules(net(), given), kind, *words)
    only(fuse_modules_qat(net(), given), kind, *words)


def test_one_module_listed_under_two_names():
    groups = [["stem.0", "stem.1"], ["also.0", "also.1"]]
    assert [(type(p), p.node) for p in found_in(fuse_modules(net(), groups))] == [
        (BadConfig, "also.0"),
        (BadConfig, "also.1"),
    ]


def test_a_part_of_a_listed_module_is_told():
    model = sequence(chain((nn.Conv2d, nn.ReLU)), nn.ReLU())
    told = found_in(fuse_modules(model, [["0", "1"], ["0.0", "0.1"]]))
    assert [(type(p), p.node) for p in told] == [(BadConfig, "0.0"), (BadConfig, "0.1")]
    assert told[0].reason == "it is a part of '0', which is listed too"


def test_one_relu_for_two_layers():
    relu = nn.ReLU()
    told = found_in(fuse_modules(sequence(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu), [["0", "1"], ["2", "3"]]))
    assert [(type(p), p.node) for p in told] == [(BadConfig, "3"), (CannotFuse, "0 + 1"), (CannotFuse, "2 + 3")]
    assert "1 is the same module as 3" in told[1].reason


def test_all_problems_of_all_groups_are_told_at_once():
    model = nn.ModuleDict({"a": mixed(0), "b": chain((nn.ReLU, nn.Conv2d)), "c": chain((nn.Conv2d, nn.ReLU))})
    model["a"][1] = nn.BatchNorm2d(9).eval()
    groups = [["a.0", "a.1"], ["b.0", "b.1"], ["c.0", "c.1"]]
    told = found_in(fuse_modules(model, groups))
    assert [(type(p), p.node) for p in told] == [(CannotFuse, "a.0 + a.1"), (CannotFuse, "b.0 + b.1")]
    model["c"][1].register_forward_pre_hook(spy)
    told = found_in(fuse_modules(model, [*groups, ["x", "b.y"], ["b.1"]], fuser_func=3, extra_fusers=4))
    assert [(type(p).__name__, p.node) for p in told] == [
        ("BadConfig", "fuser_func"),
        ("BadConfig", "extra_fusers"),
        ("BadConfig", "modules_to_fuse[4]"),
        ("UnknownName", "x"),
        ("UnknownName", "b.y"),
        ("BadConfig", "b.1"),
        ("CannotFuse", "c.0 + c.1"),
    ]


def test_wrong_arguments_are_told():
    model = chain((nn.Conv2d, nn.ReLU))
    only(fuse_modules(nn.Linear, ["a", "b"]), NotAModule, "got type")
    assert [type(p) for p in found_in(fuse_modules(3, 4))] == [NotAModule, BadConfig]
    only(fuse_modules(model, ["0", "1"], fuser_func=None), BadConfig, "fuser_func", "got None")
    only(fuse_modules(model, ["0", "1"], extra_fusers=[1]), BadConfig, "extra_fusers", "expected a dict")
    only(fuse_modules(model, ["0", "1"], extra_fusers={nn.Linear: print}), BadConfig, "a tuple of classes")
    only(fuse_modules(model, ["0", "1"], extra_fusers={(nn.Linear,): 3}), BadConfig, "a function, got 3")


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo: Any) -> Any:
        raise KeyError("no copies")


def test_a_model_that_cannot_be_copied_is_told():
    model = sequence(nn.Linear(4, 4), nn.ReLU(), Uncopyable())
    only(fuse_modules(model, ["0", "1"]), UserFunctionFailed, "model", "cannot be copied: KeyError: 'no copies'")


def test_a_scripted_model_is_refused():
    only(fuse_modules(scripted(chain((nn.Conv2d, nn.ReLU))), ["0", "1"]), CannotFuse, "TorchScript")


# Fusers of the user's own


class Scaled(nn.Module):
    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x) * 3


@pytest.mark.parametrize("function", [fuse_modules, fuse_modules_qat])
def test_extra_fusers_extend_and_override(function):
    modes: list[bool] = []

    def scaled(is_qat: bool, *modules: nn.Module) -> nn.Module:
        modes.append(is_qat)
        return Scaled(*modules)

    model, x = sequence(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU()), torch.ones(2, 4)
    extra = {(nn.Linear, nn.Tanh): lambda _, *m: nn.Sequential(*m), (nn.Linear, nn.ReLU): scaled}
    made = unwrap(function(model, [["0", "1"], ["2", "3"]], extra_fusers=extra))
    assert [type(part) for part in made] == [nn.Sequential, nn.Identity, Scaled, nn.Identity]
    assert not made[2].training
    assert modes == [function is fuse_modules_qat]
    assert close(run(made, x), run(model, x) * 3)


def test_extra_fusers_that_fail_are_told():
    def fails(is_qat: bool, *modules: nn.Module) -> nn.Module:
        raise KeyError("oops")

    model = chain((nn.Conv2d, nn.ReLU))
    types = (nn.Conv2d, nn.ReLU)
    only(fuse_modules(model, ["0", "1"], extra_fusers={types: fails}), UserFunctionFailed, "0 + 1", "KeyError: 'oops'")
    only(fuse_modules(model, ["0", "1"], extra_fusers={types: lambda *_: 3}), UserFunctionFailed, "gave a int")


@pytest.mark.parametrize("function", [fuse_modules, fuse_modules_qat])
def test_a_fuser_function_of_the_users_own(function):
    given: list[Any] = []
    calls: list[str] = []

    def scaled(modules: list[nn.Module], is_qat: bool, extra: Any) -> list[nn.Module]:
        given.append(([type(m) for m in modules], is_qat, extra))
        return [Scaled(*copy.deepcopy(modules)), nn.Identity()]

    model, x, extra = chain((nn.Conv2d, nn.ReLU)), data((nn.Conv2d,)), {(nn.Conv2d, nn.ReLU): Scaled}
    model[0].register_forward_pre_hook(lambda m, args: calls.append("pre"))
    model[1].register_forward_hook(lambda m, args, out: calls.append("post"))
    made = unwrap(function(model, ["0", "1"], fuser_func=scaled, extra_fusers=extra))
    assert given == [([nn.Conv2d, nn.ReLU], function is fuse_modules_qat, extra)]
    assert not any(part.training for part in (made[0], made[1]))
    assert same_bits(run(made, x), run(model, x) * 3)
    assert calls == ["pre", "post"] * 2


@pytest.mark.parametrize(
    ("fuser", "words"),
    [
        (lambda m, q, e: m[:1], "gave 1 modules for 2"),
        (lambda m, q, e: [1, 2], "gave [1, 2], not a list of modules"),
        (lambda m, q, e: None, "gave None, not a list of modules"),
        (lambda m: m, "raised TypeError"),
    ],
)
def test_a_fuser_function_that_fails_is_told(fuser, words):
    model = chain((nn.Conv2d, nn.ReLU))
    only(fuse_modules(model, ["0", "1"], fuser_func=fuser), UserFunctionFailed, "0 + 1", words)


def test_a_fuser_function_may_go_on_with_qfuncs_own():
    def wrapped(modules: list[nn.Module], is_qat: bool, extra: Any) -> list[nn.Module]:
        return fuse_known_modules(modules, is_qat, extra)

    model = chain((nn.Conv2d, nn.BatchNorm2d))
    assert type(unwrap(fuse_modules(model, ["0", "1"], fuser_func=wrapped))[0]) is nn.Conv2d
    only(fuse_modules(model.train(), ["0", "1"], fuser_func=wrapped), InTrainingMode, "0 + 1")


def test_a_forward_of_its_own_would_be_lost():
    model = chain((nn.Conv2d, nn.BatchNorm2d))
    model[1].forward = lambda x: x * 0
    for function in (fuse_modules, fuse_modules_qat):
        only(function(model, ["0", "1"]), CannotFuse, "forward of its own")


def test_modules_of_a_sequence_must_be_neighbours():
    model = chain((nn.Conv2d, nn.BatchNorm2d, nn.ReLU))
    only(fuse_modules(model, ["0", "2"]), CannotFuse, "0 + 2", "follow")
    only(fuse_modules(model, ["2", "0"]), CannotFuse, "2 + 0", "follow")
