"""A decomposed module is a plain one that exports and compiles; torch's operators are registered when it needs them."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from returns.result import Failure
from torch import Tensor, fx, nn

import qfunc
from qfunc import Lowered, check_host, lower, materialize, unwrap
from qfunc.config.point import Edge
from qfunc.edge import decomposed as loading
from qfunc.engines import ONEDNN
from qfunc.errors import EngineMissing, NotLowered, problems
from qfunc.ir import digest
from qfunc.numerics.qparams import INT8_SYMMETRIC
from qfunc.passes.stages import Converted
from qfunc.testing.metrics import same_bits
from tests.convert.forms import annotations, converted_of

pytestmark = pytest.mark.skipif(not loading.has_decomposed(), reason="this torch has no decomposed operators")


class Net(nn.Module):
    """A module with a norm to fold, one without, a sum, and a function with a weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)
        self.last = nn.Parameter(torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        x = torch.relu(self.body(x) + x)
        return F.linear(self.head(x.mean((2, 3))), self.last)


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def converted() -> Converted:
    graph = unwrap(qfunc.fuse(unwrap(qfunc.trace(Net().eval(), X))))
    return unwrap(qfunc.convert(unwrap(qfunc.calibrate(unwrap(qfunc.prepare(graph)), [X], progress=False))))


@pytest.fixture(scope="module")
def lowered(converted: Converted) -> Lowered:
    return unwrap(lower(converted, engine="decomposed"))


@pytest.fixture(scope="module")
def module(lowered: Lowered) -> fx.GraphModule:
    return unwrap(materialize(lowered))


@pytest.fixture
def fresh(lowered: Lowered) -> fx.GraphModule:
    return unwrap(materialize(lowered))


# What it is -----------------------------------------------------------------------------------------------------------


def test_the_state_holds_integers_and_their_qparams(module: fx.GraphModule) -> None:
    state = module.state_dict()
    weights = {"conv.weight": 8, "body.weight": 8, "head.weight": 5, "last": 4}
    for name, channels in weights.items():
        assert state[name].dtype is torch.int8
        assert state[f"{name}_scale"].dtype is torch.float32
        assert state[f"{name}_zero_point"].dtype is torch.int64
        assert state[f"{name}_scale"].shape == state[f"{name}_zero_point"].shape == (channels,)
    parts = {f"{name}{end}" for name in weights for end in ("", "_scale", "_zero_point")}
    assert set(state) == parts | {"conv.bias", "body.bias", "head.bias"}
    assert not any(part.requires_grad for part in module.buffers())


def test_its_nodes_are_calls_of_functions(module: fx.GraphModule) -> None:
    assert not [node for node in module.graph.nodes if node.op == "call_module"]
    packets = {getattr(node.target, "namespace", "") for node in module.graph.nodes}
    assert "quantized_decomposed" in packets


def test_state_loads(lowered: Lowered, module: fx.GraphModule) -> None:
    other = unwrap(materialize(lowered))
    for tensor in other.state_dict().values():
        tensor.zero_()
    assert not torch.equal(other(X), module(X))
    other.load_state_dict(module.state_dict())
    assert same_bits(other(X), module(X))


def test_the_source_stays_as_it_is(lowered: Lowered, fresh: fx.GraphModule) -> None:
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.zero_()
    assert unwrap(materialize(lowered)).get_buffer("head.weight").any()
    assert lowered.graph.sources["model"].model.head.weight.any()


@torch.no_grad()
def test_copies_and_pickles(fresh: fx.GraphModule) -> None:
    expected = fresh(X)
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(fresh), buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(fresh), pickle.loads(pickle.dumps(fresh)), torch.load(buffer, weights_only=False)):
        assert same_bits(other(X), expected)
        assert same_bits(pickle.loads(pickle.dumps(other))(X), expected)


@torch.no_grad()
def test_loads_in_another_process(fresh: fx.GraphModule, tmp_path: Path) -> None:
    torch.save({"module": copy.deepcopy(fresh), "x": X, "y": fresh(X)}, tmp_path / "saved.pt")
    code = (
        "import sys, torch\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.set_num_threads(1)\n"
        "with torch.no_grad(): assert torch.equal(saved['module'](saved['x']), saved['y'])\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code, str(tmp_path / "saved.pt")], check=True)


def test_lowering_again_gives_the_same(converted: Converted, lowered: Lowered) -> None:
    again = unwrap(lower(converted, engine="decomposed"))
    assert again == lowered
    assert digest(again.graph) == digest(lowered.graph)


def test_the_certificate_leaves_the_choice_to_the_consumer(converted: Converted, lowered: Lowered) -> None:
    certificate = lowered.certificate
    assert certificate.in_int8 == 0
    assert certificate.conversions == unwrap(lower(converted, engine="reference")).certificate.conversions > 0
    assert {"whoever compiles the graph" in entry.reason for entry in certificate.fallbacks} == {True}
    for engine in ("decomposed", "reference"):
        strict = problems(lower(converted, engine=engine, strict=True).failure())
        assert len(strict) == len(certificate.fallbacks)
        assert all(isinstance(problem, NotLowered) for problem in strict)


@torch.no_grad()
def test_kernels_of_the_users_own_stand_among_its_operators(converted: Converted) -> None:
    rows = tuple(row for row in ONEDNN.rows if row.name == "mean")
    lowered = unwrap(lower(converted, engine="decomposed", kernels=rows))
    kernels = {entry.operator: entry.kernel for entry in lowered.certificate.entries}
    assert kernels["mean"] == "codes.mean"
    assert kernels["linear"] == ""
    module = unwrap(materialize(lowered))
    assert [node.target for node in module.graph.nodes if node.op == "call_module"] == ["mean"]
    torch.testing.assert_close(module(X), unwrap(materialize(converted))(X), rtol=0, atol=0.05)


# Export and compilers -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_exports(fresh: fx.GraphModule, strict: bool) -> None:
    exported = torch.export.export(fresh, (X,), strict=strict)
    assert same_bits(exported.module()(X), fresh(X))
    calls = [str(node.target) for node in exported.graph.nodes if "quantized_decomposed" in str(node.target)]
    assert calls == [str(n.target) for n in fresh.graph.nodes if "quantized_decomposed" in str(n.target)]
    assert exported.state_dict["head.weight"].dtype is torch.int8


@torch.no_grad()
def test_exports_with_any_batch(fresh: fx.GraphModule) -> None:
    exported = torch.export.export(fresh, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (X, X[:2], torch.cat([X, X, X])):
        assert same_bits(exported.module()(batch), fresh(batch))


@torch.no_grad()
def test_exports_with_qparams_chosen_when_it_runs() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.randn(5, 4)
    weight = qfunc.PerChannelMinMax(qfunc.QuantSpec("int8", -128, 127, "per_channel_symmetric", 0))
    mapping = qfunc.QConfigMapping(qfunc.QConfig(qfunc.Dynamic(), weight))
    prepared = unwrap(qfunc.prepare(unwrap(qfunc.trace(model, x)), mapping, backend=qfunc.X86))
    stage = unwrap(qfunc.convert(unwrap(qfunc.calibrate(prepared, []))))
    module = unwrap(materialize(unwrap(lower(stage, engine="decomposed"))))
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (x, x[:3] * 2):
        assert same_bits(exported.module()(batch), module(batch))
        assert same_bits(unwrap(materialize(stage))(batch), module(batch))


@torch.no_grad()
def test_dynamo_takes_it_whole(fresh: fx.GraphModule) -> None:
    torch._dynamo.reset()
    assert same_bits(torch.compile(fresh, backend="eager", fullgraph=True)(X), fresh(X))


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_compiles_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near what it computes otherwise, as compilers add in any order; also where a range does not hold zero."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 2)).eval(), torch.randn(5, 4)
    nn.init.constant_(model[0].bias, 9.0)
    weight = qfunc.PerChannelMinMax(qfunc.QuantSpec("int8", -128, 127, "per_channel_symmetric", 0))
    ways = dict(zip(("_0", "_1", "_2"), (qfunc.MinMax(), qfunc.Dynamic(), qfunc.Cast()), strict=True))
    inputs = {Edge(id, "input"): way for id, way in ways.items()}
    given = annotations(inputs=inputs, weights={"_0": weight, "_1": weight, "_2": qfunc.MinMax(INT8_SYMMETRIC)})
    stage = converted_of(model, x, given)
    module = unwrap(materialize(unwrap(lower(stage, engine="decomposed"))))
    assert model[0](x).min() > 1
    torch._dynamo.reset()
    compiled = torch.compile(module)(x)
    torch.testing.assert_close(compiled, module(x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(compiled, model(x), rtol=0.05, atol=0.05)


# The registration -----------------------------------------------------------------------------------------------------


def test_it_is_loaded_when_a_module_is_made_and_not_before() -> None:
    code = (
        "import torch, qfunc\n"
        "loaded = lambda: hasattr(torch.ops.quantized_decomposed, 'quantize_per_tensor')\n"
        "model, x = torch.nn.Sequential(torch.nn.Linear(2, 2)).eval(), torch.randn(3, 2)\n"
        "assert 'decomposed' in qfunc.check_host().engines\n"
        "lowered = {e: qfunc.unwrap(qfunc.quantize(model, [x], engine=e)) for e in ('reference', 'decomposed')}\n"
        "qfunc.unwrap(qfunc.materialize(lowered['reference']))\n"
        "assert not loaded()\n"
        "qfunc.unwrap(qfunc.materialize(lowered['decomposed']))\n"
        "assert loaded()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_a_torch_without_the_operators_is_told(
    converted: Converted, lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = replace(check_host(), engines=("onednn",), quantized_engines=())
    (problem,) = problems(lower(converted, engine="decomposed", host=without).failure())
    assert problem == EngineMissing("decomposed", ("onednn", "reference"))

    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(loading, "import_module", absent)
    failure = materialize(lowered)
    assert isinstance(failure, Failure)
    (problem,) = problems(failure.failure())
    assert isinstance(problem, EngineMissing)
    assert "engine='reference'" in problem.remedy
    assert not isinstance(materialize(converted), Failure)
    monkeypatch.setattr(torch, "__path__", [str(tmp_path)])
    assert not loading.has_decomposed()
    importlib.invalidate_caches()
