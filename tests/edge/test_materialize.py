"""A materialized module is an ordinary one, and shares its memory with the source until either is written to."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, fx, nn

from qfunc import fuse
from qfunc.config.custom_config import CustomConfig
from qfunc.edge.materialize import materialize
from qfunc.edge.trace import trace
from qfunc.errors import StaleSource, UserFunctionFailed, WrongStage, problems
from qfunc.ir import Graph
from qfunc.result import unwrap
from qfunc.testing import same_bits
from tests.laws.test_trace import state
from tests.zoo import ZOO

ROOT = Path(__file__).resolve().parents[2]
X = torch.linspace(-2, 2, 2 * 3 * 6 * 6).reshape(2, 3, 6, 6)


class Net(nn.Module):
    """Nested containers, tied weights, a parameter used apart from its module, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Buffer(torch.ones(1))
        self.hidden = nn.Buffer(torch.ones(1), persistent=False)
        self.table = torch.ones(4)
        self.stem[1].running_var.fill_(2.0)
        self.classes, self._secret = ["cat", "dog"], {"k": 1}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3))
        x = self.a(x) + self.b(x) + self.a.bias
        return x * self.scale + self.shift + self.hidden + self.table


def net() -> Net:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Net().eval()


def made_of(model: nn.Module, **options: bool) -> fx.GraphModule:
    return unwrap(materialize(unwrap(trace(model)), **options))


def run(model: nn.Module, *inputs: Tensor) -> object:
    with torch.no_grad():
        return model(*inputs)


# State


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_state_dicts_are_the_models(case) -> None:
    model, _ = case.build()
    made = made_of(model)
    assert {**made.state_dict()}.keys() == {**model.state_dict()}.keys()
    assert same_bits(dict(sorted(made.state_dict().items())), dict(sorted(model.state_dict().items())))
    names = {name for name, _ in model.named_parameters()}
    assert {name for name, _ in made.named_parameters()} == names
    assert {name for name, p in made.named_parameters() if p.requires_grad} == names


@pytest.mark.parametrize("how", [lambda m: m, copy.deepcopy], ids=["made", "copied"])
def test_what_the_state_leaves_out_stays_out(how) -> None:
    model = net()
    made = how(made_of(model))
    assert made.state_dict().keys() == model.state_dict().keys()
    assert {"hidden", "table"} <= {name for name, _ in made.named_buffers()}
    assert same_bits(run(made, X), run(model, X))


def test_state_dicts_load_both_ways() -> None:
    model, other = net(), net()
    with torch.no_grad():
        other.scale.fill_(3.0)
        other.stem[0].weight.mul_(2)
    made = made_of(model)
    made.load_state_dict(other.state_dict())
    assert same_bits(run(made, X), run(other, X))
    assert model.scale.item() == 1
    model.load_state_dict(made.state_dict())
    assert same_bits(run(model, X), run(other, X))


LOADING = """
import sys, torch
sys.path.insert(0, {root!r})
from qfunc.config.custom_config import CustomConfig
from qfunc.edge.materialize import materialize
from qfunc.edge.trace import trace
from qfunc.result import unwrap
from tests.edge.test_materialize import X, net
if "state" in sys.argv[2]:
    model = net()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    made = unwrap(materialize(unwrap(trace(model))))
    made.load_state_dict(torch.load(sys.argv[1]))
else:
    made = torch.load(sys.argv[1], weights_only=False)
torch.save(made(X).detach(), sys.argv[1])
"""


@pytest.mark.parametrize("what", ["state", "module"])
def test_other_processes_load_it(tmp_path: Path, what: str) -> None:
    made = made_of(net())
    wanted = run(made, X)
    path = tmp_path / "it"
    torch.save(made.state_dict() if what == "state" else made, path)
    code = LOADING.format(root=str(ROOT))
    environment = {**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path), what], env=environment, check=True, cwd=ROOT)
    assert torch.allclose(torch.load(path), wanted)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(how) -> None:
    made = made_of(net())
    again = how(made)
    assert same_bits(run(made, X), run(again, X))
    assert again.a.weight is again.b.weight
    assert again.classes == ["cat", "dog"]


# Sharing


def changes(model: nn.Module) -> None:
    """Write to everything a model holds."""
    model.half()
    model.train()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.add_(1)
    model.float()


@pytest.mark.parametrize("options", [{}, {"copy": True}])
def test_nothing_done_to_one_side_reaches_the_other(options: dict[str, bool]) -> None:
    model = net()
    made = made_of(model, **options)
    wanted, before = run(model, X), state(model)
    changes(made)
    assert same_bits(state(model), before)
    assert same_bits(run(model, X), wanted)
    made = made_of(model, **options)
    changes(model)
    assert same_bits(run(made, X), wanted)


def test_training_it_does_not_reach_the_source() -> None:
    model = net().train()
    made = made_of(model)
    assert made.training
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        made(X).square().sum().backward()
        optimizer.step()
    assert same_bits(model.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())
    assert not same_bits(made.state_dict(), before)
    assert made.a.weight is made.b.weight


def test_training_the_source_does_not_reach_it() -> None:
    model = net()
    made = made_of(model)
    wanted = run(made, X)
    model(X).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert same_bits(run(made, X), wanted)


def memory(model: nn.Module) -> set[int]:
    return {torch._C._data_address(t) for t in model.parameters()}


def test_memory_is_shared_until_then() -> None:
    model = net()
    assert memory(made_of(model)) == memory(model)
    assert memory(made_of(model, copy=True)).isdisjoint(memory(model))


@pytest.mark.parametrize("kind", ["numpy", "mapped", "shared", "sparse", "inference", "view"])
def test_memory_of_any_kind(kind: str, tmp_path: Path) -> None:
    values = torch.arange(6.0).reshape(2, 3)
    match kind:
        case "numpy":
            held = torch.from_numpy(values.numpy().copy())
        case "mapped":
            (tmp_path / "it").write_bytes(values.numpy().tobytes())
            held = torch.from_file(str(tmp_path / "it"), shared=True, size=6).reshape(2, 3)
        case "shared":
            held = values.clone().share_memory_()
        case "sparse":
            held = values.to_sparse()
        case "view":
            held = torch.arange(12.0)[3:9].view(2, 3)
        case "inference":
            with torch.inference_mode():
                held = values.clone()
    model = type("M", (nn.Module,), {"forward": lambda self, x: x + self.held.to_dense()})()
    model.held = nn.Buffer(held)
    made = made_of(model)
    x = torch.ones(2, 3)
    assert same_bits(run(made, x), values + 1 if kind != "view" else held + 1)
    if kind not in ("inference", "sparse"):
        wanted = run(made, x)
        model.held.add_(1)
        assert same_bits(run(made, x), wanted)
        made = made_of(model)
        made.held.mul_(0)
        assert float(model.held.sum()) != 0


# What else a module has


def test_conversions() -> None:
    made = made_of(net())
    assert made.to("meta")(X.to("meta")).is_meta
    half = made_of(net()).half()
    assert all(t.dtype == torch.float16 for t in half.parameters())
    assert half(X.half()).dtype == torch.float16
    assert made_of(net()).double()(X.double()).dtype == torch.float64


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*instance-level annotations:UserWarning")
def test_torch_jit_script() -> None:
    made = made_of(net())
    scripted = torch.jit.script(made)
    buffer = io.BytesIO()
    torch.jit.save(scripted, buffer)
    buffer.seek(0)
    assert torch.allclose(run(torch.jit.load(buffer), X), run(made, X))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_compile() -> None:
    made = made_of(net())
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.allclose(run(compiled, X), run(made, X))
    assert torch.allclose(run(compiled, X[:1, :, :5]), run(made, X[:1, :, :5]))


def _times_ten(module: nn.Module, args: object, output: Tensor) -> Tensor:
    return output * 10


def _minus_one(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] - 1,)


def test_hooks_are_kept() -> None:
    model = net()
    model.register_forward_hook(_times_ten)
    model.register_forward_pre_hook(_minus_one)
    model.b.register_forward_hook(_times_ten)
    wanted = run(model, X)
    made = made_of(model)
    for module in (made, copy.deepcopy(made)):
        assert same_bits(run(module, X), wanted)
    assert len(model._forward_hooks) == 1
    made._forward_hooks.clear()
    assert same_bits(run(model, X), wanted)


def test_hooks_report_to_whom_they_did() -> None:
    class Log:
        calls = 0

        def __init__(self) -> None:
            self.seen: list[object] = []

        def __call__(self, *args: object) -> None:
            self.seen.append(args)

    log, model = Log(), net()
    model.register_forward_hook(log)
    run(made_of(model), X)
    assert len(log.seen) == 1


def test_attributes_are_kept() -> None:
    model = net()
    for module in (made_of(model), copy.deepcopy(made_of(model))):
        assert module.classes == ["cat", "dog"]
        assert module._secret == {"k": 1}
        module.classes.append("cow")
    assert model.classes == ["cat", "dog"]


def test_attributes_that_hold_parameters_hold_the_new_ones() -> None:
    model = net()
    model.groups = [model.a.weight, model.scale]
    made = made_of(model)
    assert made.groups[0] is made.a.weight
    assert made.groups[1] is made.scale


def test_parameters_keep_their_own_attributes() -> None:
    model = net()
    model.scale.no_decay = True
    model.a.bias.requires_grad_(False)
    made = made_of(model)
    assert made.scale.no_decay
    assert not made.a.bias.requires_grad


def test_training_flags_are_kept() -> None:
    model = net().train()
    model.stem[1].eval()
    model.stem.eval()
    made = made_of(model)
    assert {n: m.training for n, m in model.named_modules()} == {n: m.training for n, m in made.named_modules()}


# Modules of which a pass changed some calls


class Twice(nn.Module):
    """`conv` is fused with a batch norm at one site and called alone at the other; its parameters are read as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        nn.init.uniform_(self.bn.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv(x)))
        return self.conv(y) + self.conv.bias.sum() + F.conv2d(x, self.conv.weight)


def test_one_module_changed_at_one_site() -> None:
    model = Twice().eval()
    before, wanted = state(model), run(model, X)
    graph = unwrap(fuse(unwrap(trace(model, X))))
    made = unwrap(materialize(graph))
    assert torch.allclose(run(made, X), wanted, atol=1e-5)
    assert same_bits(state(model), before)
    assert same_bits(made.conv.weight, model.conv.weight)
    again = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    assert same_bits(run(again, X), run(made, X))


def test_a_changed_module_whose_parameters_are_read() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            nn.init.uniform_(self.bn.running_mean)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.conv.bias.sum() + self.bn.running_mean.sum()

    model = Read().eval()
    made = unwrap(materialize(unwrap(fuse(unwrap(trace(model))))))
    assert torch.allclose(run(made, X), run(model, X), atol=1e-6)


def test_a_leaf_and_its_parts() -> None:
    class Leaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > 0 else x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = Leaf()

        def forward(self, x: Tensor) -> Tensor:
            return self.leaf.inner(x) + self.leaf(x) + self.leaf.inner.bias

    model = Outer()
    made = unwrap(materialize(unwrap(trace(model, custom=CustomConfig(non_traceable_types=(Leaf,))))))
    assert same_bits(run(made, X), run(model, X))
    assert made.state_dict().keys() == model.state_dict().keys()


# Errors


def _write(model: Net) -> None:
    with torch.no_grad():
        model.scale.add_(1)


def _replace(model: Net) -> None:
    model.scale = nn.Parameter(torch.zeros(1))


def _swap(model: Net) -> None:
    model.scale.data = torch.zeros(1)


def _delete(model: Net) -> None:
    del model.scale


def _replace_attribute(model: Net) -> None:
    model.table = torch.zeros(4)


def _swap_again(model: Net) -> None:
    for _ in range(3):  # storages come and go at one address
        model.scale.data = torch.zeros(1)


@pytest.mark.parametrize("change", [_write, _replace, _swap, _swap_again, _delete, _replace_attribute])
def test_changed_sources_are_told(change) -> None:
    model = net()
    graph = unwrap(trace(model))
    change(model)
    error = materialize(graph).failure()
    assert [type(problem) for problem in problems(error)] == [StaleSource]
    assert error.node == ("table" if change is _replace_attribute else "scale")


def test_leaves_that_cannot_be_copied_are_told() -> None:
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo: object) -> object:
            raise ValueError("never")

    graph = unwrap(trace(nn.Sequential(Stubborn(2, 2)), custom=CustomConfig(non_traceable_types=(Stubborn,))))
    error = materialize(graph).failure()
    assert isinstance(error, UserFunctionFailed)
    assert error.node == "0"


@pytest.mark.parametrize("given", [None, 3, nn.Linear(2, 2), Graph])
def test_other_things_are_refused(given: object) -> None:
    assert isinstance(materialize(given).failure(), WrongStage)


def test_statistics_that_trained_on_are_stale():
    """Batch norm updates them without a trace in their versions; its count tells."""
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)).eval()
    graph = unwrap(fuse(unwrap(trace(model))))
    model.train()(torch.randn(4, 2, 3, 3))
    names = {problem.node for problem in problems(materialize(graph).failure())}
    assert names >= {"1.running_mean", "1.running_var"}
