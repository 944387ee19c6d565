"""A program while it is written: each line runs as soon as it is there, so that the next one knows its operands.

What is known of a value (shape, strides, which storage it lies in) is what torch says of it, so that the rules of no
operator are written a second time. A `Draft` is mutable and lives inside one call of `write_program`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from qfunc.testing.program import NAMES, Input, Program, Shape, assign, build

T = TypeVar("T")

_LARGEST = 1000.0
_MOST_ELEMENTS = 1 << 14


class Pick(Protocol):
    """Chooses one of several options; the first is the simplest."""

    def __call__(self, options: Sequence[T], /) -> T:
        """One of `options`, which are not empty."""
        ...


class Draft:
    """The lines so far and the values they computed."""

    def __init__(self, seed: int, inputs: tuple[Input, ...], defaults: tuple[tuple[str, float], ...]) -> None:
        self.seed, self.inputs, self.defaults = seed, inputs, defaults
        self.setup: list[tuple[str, str]] = []
        self.body: list[str] = []
        self.live: dict[str, Tensor] = {}
        self.calls: list[tuple[str, str, Shape]] = []
        self._module = nn.Module().eval()
        given = dict(zip((i.name for i in inputs), build(self.program("None")).example_inputs, strict=True))
        self._scope: dict[str, Any] = {**NAMES, **dict(defaults), **given, "self": self._module}
        for spec in inputs:
            if spec.form == "tensor":
                self.live[spec.name] = self._scope[spec.name]
            else:
                for part in spec.parts():
                    self.value(part)
        self._inputs = frozenset(_storage(tensor) for tensor in self.live.values())

    def program(self, result: str) -> Program:
        """The program so far, returning `result`."""
        return Program(self.seed, self.inputs, self.defaults, tuple(self.setup), tuple(self.body), result)

    def shape(self, name: str) -> Shape:
        """The shape of a live value."""
        return tuple(self.live[name].shape)

    def latest(self) -> list[str]:
        """All live values, the latest first."""
        return list(reversed(self.live))

    def attribute(self, prefix: str, expression: str, path: str = "") -> str:
        """A new attribute of the model, or with `path` a dotted one that exists; returns the expression to read it."""
        target = path or f"{prefix}{len(self.setup)}"
        assign(self._module, self.seed, len(self.setup), target, expression)
        self.setup.append((target, expression))
        return f"self.{target}"

    def call(self, constructor: str, x: str) -> str:
        """A new module of the given constructor, called on `x`."""
        module = self.attribute("m", constructor)
        self.calls.append((module, constructor, self.shape(x)))
        return f"{module}({x})"

    def statement(self, line: str) -> None:
        """Run a line that gives no new tensor, and keep it."""
        with torch.no_grad():
            exec(line, self._scope)  # noqa: S102 - text of ours
        self.body.append(line)

    def value(self, expression: str, *, always: bool = False) -> str | None:
        """A new value; None, and nothing written, where it would be empty, too large, or not a finite number.

        Programs are to compute something that a reader can compare: powers of powers would only overflow. `always`
        is for lines that cannot be taken back, because they write to memory.
        """
        name = f"v{len(self.body)}"
        with torch.no_grad():
            result = eval(expression, self._scope)  # noqa: S307 - text of ours
        if isinstance(result, Tensor):
            sane = 0 < result.numel() <= _MOST_ELEMENTS and bool(result.abs().max() < _LARGEST)
            if not (sane or always):
                return None
            self.live[name] = result
        self._scope[name] = result
        self.body.append(f"{name} = {expression}")
        return name

    def writable(self, x: str) -> bool:
        """Whether an in-place operator may write to `x`: not an input's memory, no element at two places."""
        tensor = self.live[x]
        repeats = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return _storage(tensor) not in self._inputs and not repeats

    def aliases(self, x: str) -> list[str]:
        """The other live values that lie in the memory of `x`, the latest first."""
        storage = _storage(self.live[x])
        return [name for name in self.latest() if name != x and _storage(self.live[name]) == storage]

    def forget(self, names: Sequence[str]) -> None:
        """No later line will read these."""
        for name in names:
            del self.live[name]

    def viewable(self, x: str) -> bool:
        """Whether `x` is contiguous, at any batch size (torch overlooks the strides of dimensions of size 1)."""
        tensor = self.live[x]
        return tensor.is_contiguous() and tensor.stride(0) == math.prod(tensor.shape[1:])

    def partners(self, x: str) -> list[str]:
        """Values of the shape of `x`, the latest first, `x` itself last."""
        return [y for y in self.latest() if y != x and self.shape(y) == self.shape(x)] + [x]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
