"""What each kernel must compute, on inputs that bring out what kernels get wrong.

A reference is the float64 meaning of the kernel, in units of output codes and not yet rounded:
`clamp(f(dequantize(x)) / scale + zero_point)`. A kernel keeps its contract when every code is within one step of it,
and all but one in a hundred are correctly rounded (either way, on a tie).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qfunc.config.host_report import Verdict
from qfunc.numerics.grid import Affine

_STEP = 1.0
_ROUNDING = 0.5
_SLACK = 1e-3  # of a step: float32 arithmetic on numbers of up to 255 steps
_SHARE = 0.01
_RELATIVE = 1e-5  # of the largest value, for float32 results


@dataclass(frozen=True, slots=True)
class Sample:
    """One input of a contract: the tensors, and whatever else makes the kernel (`setup`)."""

    label: str
    tensors: tuple[Tensor, ...]
    setup: Any
    output: Affine | None
    """Qparams of the result; None for float32."""


@dataclass(frozen=True, slots=True)
class Contract:
    """`kernel(sample)` must agree with `reference(sample)` on all `samples()`.

    The reference returns real values in float64; the check scales them to output codes.
    """

    name: str
    kernel: Callable[[Sample], Tensor]
    reference: Callable[[Sample], Tensor]
    samples: Callable[[], Iterator[Sample]]


def check(contract: Contract) -> Verdict:
    """Run a contract. A kernel that raises breaks it.

    >>> def samples():
    ...     yield Sample("one", (torch.tensor([3], dtype=torch.uint8),), None, Affine(1.0, 0))
    >>> check(Contract("copy", lambda s: s.tensors[0], lambda s: s.tensors[0].double() + 2, samples))
    Verdict(kernel='copy', ok=False, reason='one: off by 2.00 steps')
    """
    with torch.no_grad():
        for sample in contract.samples():
            try:
                got = contract.kernel(sample)
            except RuntimeError as error:
                return Verdict(contract.name, ok=False, reason=f"{sample.label}: {str(error).splitlines()[0][:200]}")
            reason = disagreement(got, contract.reference(sample), sample.output)
            if reason:
                return Verdict(contract.name, ok=False, reason=f"{sample.label}: {reason}")
    return Verdict(contract.name, ok=True)


def disagreement(got: Tensor, real: Tensor, output: Affine | None) -> str:
    """Why `got` does not stand for the float64 values `real`; empty where it does.

    >>> disagreement(torch.tensor([4], dtype=torch.uint8), torch.tensor([1.4]).double(), Affine(0.5, 1))
    ''
    """
    if got.shape != real.shape:
        return f"shape {tuple(got.shape)} instead of {tuple(real.shape)}"
    if not got.numel():
        return ""
    if output is None:
        relative = (got.double() - real).abs().max().item() / max(real.abs().max().item(), 1e-30)
        return "" if relative <= _RELATIVE else f"off by {relative:.2g} of the largest value"
    low, high = output.bounds
    exact = (real / output.scale + output.zero_point).clamp(low, high)
    error = (got.double() - exact).abs()
    largest = error.max().item()
    if largest > _STEP + _ROUNDING + _SLACK:
        return f"off by {largest:.2f} steps"
    share = (error > _ROUNDING + _SLACK).double().mean().item()
    return "" if share <= _SHARE else f"{share:.1%} of the codes are not the nearest"


def real_values(codes: Tensor, qparams: Affine) -> Tensor:
    """The float64 values of codes."""
    return (codes.double() - qparams.zero_point) * qparams.scale


def output_for(real: Tensor, zero_point: int | None = None) -> Affine:
    """Qparams that hold most of `real` in `uint8`, and let some of it saturate."""
    if not real.numel():
        return Affine(1.0, 0)
    low, high = min(real.min().item(), 0.0), max(real.max().item(), 0.0)
    scale = max(high - low, 1e-3) / 240.0
    found = min(255, max(0, round(-low / scale))) if zero_point is None else zero_point
    return Affine(scale, found)


def adversarial_codes(shape: tuple[int, ...], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Codes of `shape`: random, all 255, all 0, extremes only, and random ones in awkward memory."""

    def draw(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)

    extremes = draw(0, 2).mul_(255)
    yield "random", _channels_last(draw(0, 256))
    yield "all 255", _channels_last(torch.full(shape, 255, dtype=torch.uint8))
    yield "all 0", torch.zeros(shape, dtype=torch.uint8)
    yield "extremes", _channels_last(extremes)
    yield "contiguous", draw(0, 256)
    yield "strided", torch.randint(0, 256, (*shape, 2), dtype=torch.uint8, generator=generator)[..., 1]
    if len(shape) > 1 and shape[0]:
        yield "empty batch", draw(0, 256)[:0]


def _channels_last(x: Tensor) -> Tensor:
    match x.dim():
        case 4:
            return x.contiguous(memory_format=torch.channels_last)
        case 5:
            return x.contiguous(memory_format=torch.channels_last_3d)
        case _:
            return x
