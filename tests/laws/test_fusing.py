"""Fusion on random models and on real ones: the meaning stays, and the report tells what happened."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qfunc import CPU, X86, CustomConfig, explain_fusion, fuse, materialize, trace, unwrap
from qfunc.config.backend_config import BackendConfig
from qfunc.ir import Graph
from qfunc.passes.explain import FusionReport
from qfunc.testing import LAWS, Case, Walk, check_law, models, relative_error
from qfunc.testing.walk import fingerprint
from tests.zoo import ZOO, ZooCase

BACKENDS = {"cpu": CPU, "x86": X86}
FUSION_LAWS = [law for law in LAWS if law.name.startswith("fusing")]
DENSE = ("conv", "conv_transpose", "norm", "block", "activation", "arithmetic", "pool", "mean", "linear", "identity")

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def fused_walk(model: nn.Module, inputs: tuple[object, ...], backend: BackendConfig) -> Walk:
    case = Case(model, inputs, (), backend)
    graph = unwrap(trace(model, inputs))
    return Walk(case, {"trace": graph, "fuse": unwrap(fuse(graph, backend=backend))})


def hold(way: Walk) -> None:
    violations = [violation for law in FUSION_LAWS if (violation := check_law(law, way)) is not None]
    assert not violations, "\n".join(map(str, violations))


@each_backend
@given(data=st.data())
def test_fusion_keeps_the_meaning_of_random_models(backend: str, data: st.DataObject) -> None:
    families = data.draw(st.sampled_from([None, DENSE]))
    strategy = models(max_nodes=10) if families is None else models(max_nodes=10, families=families)
    made = data.draw(strategy)
    hold(fused_walk(made.module, made.example_inputs, BACKENDS[backend]))


@settings(max_examples=settings().max_examples // 2)
@given(made=models(aliasing=True))
def test_fusion_keeps_the_meaning_where_memory_is_shared(made: object) -> None:
    hold(fused_walk(made.module, made.example_inputs, CPU))


@pytest.mark.parametrize("zoo", ZOO, ids=str)
def test_fusion_keeps_the_meaning_of_the_zoo(zoo: ZooCase) -> None:
    model, inputs = zoo.build()
    for backend in BACKENDS.values():
        hold(fused_walk(model, inputs, backend))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_large", "densenet121", "googlenet", "shufflenet_v2_x1_0"])
def test_fusion_keeps_the_meaning_of_torchvisions_models(torchvision_zoo, name: str) -> None:
    model, _ = torchvision_zoo.build(name)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    way = fused_walk(model, (x,), CPU)
    violation = check_law(FUSION_LAWS[0], way)
    assert violation is None, violation
    kinds = [node.kind for node in unwrap(fuse(way.stages["trace"]))]
    assert kinds.count("batch_norm") < [node.kind for node in way.stages["trace"]].count("batch_norm")


@each_backend
@pytest.mark.parametrize("qat", [False, True], ids=["eval", "qat"])
@given(data=st.data())
def test_the_report_tells_what_fuse_does(backend: str, qat: bool, data: st.DataObject) -> None:
    made = data.draw(models(families=data.draw(st.sampled_from([DENSE, ("conv", "norm", "activation")]))))
    graph = unwrap(trace(made.module, made.example_inputs))
    before = fingerprint((graph, made.module))
    report = unwrap(explain_fusion(graph, backend=BACKENDS[backend], qat=qat))
    fused = unwrap(fuse(graph, backend=BACKENDS[backend], qat=qat))
    assert fingerprint((graph, made.module)) == before
    agree(graph, fused, report)
    assert unwrap(fuse(fused, backend=BACKENDS[backend], qat=qat)) is fused


def agree(graph: Graph, fused: Graph, report: FusionReport) -> None:
    """What is fused is gone, what is gone is told, and each operator that starts a pattern is told of once."""
    assert len(graph) - len(fused) == sum(gone(chain) for chain in report.fused)
    # A norm that moved before a pool is told of twice: there, and in the chain that it then joined.
    told = [place for chain in report.fused if not moved(chain) for place in chain.places]
    alone = [row.node for row in report.unfused]
    assert len(set(alone)) == len(alone)
    assert {row.place for row in report.unfused} <= {node.place for node in graph}
    for row in report.unfused:
        assert row.reason
        assert row.node in fused.nodes
        assert not fused[row.node].post
    assert all(chain.node in fused.nodes or chain.module == "nothing" for chain in report.fused)
    sites = [node.place for node in graph]
    assert all(told.count(place) <= sites.count(place) for place in told)


def moved(chain: object) -> bool:
    return chain.module.startswith("batch_norm, then")


def gone(chain: object) -> int:
    if chain.module == "nothing":
        return 1
    return 0 if moved(chain) else len(chain.places) - 1


@each_backend
@given(data=st.data())
def test_each_operator_that_starts_a_pattern_is_fused_or_left_alone(backend: str, data: st.DataObject) -> None:
    made = data.draw(models(families=DENSE))
    graph = unwrap(trace(made.module, made.example_inputs))
    report = unwrap(explain_fusion(graph, backend=BACKENDS[backend]))
    names = {name.split(" + ")[0] for name in patterns(BACKENDS[backend])}
    places = [node.place for node in graph if node.kind in names]
    told = [place for chain in report.fused if not moved(chain) for place in chain.places]
    told += [row.place for row in report.unfused]
    for place in places:
        assert told.count(place) >= 1, (place, str(report))
    for row in report.unfused:
        sites = [node.id for node in graph if node.place == row.place]
        assert told.count(row.place) <= len(sites), (row.place, str(report))


def patterns(backend: BackendConfig) -> list[str]:
    return [pattern.name for pattern in backend.fusions]


@given(made=models(families=DENSE))
def test_nothing_is_fused_in_a_model_that_is_left_alone_as_a_whole(made: object) -> None:
    graph = unwrap(trace(made.module, made.example_inputs))
    assert unwrap(fuse(graph, custom=CustomConfig(unfused_names=("",)))) is graph


def test_the_law_notices_a_model_that_computes_something_else() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    other = copy.deepcopy(model)
    other[1].running_mean += 1e-3
    x = torch.randn(2, 3, 4, 4)
    way = fused_walk(model, (x,), CPU)
    wrong = Walk(way.case, {"trace": way.stages["trace"], "fuse": fused_walk(other, (x,), CPU).stages["fuse"]})
    assert check_law(FUSION_LAWS[0], way) is None
    assert check_law(FUSION_LAWS[0], wrong) is not None
    made = unwrap(materialize(way.stages["fuse"]))
    assert 0 < relative_error(model(x), made(x)) < 1e-6
