"""The contracts of the kernels of engine `"onednn"`: plain codes in, plain codes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from qfunc.edge.kernels.affine import Clamp, Dequantize, Quantize, tabulate
from qfunc.edge.kernels.arithmetic import Add, Cat, Mul
from qfunc.edge.kernels.base import operator
from qfunc.edge.kernels.contract import Contract, Sample, adversarial_codes, output_for, real_values
from qfunc.edge.kernels.dynamic_contracts import dynamic_contracts, float_contracts
from qfunc.edge.kernels.pool import AdaptiveAvgPool, AvgPool, MaxPool, Mean
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
_ZERO_POINTS = (0, 128, 255)


def every_code(label: str, *shape: int) -> Iterator[tuple[str, Tensor]]:
    """All 256 codes, in all memory formats a kernel may meet."""
    generator = torch.Generator().manual_seed(9)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    yield f"{label}, all codes", codes
    yield f"{label}, no codes", codes[:0]
    yield f"{label}, scalar", codes[200]
    for name, x in adversarial_codes(shape, generator):
        yield f"{label}, {name}", x


def _unary(
    name: str,
    make: Callable[[Affine, Affine], torch.nn.Module],
    reference: Callable[[Tensor], Tensor],
    shapes: tuple[tuple[int, ...], ...],
    *,
    same: bool = False,
    all_codes: bool = True,
) -> Contract:
    """The contract of a module that maps codes to codes, over zero points 0, 128 and 255 on both sides."""

    def samples() -> Iterator[Sample]:
        for turn, zero_point in enumerate(_ZERO_POINTS):
            given = Affine(0.05, zero_point)
            output = given if same else Affine(0.031, _ZERO_POINTS[turn - 1])
            for shape in shapes:
                generator = torch.Generator().manual_seed(turn)
                inputs = every_code if all_codes else lambda label, *s: adversarial_codes(s, generator)  # noqa: ARG005, B023
                for label, x in inputs(f"{given} {shape}", *shape):
                    yield Sample(label, (x,), (given, output), output)

    def kernel(sample: Sample) -> Tensor:
        return make(*sample.setup)(sample.tensors[0])  # type: ignore[no-any-return]

    def meaning(sample: Sample) -> Tensor:
        return reference(real_values(sample.tensors[0], sample.setup[0]))

    return Contract(name, kernel, meaning, samples)


def _binary(
    name: str,
    make: Callable[[Affine, Affine, Affine], torch.nn.Module],
    reference: Callable[[Tensor, Tensor], Tensor],
    *,
    same_shape: bool = False,
) -> Contract:
    def samples() -> Iterator[Sample]:
        generator = torch.Generator().manual_seed(6)
        grid = torch.arange(256, dtype=torch.int32).to(torch.uint8)
        pairs = [(grid.repeat(256), grid.repeat_interleave(256))]
        first, second = (list(adversarial_codes((2, 5, 3, 4), generator)) for _ in range(2))
        # Each with the next, so that memory formats differ; the empty batches last, with each other.
        pairs += [(x, y) for (_, x), (_, y) in zip(first, [*second[1:-1], second[0], second[-1]], strict=True)]
        if not same_shape:
            x = torch.randint(0, 256, (2, 5, 3, 4), dtype=torch.uint8, generator=generator)
            pairs += [(x, x[:, :, :1, :1]), (x[:, :, :1, :1], x), (x, x[0, 0, 0]), (x, x[0, 0, 0, 0])]
        for turn, (x, y) in enumerate(pairs):
            left, right = Affine(0.05, _ZERO_POINTS[turn % 3]), Affine(0.037, _ZERO_POINTS[(turn + 1) % 3])
            output = output_for(reference(real_values(x, left), real_values(y, right)))
            yield Sample(f"{tuple(x.shape)}, {tuple(y.shape)}", (x, y), (left, right, output), output)

    def kernel(sample: Sample) -> Tensor:
        return make(*sample.setup)(*sample.tensors)  # type: ignore[no-any-return]

    def meaning(sample: Sample) -> Tensor:
        left, right, _ = sample.setup
        return reference(real_values(sample.tensors[0], left), real_values(sample.tensors[1], right))

    return Contract(name, kernel, meaning, samples)


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
    yield _unary(
        f"max_{suffix}",
        lambda _a, _b: MaxPool(*max_options, ceil_mode=True),
        lambda x: _MAX_POOL[dims](x, *max_options, ceil_mode=True),
        _shapes(dims), same=True, all_codes=False,
    )  # fmt: skip
    yield _unary(
        f"avg_{suffix}",
        lambda a, b: AvgPool(window(3), a, b, stride=window(2), padding=window(1), ceil_mode=True),
        lambda x: _AVG_POOL[dims](x, window(3), window(2), window(1), ceil_mode=True),
        _shapes(dims), all_codes=False,
    )  # fmt: skip
    yield _unary(
        f"adaptive_avg_{suffix}",
        lambda a, b: AdaptiveAvgPool(window(2), a, b),
        lambda x: _ADAPTIVE[dims](x, window(2)),
        _shapes(dims), all_codes=False,
    )  # fmt: skip


def onednn_contracts(layouts: PairLayouts) -> tuple[Contract, ...]:
    """The contracts of engine `"onednn"`, with weights that a host with these pair layouts bears."""
    return (
        *weighted_contracts(layouts),
        *dynamic_contracts(layouts),
        *plain_contracts(),
        _binary("onednn.qadd.tensor", partial(_OnednnBinary, "qadd"), torch.add, same_shape=True),
        _binary("onednn.qmul.tensor", partial(_OnednnBinary, "qmul"), torch.mul, same_shape=True),
    )


def plain_contracts() -> tuple[Contract, ...]:
    """The kernels that are aten operators on plain codes."""
    shapes = ((2, 5, 7, 6), (3, 16), (1, 3, 4, 5, 2))
    return (
        *float_contracts(),
        _unary("table", lambda a, b: tabulate(torch.sigmoid, a, b), torch.sigmoid, (*shapes, (2, 64, 16, 16))),
        _unary("quantize", lambda a, b: torch.nn.Sequential(Dequantize(a), Quantize(b)), lambda x: x, shapes),
        _unary(
            "clamp",
            lambda a, _: Clamp(a.zero_point, None),
            torch.relu,
            shapes,
            same=True,
        ),
        *(contract for dims in (1, 2, 3) for contract in _pools(dims)),
        _unary("mean", lambda a, b: Mean((-1,), a, b), lambda x: x.mean(-1), shapes, all_codes=False),
        *(
            contract
            for name, make, function in (("add", Add, torch.add), ("mul", Mul, torch.mul))
            for contract in (
                _binary(name, make, function),
                _binary(f"{name}[relu]", partial(make, post_op="relu"), partial(_relu_of, function)),
            )
        ),
        _binary(
            "cat",
            lambda a, b, o: _Call(Cat((a, b), o, -1)),
            lambda x, y: torch.cat([x, y], -1),
            same_shape=True,
        ),
    )


def _relu_of(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
    return function(x, y).relu()


class _Call(torch.nn.Module):
    def __init__(self, cat: Cat) -> None:
        super().__init__()
        self.cat = cat

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.cat(tensors)  # type: ignore[no-any-return]
