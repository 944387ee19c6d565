"""The contracts of the kernels of engine `"onednn"`: plain codes in, plain codes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.affine import Clamp, Dequantize, Quantize, tabulate
from qfunc.edge.kernels.arithmetic import Add, Cat, Mul, Stack
from qfunc.edge.kernels.base import operator
from qfunc.edge.kernels.contract import Contract
from qfunc.edge.kernels.contract_forms import binary, unary
from qfunc.edge.kernels.dynamic_contracts import dynamic_contracts, float_contracts
from qfunc.edge.kernels.pool import AdaptiveAvgPool, AvgPool, MaxPool, Mean, Sum
from qfunc.edge.kernels.spatial_contracts import spatial_contracts, transposed_contracts
from qfunc.edge.kernels.weighted_contracts import weighted_contracts
from qfunc.numerics.grid import Affine
from qfunc.numerics.saturation import PairLayouts

_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG_POOL: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE: dict[int, Callable[..., Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class _OnednnBinary(torch.nn.Module):
    """`onednn.qadd.tensor` and its like: no kernel of qfunc's, measured so that the report can say why."""

    def __init__(self, name: str, left: Affine, right: Affine, output: Affine) -> None:
        super().__init__()
        self._operator = operator("onednn", name, "tensor")
        self._left, self._right = (left.scale, left.zero_point), (right.scale, right.zero_point)
        self._output = (output.scale, output.zero_point, torch.uint8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self._operator is None:
            raise RuntimeError("this torch has no such operator")
        return self._operator(x, *self._left, y, *self._right, *self._output)  # type: ignore[no-any-return]


def _shapes(dims: int) -> tuple[tuple[int, ...], ...]:
    return ((2, 5, *(7, 6, 5)[:dims]), (1, 16, *(8, 5, 4)[:dims]))


def _pools(dims: int) -> Iterator[Contract]:
    suffix = f"pool{dims}d"

    def window(value: int) -> tuple[int, ...]:
        return (value,) * dims

    max_options = (window(3), window(2), window(1), window(1))
    yield unary(
        f"max_{suffix}",
        lambda _a, _b: MaxPool(*max_options, ceil_mode=True),
        lambda x: _MAX_POOL[dims](x, *max_options, ceil_mode=True),
        _shapes(dims), same=True, all_codes=False,
    )  # fmt: skip
    yield unary(
        f"avg_{suffix}",
        lambda a, b: AvgPool(window(3), a, b, stride=window(2), padding=window(1), ceil_mode=True),
        lambda x: _AVG_POOL[dims](x, window(3), window(2), window(1), ceil_mode=True),
        _shapes(dims), all_codes=False,
    )  # fmt: skip
    yield unary(
        f"adaptive_avg_{suffix}",
        lambda a, b: AdaptiveAvgPool(window(2), a, b),
        lambda x: _ADAPTIVE[dims](x, window(2)),
        _shapes(dims), all_codes=False,
    )  # fmt: skip


def onednn_contracts(layouts: PairLayouts) -> tuple[Contract, ...]:
    """The contracts of engine `"onednn"`, with weights that a host with these pair layouts bears."""
    return (
        *weighted_contracts(layouts),
        *transposed_contracts(layouts),
        *dynamic_contracts(layouts),
        *plain_contracts(),
        binary("onednn.qadd.tensor", partial(_OnednnBinary, "qadd"), torch.add, same_shape=True),
        binary("onednn.qmul.tensor", partial(_OnednnBinary, "qmul"), torch.mul, same_shape=True),
    )


def plain_contracts() -> tuple[Contract, ...]:
    """The kernels that are aten operators on plain codes."""
    shapes = ((2, 5, 7, 6), (3, 16), (1, 3, 4, 5, 2))
    return (
        *float_contracts(),
        unary("table", lambda a, b: tabulate(torch.sigmoid, a, b), torch.sigmoid, (*shapes, (2, 64, 16, 16))),
        unary("quantize", lambda a, b: torch.nn.Sequential(Dequantize(a), Quantize(b)), lambda x: x, shapes),
        unary(
            "clamp",
            lambda a, _: Clamp(a.zero_point, None),
            torch.relu,
            shapes,
            same=True,
        ),
        *(contract for dims in (1, 2, 3) for contract in _pools(dims)),
        unary("mean", lambda a, b: Mean((-1,), a, b), lambda x: x.mean(-1), shapes, all_codes=False),
        unary("sum", lambda a, b: Sum((-1,), a, b), lambda x: x.sum(-1), shapes, all_codes=False),
        *(
            contract
            for name, make, function in (
                ("add", Add, torch.add),
                ("sub", partial(Add, alpha=-1.0), torch.sub),
                ("mul", Mul, torch.mul),
            )
            for contract in (
                binary(name, make, function),
                binary(f"{name}[relu]", partial(make, post_op="relu"), partial(_relu_of, function)),
            )
        ),
        *(
            binary(name, partial(_joined, make), partial(_joined_reals, function), same_shape=True)
            for name, make, function in (("cat", Cat, torch.cat), ("stack", Stack, torch.stack))
        ),
        *spatial_contracts(),
    )


def _joined(make: Callable[..., Cat], left: Affine, right: Affine, output: Affine) -> torch.nn.Module:
    return _Call(make((left, right), output, -1))


def _joined_reals(function: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    return function([x, y], -1)


def _relu_of(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return function(x, y).relu()


class _Call(torch.nn.Module):
    def __init__(self, cat: Cat) -> None:
        super().__init__()
        self.cat = cat

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.cat(tensors)  # type: ignore[no-any-return]
