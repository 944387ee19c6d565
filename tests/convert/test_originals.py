"""The float weights of what became integers, kept with the module on request."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn

from qfunc import (
    CPU,
    X86,
    QConfigMapping,
    calibrate,
    convert,
    fuse,
    layers,
    lower,
    materialize,
    pack,
    prepare,
    trace,
    unpack,
    unwrap,
)
from qfunc.backends.default_mappings import DYNAMIC, WEIGHT_ONLY
from qfunc.errors import BadConfig
from qfunc.testing import oracle


class Net(nn.Module):
    """A folded convolution, a layer called twice, a function, and a layer that stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4, bias=False)
        self.norm.running_var.uniform_(0.5, 2.0)
        self.weight, self.twice, self.last = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.fc(F.relu(self.norm(self.conv(x))).mean((2, 3)))
        return self.last(self.twice(self.twice(F.linear(y, self.weight))))


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ENGINES = ("onednn", "quantized", "reference")


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def converted_of(model, *, backend=CPU, keep=True, equalize=None, mapping=None):
    graph = unwrap(fuse(unwrap(trace(model, X)), backend=backend))
    mapping = (mapping or backend.qconfig_mapping).set_module_name("last", None)
    prepared = unwrap(prepare(graph, mapping, backend=backend, equalize=equalize))
    return unwrap(convert(unwrap(calibrate(prepared, [X], progress=False)), keep_original_weights=keep))


def kept_of(stage, **options):
    return unwrap(materialize(stage, **options)).original_weights


@pytest.mark.parametrize("equalize", [None, layers])
@pytest.mark.parametrize("engine", [None, *ENGINES])
def test_they_are_the_float_weights(engine, equalize):
    model = net()
    converted = converted_of(model, equalize=equalize)
    found = kept_of(converted if engine is None else unwrap(lower(converted, engine=engine)))
    nodes = {node.id for node in converted.graph if node.origin.module == "twice"}
    (function,) = (node.id for node in converted.graph if node.kind == "linear" and not node.origin.module)
    assert found.keys() == {"conv", "fc", function, *nodes}
    assert found["fc"].keys() == {"weight"}
    assert torch.equal(found["fc"]["weight"], model.fc.weight)
    assert torch.equal(found[function]["weight"], model.weight)
    for node in nodes:
        assert torch.equal(found[node]["weight"], model.twice.weight)
        assert torch.equal(found[node]["bias"], model.twice.bias)
    y = F.relu(F.conv2d(X, found["conv"]["weight"], found["conv"]["bias"]))
    torch.testing.assert_close(y, F.relu(model.norm(model.conv(X))), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [False, True])
def test_memory_is_shared_until_it_is_written_to(copied):
    model = net()
    found = kept_of(converted_of(model), copy=copied)["fc"]["weight"]
    assert (torch._C._data_address(found) == torch._C._data_address(model.fc.weight)) is not copied
    before = model.fc.weight.clone()
    found.add_(1)
    assert torch.equal(model.fc.weight, before)
    assert not found.requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_they_are_no_state_and_travel_with_the_module(engine):
    converted = converted_of(net())
    with_them, bare = (
        unwrap(materialize(unwrap(lower(stage, engine=engine))))
        for stage in (converted, converted_of(net(), keep=False))
    )
    assert with_them.state_dict().keys() == bare.state_dict().keys()
    assert [name for name, _ in with_them.named_parameters()] == [name for name, _ in bare.named_parameters()]
    assert not hasattr(bare, "original_weights")
    for made in (copy.deepcopy(with_them), pickle.loads(pickle.dumps(with_them)), _saved(with_them)):
        assert made.original_weights.keys() == with_them.original_weights.keys()
        for place, parts in with_them.original_weights.items():
            for name, tensor in parts.items():
                assert torch.equal(made.original_weights[place][name], tensor)
        assert torch.equal(made(X), with_them(X))
    twice = copy.deepcopy(copy.deepcopy(with_them))
    twice.original_weights["fc"]["weight"].zero_()
    assert with_them.original_weights["fc"]["weight"].any()


def _saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_stages_carry_them():
    lowered = unwrap(lower(converted_of(net())))
    assert kept_of(unwrap(pack(lowered).bind(unpack))).keys() == kept_of(lowered).keys()
    assert converted_of(net()).graph.order == converted_of(net(), keep=False).graph.order


def test_weights_that_become_no_integers_are_not_among_them():
    assert unwrap(materialize(converted_of(net(), mapping=QConfigMapping()))).original_weights == {}


class Numbered(nn.Module):
    """A layer has the name that the second call of another one has as a node."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.fc_1, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = F.pad(x.mean((2, 3)), (0, 1))
        return self.last(self.fc_1(self.fc(self.fc(y))))


def test_a_path_is_that_of_its_layer_and_no_weights_are_lost():
    torch.manual_seed(0)
    model = Numbered().eval()
    converted = converted_of(model)
    calls = [node.id for node in converted.graph if node.origin.module == "fc"]
    assert "fc_1" in calls
    found = kept_of(converted)
    assert torch.equal(found["fc_1"]["weight"], model.fc_1.weight)
    assert len(found) == 3
    assert all(torch.equal(parts["weight"], model.fc.weight) for key, parts in found.items() if key != "fc_1")


def test_recurrent_layers_keep_all_their_matrices():
    model = nn.Sequential(nn.LSTM(4, 3, num_layers=2)).eval()
    graph = unwrap(trace(model, torch.randn(5, 2, 4)))
    prepared = unwrap(prepare(graph, DYNAMIC, backend=X86))
    converted = unwrap(convert(unwrap(calibrate(prepared, [], progress=False)), keep_original_weights=True))
    found = kept_of(converted)
    assert found["0"].keys() == {"weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"}
    assert torch.equal(found["0"]["weight_hh_l1"], model[0].weight_hh_l1)


def test_tables_keep_theirs():
    model = nn.Sequential(nn.EmbeddingBag(10, 4)).eval()
    ids = torch.randint(0, 10, (3, 5))
    prepared = unwrap(prepare(unwrap(trace(model, ids)), WEIGHT_ONLY))
    converted = unwrap(convert(unwrap(calibrate(prepared, [], progress=False)), keep_original_weights=True))
    assert torch.equal(kept_of(converted)["0"]["weight"], model[0].weight)


def test_an_attribute_of_the_name_is_an_error():
    model = net()
    model.original_weights = 3
    found = materialize(converted_of(model)).failure()
    assert isinstance(found, BadConfig)
    assert unwrap(materialize(converted_of(model, keep=False))).original_weights == 3


class Functions(nn.Module):
    """Of these alone torch.ao keeps the weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Parameter(torch.randn(4, 192)), nn.Parameter(torch.randn(3, 4))
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(F.relu(F.linear(torch.flatten(x, 1), self.first, self.bias)), self.second)


@pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")
def test_they_are_those_of_torch_ao():
    model = Functions().eval()
    prepared = oracle.calibrate(oracle.prepare(model, (X,)), [(X,)])
    theirs = oracle.convert(prepared, keep_original_weights=True).original_weights_lookup
    graph = unwrap(fuse(unwrap(trace(model, X)), backend=X86))
    calibrated = unwrap(prepare(graph, backend=X86).bind(lambda stage: calibrate(stage, [X], progress=False)))
    ours = kept_of(unwrap(convert(calibrated, keep_original_weights=True)))
    assert len(theirs) == len(ours) == 2
    for weight, *others in theirs.values():  # behind the weight, its qparams and the bias
        (same,) = (parts for parts in ours.values() if parts["weight"].shape == weight.shape)
        assert torch.equal(same["weight"], weight)
        held = [other for other in others if other is not None]
        assert all(any(torch.equal(other, same[name]) for other in held) for name in same.keys() - {"weight"})
