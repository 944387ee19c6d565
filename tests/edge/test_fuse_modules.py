"""Eager fusion: a model whose listed modules became one computes what it did, and what cannot be is told."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
from returns.result import Failure
from torch import Tensor, fx, nn

from qfunc import fuse, fuse_known_modules, fuse_modules, fuse_modules_qat, materialize, quantize, trace, unwrap
from qfunc.edge import fused
from qfunc.edge.fusers import FUSERS
from qfunc.errors import BadConfig, CannotFuse, InTrainingMode, NotAModule, UnknownName, UserFunctionFailed, problems
from qfunc.result import QuantException
from qfunc.testing import oracle, same_bits

ROWS = tuple(FUSERS)
FOLDED = tuple(types for types in ROWS if not types[0].__name__.startswith("Batch") and types[1] is not nn.ReLU)
TRAINED = tuple(types for types in ROWS if "Transpose" not in types[0].__name__)
IN_EVAL = {
    ("Conv", "BatchNorm"): "Conv",
    ("Conv", "BatchNorm", "ReLU"): "ConvReLU",
    ("ConvTranspose", "BatchNorm"): "ConvTranspose",
    ("Conv", "ReLU"): "ConvReLU",
    ("Linear", "BatchNorm"): "Linear",
    ("Linear", "ReLU"): "LinearReLU",
    ("BatchNorm", "ReLU"): "BNReLU",
}
IN_QAT = {
    **IN_EVAL,
    ("Conv", "BatchNorm"): "ConvBn",
    ("Conv", "BatchNorm", "ReLU"): "ConvBnReLU",
    ("Linear", "BatchNorm"): "LinearBn",
}


def label(types: tuple[type, ...]) -> str:
    return "+".join(type.__name__ for type in types)


rows = pytest.mark.parametrize("types", ROWS, ids=label)
folded_rows = pytest.mark.parametrize("types", FOLDED, ids=label)


def layer(kind: type, **options: Any) -> nn.Module:
    """A layer of 4 channels in, 8 out, with parameters and statistics of a trained one."""
    name, norm = kind.__name__, {k: v for k, v in options.items() if k in ("affine", "eps", "track_running_stats")}
    if kind is nn.ReLU:
        return nn.ReLU()
    if name.startswith("BatchNorm"):
        made: Any = kind(8, **norm)
        if made.running_mean is not None:
            made.running_mean.normal_()
            made.running_var.uniform_(0.1, 3)
        if made.affine:
            nn.init.normal_(made.weight)
            nn.init.normal_(made.bias)
        return made
    given = {"bias": options.get("bias", True)}
    return nn.Linear(4, 8, **given) if kind is nn.Linear else kind(4, 8, 3, groups=options.get("groups", 1), **given)


def chain(types: tuple[type, ...], seed: int = 0, **options: Any) -> nn.Sequential:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(*(layer(kind, **options) for kind in types)).eval()


def data(types: tuple[type, ...], batch: int = 3) -> Tensor:
    rank = 0 if types[0] is nn.Linear else int(types[0].__name__[-2])
    channels = 8 if types[0].__name__.startswith("Batch") else 4
    return torch.randn(batch, channels, *[6] * rank, generator=torch.Generator().manual_seed(1))


def names_of(model: nn.Sequential) -> list[str]:
    return [name for name, _ in model.named_children()]


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def stem(name: str) -> str:
    return name.rstrip("123d")


def found_in(result: Any) -> list[Any]:
    assert isinstance(result, Failure), result
    return list(problems(result.failure()))


def only(result: Any, kind: type, *words: str) -> Any:
    """The single problem, which is of this kind and has these words in its text."""
    (problem,) = found_in(result)
    assert type(problem) is kind, problem
    assert problem.remedy
    for word in words:
        assert word in f"{problem.node}: {problem.reason}", problem
    return problem


# What fuses, and into what


@rows
def test_fused_for_evaluation_it_computes_the_same(types):
    model, x = chain(types), data(types)
    made = unwrap(fuse_modules(model, names_of(model)))
    expected = IN_EVAL[tuple(stem(type.__name__) for type in types)]
    assert stem(type(made[0]).__name__) == expected
    assert type(made[0]).__name__[-2:] == types[0].__name__[-2:] or types[0] is nn.Linear
    assert [type(part) for part in made[1:]] == [nn.Identity] * (len(types) - 1)
    assert not any(part.training for part in made.modules())
    assert close(run(made, x), run(model, x))
    assert not run(made, x).isnan().any()


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
@pytest.mark.parametrize("qat", [False, True], ids=["eval", "qat"])
@rows
def test_the_reference_fuses_into_the_same(types, qat):
    if qat and types not in TRAINED:
        pytest.skip("the reference refuses as well; see the errors")
    model, x = chain(types), data(types)
    ours = unwrap((fuse_modules_qat if qat else fuse_modules)(model, names_of(model)))
    theirs = oracle.fuse_modules(model, names_of(model), qat=qat)
    assert [type(part).__name__ for part in ours] == [type(part).__name__ for part in theirs]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert close(run(ours, x), run(theirs, x))
    if qat:
        ours.train()
        theirs.train()
        assert same_bits(run(ours, x), run(theirs, x))
        assert same_bits(dict(ours.state_dict()), dict(theirs.state_dict()))


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
def test_the_table_is_the_references():
    for types in ROWS:
        oracle.fuse_modules(chain(types), [str(i) for i in range(len(types))])
    with pytest.raises(AssertionError, match="did not find fuser"):
        oracle.fuse_modules(chain((nn.Linear, nn.BatchNorm1d, nn.ReLU)), ["0", "1", "2"])
    assert isinstance(fuse_modules(chain((nn.Linear, nn.BatchNorm1d, nn.ReLU)), ["0", "1", "2"]), Failure)


@pytest.mark.parametrize("types", TRAINED, ids=label)
def test_fused_for_training_it_trains_the_same(types):
    model, x = chain(types).train(), data(types)
    made = unwrap(fuse_modules_qat(model, names_of(model)))
    assert stem(type(made[0]).__name__) == IN_QAT[tuple(stem(type.__name__) for type in types)]
    assert all(part.training for part in made.modules())
    steps = []
    for trained in (model, made):
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        outputs = []
        for scale in (1, 2):
            optimizer.zero_grad()
            outputs.append(trained(x * scale))
            outputs[-1].square().sum().backward()
            optimizer.step()
        steps.append((outputs, [p.grad for p in trained.parameters()], [*trained.parameters(), *trained.buffers()]))
    assert same_bits(*steps)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@folded_rows
def test_folding_holds_for_all_options(types, affine, bias, seed):
    options = {"eps": (1e-5, 1e-3, 0.5)[seed], "groups": (1, 2, 4)[seed]}
    model, x = chain(types, seed, affine=affine, bias=bias, **options), data(types)
    assert close(run(unwrap(fuse_modules(model, names_of(model))), x), run(model, x))


@folded_rows
def test_zero_gamma_leaves_beta(types):
    model, x = chain(types), data(types)
    nn.init.zeros_(model[1].weight)
    made = unwrap(fuse_modules(model, names_of(model)))
    folded = made[0][0] if len(types) == 3 else made[0]
    assert same_bits(folded.bias.detach(), model[1].bias.detach())
    assert same_bits(run(made, x), run(model, x))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)], ids=str)
@folded_rows
def test_the_dtype_stays(types, dtype, tolerance):
    model, x = chain(types).to(dtype), data(types).to(dtype)
    made = unwrap(fuse_modules(model, names_of(model)))
    assert {p.dtype for p in made.parameters()} == {dtype}
    assert close(run(made, x), run(model, x), tolerance)


def test_a_batch_norm_after_a_linear_layer_is_folded_along_the_last_axis():
    model = chain((nn.Linear, nn.BatchNorm1d))
    x = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    made = unwrap(fuse_modules(model, ["0", "1"]))
    with torch.no_grad():
        rows_of_two_dimensions = model(x.flatten(0, 1)).view(2, 8, 8)
        assert close(made(x), rows_of_two_dimensions)
        assert not close(made(x), model(x))


def test_the_folded_layer_keeps_what_else_it_has():
    model = chain((nn.Conv2d, nn.BatchNorm2d))
    model[0].note = "kept"
    model[0].weight.requires_grad_(False)
    made = unwrap(fuse_modules(model, ["0", "1"]))
    assert made[0].note == "kept"
    assert made[0].weight.requires_grad
    model[0].bias.requires_grad_(False)
    model[1].requires_grad_(False)
    assert not unwrap(fuse_modules(model, ["0", "1"]))[0].weight.requires_grad


def test_a_model_in_training_mode_may_have_its_relus_fused():
    for types in ((nn.Conv2d, nn.ReLU), (nn.BatchNorm2d, nn.ReLU)):
        made = unwrap(fuse_modules(chain(types).train(), ["0", "1"]))
        assert all(part.training for part in made.modules())


# The fused modules are ordinary ones


PARTS: dict[type, tuple[Any, ...]] = {
    fused.LinearLeakyReLU: (nn.Linear(4, 8), nn.LeakyReLU()),
    fused.LinearTanh: (nn.Linear(4, 8), nn.Tanh()),
    fused.ConvAdd2d: (nn.Conv2d(4, 4, 1), torch.add),
    fused.ConvAddReLU2d: (nn.Conv2d(4, 4, 1), torch.add, nn.ReLU()),
}
CLASSES = tuple(
    c for c in vars(fused).values() if isinstance(c, type) and issubclass(c, fused.FusedModule) and "parts" in vars(c)
)[1:]
classes = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


def instance(kind: Any) -> tuple[Any, tuple[Tensor, ...]]:
    parts = PARTS.get(kind) or tuple(chain(kind.parts))
    x = data(tuple(map(type, parts[:1])))
    return kind(*parts).eval(), (x, x) if "Add" in kind.__name__ else (x,)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, fx.symbolic_trace, scripted], ids=lambda way: way.__name__)
@classes
def test_it_travels_like_any_module(kind, way):
    module, inputs = instance(kind)
    with torch.no_grad():
        expected = module(*inputs)
        assert same_bits(way(module)(*inputs), expected)


@classes
def test_it_computes_what_its_parts_compute_in_turn(kind):
    module, (x, *others) = instance(kind)
    with torch.no_grad():
        value = module[0](x) + others[0] if others else module[0](x)
        for part in list(module)[1:]:
            value = part(value)
        assert same_bits(module(x, *others), value)


@classes
def test_it_refuses_other_parts(kind):
    parts = PARTS.get(kind) or tuple(chain(kind.parts))
    with pytest.raises(TypeError):
        kind(*parts[:-1])
    with pytest.raises(TypeError, match=kind.__name__):
        kind(nn.Identity(), *parts[1:])
    with pytest.raises(TypeError):
        kind(*parts, nn.Identity())


def test_its_last_part_is_checked():
    with pytest.raises(TypeError, match="ConvAddReLU2d ends in a ReLU"):
        fused.ConvAddReLU2d(nn.Conv2d(1, 1, 1), torch.add, nn.Tanh())


def test_a_slice_of_it_is_a_plain_sequence():
    module, (x,) = instance(fused.ConvBnReLU2d)
    assert type(module[:2]) is nn.Sequential
    assert same_bits(run(module[2], run(module[:2], x)), run(module, x))


def test_fused_models_go_on_to_be_quantized():
    model = nn.Sequential(*chain((nn.Conv2d, nn.BatchNorm2d, nn.ReLU)), nn.Flatten(), nn.Linear(128, 4)).eval()
    made, x = unwrap(fuse_modules(model, ["0", "1", "2"])), data((nn.Conv2d,))
    again = unwrap(trace(made, x).bind(fuse).bind(materialize))
    assert close(run(again, x), run(model, x))
    assert close(run(unwrap(quantize(made, [x]).bind(materialize)), x), run(model, x), 0.1)


# Purity


class Net(nn.Module):
    """Nested names, tied weights, one module under two names, attributes, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = chain((nn.Conv2d, nn.BatchNorm2d, nn.ReLU))
        self.also = self.stem
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.relu = nn.ReLU()
        self.scale = nn.Buffer(torch.ones(1))
        self.hidden = nn.Buffer(torch.ones(1), persistent=False)
        self.notes = {"classes": ["cat", "dog"]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(self.stem(x).mean((2, 3)))) + self.b(self.also(x).mean((2, 3)))
        return x * self.scale + self.hidden


GROUPS = [["stem.0", "stem.1", "stem.2"], ["a", "relu"]]


def net() -> Net:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Net().eval()


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


def spy(*args: Any) -> None:
    """A hook that does nothing."""


@pytest.mark.parametrize(("index", "register", "kind"), REFUSED, ids=[row[2] for row in REFUSED])
def test_hooks_that_cannot_move_are_told(index, register, kind):
    model = chain((nn.Conv2d, nn.ReLU))
    getattr(model[index], register)(spy)
    for function in (fuse_modules, fuse_modules_qat):
        only(function(model, ["0", "1"]), CannotFuse, "0 + 1", f"the {kind} spy of {index} would be lost")
    with pytest.raises(QuantException, match=f"{kind} spy of {type(model[index]).__name__}"):
        fuse_known_modules(list(model), False)


# Errors


def sequence(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules).eval()


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
    extra = {(nn.Linear, nn.Tanh): lambda _, *m: fused.LinearTanh(*m), (nn.Linear, nn.ReLU): scaled}
    made = unwrap(function(model, [["0", "1"], ["2", "3"]], extra_fusers=extra))
    assert [type(part) for part in made] == [fused.LinearTanh, nn.Identity, Scaled, nn.Identity]
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
