"""Tensors of every kind that an observer may meet, made from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float32).max
LEAST = 2.0**-149

Shape = tuple[int, ...]
Draw = Callable[[Shape, random.Random, torch.Generator], Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One to four tensors of one class, with as many channels along `ch_axis`; `str` is enough to make it again."""

    seed: int
    kind: str
    ch_axis: int
    tensors: tuple[Tensor, ...]

    def __str__(self) -> str:
        shapes = ", ".join(str(tuple(x.shape)) for x in self.tensors)
        return f"case(seed={self.seed}): {self.kind}, {self.tensors[0].dtype}, ch_axis={self.ch_axis}, shapes {shapes}"


def _normal(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=g) * 10 ** r.uniform(-6, 6) + r.choice((0.0, 0.0, r.uniform(-3, 3)))


def _uniform(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    low, high = sorted((r.uniform(-9, 9), r.uniform(-9, 9)))
    return torch.rand(shape, generator=g) * (high - low) + low


def _constant(*values: float) -> Draw:
    return lambda shape, r, g: torch.full(shape, r.choice(values))


def _subnormal(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    codes = torch.randint(-(2**23) + 1, 2**23, shape, generator=g).to(torch.float64)
    return (codes * r.choice((LEAST, LEAST, 2.0**-140))).to(torch.float32)


def _mixed(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    lowest, highest = r.choice(((-44, 38), (-20, 20), (-3, 11)))
    exponents = torch.rand(shape, generator=g, dtype=torch.float64) * (highest - lowest) + lowest
    return (10**exponents).to(torch.float32) * torch.randn(shape, generator=g).sign()


def _huge(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    """Up to the largest float32 on both sides or on one, so that widths and averages overflow."""
    x = torch.rand(shape, generator=g, dtype=torch.float64) * 2 - 1
    x = x.sign() if r.random() < 0.3 else r.choice((x, x, x.abs(), -x.abs()))
    return (x * LARGEST * r.choice((1.0, 1.0, 0.6, 1e-3))).to(torch.float32)


def _border(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    """Where the cubes of a histogram search begin to overflow or vanish in float32."""
    return torch.randn(shape, generator=g) * 10 ** r.choice((r.uniform(9, 16), r.uniform(-16, -7)))


def _huge_beside_small(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    """Slices of magnitudes of their own: the width of one may overflow beside one that is 1."""
    axis = r.randrange(len(shape))
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    scales = torch.tensor([r.choice((1.0, 1e-6, 3.0, 3.4e38)) for _ in range(shape[axis])]).view(sizes)
    x = torch.rand(shape, generator=g) * 2 - 1
    return r.choice((x, x.sign())) * scales


def _one_sided(sign: float) -> Draw:
    def draw(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
        x = (torch.randn(shape, generator=g).abs() + r.choice((0.0, 0.1, 50.0))) * 10 ** r.uniform(-9, 9)
        return x * sign

    return draw


def _relu(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    return (torch.randn(shape, generator=g) - r.choice((0.0, 1.5, 3.0))).relu()


def _outliers(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    x = torch.randn(shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < 0.02, x * 10 ** r.uniform(1, 5), x)


def _integers(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    limit = r.choice((2, 8, 128, 2**20))
    return torch.randint(-limit, limit, shape, generator=g).to(torch.float32)


def _ties(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    """Ranges whose zero point lies between two codes, up to rounding."""
    end = r.uniform(0.1, 10)
    return (torch.randint(-1, 2, shape, generator=g) * end).to(torch.float32)


def _narrow(shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    """A few float32 steps wide, far from zero."""
    return r.choice((1.0, -7.0, 1e8)) * (1 + torch.randint(0, 4, shape, generator=g) * 2.0**-23)


KINDS: Mapping[str, Draw] = {
    "normal": _normal,
    "uniform": _uniform,
    "zero": _constant(0.0, -0.0),
    "positive constant": _constant(1.0, 0.1, 255.0),
    "negative constant": _constant(-1.0, -0.1, -255.0),
    "tiny constant": _constant(1e-30, -1e-38, 1e-8, 1e-40, -LEAST),
    "huge constant": _constant(LARGEST, -LARGEST, 1e30, -1e36),
    "subnormal": _subnormal,
    "mixed magnitudes": _mixed,
    "huge": _huge,
    "border": _border,
    "huge beside small": _huge_beside_small,
    "positive": _one_sided(1.0),
    "negative": _one_sided(-1.0),
    "relu": _relu,
    "outliers": _outliers,
    "integers": _integers,
    "ties": _ties,
    "narrow": _narrow,
    "single": _normal,
    "channels last": _normal,
    "float16": _normal,
    "bfloat16": _normal,
    "float64": _normal,
    "with empty": _normal,
    "only empty": _normal,
    "changing": _normal,
}
"""The classes; the last ones say what is done with normal numbers."""


def kind_of(seed: int) -> str:
    """The class of a case."""
    return tuple(KINDS)[seed % len(KINDS)]


def case(seed: int, least: int = 1, most: int = 40) -> Case:
    """The case of a seed: tensors of 0 to 4 axes, the last, unless of channels, of `least` to `most` values."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    kind = kind_of(seed)
    dims = 4 if kind == "channels last" else r.randint(1, 4)
    ch_axis = r.randrange(dims)
    channels = r.randint(1, 5)

    def shape() -> Shape:
        sizes = [r.randint(1, 4) for _ in range(dims - 1)] + [r.randint(least, most)]
        sizes[ch_axis] = max(channels, least if ch_axis == dims - 1 else 1)
        return tuple(sizes)

    tensors = tuple(_drawn(kind, shape(), r, g) for _ in range(r.randint(1, 4)))
    if kind == "with empty":
        empty = [1] * dims
        empty[ch_axis], empty[(ch_axis + 1) % dims] = channels, 0
        spot = r.randint(0, len(tensors))
        tensors = (*tensors[:spot], torch.zeros(empty), *tensors[spot:])[:4]
    return Case(seed, kind, ch_axis, tensors)


def _drawn(kind: str, shape: Shape, r: random.Random, g: torch.Generator) -> Tensor:
    draw = KINDS[r.choice(tuple(KINDS)[:19])] if kind == "changing" else KINDS[kind]
    x = draw(shape, r, g).to(torch.float32)
    match kind:
        case "single":
            return x.reshape(-1)[0].reshape(r.choice(((), (1,) * len(shape))))
        case "only empty":
            return x[..., :0]
        case "channels last":
            return x.contiguous(memory_format=torch.channels_last)
        case "float16" | "bfloat16" | "float64":
            dtype: torch.dtype = getattr(torch, kind)
            limit = min(torch.finfo(dtype).max, LARGEST)
            return (x.to(torch.float64) * (1 + 1e-11)).clamp(-limit, limit).to(dtype)
    return x
