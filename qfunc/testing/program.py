"""Models as values: a `Program` is the text of a small model, `build` makes the module and its inputs.

A program is a frozen value that compares, hashes and prints; its `repr` is an expression that gives it back, so that a
failing example can be pasted into a test. The module is ordinary: it is deep-copied, pickled and fx-traced like one
written by hand, because its `forward` *is* written by hand: the lines of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

Shape: TypeAlias = tuple[int, ...]
Example: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

NAMES = MappingProxyType({"torch": torch, "nn": nn, "F": F})
"""What the lines of a program may name, apart from `self`, the inputs and earlier values."""

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_KEYS = "abcdefgh"


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a model: one tensor, or a tuple or dict (keys "a", "b", ...) of tensors, of the given shapes.

    Dimension 0 of every shape is the batch.
    """

    name: str
    shapes: tuple[Shape, ...]
    form: Literal["tensor", "tuple", "dict"] = "tensor"

    def example(self, generator: torch.Generator, batch: int | None = None) -> Example:
        """Standard normal values; `batch`, if given, takes the place of dimension 0."""
        sizes = [shape if batch is None else (batch, *shape[1:]) for shape in self.shapes]
        tensors = tuple(torch.randn(size, generator=generator) for size in sizes)
        match self.form:
            case "tensor":
                return tensors[0]
            case "tuple":
                return tensors
            case "dict":
                return dict(zip(_KEYS, tensors, strict=False))

    def parts(self) -> tuple[str, ...]:
        """The expressions that read the tensors of this input.

        >>> Input("x1", ((2, 3), (2, 3)), "dict").parts()
        ("x1['a']", "x1['b']")
        """
        count = len(self.shapes)
        match self.form:
            case "tensor":
                return (self.name,)
            case "tuple":
                return tuple(f"{self.name}[{index}]" for index in range(count))
            case "dict":
                return tuple(f"{self.name}[{key!r}]" for key in _KEYS[:count])


@dataclass(frozen=True, slots=True, repr=False)
class Program:
    """The text of a model.

    `setup` gives the attributes, as (dotted target, expression), `body` the statements of `forward` in order, `result`
    the expression it returns; `defaults` are number-valued parameters after the inputs. Weights depend on `seed` alone.

    >>> relu = Program(0, (Input("x0", ((2, 3),)),), (), (), ("v0 = torch.relu(x0)",), "v0")
    >>> print(relu.source)
    def forward(self, x0):
        v0 = torch.relu(x0)
        return v0
    """

    seed: int
    inputs: tuple[Input, ...]
    defaults: tuple[tuple[str, float], ...]
    setup: tuple[tuple[str, str], ...]
    body: tuple[str, ...]
    result: str

    @property
    def source(self) -> str:
        """The model's `forward`, as Python."""
        parameters = ["self", *(i.name for i in self.inputs), *(f"{name}={value!r}" for name, value in self.defaults)]
        lines = (*self.body, f"return {self.result}")
        return "\n    ".join((f"def forward({', '.join(parameters)}):", *lines))

    @property
    def description(self) -> str:
        """The model as a reader wants it: attributes, then `forward`."""
        return "\n".join((*(f"self.{target} = {value}" for target, value in self.setup), self.source))

    def __repr__(self) -> str:
        fields = {
            "seed": repr(self.seed),
            "inputs": _rows(self.inputs),
            "defaults": repr(self.defaults),
            "setup": _rows(self.setup),
            "body": _rows(self.body),
            "result": repr(self.result),
        }
        return "Program(\n" + "".join(f"    {name}={value},\n" for name, value in fields.items()) + ")"


def _rows(values: tuple[object, ...]) -> str:
    return "(\n" + "".join(f"        {value!r},\n" for value in values) + "    )" if values else "()"


class ProgramModule(nn.Module):
    """What the modules of all programs are; `module_class` adds the `forward` of one."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        for index, (target, expression) in enumerate(program.setup):
            assign(self, program.seed, index, target, expression)
        self.eval()

    def __reduce__(self) -> tuple[Callable[[Program], ProgramModule], tuple[Program], dict[str, Any]]:
        return _blank, (self.program,), self.__dict__


def assign(module: nn.Module, seed: int, index: int, target: str, expression: str) -> None:
    """Set the attribute `target` (dotted) of `module` to the value of `expression`.

    Random values depend on `seed` and `index`; batch norms get statistics and weights as training leaves them: means
    off zero, variances off one, here and there a negative weight.
    """
    with _seeded(1009 * seed + index):
        value = eval(expression, {**NAMES, "self": module})  # noqa: S307 - text of ours
        if isinstance(value, nn.Module):
            for norm in value.modules():
                if isinstance(norm, _NORMS):
                    _train_norm(norm)
    *path, name = target.split(".")
    setattr(module.get_submodule(".".join(path)), name, value.eval() if isinstance(value, nn.Module) else value)


def _train_norm(norm: nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) -> None:
    size = norm.num_features
    with torch.no_grad():
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(0.3 * torch.randn(size))
            norm.running_var.copy_(0.3 + torch.rand(size))
        if norm.affine:
            sign = torch.where(torch.rand(size) < 0.2, -1.0, 1.0)
            norm.weight.copy_(sign * (0.5 + torch.rand(size)))
            norm.bias.copy_(0.2 * torch.randn(size))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def module_class(program: Program) -> type[ProgramModule]:
    """A class whose `forward` is that of `program`: fx reads it from the class, not from the instance."""
    scope: dict[str, Any] = dict(NAMES)
    exec(compile(program.source, "<qfunc.testing program>", "exec"), scope)  # noqa: S102 - text of ours
    return type("ProgramModule", (ProgramModule,), {"forward": scope["forward"]})


def _blank(program: Program) -> ProgramModule:
    cls = module_class(program)
    return cls.__new__(cls)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ModelCase:
    """A model in eval mode, inputs it runs on, and the program they come from.

    Its `repr` is an expression that builds the same case again.
    """

    module: nn.Module
    example_inputs: tuple[Example, ...]
    program: Program

    @property
    def description(self) -> str:
        """The model's text, for people."""
        return self.program.description

    @property
    def named_inputs(self) -> dict[str, Example]:
        """The example inputs by name, for `module(**case.named_inputs)`."""
        return {spec.name: value for spec, value in zip(self.program.inputs, self.example_inputs, strict=True)}

    def batches(self, count: int, size: int | None = None) -> tuple[tuple[Example, ...], ...]:
        """`count` more inputs, each of other values; `size`, if given, is their batch size."""
        return tuple(_examples(self.program, 1 + index, size) for index in range(count))

    def __repr__(self) -> str:
        return f"build({self.program!r})"


def build(program: Program) -> ModelCase:
    """The model and the inputs of a program: a function of the program alone.

    >>> case = build(Program(0, (Input("x0", ((2, 3),)),), (), (("m0", "nn.ReLU()"),), ("v0 = self.m0(x0)",), "v0"))
    >>> case.module(*case.example_inputs).shape
    torch.Size([2, 3])
    """
    return ModelCase(module_class(program)(program), _examples(program, 0), program)


def _examples(program: Program, index: int, batch: int | None = None) -> tuple[Example, ...]:
    generator = torch.Generator().manual_seed(1009 * program.seed + index)
    return tuple(spec.example(generator, batch) for spec in program.inputs)
