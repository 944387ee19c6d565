"""Kernels of the user's own: tried first, checked on the host, materialized as leaves."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from qfunc import (
    KernelRow,
    Trial,
    Verdict,
    calibrate,
    check_host,
    check_kernels,
    convert,
    fuse,
    lower,
    materialize,
    own_kernel,
    prepare,
    quantize,
    render,
    trace,
    unwrap,
)
from qfunc.errors import BadConfig, NotLowered, UnknownName, UserFunctionFailed, problems
from qfunc.testing.kernel_law import kernels_off
from tests.edge.own_kernels import make_add_relu, make_cat, make_hardswish, one_scale

BATCH = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
HARDSWISH = unwrap(own_kernel("mine.hardswish", ("hardswish",), make_hardswish))
CAT = unwrap(
    own_kernel(
        "mine.cat", ("cat",), make_cat, constraint=one_scale,
        trials=(Trial(((2, 3, 4), (2, 5, 4)), {"dim": 1}, same_qparams=True),),
    )
)  # fmt: skip
ADD = unwrap(own_kernel("mine.add_relu", ("add + relu",), make_add_relu))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 2, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.pool(self.first(x)))
        z = torch.relu(y + self.pool(self.first(x)))
        return self.last(torch.cat([z, z], 1))


def reference(model: nn.Module | None = None) -> Any:
    torch.manual_seed(1)
    prepared = unwrap(trace((model or Model()).eval(), BATCH).bind(fuse).bind(prepare))
    return unwrap(calibrate(prepared, [BATCH]).bind(convert))


def kernels(lowered: Any) -> dict[str, str]:
    return {entry.operator: entry.kernel for entry in lowered.certificate.entries}


def test_kernels_of_the_user_come_first_and_are_right() -> None:
    stage = reference()
    lowered = unwrap(lower(stage, kernels=(HARDSWISH, CAT, ADD), strict=True))
    found = kernels(lowered)
    assert found["hardswish"] == "mine.hardswish"
    assert found["add + relu"] == "mine.add_relu"
    assert found["cat"] == "mine.cat"
    own = [entry for entry in lowered.certificate.entries if entry.engine == "own"]
    assert [entry.verdict for entry in own] == [f"keeps {entry.kernel}" for entry in own]
    assert all(entry.form == "integer" for entry in own)
    assert [off for off in kernels_off(stage, lowered, [(BATCH,)]) if off] == []
    ours, theirs = (unwrap(materialize(unwrap(lower(stage, kernels=k))))(BATCH) for k in ((HARDSWISH, CAT, ADD), ()))
    scale = theirs.abs().max()
    assert (ours - theirs).abs().max() < 0.05 * scale


def test_materialized_modules_survive_copies_pickles_and_files() -> None:
    module = unwrap(materialize(unwrap(lower(reference(), kernels=(HARDSWISH, CAT, ADD)))))
    expected = module(BATCH)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(BATCH), expected)


def test_quantize_takes_them_and_is_equal_to_the_steps() -> None:
    torch.manual_seed(1)
    lowered = unwrap(quantize(Model().eval(), [BATCH], kernels=(HARDSWISH,)))
    assert kernels(lowered)["hardswish"] == "mine.hardswish"


def wrong(call: Any) -> Any:
    return lambda x: x


def raising(call: Any) -> Any:
    raise KeyError("no such thing")


def floats(call: Any) -> Any:
    return lambda x: x.float()


def in_place(call: Any) -> Any:
    return lambda x: x.copy_(make_hardswish(call)(x))


BREACHES = {
    "wrong": (wrong, "steps"),
    "raising": (raising, "it raised KeyError"),
    "floats": (floats, "torch.float32 instead of uint8"),
    "nothing": (lambda call: lambda x: None, "NoneType instead of uint8"),
    "in place": (in_place, "writes over its operands"),
    "another shape": (lambda call: lambda x: x[..., :0], "shape"),
}


@pytest.mark.parametrize("name", BREACHES)
def test_one_that_breaks_its_contract_is_not_used_and_the_certificate_says_so(name: str) -> None:
    make, reason = BREACHES[name]
    row = unwrap(own_kernel("mine.broken", ("hardswish",), make))
    verdict = unwrap(check_kernels((row,))).verdict("mine.broken")
    assert not verdict.ok
    assert reason in verdict.reason
    stage = reference()
    lowered = unwrap(lower(stage, kernels=(row,)))
    (entry,) = (entry for entry in lowered.certificate.entries if entry.operator == "hardswish")
    assert entry.kernel == "codes.table"
    assert entry.reason == f"mine.broken: fails its contract: {verdict.reason}"
    assert entry.broken == (verdict,)
    problem = lower(stage, kernels=(row,), strict=True).failure()
    assert problem == NotLowered("hardswish", entry.reason)


def test_one_without_a_verdict_is_not_used() -> None:
    """A report that was made without it, as one of another machine, does not vouch for it."""
    lowered = unwrap(lower(reference(), host=check_host(), kernels=(HARDSWISH,)))
    (entry,) = (entry for entry in lowered.certificate.entries if entry.operator == "hardswish")
    assert entry.reason == "mine.hardswish: fails its contract: not checked on this host"
    vouching = replace(check_host(), verdicts=(*check_host().verdicts, Verdict("mine.hardswish", ok=True)))
    assert kernels(unwrap(lower(reference(), host=vouching, kernels=(HARDSWISH,))))["hardswish"] == "mine.hardswish"


def test_a_constraint_declines_with_its_reason() -> None:
    def never(_: Any) -> str:
        return "not on a Sunday"

    row = unwrap(own_kernel("mine.hardswish", ("hardswish",), make_hardswish, constraint=never))
    lowered = unwrap(lower(reference(), kernels=(row,), strict=True))
    (entry,) = (entry for entry in lowered.certificate.entries if entry.operator == "hardswish")
    assert (entry.kernel, entry.reason) == ("codes.table", "mine.hardswish: not on a Sunday")


def test_what_is_fused_behind_an_operator_is_not_left_out() -> None:
    row = unwrap(own_kernel("mine.add", ("add",), make_add_relu))
    lowered = unwrap(lower(reference(), kernels=(row,)))
    assert kernels(lowered)["add + relu"] == "codes.add"


def test_checking_changes_no_report_and_draws_no_numbers() -> None:
    before, numbers = check_host(), torch.random.get_rng_state()
    host = unwrap(check_kernels((HARDSWISH, CAT, ADD)))
    assert check_host() == before
    assert torch.equal(torch.random.get_rng_state(), numbers)
    assert [v for v in host.verdicts if v not in before.verdicts] == [
        Verdict(name, ok=True) for name in ("mine.add_relu", "mine.cat", "mine.hardswish")
    ]
    assert unwrap(check_kernels((HARDSWISH, CAT, ADD), host)) == host
    assert unwrap(check_kernels(())) is before


def test_a_trial_that_fits_no_operator_is_a_verdict() -> None:
    row = unwrap(own_kernel("mine.pool", ("max_pool2d",), make_hardswish))
    assert "cannot be run on a trial" in unwrap(check_kernels((row,))).verdict("mine.pool").reason


def test_one_that_cannot_be_made_is_an_error_of_materialize() -> None:
    row = unwrap(own_kernel("mine.raising", ("hardswish",), raising))
    host = replace(check_host(), verdicts=(Verdict("mine.raising", ok=True), *check_host().verdicts))
    problem = materialize(unwrap(lower(reference(), host=host, kernels=(row,)))).failure()
    assert isinstance(problem, UserFunctionFailed)
    assert problem.node == "mine.raising"


def test_quantized_tensors_are_not_for_them() -> None:
    for problem in (
        lower(reference(), engine="quantized", kernels=(HARDSWISH,)).failure(),
        lower(reference(), kernels=(HARDSWISH, HARDSWISH)).failure(),
        lower(reference(), kernels=(3,)).failure(),  # type: ignore[arg-type]
        check_kernels("mine").failure(),  # type: ignore[arg-type]
        quantize(Model().eval(), [BATCH], kernels=HARDSWISH).failure(),  # type: ignore[arg-type]
    ):
        assert isinstance(problem, BadConfig)
        assert problem.node == "kernels"


def test_the_reference_engine_runs_them() -> None:
    lowered = unwrap(lower(reference(), engine="reference", kernels=(HARDSWISH,)))
    assert lowered.certificate.in_int8 == 1
    assert unwrap(materialize(lowered))(BATCH).isfinite().all()


MISUSES: dict[str, tuple[dict[str, Any], type]] = {
    "a name without a dot": ({"name": "hardswish"}, BadConfig),
    "a name of qfunc's": ({"name": "onednn.conv2d"}, BadConfig),
    "no name": ({"name": 3}, BadConfig),
    "no operators": ({"operators": ()}, BadConfig),
    "a str of operators": ({"operators": "relu"}, BadConfig),
    "an unknown operator": ({"operators": ("relu", "add + rellu")}, UnknownName),
    "a layer": ({"operators": ("conv2d",)}, BadConfig),
    "no function": ({"make": 3}, BadConfig),
    "no constraint": ({"constraint": "never"}, BadConfig),
    "no trials": ({"trials": [1]}, BadConfig),
    "a trial of another": ({"trials": (Trial(((1,),), operator="tanh"),)}, UnknownName),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_told_at_once(name: str) -> None:
    changed, kind = MISUSES[name]
    given: dict[str, Any] = {"name": "mine.k", "operators": ("relu",), "make": wrong, **changed}
    error = own_kernel(given.pop("name"), given.pop("operators"), **given).failure()
    assert {type(p) for p in problems(error)} == {kind}
    assert render(error)


def test_a_row_is_a_value() -> None:
    assert isinstance(HARDSWISH, KernelRow)
    assert unwrap(own_kernel("mine.hardswish", ("hardswish",), make_hardswish)) == HARDSWISH


def absolute(call: Any) -> Any:
    """Codes of values that cannot be negative, on an unchanged grid, are those of their absolute values."""
    given, output = call.grids[0], call.output
    if given == output and given.zero_point == 0:
        return lambda codes: codes
    return lambda codes: (
        (((codes.float() - given.zero_point) * given.scale).abs() / output.scale + output.zero_point)
        .round()
        .clamp(0, 255)
        .to(torch.uint8)
    )


class Residual(nn.Module):
    """A sum takes the absolute value of what is read again after it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.third, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu(self.first(x))
        return self.third(self.second(x)) + torch.abs(y), self.last(y)


def test_what_a_kernel_gives_may_be_its_operand_which_nothing_overwrites() -> None:
    row = unwrap(own_kernel("mine.abs", ("abs",), absolute))
    stage = reference(Residual())
    lowered = unwrap(lower(stage, kernels=(row,)))
    assert {"mine.abs", "onednn.conv2d_add"} <= set(kernels(lowered).values())
    ours = unwrap(materialize(lowered))(BATCH)
    theirs = unwrap(materialize(unwrap(lower(stage, engine="reference"))))(BATCH)
    for got, expected in zip(ours, theirs, strict=True):
        assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("constraint", [raising, lambda call: 3, lambda: ""], ids=["raises", "no text", "no argument"])
def test_a_constraint_that_fails_is_told_with_its_node(constraint: Any) -> None:
    row = unwrap(own_kernel("mine.hardswish", ("hardswish",), make_hardswish, constraint=constraint))
    (problem,) = problems(lower(reference(), kernels=(row,)).failure())
    assert isinstance(problem, UserFunctionFailed)
    assert problem.node.startswith("hardswish")
    assert "the constraint of mine.hardswish" in problem.reason


@pytest.mark.parametrize(
    "plan", [raising, lambda call: 3, lambda: "", None], ids=["raises", "no plan", "no argument", "none"]
)
def test_a_plan_that_fails_is_told_with_its_node(plan: Any) -> None:
    rows = tuple(KernelRow(f"mine.{kind}", (kind,), plan, checked=False) for kind in ("hardswish", "cat"))
    found = problems(lower(reference(), kernels=rows).failure())
    assert {type(problem) for problem in found} == {UserFunctionFailed}
    for kind, problem in zip(("hardswish", "cat"), found, strict=True):
        assert problem.node.startswith(kind)
        assert problem.reason.startswith(f"the plan of mine.{kind} ")


def test_a_plan_of_the_user_may_decline_and_may_plan() -> None:
    def plan(call: Any) -> Any:
        return "not today" if call.node.kind == "cat" else replace(call.node, kind="hardswish")

    row = KernelRow("mine.kept", ("cat", "hardswish"), plan, checked=False)
    found = kernels(unwrap(lower(reference(), kernels=(row,))))
    assert found["hardswish"] == "mine.kept"
    assert found["cat"] == "codes.cat"


@pytest.mark.parametrize("operator", [5, ["hardswish"], None])
def test_a_trial_names_its_operator_with_a_text(operator: Any) -> None:
    failed = own_kernel("mine.hardswish", ("hardswish",), make_hardswish, trials=(Trial(((2, 3),), operator=operator),))
    assert "operator of a Trial" in render(failed.failure())
