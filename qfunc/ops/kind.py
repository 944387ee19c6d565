"""Kinds of operators and the forms in which users write them, as data.

A signature is written as text, `"input, weight, bias=None, stride=1"`. In a form's signature each parameter is named by
the kind's parameter that it gives; `min:min_val=-1.0` is written with the keyword `min_val`; `*shape` takes all the
remaining positional arguments (or one tuple of them); `!x=False` is accepted with that value only; `~inplace=False` is
the switch that makes the call write into its input.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Literal, TypeAlias

from qfunc.ir.value import Arg

Op: TypeAlias = Literal["call_function", "call_method", "call_module"]


Call: TypeAlias = tuple[str, tuple[str, ...]]
"""A function and the arguments it is given, in order; `dtype=` is given by keyword."""


class Required(Enum):
    """The absence of a default."""

    REQUIRED = "required"


REQUIRED = Required.REQUIRED


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter: its name in the kind, the keyword it is written with, its default, and how it binds."""

    name: str
    keyword: str
    default: Arg | Required = REQUIRED
    how: Literal["plain", "spread", "only_default", "inplace"] = "plain"


@dataclass(frozen=True, slots=True)
class Form:
    """One way of writing a kind.

    `fixed` are arguments that the form implies; `attributes` are read from the module that is called; `emit` is the
    target written when the node is materialized, where it differs (the out-of-place twin of `relu_`, say).
    """

    op: Op
    target: str
    params: tuple[Param, ...]
    fixed: tuple[tuple[str, Arg], ...] = ()
    attributes: tuple[str, ...] = ()
    emit: str = ""
    inplace: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """An operator: its parameters, which of them take tensors, which are weights, and its forms.

    `tensors` are the activation operands (each a value, or a list of values); `weights` the parameter operands. `sizes`
    are parameters given as one int or as `rank` of them, or as lists where no `rank` is said; they are kept as tuples.
    `call` computes a node that has no written form; `full_call` does where a parameter that `call` leaves out is not at
    its default.
    """

    name: str
    params: tuple[Param, ...]
    forms: tuple[Form, ...]
    tensors: tuple[str, ...] = ("input",)
    weights: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    rank: int = 0
    call: Call = ("", ())
    full_call: Call = ("", ())


def signature(text: str) -> tuple[Param, ...]:
    """Read a signature.

    >>> [(p.name, p.keyword, p.default, p.how) for p in signature("input, min:min_val=-1.0, *shape")][1:]
    [('min', 'min_val', -1.0, 'plain'), ('shape', 'shape', <Required.REQUIRED: 'required'>, 'spread')]
    """
    return tuple(_param(part) for part in text.split(", ")) if text else ()


# The same few dozen parameters occur hundreds of times: reading each once makes the import noticeably faster.
@cache
def _param(text: str) -> Param:
    name, _, default = text.partition("=")
    how: Literal["plain", "spread", "only_default", "inplace"] = "plain"
    match name[0]:
        case "*":
            how = "spread"
        case "!":
            how = "only_default"
        case "~":
            how = "inplace"
    canonical, _, keyword = name.lstrip("*!~").partition(":")
    return Param(canonical, keyword or canonical, ast.literal_eval(default) if default else REQUIRED, how)


def function(target: str, params: str, *, emit: str = "", inplace: bool = False, **fixed: Arg) -> Form:
    """A function form; `inplace` functions always write into their first argument."""
    return Form("call_function", target, signature(params), tuple(fixed.items()), (), emit, inplace)


def method(target: str, params: str, *, emit: str = "", inplace: bool = False, **fixed: Arg) -> Form:
    """A method form; the first parameter is the object."""
    return Form("call_method", target, signature(params), tuple(fixed.items()), (), emit, inplace)


def module(target: str, attributes: str = "", params: str = "input", **fixed: Arg) -> Form:
    """A module form; `attributes` are read from the module, `name:attribute` where they are called otherwise."""
    return Form("call_module", target, signature(params), tuple(fixed.items()), tuple(attributes.split()))


def kind(
    name: str,
    params: str,
    *forms: Form,
    call: str = "",
    full_call: str = "",
    tensors: str = "input",
    weights: str = "",
    sizes: str = "",
    rank: int = 0,
) -> Kind:
    """A row of the vocabulary; `call` is written `"torch.clamp(input, min, max)"`."""
    return Kind(
        name,
        signature(params),
        forms,
        tuple(tensors.split()),
        tuple(weights.split()),
        tuple(sizes.split()),
        rank,
        _call(call),
        _call(full_call),
    )


def _call(text: str) -> Call:
    target, _, names = text.rstrip(")").partition("(")
    return target, tuple(names.split(", ")) if names else ()
