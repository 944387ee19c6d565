"""`trace`: what it accepts, what it says of what it refuses, and that the model stays as it was."""

from __future__ import annotations

import copy
import math
import pickle
import random
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations

from qfunc.config.custom_config import CustomConfig
from qfunc.edge.materialize import materialize
from qfunc.edge.trace import trace
from qfunc.errors import BadExampleInputs, NotAModule, SeveralDevices, UnknownName, Untraceable, problems
from qfunc.ir import TensorFact, digest, to_text, verify
from qfunc.params import Load
from qfunc.result import unwrap
from qfunc.testing import same_bits
from tests.laws.test_trace import holds, state

X = (torch.linspace(-2, 3, 24).reshape(2, 3, 2, 2),)


class Point(NamedTuple):
    a: Tensor
    b: object


@fx.wrap
def wrapped(x: Tensor, flag: bool) -> Tensor:
    return x * 2 if flag and x.sum() > 0 else -x


def plain(x: Tensor, *, k: float = 2.0) -> Tensor:
    return torch.sin(x) * k


def module(forward, **attributes: object) -> nn.Module:
    made = type("Model", (nn.Module,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made.eval()


class Branch(nn.Module):
    """What fx cannot trace, and writes to its own state."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.calls = nn.Linear(2, 2), 0

    def forward(self, x: Tensor, sign: float = 1.0) -> Tensor:
        self.calls += 1
        return self.lin(x) * sign if x.sum() > 0 else x


def nested(self, x):
    parts = {"a": [x, (x + 1, {"b": x[:, :1]})]}
    y = torch.cat([parts["a"][0], parts["a"][1][0]], dim=1)
    return {"out": (y, [x[..., 0:1, None]]), "n": x.size(0), "none": None, "p": Point(x, (1, "two", 3.0))}


def sizes(self, x):
    n, c, h, w = x.shape
    a, b = x.size(0), x.dim()
    return (
        x.view(n, c * h * w),
        x.reshape(a, -1),
        torch.zeros((n, 2)) + b,
        x.new_ones(n, 1),
        math.prod((2, 3)),
        n,
        x.shape,
    )


def slices(self, x):
    k = x.size(1) // 2
    return x[:, :k], x[:, k:, ::2], x[0, ..., -1], x[x > 0], x[[0, 1]], x[None], x[:, torch.tensor([0, 2])]


def parameters(self, x):
    y = F.linear(x, self.part.lin.weight, self.part.lin.bias) + self.part.lin.bias.sum()
    return self.part.lin(x) + y * self.scale + self.part.offset + self.plain + torch.ones(2) * 3


def sites(self, x):
    return self.relu(self.conv(self.relu(self.conv(x)))) + self.conv(x + 1)


def wraps(self, x):
    return wrapped(x, True) + plain(x, k=3.0) + torch.mean(input=x, dim=(1,), keepdim=True)


def part() -> nn.Module:
    made = module(lambda self, x: x)
    made.lin, made.offset = nn.Linear(2, 2), nn.Buffer(torch.ones(2))
    return made


def tied() -> nn.Module:
    made = module(lambda self, x: self.b(self.a(x)), a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    made.b.weight = made.a.weight
    return made


def prune(model: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(model)


def hooked(model: nn.Module) -> nn.Module:
    model.register_forward_hook(_double)
    return model


def _double(module, args, output):
    return output * 2


def own_forward(model: nn.Module) -> nn.Module:
    model.forward = lambda x: x * 3
    return model


MODELS = {
    "nested": lambda: module(nested),
    "sizes": lambda: module(sizes),
    "slices": lambda: module(slices),
    "parameters": lambda: module(parameters, part=part(), scale=nn.Parameter(torch.ones(1)), plain=torch.ones(2)),
    "sites": lambda: module(sites, relu=nn.ReLU(inplace=True), conv=nn.Conv2d(3, 3, 1)),
    "tied": tied,
    "wraps": lambda: module(wraps),
    "parametrized": lambda: nn.Sequential(prune(nn.Linear(2, 2)), nn.ReLU()).eval(),
    "old weight norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 2)), nn.ReLU()).eval(),
    "hooked leaf": lambda: nn.Sequential(hooked(nn.Linear(2, 2)), nn.ReLU()).eval(),
    "hooked block": lambda: nn.Sequential(hooked(nn.Sequential(nn.Linear(2, 2))), nn.ReLU()).eval(),
    "hooked root": lambda: hooked(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()),
    "own forward": lambda: nn.Sequential(own_forward(nn.Linear(2, 2)), nn.ReLU()).eval(),
    "several modes": lambda: nn.Sequential(nn.Dropout(0.5).train(), nn.Conv2d(3, 3, 1)),
    "buffer decides": lambda: module(lambda self, x: x * 2 if self.flag > 0 else x, flag=nn.Buffer(torch.ones(1))),
    "scripted leaf": lambda: nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.ReLU()).eval(),
    "leaf of one type": lambda: nn.Sequential(nn.LSTM(2, 3, batch_first=True)).eval(),
    "subclass": lambda: nn.Sequential(type("Mine", (nn.Linear,), {})(2, 2)).eval(),
    "graph module": lambda: fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()),
    "training": lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train(),
    "nothing": lambda: nn.Identity(),
    "constant": lambda: module(lambda self, x: torch.arange(3)),
    "no output": lambda: module(lambda self, x: None),
    "unused": lambda: module(lambda self, x, y=None, *, flag=True: x),
    "dtypes": lambda: module(lambda self, x: x.to(torch.float64).to(device="cpu").type(torch.float16)),
    "layouts": lambda: module(lambda self, x: x.contiguous(memory_format=torch.channels_last).view(torch.int32)),
    "infinity": lambda: module(lambda self, x: x.masked_fill(x > 0, -math.inf) + float("nan")),
    "inner name": lambda: module(lambda self, output, self_1=2: output + self_1),
}  # fmt: skip


def inputs(name: str) -> tuple[Tensor, ...]:
    return (torch.linspace(-1, 1, 12).reshape(2, 3, 2),) if name == "leaf of one type" else X


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_results_are_the_same(name: str) -> None:
    model = MODELS[name]()
    if name == "scripted leaf":
        made = unwrap(materialize(unwrap(trace(model, X))))
        assert same_bits(model(*X), made(*X))
    elif name == "training":
        torch.manual_seed(0)
        wanted = model(*X)
        torch.manual_seed(0)
        assert same_bits(wanted, unwrap(materialize(unwrap(trace(model, X))))(*X))
    else:
        holds(model, inputs(name))


def test_keyword_and_default_inputs() -> None:
    scaled = module(lambda self, x, k=2.0, *, shift=1: x * k + shift)
    made = unwrap(materialize(unwrap(trace(scaled, {"x": X[0]}))))
    assert same_bits(made(*X), scaled(*X))
    assert same_bits(made(X[0], k=3, shift=2), scaled(X[0], k=3, shift=2))
    assert same_bits(made(x=X[0]), scaled(x=X[0]))


@pytest.mark.parametrize("given", [X[0], X, [X[0]], {"x": X[0]}])
def test_facts(given: object) -> None:
    model = module(lambda self, x: (x.half(), x.chunk(3, 1), x.size(0)))
    graph = unwrap(trace(model, given))
    facts = {node.id: node.fact for node in graph}
    third = TensorFact((2, 1, 2, 2), "float32", "cpu")
    assert facts["x"] == TensorFact((2, 3, 2, 2), "float32", "cpu")
    assert facts["half"] == TensorFact((2, 3, 2, 2), "float16", "cpu")
    assert facts["chunk"] == (third, third, third)
    assert facts["size"] is None


def test_examples_are_not_written_to() -> None:
    given = X[0].clone()
    unwrap(trace(module(lambda self, x: x.relu_()), given))
    assert same_bits(given, X[0])


@pytest.mark.parametrize(
    ("given", "node", "says"),
    [
        ((torch.ones(2, 5),), "lin", "shapes cannot be multiplied"),
        ((torch.ones(2, 2), 1, 2), "example_inputs", "3 inputs were given"),
        ({"y": torch.ones(2, 2)}, "example_inputs", "no input 'y'"),
        ((), "example_inputs", "0 inputs were given"),
        ((None,), "lin", ""),
        (("text",), "lin", ""),
    ],
)
def test_examples_that_do_not_fit(given: object, node: str, says: str) -> None:
    error = trace(module(lambda self, x: self.lin(x), lin=nn.Linear(2, 2)), given).failure()
    assert isinstance(error, BadExampleInputs)
    assert error.node == node
    assert says in error.reason


@pytest.mark.parametrize("given", [None, 3, nn.Linear, lambda x: x, torch.ones(1), torch.relu])
def test_not_a_module(given: object) -> None:
    assert isinstance(trace(given).failure(), NotAModule)


def test_several_devices_and_unknown_names_are_told_together() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    error = trace(model, custom=CustomConfig(non_traceable_names=("2",))).failure()
    assert {type(problem) for problem in problems(error)} == {SeveralDevices, UnknownName}


def test_meta_models_are_traced_and_materialized() -> None:
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.ReLU())
    made = unwrap(materialize(unwrap(trace(model, torch.ones(2, 2, device="meta")))))
    assert made(torch.ones(2, 2, device="meta")).is_meta


@pytest.mark.parametrize(
    "custom",
    [CustomConfig(non_traceable_names=("leaf",)), CustomConfig(non_traceable_types=(Branch,))],
)
def test_user_leaves(custom: CustomConfig) -> None:
    model = module(lambda self, x: self.leaf(x, sign=2.0) + self.leaf.lin(x), leaf=Branch().eval())
    before = state(model)
    graph = unwrap(trace(model, X, custom=custom))
    made = unwrap(materialize(graph))
    assert same_bits(before, state(model))
    assert same_bits(made(*X), copy.deepcopy(model)(*X))
    assert set(made.state_dict()) == set(model.state_dict())
    again = unwrap(trace(made, X))
    assert same_bits(unwrap(materialize(again))(*X), made(*X))


def test_lambdas_and_closures() -> None:
    factor = 3.0
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(lambda value: value * factor, (x,)))
    traced = trace(fx.GraphModule(nn.Module(), graph))
    assert same_bits(unwrap(materialize(unwrap(traced)))(*X), X[0] * 3)


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_materialized_modules_are_traced_again(how) -> None:
    model = MODELS["parameters"]()
    first = unwrap(trace(model, X))
    made = how(unwrap(materialize(first)))
    second = unwrap(trace(made, X))
    assert [node.kind for node in second] == [node.kind for node in first]
    assert same_bits(unwrap(materialize(second))(*X), model(*X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_parts_are_leaves() -> None:
    model = nn.Sequential(torch.compile(nn.Linear(2, 2), backend="eager"), nn.ReLU())
    graph = unwrap(trace(model, X))
    assert same_bits(unwrap(materialize(graph))(*X), model(*X))


# The model stays as it was


def test_what_forward_writes_is_undone() -> None:
    def forward(self, x):
        self.count = x.size(0)
        self.seen.append(x)
        self.table["x"] = x
        self.names.add("new")
        self.register_buffer("late", torch.zeros(1))
        self.inner.cache = x
        self.inner.training = True
        self.inner.register_forward_hook(_double)
        self.total = 1
        random.random()
        return x + torch.rand(1) * 0 + torch.tensor(2.0) + self.late

    model = module(forward, seen=[], table={}, names=set(), inner=nn.ReLU(), total=0)
    before = state(model)
    graph = unwrap(trace(model, X))
    assert same_bits(before, state(model))
    assert (model.seen, model.table, model.names, model.total) == ([], {}, set(), 0)
    assert not hasattr(model, "count")
    assert same_bits(unwrap(materialize(graph))(*X), X[0] + 2)


def test_a_failed_trace_undoes_as_well() -> None:
    def forward(self, x):
        self.count = x
        self.flag.add_(1)
        return x if x.sum() > 0 else -x

    model = module(forward, flag=nn.Buffer(torch.ones(1)))
    before = state(model)
    assert isinstance(trace(model).failure(), Untraceable)
    assert same_bits(before, state(model))
    assert not hasattr(model, "count")


def test_writing_to_a_tensor_that_is_not_recorded_is_told() -> None:
    def forward(self, x):
        self.memory.add_(1)
        return x + self.memory

    model = module(forward, memory=torch.zeros(1))
    before = state(model)
    error = trace(model).failure()
    assert isinstance(error, Untraceable)
    assert "register_buffer" in error.remedy
    assert same_bits(before, state(model))
    assert float(model.memory) == 0


def test_modules_made_in_forward_are_told() -> None:
    def forward(self, x):
        self.made = nn.Linear(2, 2)
        return self.made(x)

    model = module(forward)
    error = trace(model).failure()
    assert isinstance(error, Untraceable)
    assert "made in forward" in error.cause


def test_lazy_modules_are_told() -> None:
    error = trace(nn.Sequential(nn.LazyLinear(2))).failure()
    assert {type(problem) for problem in problems(error)} == {Untraceable}


# The graph


def test_the_graph_is_a_value() -> None:
    model = MODELS["sites"]()
    one, other = unwrap(trace(model, X)), unwrap(trace(model, X))
    assert digest(one) == digest(other)
    assert to_text(one) == to_text(other)
    assert one.nodes == other.nodes
    assert unwrap(verify(one)) is one


def test_functional_weights_are_expressions_as_those_of_modules() -> None:
    model = module(
        lambda self, x: F.linear(x, self.w, bias=self.b), w=nn.Parameter(torch.ones(2, 2)), b=nn.Buffer(torch.ones(2))
    )
    (node,) = [node for node in unwrap(trace(model)) if node.kind == "linear"]
    assert node.get("weight") == Load("w", "float32", (2, 2))
    assert node.get("bias") == Load("b", "float32", (2,))


def test_origins_name_the_module_and_the_way_of_writing() -> None:
    graph = unwrap(trace(nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)))))
    origins = {node.kind: node.origin for node in graph}
    assert (origins["conv2d"].module, origins["conv2d"].type) == ("0.0", "torch.nn.Conv2d")
    assert (origins["relu"].module, origins["relu"].type) == ("0.1", "torch.nn.ReLU")
