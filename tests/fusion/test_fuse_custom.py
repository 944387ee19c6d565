"""Fusions of the user's own: what a fuser is given, what becomes of its result, and what cannot be meant."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc import CustomConfig, CustomFusion, MatchAllNode, explain_fusion, fuse, materialize, unwrap
from qfunc.errors import BadConfig, CannotFuse, InTrainingMode, UnknownName, UserFunctionFailed, problems
from qfunc.testing import same_bits
from qfunc.testing.walk import fingerprint
from tests.fusion.models import conv, fused, image, kinds, model, norm, run, sequential, traced

X = image()


def in_line(is_qat: bool, *parts: Any) -> nn.Module:
    """A fuser: the modules one after the other, functions and methods as they were."""
    made = nn.Sequential(*(part if isinstance(part, nn.Module) else Called(part) for part in parts))
    made.is_qat, made.parts = is_qat, tuple(type(part).__name__ for part in parts)
    return made


class Called(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return getattr(x, self.function)() if isinstance(self.function, str) else self.function(x)


def custom(*pattern: Any, fuser: Callable[..., Any] = in_line, **options: Any) -> CustomConfig:
    return CustomConfig(fusions=(CustomFusion(fuser, pattern=pattern, **options),))


def tree(pattern: Any, fuser: Callable[..., Any], **getters: Any) -> CustomConfig:
    return CustomConfig(fusions=(CustomFusion(fuser, complex_pattern=pattern, **getters),))


def owned(module: nn.Module) -> nn.Module:
    """The module that a fuser made, in a materialized module."""
    return next(part for part in module.modules() if hasattr(part, "is_qat"))


# Simple patterns

FORMS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], tuple[Any, ...], tuple[str, ...]]] = {
    "modules": (lambda s, x: s.r(s.b(s.c(x))), (nn.Conv2d, nn.BatchNorm2d, nn.ReLU), ("Conv2d", "BatchNorm2d", "ReLU")),
    "F.relu": (lambda s, x: F.relu(s.c(x), inplace=True), (nn.Conv2d, F.relu), ("Conv2d", "ReLU")),
    "method": (lambda s, x: s.c(x).relu(), (nn.Conv2d, "relu"), ("Conv2d", "str")),
    "function": (lambda s, x: torch.tanh(s.c(x)), (nn.Conv2d, torch.tanh), ("Conv2d", "builtin_function_or_method")),
    "identity between": (lambda s, x: s.r(s.i(s.c(x))), (nn.Conv2d, nn.ReLU), ("Conv2d", "ReLU")),
    "identity wanted": (lambda s, x: s.i(s.c(x)), (nn.Conv2d, nn.Identity), ("Conv2d", "Identity")),
    "dropout wanted": (lambda s, x: s.d(s.c(x)), (nn.Conv2d, nn.Dropout), ("Conv2d", "Dropout")),
    "pool and norm": (
        lambda s, x: s.b(s.p(s.c(x))),
        (nn.AvgPool2d, nn.BatchNorm2d),
        ("AvgPool2d", "BatchNorm2d"),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_simple_pattern_gives_its_modules_in_forward_order(name: str) -> None:
    torch.manual_seed(0)
    forward, pattern, parts = FORMS[name]
    layers = {"c": conv(), "b": norm(), "r": nn.ReLU(), "i": nn.Identity(), "d": nn.Dropout(), "p": nn.AvgPool2d(2)}
    made = model(forward, **layers)
    graph = fused(made, X, custom=custom(*pattern))
    assert "owned" in kinds(graph)
    part = owned(unwrap(materialize(graph)))
    assert (part.parts, part.is_qat, part.training) == (parts, False, False)
    assert not any(inner.training for inner in part.modules())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("qat", [True, False])
def test_a_fuser_is_told_what_for_and_given_modules_in_the_roots_mode(qat: bool, training: bool) -> None:
    seen: list[tuple[bool, list[bool]]] = []

    def fuser(is_qat: bool, *parts: nn.Module) -> nn.Module:
        seen.append((is_qat, [part.training for part in parts]))
        return nn.Sequential(*parts)

    made = model(lambda self, x: F.relu(self.c(x)), c=conv()).train(training)
    result = fuse(traced(made, (X,)), custom=custom(nn.Conv2d, F.relu, fuser=fuser), qat=qat)
    if training and not qat:
        assert seen == []
        assert [type(problem) for problem in problems(result.failure())] == [InTrainingMode]
    else:
        assert unwrap(result) is not None
        assert seen == [(qat, [training, training])]


def test_a_fuser_may_change_what_it_is_given() -> None:
    made = model(lambda self, x: self.d(self.c(x)), c=conv(), d=conv())
    made.d.weight = made.c.weight
    before = fingerprint(made)
    ties: list[bool] = []

    def fuser(is_qat: bool, first: nn.Conv2d, second: nn.Conv2d) -> nn.Module:
        ties.append(first.weight is second.weight and first.weight is not made.c.weight)
        nn.init.zeros_(first.weight)
        first.extra = 1
        return nn.Sequential(first, second)

    graph = unwrap(fuse(traced(made, (X,)), custom=custom(nn.Conv2d, nn.Conv2d, fuser=fuser)))
    assert ties == [True]
    assert fingerprint(made) == before
    assert run(unwrap(materialize(graph)), (torch.zeros_like(X),)).shape == X.shape


def test_the_graph_owns_what_a_fuser_made() -> None:
    torch.manual_seed(0)
    made = sequential(conv(), nn.ReLU())
    graph = unwrap(fuse(traced(made, (X,)), custom=custom(nn.Conv2d, nn.ReLU)))
    first, second = unwrap(materialize(graph)), unwrap(materialize(graph))
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    first(X).sum().backward()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter -= 0.1 * parameter.grad
    assert not same_bits(run(first, (X,)), run(second, (X,)))
    assert same_bits(run(second, (X,)), run(made, (X,)))
    assert same_bits(run(unwrap(materialize(graph)), (X,)), run(made, (X,)))


def test_patterns_are_tried_in_order_and_before_the_backends() -> None:
    torch.manual_seed(0)
    made = sequential(conv(), norm(), nn.ReLU(), conv(), nn.ReLU())
    fusions = (
        CustomFusion(in_line, pattern=(nn.BatchNorm2d, nn.ReLU)),
        CustomFusion(in_line, pattern=(nn.Conv2d, nn.BatchNorm2d)),
    )
    assert kinds(fused(made, X, custom=CustomConfig(fusions=fusions))) == ["conv2d", "owned", "conv2d + relu"]
    assert kinds(fused(made, X, custom=CustomConfig(fusions=fusions[::-1]))) == ["owned", "relu", "conv2d + relu"]


# Trees


class Summed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.is_qat = layer, False

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return F.relu(self.layer(x) + other)


SUM = (nn.ReLU, (operator.add, nn.Conv2d, MatchAllNode))


def test_a_tree_with_a_root_and_another_input() -> None:
    torch.manual_seed(0)
    made = model(lambda self, x: self.r(self.c(x) + self.d(x)), c=conv(), d=conv(), r=nn.ReLU())
    given: list[Any] = []

    def fuser(is_qat: bool, relu: nn.Module, total: tuple[Any, ...]) -> nn.Module:
        given.append((type(relu), total[0], type(total[1]), total[2]))
        return Summed(total[1])

    chosen = tree(
        SUM, fuser, root_node_getter=lambda nodes: nodes[1][1], extra_inputs_getter=lambda nodes: [nodes[1][2]]
    )
    assert kinds(fused(made, X, custom=chosen)) == ["conv2d", "owned"]
    assert given[0] == (nn.ReLU, operator.add, nn.Conv2d, MatchAllNode)


class Shifted(nn.Module):
    def __init__(self, layer: nn.Module, by: float) -> None:
        super().__init__()
        self.layer, self.by = layer, by

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.by


@pytest.mark.parametrize(("number", "matches"), [(1, True), (2, False)])
def test_a_constant_in_a_pattern(number: int, matches: bool) -> None:
    torch.manual_seed(0)
    made = model(lambda self, x: torch.add(self.c(x), 1), c=conv())

    def fuser(is_qat: bool, add: object, layer: nn.Module, by: int) -> nn.Module:
        return Shifted(layer, by)

    chosen = tree((torch.add, nn.Conv2d, number), fuser, root_node_getter=lambda nodes: nodes[1])
    assert kinds(fused(made, X, custom=chosen, tolerance=0)) == (["owned"] if matches else ["conv2d", "add"])


class PlusTransposed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x.mT


def test_an_attribute_in_a_pattern() -> None:
    torch.manual_seed(0)
    made = model(lambda self, x: torch.add(self.c(x), x.mT), c=conv())

    def fuser(is_qat: bool, add: object, layer: nn.Module, attribute: object) -> nn.Module:
        return PlusTransposed(layer)

    pattern = (torch.add, nn.Conv2d, (getattr, "mT"))
    assert kinds(fused(made, X, custom=tree(pattern, fuser, root_node_getter=lambda n: n[1]))) == ["owned"]
    other = (torch.add, nn.Conv2d, (getattr, "mH"))
    assert kinds(fused(made, X, custom=tree(other, fuser, root_node_getter=lambda n: n[1])))[0] != "owned"


# What cannot be meant


def _raises(is_qat: bool, *parts: object) -> nn.Module:
    raise KeyError("label")


FAULTS: dict[str, tuple[CustomConfig, type, str]] = {
    "fuser raises": (custom(nn.Conv2d, nn.ReLU, fuser=_raises), UserFunctionFailed, "KeyError: 'label'"),
    "no module": (
        custom(nn.Conv2d, nn.ReLU, fuser=lambda q, *parts: 3),
        UserFunctionFailed,
        "returned a int, not a torch.nn.Module",
    ),
    "other arguments": (custom(nn.Conv2d, nn.ReLU, fuser=lambda q, one: one), UserFunctionFailed, "TypeError"),
    "root is no node": (
        custom(nn.Conv2d, nn.ReLU, root_node_getter=lambda nodes: 3),
        CannotFuse,
        "the root must be one of the matched nodes, not 3",
    ),
    "root inside the match": (
        custom(nn.Conv2d, nn.ReLU, root_node_getter=lambda nodes: nodes[0]),
        CannotFuse,
        "its root is called with a value that is a part of the match",
    ),
    "root getter raises": (
        custom(nn.Conv2d, nn.ReLU, root_node_getter=lambda nodes: nodes[7]),
        UserFunctionFailed,
        "IndexError: tuple index out of range",
    ),
    "extra is no node": (
        custom(nn.Conv2d, nn.ReLU, extra_inputs_getter=lambda nodes: ["x"]),
        CannotFuse,
        "an extra input is no node of the graph before it, or is a part of the match",
    ),
    "extra is matched": (
        custom(nn.Conv2d, nn.ReLU, extra_inputs_getter=lambda nodes: [nodes[1]]),
        CannotFuse,
        "an extra input is no node of the graph before it, or is a part of the match",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_users_functions_are_told(name: str) -> None:
    chosen, kind, reason = FAULTS[name]
    graph = traced(sequential(conv(), nn.ReLU()), (X,))
    (problem,) = problems(fuse(graph, custom=chosen).failure())
    assert type(problem) is kind
    assert reason in problem.reason
    told = explain_fusion(graph, custom=chosen)
    fuser_is_at_fault = kind is UserFunctionFailed and "getter" not in name
    assert (told.value_or(None) is not None) is fuser_is_at_fault


def test_a_root_that_is_no_module_is_told() -> None:
    graph = traced(model(lambda self, x: self.c(F.relu(x)), c=conv()), (X,))
    (problem,) = problems(fuse(graph, custom=custom(F.relu, nn.Conv2d)).failure())
    assert problem.reason == "its root 'relu' is no call of a module"


WRONG: dict[str, CustomConfig] = {
    "one operator": custom(nn.Conv2d),
    "four operators": custom(nn.Conv2d, nn.ReLU, nn.ReLU, nn.ReLU),
    "a tuple in a chain": custom(nn.Conv2d, (nn.ReLU,)),
    "no pattern": CustomConfig(fusions=(CustomFusion(in_line),)),
    "both patterns": CustomConfig(fusions=(CustomFusion(in_line, (nn.Conv2d, nn.ReLU), SUM),)),
    "no tuple": CustomConfig(fusions=(CustomFusion(in_line, complex_pattern=nn.ReLU),)),
    "a list": CustomConfig(fusions=(CustomFusion(in_line, pattern=[nn.Conv2d, nn.ReLU]),)),
    "a lambda": custom(nn.Conv2d, lambda x: x),
    "a number": custom(nn.Conv2d, 3),
    "anything in a chain": custom(nn.Conv2d, MatchAllNode),
    "a tuple of one": tree((nn.ReLU, (nn.Conv2d,)), in_line),
    "a number at the head": tree((3, nn.Conv2d), in_line),
    "no function": custom(nn.Conv2d, nn.ReLU, fuser=3),
    "no fusion": CustomConfig(fusions=(3,)),
    "no tuple of fusions": CustomConfig(fusions=CustomFusion(in_line, (nn.Conv2d, nn.ReLU))),
    "names as one text": CustomConfig(unfused_names="0"),
    "patterns of no text": CustomConfig(unfused_patterns=(3,)),
    "attributes as one text": CustomConfig(preserved_attributes="size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_configuration_that_cannot_be_meant_is_told(name: str) -> None:
    graph = traced(sequential(conv(), nn.ReLU()), (X,))
    for function in (fuse, explain_fusion):
        found = problems(function(graph, custom=WRONG[name]).failure())
        assert found
        assert {type(problem) for problem in found} == {BadConfig}


def test_unknown_names_are_told_all_at_once() -> None:
    graph = traced(sequential(conv(), nn.ReLU()), (X,))
    wrong = CustomConfig(unfused_names=("1", "9"), unfused_patterns=("conv2d + rleu",), preserved_attributes=("sizes",))
    for function in (fuse, explain_fusion):
        found = problems(function(graph, custom=wrong).failure())
        assert [(type(p), p.what, p.node) for p in found] == [
            (UnknownName, "module", "9"),
            (UnknownName, "pattern", "conv2d + rleu"),
            (UnknownName, "attribute", "sizes"),
        ]
        assert "'conv2d + relu'" in found[1].remedy


def test_a_pattern_does_not_match_what_the_backend_has_folded() -> None:
    """Behind the fold, convolution and sigmoid are neighbours; a fuser would be given the bare convolution."""
    made = model(lambda self, x: torch.sigmoid(self.b(self.c(x))), c=conv(), b=norm())
    configured = custom(nn.Conv2d, torch.sigmoid)
    graph = unwrap(fuse(traced(made, (X,)), custom=configured))
    assert kinds(graph) == ["conv2d", "sigmoid"]
    assert unwrap(fuse(graph, custom=configured)) is graph


def test_operands_given_by_keyword_count_and_options_do_not_fit() -> None:
    configured = custom(nn.Conv2d, nn.Sigmoid)
    made = model(lambda self, x: self.s(input=self.c(input=x)), c=conv(), s=nn.Sigmoid())
    assert kinds(unwrap(fuse(traced(made, (X,)), custom=configured))) == ["owned"]
    sums = custom(nn.Conv2d, torch.softmax)
    made = model(lambda self, x: torch.softmax(self.c(x), dim=1), c=conv())
    graph = traced(made, (X,))
    assert "owned" not in kinds(unwrap(fuse(graph, custom=sums)))
    assert "is given dim, which the pattern does not take" in str(unwrap(explain_fusion(graph, custom=sums)))


def test_a_near_miss_of_a_pattern_is_told() -> None:
    made = model(lambda self, x: (y := self.n(x)).softmax(-1) + y, n=nn.LayerNorm(6))
    graph = traced(made, (torch.randn(2, 6),))
    (row,) = [
        row for row in unwrap(explain_fusion(graph, custom=custom(nn.LayerNorm, "softmax"))).unfused if row.node == "n"
    ]
    assert "has 2 users" in row.reason
    assert row.reason.startswith("torch.nn.LayerNorm + .softmax")


def test_what_a_fuser_returns_belongs_to_the_graph() -> None:
    shared = nn.Sequential(conv(), nn.Dropout(0.9))
    made = model(lambda self, x: torch.sigmoid(self.c(x)), c=conv())
    graph = unwrap(
        fuse(traced(made, (X,)), custom=custom(nn.Conv2d, torch.sigmoid, fuser=lambda _qat, *_parts: shared))
    )
    before = unwrap(materialize(graph))(X)
    with torch.no_grad():
        shared[0].weight.zero_()
    after = unwrap(materialize(graph))
    assert same_bits(after(X), before)
    assert not any(part.training for part in after.modules())
    assert shared.training
