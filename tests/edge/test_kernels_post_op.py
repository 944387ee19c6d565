"""From what is fused behind an operator to its kernel's post-op: what engines plan, and what hosts are asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from returns.result import Success
from torch import nn

import qfunc
from qfunc.config.host_report import HostReport, Verdict
from qfunc.edge.kernels.contract import Contract, check, disagreement
from qfunc.edge.kernels.linear import LinearCall, OnednnLinear
from qfunc.edge.kernels.post_op import NO_POST_OP, read_post_op
from qfunc.edge.kernels.weighted_contracts import apply_post_op, weighted_contracts
from qfunc.engines.post_op import POST_OPS, contract_name, post_op
from qfunc.ir import Draft, PostOp, Ref
from qfunc.numerics.grid import Affine
from qfunc.ops import BY_NAME, resolve
from qfunc.passes.stages import Converted
from qfunc.testing.kernel_law import kernels_off

FUSED = {
    "hardtanh": PostOp("clamp", (("min", -0.2), ("max", 0.3))),
    "hardswish": PostOp("hardswish"),
    "silu": PostOp("silu"),
    "leaky_relu": PostOp("leaky_relu", (("negative_slope", 0.1),)),
    "tanh": PostOp("tanh"),
    "gelu": PostOp("gelu", (("approximate", "tanh"),)),
}
"""What an operator must have behind it for its kernel to use a post-op."""


def meaning(post: PostOp, x: torch.Tensor) -> torch.Tensor:
    """What torch's function of the post-op's kind computes."""
    target, names = BY_NAME[post.kind].call
    values = {"input": x, **dict(post.args)}
    keywords = {name[:-1]: values[name[:-1]] for name in names if name.endswith("=")}
    return resolve(target)(*(values[name] for name in names if not name.endswith("=")), **keywords)


# The host -----------------------------------------------------------------------------------------------------------


def test_every_post_op_of_every_kernel_has_a_verdict() -> None:
    report = qfunc.check_host()
    weighted = [kernel for kernel in POST_OPS if kernel.startswith("onednn.")]
    names = [contract_name(kernel, post) for kernel in weighted for post in ("none", *POST_OPS[kernel])]
    names += [f"{kind}{post}" for kind in ("add", "mul", "quantized.add", "quantized.mul") for post in ("", "[relu]")]
    assert [name for name in names if not report.verdict(name).ok] == []


CONTRACTS = {contract.name: contract for contract in weighted_contracts(qfunc.check_host().onednn_layouts)}


@pytest.mark.parametrize("name", [name for name in CONTRACTS if "[" in name])
def test_a_kernel_that_leaves_its_post_op_out_breaks_the_contract(name: str) -> None:
    contract = CONTRACTS[name]

    def plain(sample):
        setup = sample.setup
        return contract.kernel(replace(sample, setup=replace(setup, call=replace(setup.call, post_op=NO_POST_OP))))

    broken = check(Contract(name, plain, contract.reference, contract.samples))
    assert not broken.ok
    assert "off by" in broken.reason or "not the nearest" in broken.reason


# What an engine plans -----------------------------------------------------------------------------------------------

BOUND = st.one_of(st.none(), st.floats(-3, 3), st.integers(-2, 2), st.just(0.0))


@settings(max_examples=200, deadline=None)
@given(BOUND, BOUND, st.one_of(st.none(), st.builds(Affine, st.floats(0.002, 0.05), st.integers(0, 255))))
def test_a_clamp_is_computed_or_absorbed_whatever_its_bounds(low, high, output) -> None:
    if low is None and high is None:
        low = -1
    post = PostOp("clamp", (("min", low), ("max", high)))
    literal = post_op("onednn.linear", (post,), output)
    assert isinstance(literal, tuple)
    x = torch.arange(256, dtype=torch.int32).to(torch.uint8)[:, None]
    qparams = (1.0, 0, "float32") if output is None else (output.scale, output.zero_point, output.dtype)
    call = LinearCall(0.03, 128, *qparams, post_op=read_post_op(literal))
    got = OnednnLinear(torch.tensor([[1]], dtype=torch.int8), torch.ones(1), None, call)(x)
    real = meaning(post, (x.double() - 128) * 0.03)
    if output is None:
        assert disagreement(got, real, None) == ""
        return
    # What is absorbed may be off by half a step more: not all codes are the nearest then.
    exact = (real / output.scale + output.zero_point).clamp(*output.bounds)
    assert (got.double() - exact).abs().max() <= 1.01


def test_what_the_codes_absorb_costs_nothing() -> None:
    codes = Affine(6 / 255, 0)
    relu6 = PostOp("clamp", (("min", 0.0), ("max", 6.0)))
    for kernel in POST_OPS:
        assert post_op(kernel, (PostOp("relu"),), codes) == ("none",)
        assert post_op(kernel, (relu6,), codes) == ("none",)
        assert post_op(kernel, (relu6, PostOp("relu")), codes) == ("none",)
        assert post_op(kernel, (PostOp("relu"), relu6), replace(codes, zero_point=3)) != ("none",)
    assert post_op("onednn.conv2d", (relu6, PostOp("silu")), codes) == ("silu",)


def test_a_clamp_at_zero_is_a_relu() -> None:
    post = PostOp("clamp", (("min", 0), ("max", None)))
    assert all(post_op(kernel, (post,), None) == ("relu",) for kernel, posts in POST_OPS.items() if posts)


@pytest.mark.parametrize(
    "posts",
    [
        (PostOp("sigmoid"),),
        (PostOp("elu", (("alpha", 1.0),)),),
        (PostOp("silu"), PostOp("tanh")),
        (PostOp("add", (("other", Ref("x")),)),),
        (PostOp("clamp", (("min", Ref("x")), ("max", 1.0))),),
        (PostOp("clamp", (("min", float("nan")), ("max", 1.0))),),
        (PostOp("leaky_relu", (("negative_slope", Ref("x")),)),),
        (PostOp("gelu", (("approximate", "bogus"),)),),
    ],
    ids=str,
)
def test_what_no_kernel_has_is_declined_by_name(posts: tuple[PostOp, ...]) -> None:
    for kernel in POST_OPS:
        reason = post_op(kernel, posts, Affine(0.1, 100))
        assert isinstance(reason, str)
        assert all(repr(post) in reason for post in posts)


@pytest.mark.parametrize("name", FUSED)
def test_a_kernel_takes_what_its_row_of_the_table_says(name: str) -> None:
    for kernel, has in POST_OPS.items():
        found = post_op(kernel, (FUSED[name],), None)
        assert isinstance(found, tuple) == (name in has), (kernel, name)
        if isinstance(found, tuple):
            x = torch.linspace(-3, 3, 101, dtype=torch.float64)
            assert torch.allclose(apply_post_op(read_post_op(found), x), meaning(FUSED[name], x))


# The whole way ------------------------------------------------------------------------------------------------------

MODELS = {
    "conv1d": lambda: nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.Conv1d(8, 4, 3)),
    "conv2d": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)),
    "conv3d": lambda: nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.Conv3d(8, 4, 1)),
    "linear": lambda: nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 5)),
}
SHAPES = {"conv1d": (2, 3, 9), "conv2d": (2, 3, 9, 8), "conv3d": (2, 3, 6, 5, 4), "linear": (4, 12)}


def quantized(model: nn.Module, x: torch.Tensor) -> Converted:
    """The reference form of a model, calibrated with one batch."""
    fused = qfunc.unwrap(qfunc.fuse(qfunc.unwrap(qfunc.trace(model.eval(), (x,)))))
    prepared = qfunc.unwrap(qfunc.prepare(fused))
    return qfunc.unwrap(qfunc.convert(qfunc.unwrap(qfunc.calibrate(prepared, [x], progress=False))))


def converted(kind: str, post: PostOp) -> tuple[Converted, torch.Tensor]:
    """Two layers in their reference form, the post-op behind both: one gives codes and the other floats."""
    torch.manual_seed(0)
    x = torch.randn(SHAPES[kind])
    reference = quantized(MODELS[kind](), x)
    draft = Draft(reference.graph)
    for node in reference.graph:
        if node.kind == kind:
            draft.put(replace(node, post=(post,)))
    return replace(reference, graph=draft.commit()), x


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("kind", MODELS)
def test_lowered_kernels_are_their_reference(kind: str, name: str) -> None:
    reference, x = converted(kind, FUSED[name])
    lowered = qfunc.unwrap(qfunc.lower(reference))
    has = name in POST_OPS[f"onednn.{kind}"]
    assert [bool(entry.kernel) for entry in lowered.certificate.entries] == [has, has]
    if not has:
        assert all("the kernel has no post-op for" in entry.reason for entry in lowered.certificate.entries)
        return
    assert [node.get("post_op")[0] for node in lowered.graph if node.has("post_op")] == [name, name]
    assert [off for off in kernels_off(reference, lowered, [(x,)]) if off] == []
    expected = qfunc.unwrap(qfunc.materialize(reference))(x)
    assert qfunc.testing.metrics.sqnr(expected, qfunc.unwrap(qfunc.materialize(lowered))(x)) > 30


def failing(*names: str) -> HostReport:
    """This machine, as if some of its kernels were wrong."""
    report = qfunc.check_host()
    wrong = tuple(Verdict(name, ok=False, reason="simulated") for name in names)
    return replace(report, verdicts=wrong + tuple(v for v in report.verdicts if v.kernel not in names))


def test_a_wrong_post_op_condemns_no_other_kernel() -> None:
    reference, _ = converted("conv2d", FUSED["silu"])
    host = failing("onednn.conv2d[silu]", "onednn.conv2d[hardtanh]", "onednn.linear[silu]")
    lowered = qfunc.unwrap(qfunc.lower(reference, host=host))
    assert [entry.kernel for entry in lowered.certificate.entries] == ["", ""]
    assert all("fails its contract on this host: simulated" in entry.reason for entry in lowered.certificate.entries)
    for other in (FUSED["hardswish"], PostOp("relu")):
        reference, _ = converted("conv2d", other)
        assert not qfunc.unwrap(qfunc.lower(reference, host=host)).certificate.fallbacks


class Residual(nn.Module):
    """A sum behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A clamp that does not end where the codes do is a hardtanh."""
        x = self.first(x)
        return self.last(torch.clamp(self.second(x) + x, -0.5, 0.5))


@pytest.mark.parametrize("name", ["onednn.conv2d_add", "onednn.conv2d_add[hardtanh]", ""])
def test_a_wrong_sum_is_not_used(name: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(2, 4, 8, 8)
    reference = quantized(Residual(), batch)
    draft = Draft(reference.graph)
    for node in reference.graph:
        if any(post.kind == "clamp" for post in node.post):
            inner = PostOp("clamp", (("min", -0.3), ("max", 0.4)))
            absorbed = PostOp("relu") if name == "onednn.conv2d_add" else inner
            draft.put(replace(node, post=(node.post[0], absorbed)))
    reference = replace(reference, graph=draft.commit())
    lowered = qfunc.unwrap(qfunc.lower(reference, host=failing(name)))
    sums = [entry for entry in lowered.certificate.entries if "add" in entry.operator]
    assert [entry.kernel for entry in sums] == ["" if name else "onednn.conv2d_add"]
    assert [off for off in kernels_off(reference, lowered, [(batch,)]) if off] == []


@pytest.mark.parametrize("name", FUSED)
def test_the_quantized_engine_names_the_remedy(name: str) -> None:
    reference, _ = converted("linear", FUSED[name])
    match qfunc.lower(reference, engine="quantized"):
        case Success(lowered):
            first = lowered.certificate.entries[0]
            assert first.kernel == ""
            assert f"no post-op for {FUSED[name]!r}: prepare with backend=X86 for this engine" in first.reason
        case failure:
            raise AssertionError(failure)
