"""What an engine's kernels do to their result before they round it: the post-ops that they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf, isnan
from types import MappingProxyType
from typing import TypeAlias

from qfunc.config.host_report import HostReport
from qfunc.ir import Arg, PostOp
from qfunc.numerics.grid import CODE_RANGE, Affine

PostOpLiteral: TypeAlias = tuple[str | float, ...]
"""A post-op in a kernel's node: its name, then its numbers or its algorithm, such as `("hardtanh", 0.0, 6.0)`."""

POST_OPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "onednn.conv1d": ("relu", "hardtanh", "hardswish", "silu"),
        "onednn.conv2d": ("relu", "hardtanh", "hardswish", "silu"),
        "onednn.conv3d": ("relu", "hardtanh"),
        "onednn.conv1d_add": ("relu", "hardtanh"),
        "onednn.conv2d_add": ("relu", "hardtanh"),
        "onednn.linear": ("relu", "hardtanh", "hardswish", "silu", "leaky_relu", "tanh", "gelu"),
        **{f"codes.{kind}": ("relu",) for kind in ("add", "sub", "mul")},
        **{
            f"quantized.{kind}": ("relu",)
            for kind in ("conv1d", "conv2d", "conv3d", "linear", "add", "mul", "batch_norm")
        },
        "quantized.conv_transpose": (),
        "quantized.linear_dynamic": ("relu",),
        "quantized.conv2d_add[onednn]": ("relu",),
        "quantized.linear[onednn]": ("relu", "leaky_relu", "tanh"),
    }
)
"""The post-ops of each kernel, a `hardtanh` standing for any clamp. `check_host` checks every one of them."""


def contract_name(kernel: str, post: str) -> str:
    """The name of the verdict on a kernel with a post-op; ReLU and none belong to the kernel itself.

    >>> contract_name("onednn.conv2d", "hardswish"), contract_name("onednn.conv2d", "relu")
    ('onednn.conv2d[hardswish]', 'onednn.conv2d')
    """
    return kernel if post in ("none", "relu") else f"{kernel}[{post}]"


def breach(host: HostReport, contract: str) -> str:
    """Why a kernel cannot be used on this host; empty where it keeps its contract."""
    verdict = host.verdict(contract)
    return "" if verdict.ok else f"the kernel fails its contract on this host: {verdict.reason}"


def _bounds(post: PostOp) -> tuple[Arg, Arg]:
    return (0.0, None) if post.kind == "relu" else (post.get("min"), post.get("max"))


def absorbs(post: PostOp, output: Affine | None) -> bool:
    """Whether saturation at the ends of the output's codes does the work of a post-op, which only a clamp's can be.

    It does when the range of the codes ends at the bounds, or before: up to half a step, since the zero point is
    rounded, and what is clamped then gets a value no further off than rounding may leave any other.
    """
    if output is None or post.kind not in ("relu", "clamp"):
        return False
    low, high = _bounds(post)
    least, most = ((code - output.zero_point) * output.scale for code in output.bounds)
    slack = output.scale * 0.501
    holds_low = low is None or (isinstance(low, (int, float)) and least >= low - slack)
    holds_high = high is None or (isinstance(high, (int, float)) and most <= high + slack)
    return holds_low and holds_high


def _clamp(post: PostOp) -> PostOpLiteral | None:
    low, high = _bounds(post)
    low, high = -inf if low is None else low, inf if high is None else high
    if not (isinstance(low, (int, float)) and isinstance(high, (int, float))) or isnan(low) or isnan(high):
        return None
    # Where bounds cross, torch's clamp gives the upper one.
    return ("relu",) if (low, high) == (0, inf) else ("hardtanh", float(min(low, high)), float(high))


def _leaky_relu(post: PostOp) -> PostOpLiteral | None:
    slope = post.get("negative_slope")
    return ("leaky_relu", float(slope)) if isinstance(slope, (int, float)) else None


def _gelu(post: PostOp) -> PostOpLiteral | None:
    algorithm = post.get("approximate")
    return ("gelu", algorithm) if isinstance(algorithm, str) and algorithm in ("none", "tanh") else None


_READ: Mapping[str, Callable[[PostOp], PostOpLiteral | None]] = MappingProxyType(
    {
        **{kind: lambda post: (post.kind,) for kind in ("relu", "hardswish", "silu", "tanh")},
        "clamp": _clamp,
        "leaky_relu": _leaky_relu,
        "gelu": _gelu,
    }
)


def post_op(kernel: str, posts: tuple[PostOp, ...], output: Affine | None) -> PostOpLiteral | str:
    """The kernel's post-op for what is fused behind it, as a literal; or why it has none for that.

    >>> post_op("onednn.conv2d", (PostOp("clamp", (("min", 0.0), ("max", 6.0))),), None)
    ('hardtanh', 0.0, 6.0)
    >>> post_op("onednn.conv2d", (PostOp("tanh"),), None)
    'the kernel has no post-op for tanh'
    """
    left = [post for post in posts if not absorbs(post, output)]
    if clips(output) and "hardtanh" in POST_OPS[kernel]:
        return _ended(left, output)
    if not left:
        return ("none",)
    found = _READ[left[0].kind](left[0]) if len(left) == 1 and left[0].kind in _READ else None
    if found is None or found[0] not in POST_OPS[kernel]:
        return f"the kernel has no post-op for {' + '.join(map(repr, left))}"
    return found


def clips(output: Affine | None) -> str:
    """Why a kernel that saturates at the bounds of the dtype does not give these codes by itself; empty where it does.

    >>> clips(Affine(0.5, 0, "uint8", 0, 15))
    'the kernel saturates at the bounds of uint8, not at 0..15'
    """
    if output is None or output.bounds == CODE_RANGE[output.dtype]:
        return ""
    return f"the kernel saturates at the bounds of {output.dtype}, not at {output.bounds[0]}..{output.bounds[1]}"


def _ended(left: list[PostOp], output: Affine | None) -> PostOpLiteral | str:
    """A clamp at the ends of a part of the codes, together with the one clamp that may be left to do.

    Clamping to what whole codes stand for and rounding is rounding and clamping the codes.
    """
    assert output is not None
    least, most = output.bounds
    low, high = ((code - output.zero_point) * output.scale for code in (least, most))
    whole = CODE_RANGE[output.dtype]
    ends = -inf if least == whole[0] else low, inf if most == whole[1] else high
    if not left:
        return ("hardtanh", *ends)
    given = _clamp(left[0]) if len(left) == 1 and left[0].kind in ("relu", "clamp") else None
    if given is None:
        return f"{clips(output)}, and it has no post-op for {' + '.join(map(repr, left))} as well"
    bounds = (0.0, inf) if given == ("relu",) else given[1:]
    first, last = (float(bound) for bound in bounds)
    return ("hardtanh", min(max(first, ends[0]), ends[1]), max(min(last, ends[1]), ends[0]))
