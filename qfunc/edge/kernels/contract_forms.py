"""Contracts of what maps codes of one or two tensors to codes, in all memory formats that a kernel may meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qfunc.edge.kernels.contract import Contract, Sample, adversarial_codes, output_for, real_values
from qfunc.numerics.grid import Affine

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


def unary(
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


def binary(
    name: str,
    make: Callable[[Affine, Affine, Affine], torch.nn.Module],
    reference: Callable[[Tensor, Tensor], Tensor],
    *,
    same_shape: bool = False,
) -> Contract:
    """The contract of a module that maps two tensors of codes to one, with broadcasting unless they have one shape."""

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
