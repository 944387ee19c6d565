"""Kernels of the user's own, as modules, and their contracts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qfunc.config.host_report import Verdict
from qfunc.config.kernel import KernelRow
from qfunc.edge.kernels.contract import Contract, Sample, adversarial_codes, check, output_for, real_values
from qfunc.edge.kernels.island import Island
from qfunc.engines.island import IslandCall
from qfunc.engines.own import Trial
from qfunc.errors import told
from qfunc.ir import Arg, ListArg, PostOp, Ref
from qfunc.ir.node import NamedArgs
from qfunc.numerics.grid import Affine
from qfunc.ops import BY_NAME
from qfunc.ops.kind import REQUIRED


class OwnFunction(nn.Module):
    """A function of the user's from codes to codes."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *codes: Tensor) -> Tensor:
        """The codes of the result."""
        return self.function(*codes)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return str(getattr(self.function, "__qualname__", type(self.function).__name__))


def made(make: Callable[[IslandCall], Any], call: IslandCall) -> nn.Module:
    """The module of a call."""
    kernel = make(call)
    return kernel if isinstance(kernel, nn.Module) else OwnFunction(kernel)


def check_own(row: KernelRow) -> Verdict:
    """Run a kernel of the user's on its trials, against the meaning of its operator; one that raises breaks it."""
    assert row.own is not None
    make, operators = row.own.make, row.own.operators

    def kernel(sample: Sample) -> Tensor:
        given = [codes.clone() for codes in sample.tensors]
        try:
            got = made(make, sample.setup)(*given)
        except Exception as error:
            raise RuntimeError(f"it raised {told(error)}") from error
        if not all(torch.equal(after, before) for after, before in zip(given, sample.tensors, strict=True)):
            raise RuntimeError("it writes over its operands, which others may read")
        if not isinstance(got, Tensor) or got.dtype != torch.uint8:
            what = got.dtype if isinstance(got, Tensor) else type(got).__name__
            raise RuntimeError(f"it gives {what} instead of uint8 codes")
        return got

    def samples() -> Iterator[Sample]:
        for trial in row.own.trials if row.own is not None else ():
            yield from _samples(trial, trial.operator or operators[0])

    try:
        return check(Contract(row.name, kernel, _meaning, samples))
    except Exception as error:  # noqa: BLE001 - a trial is the user's: its shapes or options may fit no operator
        return Verdict(row.name, ok=False, reason=f"its operator cannot be run on a trial: {told(error)}")


_ZERO_POINTS = (0, 128, 255)


def _samples(trial: Trial, operator: str) -> Iterator[Sample]:
    for turn, zero_point in enumerate(_ZERO_POINTS):
        grids = tuple(Affine(0.05 + 0.01 * i, _ZERO_POINTS[(turn + i) % 3]) for i in range(len(trial.shapes)))
        generator = torch.Generator().manual_seed(turn)
        drawn = [[codes for _, codes in adversarial_codes(shape, generator)] for shape in trial.shapes]
        call = _call(trial, operator, grids)
        for index, tensors in enumerate(() if trial.same_qparams else zip(*drawn, strict=False)):
            real = _meaning(Sample("", tensors, call, None))
            output = output_for(real, _ZERO_POINTS[(turn + index) % 3])
            label = f"{operator} on {', '.join(str(tuple(t.shape)) for t in tensors)}, zero point {zero_point}"
            yield Sample(label, tensors, replace(call, output=output), output)
        same = Affine(0.05, zero_point)  # as `prepare` has it for what passes values on
        shared = replace(call, grids=(same,) * len(trial.shapes), output=same)
        for tensors in zip(*drawn, strict=False):
            yield Sample(f"{operator} with the same qparams {same}", tensors, shared, same)


def _call(trial: Trial, operator: str, grids: tuple[Affine, ...]) -> IslandCall:
    """What a trial computes: the operands take the tensor slots in order, a list of tensors takes all."""
    head, *posts = operator.split(" + ")
    left = [Ref(str(index)) for index in range(len(trial.shapes))]
    args = _arguments(head, trial, left, first=True)
    behind = tuple(PostOp(post, _arguments(post, trial, left, first=False)) for post in posts)
    return IslandCall(head, args, behind, grids, None)


def _arguments(kind: str, trial: Trial, left: list[Ref], *, first: bool) -> NamedArgs:
    found: list[tuple[str, Arg]] = []
    for index, param in enumerate(BY_NAME[kind].params):
        if param.name in BY_NAME[kind].tensors:
            if index == 0 and not first:
                continue  # the value before it
            if param.name == "tensors":
                found.append((param.name, ListArg(tuple(left))))
                left.clear()
            elif left:
                found.append((param.name, left.pop(0)))
            else:
                found.append((param.name, trial.options[param.name]))
        elif param.name in trial.options:
            found.append((param.name, trial.options[param.name]))
        elif param.default is not REQUIRED:
            found.append((param.name, param.default))
    return tuple(found)


def _meaning(sample: Sample) -> Tensor:
    """The operator itself, in float64."""
    call: IslandCall = sample.setup
    floats = [real_values(codes, grid) for codes, grid in zip(sample.tensors, call.grids, strict=True) if grid]
    result: Tensor = Island(replace(call, grids=(None,) * len(floats), output=None), {})(*floats)
    return result
