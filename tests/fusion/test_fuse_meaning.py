"""Where fusion must look twice: sites, ties, hooks, subclasses, sums, aliases."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations

from qfunc import CustomConfig, explain_fusion, fuse, materialize, trace, unwrap
from qfunc.errors import Untraceable, problems
from qfunc.testing import relative_error, same_bits
from tests.fusion.models import conv, fused, image, kinds, model, norm, run, sequential, traced

X = image()


def seeded(**attributes: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: make() for name, make in attributes.items()}


# One module at several sites, shared and outer parameters


@pytest.mark.parametrize("behind", ["bn", "relu"])
def test_a_layer_called_twice_is_fused_at_the_one_site(behind: str) -> None:
    parts = seeded(c=conv, bn=norm, relu=nn.ReLU)
    made = model(lambda self, x: self.c(getattr(self, behind)(self.c(x))), **parts)
    found = kinds(fused(made, X))
    assert found == {"bn": ["conv2d", "conv2d"], "relu": ["conv2d + relu", "conv2d"]}[behind]


def test_a_linear_called_thrice_is_fused_at_two_sites() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.fc(self.bn(self.fc(x)))))

    made = model(forward, fc=nn.Linear(4, 4), bn=nn.BatchNorm1d(4))
    assert kinds(fused(made, X[:, :, 0, 0])) == ["linear", "linear + relu", "linear"]


@pytest.mark.parametrize("shared", ["weight", "bias"])
def test_tied_layers_only_one_of_which_is_normed(shared: str) -> None:
    made = model(lambda self, x: self.d(self.bn(self.c(x)).relu()), **seeded(c=conv, d=conv, bn=norm))
    setattr(made.d, shared, getattr(made.c, shared))
    graph = fused(made, X)
    assert kinds(graph) == ["conv2d + relu", "conv2d"]
    module = unwrap(materialize(graph))
    assert same_bits(getattr(module.d, shared), getattr(made.d, shared))


def test_an_embedding_tied_to_a_normed_head() -> None:
    made = model(
        lambda self, i: self.bn(self.head(self.embed(i))), embed=nn.Embedding(8, 4), head=nn.Linear(4, 8, bias=False)
    )
    made.bn = nn.BatchNorm1d(8).eval()
    nn.init.uniform_(made.bn.running_mean)
    made.head.weight = made.embed.weight
    assert "linear" in kinds(fused(made, torch.tensor([1, 5, 2])))
    assert "batch_norm" not in kinds(fused(made, torch.tensor([1, 5, 2])))


def test_parameters_of_fused_modules_are_read_elsewhere() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.bn(self.c(x))
        return y + self.c.bias.view(1, -1, 1, 1) + self.c.weight.sum() - self.bn.running_mean.sum() * self.bn.weight[0]

    assert kinds(fused(model(forward, **seeded(c=conv, bn=norm)), X))[0] == "conv2d"


def test_inputs_by_keyword() -> None:
    made = model(lambda self, x: F.relu(input=self.bn(input=self.c(input=x)), inplace=True), **seeded(c=conv, bn=norm))
    assert kinds(fused(made, X)) == ["conv2d + relu"]


# Modules that do more than their class says

HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], object]] = {
    "forward hooks": nn.Module.register_forward_hook,
    "forward pre-hooks": nn.Module.register_forward_pre_hook,
    "backward hooks": nn.Module.register_full_backward_hook,
    "backward pre-hooks": nn.Module.register_full_backward_pre_hook,
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("hooked", ["c", "bn", "relu"])
def test_a_module_with_hooks_stays_and_its_hooks_fire(hooked: str, hook: str) -> None:
    made = model(lambda self, x: self.relu(self.bn(self.c(x))), **seeded(c=conv, bn=norm, relu=nn.ReLU))
    fired: list[int] = []
    HOOKS[hook](getattr(made, hooked), lambda *_: fired.append(1))
    graph = fused(made, X)
    expected = {
        "c": ["torch.nn.Conv2d", "batch_norm + relu"],
        "bn": ["conv2d", "torch.nn.BatchNorm2d", "relu"],
        "relu": ["conv2d", "torch.nn.ReLU"],
    }
    assert kinds(graph) == expected[hooked]
    assert [(note.node, note.text) for note in graph.notes] == [(hooked, f"kept as it is: the module has {hook}")]
    if hooked != "relu":
        report = unwrap(explain_fusion(traced(made, (X,))))
        assert {row.place: row.reason for row in report.unfused}[hooked] == f"its module has {hook}"
    fired.clear()
    unwrap(materialize(graph))(X.clone().requires_grad_()).sum().backward()
    assert fired == [1]


def test_a_parametrized_layer_stays() -> None:
    made = model(lambda self, x: F.relu(self.bn(self.c(x))), **seeded(c=conv, bn=norm))
    made.c = parametrizations.weight_norm(made.c)
    assert kinds(fused(made, X)) == ["torch.nn.utils.parametrize.ParametrizedConv2d", "batch_norm + relu"]
    (row,) = unwrap(explain_fusion(traced(made, (X,)))).unfused
    assert row.reason == "its module is parametrized"


class DoubledConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class RaisedReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class PlainNorm(nn.BatchNorm2d):
    pass


def test_subclasses_in_user_code_are_what_their_forward_says() -> None:
    torch.manual_seed(0)
    made = sequential(DoubledConv(4, 4, 1), norm(), RaisedReLU(), conv(), RaisedReLU())
    assert kinds(fused(made, X)) == ["conv2d", "mul", "batch_norm + relu", "add", "conv2d + relu", "add"]


def test_a_norm_of_the_users_is_no_norm() -> None:
    torch.manual_seed(0)
    made = sequential(conv(), PlainNorm(4), nn.ReLU())
    failure = trace(made, X).failure()
    assert [type(problem) for problem in problems(failure)] == [Untraceable]
    custom = CustomConfig(non_traceable_types=(PlainNorm,))
    graph = unwrap(fuse(unwrap(trace(made, X, custom=custom))))
    assert len(kinds(graph)) == 3
    assert same_bits(run(unwrap(materialize(graph)), (X,)), run(made, (X,)))


def test_a_subclass_in_torch_stays_and_is_told() -> None:
    torch.manual_seed(0)
    made = sequential(NonDynamicallyQuantizableLinear(8, 8), nn.ReLU())
    assert kinds(fused(made, X, tolerance=0)) == [
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear",
        "relu",
    ]
    (row,) = unwrap(explain_fusion(traced(made, (X,)))).unfused
    assert row.reason == "its type is a subclass of torch.nn.Linear, which may compute something else"


# Sums


def _self_sum(self: nn.Module, x: Tensor) -> Tensor:
    y = self.c(x)
    return y + y


SUMS: dict[str, tuple[Callable[..., Tensor], str, str]] = {
    "itself": (_self_sum, "conv2d", "add reads it more than once"),
    "broadcast": (
        lambda self, x: self.c(x) + x.mean((2, 3), keepdim=True),
        "conv2d",
        "add: the operands' shapes differ",
    ),
    "number": (lambda self, x: 1 + self.c(x), "conv2d", "add: one operand is not a value of the graph"),
    "alpha": (lambda self, x: torch.add(self.c(x), x, alpha=2), "conv2d", "add: the sum is scaled by alpha"),
    "right": (lambda self, x: x + self.c(x), "conv2d + add", ""),
    "left": (lambda self, x: self.c(x) + x, "conv2d + add", ""),
    "both": (
        lambda self, x: F.relu(self.c(x) + self.d(x)),
        "conv2d + add + relu",
        "add is fused with the other operator that it reads",
    ),
    "both normed": (lambda self, x: F.relu(self.bn(self.c(x)) + self.bn(self.d(x))), "conv2d + add + relu", ""),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    forward, kind, reason = SUMS[name]
    made = model(forward, **seeded(c=conv, d=conv, bn=norm))
    assert kind in kinds(fused(made, X, tolerance=1e-5 if "normed" in name else 0))
    reasons = [row.reason for row in unwrap(explain_fusion(traced(made, (X,)))).unfused if row.operator == "conv2d"]
    assert reasons == ([reason] if reason else [])


def test_a_sum_without_shapes_stays_and_is_told() -> None:
    made = model(lambda self, x: self.c(x) + x, **seeded(c=conv))
    assert kinds(fused(made, X, tolerance=0, examples=False)) == ["conv2d", "add"]
    report = unwrap(explain_fusion(traced(made, (X,), examples=False)))
    assert report.unfused[0].reason == "add: the operands' shapes are unknown: trace with example_inputs"


# Memory that is written to, and switches that are inputs


def _relu_on_alias(self: nn.Module, x: Tensor) -> object:
    y = self.c(x)
    view = y[:1]
    return F.relu_(y), view


def _write_between(self: nn.Module, x: Tensor) -> object:
    y = self.c(x)
    x.add_(1)
    return F.relu(y) + x


def _view_written_between(self: nn.Module, x: Tensor) -> object:
    a = self.d(x)
    view = a.view(-1)
    y = self.c(a)
    view.add_(1)
    return F.relu(y), view


def _items_set_between(self: nn.Module, x: Tensor) -> object:
    a = self.d(x)
    y = self.c(a)
    a[:] = 0
    return F.relu(y), a


@pytest.mark.parametrize("forward", [_relu_on_alias, _write_between, _view_written_between, _items_set_between])
def test_what_is_written_in_between_is_read_as_before(forward: Callable[..., object]) -> None:
    fused(model(forward, **seeded(c=conv, d=conv)), X, tolerance=0)


def test_a_dropout_whose_mode_is_an_input_stays() -> None:
    made = model(lambda self, x, train: F.relu(F.dropout(self.c(x), 0.5, train)), **seeded(c=conv))
    graph = unwrap(fuse(unwrap(trace(made))))
    assert kinds(graph) == ["conv2d", "dropout", "relu"]
    module = unwrap(materialize(graph))
    assert same_bits(module(X, False), made(X, False))
    assert relative_error(module(X, False), module(X, True)) > 0.1


@pytest.mark.parametrize("dropped", [nn.Dropout, nn.Dropout2d, nn.Identity])
def test_dropout_and_identity_part_no_chain_in_evaluation(dropped: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    made = sequential(conv(), dropped(), norm(), dropped(), nn.ReLU(), dropped())
    assert kinds(fused(made, X)) == ["conv2d + relu"]


@pytest.mark.parametrize("patterns", [("dropout",), ("identity",), ("dropout", "identity")])
def test_dropout_and_identity_stay_where_they_are_wanted(patterns: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    made = sequential(conv(), nn.Dropout(), nn.ReLU(), nn.Linear(8, 8), nn.Identity(), nn.ReLU())
    found = kinds(fused(made, X, tolerance=0, custom=CustomConfig(unfused_patterns=patterns)))
    assert [kind for kind in found if kind in ("dropout", "identity")] == list(patterns)
    assert found.count("relu") == len(patterns)
