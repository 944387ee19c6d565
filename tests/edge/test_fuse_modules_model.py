"""Eager fusion: the given model stays as it is, hooks move, modules with several places keep their meaning."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from returns.result import Failure
from torch import Tensor, nn

from qfunc import fuse_known_modules, fuse_modules, fuse_modules_qat, unwrap
from qfunc.edge import fused
from qfunc.errors import CannotFuse
from qfunc.result import QuantException
from qfunc.testing import same_bits
from tests.edge.eager import chain, close, data, found_in, label, names_of, net, only, run, sequence, spy

# Purity


GROUPS = [["stem.0", "stem.1", "stem.2"], ["a", "relu"]]


def state(model: nn.Module) -> Any:
    tensors = [*model.parameters(), *model.buffers(), model.hidden]
    parts = [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    hooks = [list(table) for m in model.modules() for name, table in vars(m).items() if "hooks" in name and table]
    return [(id(t), t._version, t.requires_grad) for t in tensors], parts, hooks, list(vars(model))


@pytest.mark.parametrize("function", [fuse_modules, fuse_modules_qat])
def test_the_given_model_is_untouched(function):
    model, x = net(), data((nn.Conv2d,))
    model.stem[0].register_forward_pre_hook(lambda m, args: None)
    values, before, expected = copy.deepcopy(dict(model.state_dict())), state(model), run(model, x)
    made = unwrap(function(model, GROUPS))
    assert close(run(made, x), expected)
    with torch.no_grad():
        for tensor in (*made.parameters(), *made.buffers()):
            tensor.zero_()
    made.notes["classes"].append("bird")
    assert state(model) == before
    assert same_bits(dict(model.state_dict()), values)
    assert same_bits(run(model, x), expected)
    assert model.notes == {"classes": ["cat", "dog"]}


def test_a_failure_leaves_the_model_untouched():
    model = net()
    before = state(model)
    assert isinstance(fuse_modules(model, [*GROUPS, ["b", "also"]]), Failure)
    assert state(model) == before


def test_ties_names_and_flags_are_kept():
    model = net()
    model.b.bias.requires_grad_(False)
    made = unwrap(fuse_modules(model, GROUPS))
    assert made.a[0].weight is made.b.weight
    assert made.a[0].weight is not model.a.weight
    assert made.also is made.stem
    assert not made.b.bias.requires_grad
    assert set(made.state_dict()) == {
        *(f"{path}.0.0.{name}" for path in ("stem", "also") for name in ("weight", "bias")),
        *(f"{path}.{name}" for path in ("a.0", "b") for name in ("weight", "bias")),
        "scale",
    }


def shares(one: Tensor, other: Tensor) -> bool:
    return torch._C._data_address(one) == torch._C._data_address(other)


def test_memory_is_shared_until_it_is_written_to():
    model = net()
    made = unwrap(fuse_modules(model, GROUPS))
    assert shares(made.a[0].weight, model.a.weight)
    assert shares(made.scale, model.scale)
    with torch.no_grad():
        model.a.weight.zero_()
    assert not shares(made.a[0].weight, model.a.weight)
    assert made.a[0].weight.abs().sum() > 0


def test_weights_that_a_hook_computes_are_copied_along():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    model, x = nn.Sequential(normed, nn.Linear(4, 4), nn.ReLU()).eval(), torch.ones(1, 4)
    assert same_bits(run(unwrap(fuse_modules(model, ["1", "2"])), x), run(model, x))
    only(
        fuse_modules(sequence(normed, nn.ReLU()), ["0", "1"]),
        CannotFuse,
        "forward pre-hook WeightNorm of 0 would be lost",
    )


def test_fuse_known_modules_leaves_its_modules_alone():
    conv, norm, relu = chain((nn.Conv2d, nn.BatchNorm2d, nn.ReLU))
    calls: list[str] = []
    conv.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    weight = conv.weight
    for is_qat in (False, True):
        made = fuse_known_modules([conv, norm, relu], is_qat)
        run(made[0], data((nn.Conv2d,)))
        assert calls == ["pre"]
        run(conv, data((nn.Conv2d,)))
        assert calls == ["pre", "pre"]
        calls.clear()
        assert made[0][0].weight is weight if is_qat else conv.weight is weight


# Hooks


@pytest.mark.parametrize("function", [fuse_modules, fuse_modules_qat])
@pytest.mark.parametrize("types", [(nn.Conv2d, nn.BatchNorm2d), (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)], ids=label)
def test_hooks_move_with_order_and_flags(types, function):
    model, x, calls = chain(types), data(types), []
    first, last = model[0], model[-1]
    first.register_forward_pre_hook(lambda m, args: calls.append(("pre", type(m))))
    first.register_forward_pre_hook(lambda m, args, kw: calls.append("pre with kwargs"), with_kwargs=True)
    first.register_forward_pre_hook(lambda m, args: (args[0] * 2,), prepend=True)
    last.register_forward_hook(lambda m, args, out: calls.append("post"))
    last.register_forward_hook(lambda m, args, kw, out: out + 1, with_kwargs=True, prepend=True)
    last.register_forward_hook(lambda m, args, out: calls.append("always"), always_call=True)
    expected = run(model, x)
    del calls[:]
    made = unwrap(function(model, names_of(model)))
    assert close(run(made, x), expected)
    assert calls == [("pre", type(made[0])), "pre with kwargs", "post", "always"]
    assert not made[1]._forward_hooks
    assert len(last._forward_hooks) == len(first._forward_pre_hooks) == 3
    del calls[:]
    with pytest.raises(RuntimeError):
        run(made, x[:, :1])
    assert calls[-1] == "always"


class Recording(nn.Module):
    """A model that hooks its own layers, and keeps the handles."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu = nn.Linear(4, 4), nn.ReLU()
        self.seen = 0
        self.handle = self.fc.register_forward_pre_hook(self.count)

    def count(self, module: nn.Module, args: Any) -> None:
        self.seen += 1

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.fc(x))


def test_each_model_has_its_own_hooks_and_handles():
    model = Recording().eval()
    made = unwrap(fuse_modules(model, ["fc", "relu"]))
    x = torch.ones(1, 4)
    run(made, x)
    assert (model.seen, made.seen) == (0, 1)
    model.handle.remove()
    run(made, x)
    run(model, x)
    assert (model.seen, made.seen) == (0, 2)
    made.handle.remove()
    run(made, x)
    assert made.seen == 2


REFUSED = (
    (1, "register_forward_pre_hook", "forward pre-hook"),
    (0, "register_forward_hook", "forward hook"),
    (0, "register_full_backward_hook", "backward hook"),
    (1, "register_full_backward_pre_hook", "backward pre-hook"),
    (0, "register_state_dict_pre_hook", "state-dict pre-hook"),
    (0, "register_state_dict_post_hook", "state-dict hook"),
    (1, "register_load_state_dict_pre_hook", "load-state-dict pre-hook"),
    (1, "register_load_state_dict_post_hook", "load-state-dict post-hook"),
)


@pytest.mark.parametrize(("index", "register", "kind"), REFUSED, ids=[row[2] for row in REFUSED])
def test_hooks_that_cannot_move_are_told(index, register, kind):
    model = chain((nn.Conv2d, nn.ReLU))
    getattr(model[index], register)(spy)
    for function in (fuse_modules, fuse_modules_qat):
        only(function(model, ["0", "1"]), CannotFuse, "0 + 1", f"the {kind} spy of {index} would be lost")
    with pytest.raises(QuantException, match=f"{kind} spy of {type(model[index]).__name__}"):
        fuse_known_modules(list(model), False)


# Modules with several places


class Places(nn.Module):
    """A block that is called in several ways, as chosen."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.block = chain((nn.Conv2d, nn.ReLU))
        self.conv, self.relu = nn.Conv2d(8, 8, 1), nn.ReLU()
        match way:
            case "a second name":
                self.other = self.relu
            case "a second container":
                self.other = nn.Sequential(self.relu)
            case "a second name of its container":
                self.other = self.block
            case "a list":
                self.other = {"all": [self.conv, (self.relu,)]}
            case "hidden":
                object.__setattr__(self, "other", self.relu)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.block(x)))


def test_every_name_of_a_shared_container_gets_the_fused_module():
    made = unwrap(fuse_modules(Places("a second name of its container"), ["block.0", "block.1"]))
    assert isinstance(made.other[0], fused.ConvReLU2d)
    assert made.other is made.block


@pytest.mark.parametrize(
    ("way", "group", "words"),
    [
        ("a second name", ["conv", "relu"], "relu is the same module as other"),
        ("a second container", ["conv", "relu"], "relu is the same module as other.0"),
        ("a second container", ["conv", "other.0"], "other.0 is the same module as relu"),
        ("a second name of its container", ["block.0", "relu"], "block.0 is the same module as other.0"),
        ("a list", ["conv", "relu"], "is also held by the attribute other"),
        ("hidden", ["conv", "relu"], "relu is also held by the attribute other"),
    ],
)
def test_modules_with_another_place_are_refused(way, group, words):
    model = Places(way).eval()
    told = found_in(fuse_modules(model, group))
    assert all(type(problem) is CannotFuse for problem in told)
    assert words in told[0].reason
    assert unwrap(fuse_modules(Places("").eval(), ["conv", "relu"]))
