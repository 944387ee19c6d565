"""The elementwise operator that a kernel applies to its result before it rounds, and torch's words for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, cast

from qfunc.engines.post_op import PostOpLiteral

PostOpName: TypeAlias = Literal["none", "relu", "hardtanh", "hardswish", "silu", "leaky_relu", "tanh", "gelu"]
Algorithm: TypeAlias = Literal["", "none", "tanh"]


@dataclass(frozen=True, slots=True)
class KernelPostOp:
    """A post-op of a kernel.

    `scalars` are the two bounds of `hardtanh` (infinite where there is none) and the negative slope of `leaky_relu`;
    `algorithm` is how `gelu` is computed: `"none"` by the error function, `"tanh"` by its approximation.
    """

    name: PostOpName
    scalars: tuple[float, ...] = ()
    algorithm: Algorithm = ""

    def __post_init__(self) -> None:
        assert self.name in _OPERATOR, self.name
        _, numbers, algorithms = _OPERATOR[self.name]
        assert len(self.scalars) == numbers, f"{self.name} takes {numbers} numbers, not {self.scalars}"
        assert self.algorithm in algorithms, f"{self.name} has no algorithm {self.algorithm!r}"
        # oneDNN refuses bounds that cross, and torch's clamp gives the upper one.
        assert self.name != "hardtanh" or self.scalars[0] <= self.scalars[1], f"bounds {self.scalars}"

    @property
    def operator(self) -> tuple[str, list[float], str]:
        """`(post_op_name, post_op_args, post_op_algorithm)` as torch's operators take them.

        >>> KernelPostOp("silu").operator
        ('swish', [], '')
        """
        return _OPERATOR[self.name][0], list(self.scalars), self.algorithm

    def __str__(self) -> str:
        options = ", ".join([*(f"{scalar:g}" for scalar in self.scalars), *([self.algorithm] * bool(self.algorithm))])
        return f"{self.name}({options})" if options else self.name


# Name here -> name in torch, how many numbers, which algorithms. An unknown algorithm ends the process, so nothing but
# what stands here ever reaches an operator.
_OPERATOR: Mapping[PostOpName, tuple[str, int, tuple[Algorithm, ...]]] = MappingProxyType(
    {
        "none": ("none", 0, ("",)),
        "relu": ("relu", 0, ("",)),
        "hardtanh": ("hardtanh", 2, ("",)),
        "hardswish": ("hardswish", 0, ("",)),
        "silu": ("swish", 0, ("",)),
        "leaky_relu": ("leaky_relu", 1, ("",)),
        "tanh": ("tanh", 0, ("",)),
        "gelu": ("gelu", 0, ("none", "tanh")),
    }
)

NO_POST_OP = KernelPostOp("none")
"""The result as it is."""


def read_post_op(literal: PostOpLiteral) -> KernelPostOp:
    """The post-op that a literal in a node means.

    >>> str(read_post_op(("hardtanh", 0.0, 6.0))), str(read_post_op(("gelu", "tanh")))
    ('hardtanh(0, 6)', 'gelu(tanh)')
    """
    name, *options = literal
    scalars = tuple(option for option in options if not isinstance(option, str))
    algorithm = "".join(option for option in options if isinstance(option, str))
    return KernelPostOp(cast("PostOpName", name), scalars, cast("Algorithm", algorithm))
