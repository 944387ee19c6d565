"""Eager fusion: which modules become one, that it computes what they did, and that it is an ordinary module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from returns.result import Failure
from torch import Tensor, fx, nn

from qfunc import fuse, fuse_modules, fuse_modules_qat, materialize, quantize, trace, unwrap
from qfunc.edge import fused
from qfunc.testing import oracle, same_bits
from tests.edge.eager import (
    IN_EVAL,
    IN_QAT,
    ROWS,
    TRAINED,
    chain,
    close,
    data,
    folded_rows,
    label,
    names_of,
    rows,
    run,
    scripted,
    stem,
)

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


PARTS: dict[type, tuple[Any, ...]] = {}
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
