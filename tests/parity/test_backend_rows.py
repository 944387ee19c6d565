"""Each backend quantizes what torch.ao's quantizes: every single operator of torch.ao's tables, and nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from torch import fx, nn

import qfunc
from qfunc import BackendConfig, Observation, OperatorConfig
from qfunc.backends.fusions import ADDS, MULS, SUBS
from qfunc.config.qconfig_mapping import form_named
from qfunc.ir import Node, Origin, Written
from qfunc.ops import BY_NAME, FORMS, Form, Kind, resolve
from qfunc.testing import oracle

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

BACKENDS = {name: getattr(qfunc, name.upper()) for name in oracle.BACKENDS}

RENAMED = {".shape": "builtins.getattr"}
"""torch.ao matches attributes by their names; here asking for any attribute is one operator."""

IN_PLACE = {"operator.iadd": "operator.add", "operator.imul": "operator.mul", "operator.isub": "operator.sub"}
"""Ways of writing that torch.ao's tracer takes for others, by which it lists them."""

MEASURED_INPUTS = {"hardsigmoid", "sigmoid", "softmax", "tanh", ".hardsigmoid", ".hardsigmoid_"}
"""Kinds whose fixed qparams torch.ao asks of the operand as well, which it so clips to the range of the result."""


def written(form: str, kind: str) -> Node:
    """A call that is written so."""
    if form.startswith("."):
        return Node("y", kind, origin=Origin(written=Written("call_method", form[1:])))
    if isinstance(resolve(form), type):
        return Node("y", kind, origin=Origin("m", form, written=Written("call_module", "m")))
    return Node("y", kind, origin=Origin(written=Written("call_function", form)))


def known(form: str) -> tuple[Kind, Form] | None:
    """The vocabulary's entry for a way of writing, if it has one."""
    return next((FORMS[op, form.lstrip(".")] for op in _ops(form) if (op, form.lstrip(".")) in FORMS), None)


def _ops(form: str) -> tuple[str, ...]:
    return ("call_method",) if form.startswith(".") else ("call_module", "call_function")


def row_of(backend: BackendConfig, form: str) -> tuple[str, OperatorConfig | None]:
    """The kind of what is written so, and the backend's row for it."""
    found = known(form)
    kind = found[0].name if found else form
    return kind, backend.operator(written(form, kind))


@dataclass(frozen=True)
class Case:
    backend: str
    listed: oracle.ListedOperator

    def __str__(self) -> str:
        return f"{self.backend}-{form_named(self.listed.operator)}"

    @property
    def form(self) -> str:
        """How the operator is written, by our names."""
        form = form_named(self.listed.operator)
        return RENAMED.get(form, form)


CASES = [Case(name, row) for name in BACKENDS if oracle.available() for row in oracle.operator_patterns(name)]
each = pytest.mark.parametrize("case", CASES, ids=str)


def expected_dtypes(case: Case, kind: str):
    """Theirs, but what is wrong in them."""
    if kind not in MEASURED_INPUTS:
        return case.listed.dtypes
    return tuple(replace(one, input_dtype=_unfixed(one.input_dtype)) for one in case.listed.dtypes)


def _unfixed(dtype):
    if isinstance(dtype, str):
        return dtype
    return replace(dtype, scale_exact_match=None, zero_point_exact_match=None)


@each
def test_what_is_listed_has_a_row(case):
    kind, row = row_of(BACKENDS[case.backend], case.form)
    assert row is not None
    assert row.observation is case.listed.observation
    counts, theirs = dict(row.by_tensor_count), dict(case.listed.by_tensor_count)
    for count in range(3):
        assert counts.get(count, row.observation) is theirs.get(count, case.listed.observation)
    assert row.dtypes == expected_dtypes(case, kind)
    assert row.fixed is None


@pytest.mark.parametrize("case", [case for case in CASES if case.listed.positions], ids=str)
def test_arguments(case):
    """Those at torch.ao's positions are the ones that the row, or the vocabulary, calls so."""
    kind, row = row_of(BACKENDS[case.backend], case.form)
    _, form = known(case.form)
    position = {param.name: index for index, param in enumerate(form.params)}
    names = {"weight": row.weight or "weight", "bias": row.bias or "bias", "input": (row.inputs or ("input",))[0]}
    assert {what: position[names[what]] for what, _ in case.listed.positions} == dict(case.listed.positions)
    assert {names[what] for what, _ in case.listed.positions} - {names["input"]} <= {*BY_NAME[kind].weights}


def ways(backend: BackendConfig) -> Iterator[tuple[str, str]]:
    """Every kind of a backend's rows with every way of writing that they take."""
    for row in backend.operators:
        for kind in row.kinds:
            for form in _forms(kind):
                if backend.operator(written(form, kind)) is row:
                    yield kind, form


def _forms(kind: str) -> list[str]:
    if kind not in BY_NAME:
        return [kind]
    return [f".{form.target}" if form.op == "call_method" else form.target for form in BY_NAME[kind].forms]


@pytest.mark.parametrize("name", BACKENDS)
def test_nothing_else_has_a_row(name):
    listed = {case.form for case in CASES if case.backend == name}
    taken = {IN_PLACE.get(form, form) for _, form in ways(BACKENDS[name])}
    assert {form if form.startswith(".") else form_named(resolve(form)) for form in taken} == listed


@pytest.mark.parametrize("name", BACKENDS)
def test_no_row_is_dead(name):
    """Every kind and every form of every row is met by some way of writing."""
    backend = BACKENDS[name]
    met = list(ways(backend))
    for row in backend.operators:
        assert {*row.kinds} <= {kind for kind, _ in met}
        assert row.forms <= {form for _, form in met}


class Assigned(nn.Module):
    """Assignments with arithmetic."""

    def forward(self, x, y):
        x += y
        x *= y
        x -= y
        return x


def test_in_place_arithmetic():
    """torch.ao's tracer records the function without the assignment."""
    assert {*IN_PLACE} <= ADDS | MULS | SUBS
    calls = [node.target for node in fx.symbolic_trace(Assigned()).graph.nodes if node.op == "call_function"]
    assert list(map(form_named, calls)) == list(IN_PLACE.values())


def test_attributes_are_not_observed():
    """Also those that torch.ao does not list stay float, which is what they do anyway."""
    assert RENAMED == {".shape": "builtins.getattr"}
    for name, backend in BACKENDS.items():
        _, row = row_of(backend, "builtins.getattr")
        listed = any(case.form == "builtins.getattr" for case in CASES if case.backend == name)
        assert (row.observation if row else None) is (Observation.NOT_OBSERVED if listed else None)


class Squashed(nn.Module):
    def forward(self, x):
        return torch.sigmoid(x)


def test_measured_inputs():
    """torch.ao gives the input of a sigmoid the range of its result, and so cuts off all that is not in it."""
    batch = (torch.linspace(-4, 4, 100),)
    prepared = oracle.prepare(Squashed().eval(), batch, "x86", backend_config=oracle.backend_config("x86"))
    clipped = oracle.convert(oracle.calibrate(prepared, [batch]))(*batch)
    assert clipped.min() >= 0.5
    ours = qfunc.unwrap(qfunc.quantize(Squashed().eval(), [batch], backend=qfunc.X86, progress=False))
    assert (qfunc.unwrap(qfunc.materialize(ours))(*batch) - torch.sigmoid(batch[0])).abs().max() < 0.01
