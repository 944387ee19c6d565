"""Every law on the zoo, on random models and on random configurations."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qfunc import CPU, X86, Entropy, MeanSquaredError, Percentile, QConfig, QConfigMapping, Recording
from qfunc.errors import BadConfig, UnknownName, problems
from qfunc.numerics import observers as o
from qfunc.numerics import qparams as q
from qfunc.testing import (
    LAWS,
    OBSERVER_LAWS,
    TOTAL,
    Case,
    Law,
    Measurement,
    cases,
    check_law,
    check_laws,
    walk,
)
from qfunc.testing.strategies import ENGINES
from tests.zoo import ZOO, ZooCase

BACKENDS = {"cpu": CPU, "x86": X86}
SETUPS = (("cpu", "onednn"), ("x86", "quantized"))
FEWER = max(10, settings().max_examples // 3)

each_zoo = pytest.mark.parametrize("zoo", ZOO, ids=str)


def zoo_case(zoo: ZooCase, backend: str, engine: str) -> Case:
    model, inputs = zoo.build()
    return Case(model, inputs, tuple(zoo.batches(2, 3)), BACKENDS[backend], engine)


def hold(case: Case) -> None:
    violations = check_laws(case)
    assert not violations, "\n".join(map(str, violations))


# On real architectures and on random models


@pytest.mark.parametrize(("backend", "engine"), SETUPS)
@each_zoo
def test_laws_hold_on_the_zoo(zoo: ZooCase, backend: str, engine: str) -> None:
    case = zoo_case(zoo, backend, engine)
    hold(case)
    lowered = walk(case).lowered
    assert lowered is not None
    # Where memory is shared and written to, all stays float.
    assert lowered.certificate.in_int8 > 0 or zoo.aliasing


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=FEWER)
@given(data=st.data())
def test_laws_hold_on_random_models(backend: str, engine: str, data: st.DataObject) -> None:
    case = data.draw(cases(backends=[BACKENDS[backend]], engines=[engine]))
    hold(case)
    assert walk(case).failure is None


@settings(max_examples=FEWER)
@given(case=cases(aliasing=True))
def test_laws_hold_where_memory_is_shared(case: Case) -> None:
    hold(case)
    assert walk(case).failure is None


@settings(max_examples=FEWER)
@given(case=cases(configured=True))
def test_laws_hold_for_random_configurations(case: Case) -> None:
    hold(case)


@given(case=cases(max_nodes=4, invalid=True))
def test_law_11_impossible_configurations_fail_and_never_raise(case: Case) -> None:
    assert check_law(TOTAL, case) is None


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        (QConfigMapping().set_module_name("fc9", None), UnknownName),
        (QConfigMapping().set_module_name_object_type_order("fc9", nn.Linear, 0, None), UnknownName),
        (QConfigMapping().set_module_name_regex("(", None), BadConfig),
        (QConfigMapping().set_global(QConfig(o.MinMax(q.QuantSpec("uint7")), o.MinMax(q.INT8_SYMMETRIC))), UnknownName),
        (
            QConfigMapping().set_global(QConfig(o.MinMax(q.QuantSpec(quant_max=300)), o.MinMax(q.INT8_SYMMETRIC))),
            BadConfig,
        ),
    ],
    ids=["module", "order", "regex", "dtype", "range"],
)
def test_impossible_configurations_are_told(mapping: QConfigMapping, expected: type) -> None:
    case = Case(nn.Sequential(nn.Linear(3, 3)).eval(), (torch.randn(2, 3),), (), CPU, "onednn", mapping)
    failure = walk(case).failure
    assert failure is not None
    assert [type(problem) for problem in problems(failure)] == [expected]


# Statistics and qparams

OBSERVERS = (
    *(o.MinMax(spec) for spec in (q.UINT8, q.UINT8_REDUCED, q.INT8, q.INT8_SYMMETRIC, q.QuantSpec("int16", -9, 9))),
    o.PerChannelMinMax(q.INT8_NARROW_PER_CHANNEL),
    o.PerChannelMinMax(q.QuantSpec("int8", -128, 127, "per_channel_affine", 0)),
    o.MovingAverageMinMax(q.UINT8, 0.3),
    o.MovingAveragePerChannelMinMax(q.INT8_SYMMETRIC_PER_CHANNEL, 0.3),
    o.Histogram(),
    o.Histogram(q.INT8_SYMMETRIC, 128, 2),
    o.FixedQParams(q.UINT8, 1 / 256, 0),
    Percentile(q.INT8_SYMMETRIC, 99.0, 512, 3),
    MeanSquaredError(bins=64),
    Entropy(bins=1024),
    Recording(),
)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-4, 4, width=32)
ROW = st.lists(FINITE, min_size=3, max_size=3)
TENSORS = st.lists(st.lists(ROW, max_size=4).map(lambda rows: torch.tensor(rows).reshape(-1, 3).T), max_size=4)


@pytest.mark.parametrize("law", OBSERVER_LAWS, ids=repr)
@given(observer=st.sampled_from(OBSERVERS), tensors=TENSORS)
def test_observer_laws(law: Law, observer: o.Observer, tensors: list[torch.Tensor]) -> None:
    violation = check_law(law, Measurement(observer, tuple(tensors)))
    assert violation is None, violation


# Determinism across processes

_DIGESTS = """
import torch
from qfunc.ir import digest
from qfunc.testing import walk
from qfunc.testing.walk import graph_of
from tests.laws.test_laws import ZOO, zoo_case
torch.set_num_threads(1)
for zoo in ZOO:
    if zoo.name in {"mobilenet", "densenet", "many_inputs"}:
        for stage in walk(zoo_case(zoo, "cpu", "onednn")).stages.values():
            print(digest(graph_of(stage)))
"""


def test_law_8_digests_are_the_same_in_other_processes_under_any_hash_seed() -> None:
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _DIGESTS],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1
    assert len(outputs.pop().split()) == 18


# The laws themselves notice


def test_every_law_has_a_number_a_name_and_a_statement_of_its_own() -> None:
    laws = (TOTAL, *LAWS, *OBSERVER_LAWS)
    assert {law.number for law in laws} == {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}
    assert len({law.name for law in laws}) == len({law.statement for law in laws}) == len(laws)
