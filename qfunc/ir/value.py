"""What a node's argument may be: plain immutable data, references to other nodes, names of torch objects.

Lists, dicts and slices, which Python makes mutable or unhashable, have frozen counterparts here, so that every
argument can be compared, hashed and printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import TypeAlias

from qfunc.numerics.grid import Affine, Grid
from qfunc.numerics.qparams import QuantSpec


@dataclass(frozen=True, slots=True)
class Ref:
    """A use of the value that the node `id` computes."""

    id: str

    def __repr__(self) -> str:
        return f"%{self.id}"


@dataclass(frozen=True, slots=True)
class Name:
    """A torch object known by name: a dtype, device, layout, memory format, function or type."""

    name: str

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Token:
    """An object without a name, kept in the graph's side table under `id`."""

    id: str

    def __repr__(self) -> str:
        return f"${self.id}"


@dataclass(frozen=True, slots=True)
class RecordArg:
    """A named tuple: its type (a `Name` or `Token`) and its items."""

    type: Name | Token
    items: tuple[Arg, ...]

    def __repr__(self) -> str:
        return f"{self.type!r}({', '.join(map(repr, self.items))})"


class Expression:
    """Base of parameter expressions (`qfunc.params`): how a tensor is computed from source tensors, later."""

    __slots__ = ()


class Body:
    """Base of plain data that says what a kernel computes; it refers to no node."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class ListArg:
    """A list."""

    items: tuple[Arg, ...]

    def __repr__(self) -> str:
        return f"[{', '.join(map(repr, self.items))}]"


@dataclass(frozen=True, slots=True)
class DictArg:
    """A dict, in insertion order."""

    items: tuple[tuple[Arg, Arg], ...]

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{k!r}: {v!r}" for k, v in self.items) + "}"


@dataclass(frozen=True, slots=True)
class SliceArg:
    """A slice, whose bounds may be references."""

    start: Arg
    stop: Arg
    step: Arg


Arg: TypeAlias = (
    None
    | bool
    | int
    | float
    | complex
    | str
    | bytes
    | EllipsisType
    | Ref
    | Name
    | Token
    | Expression
    | Body
    | ListArg
    | DictArg
    | SliceArg
    | RecordArg
    | Affine
    | Grid
    | QuantSpec
    | tuple["Arg", ...]
)
"""An argument of a node."""


def refs(arg: Arg) -> Iterator[str]:
    """The ids that an argument refers to, left to right, with repetition.

    >>> list(refs((Ref("a"), ListArg((Ref("b"), 3)))))
    ['a', 'b']
    """
    match arg:
        case Ref(id):
            yield id
        case tuple() | ListArg() | RecordArg():
            for item in arg if isinstance(arg, tuple) else arg.items:
                # Most items are numbers: a generator for each would double the time of a walk over a graph.
                if isinstance(item, Ref):
                    yield item.id
                elif isinstance(item, _HOLDERS):
                    yield from refs(item)
        case DictArg(items):
            for key, value in items:
                yield from refs(key)
                yield from refs(value)
        case SliceArg(start, stop, step):
            for bound in (start, stop, step):
                yield from refs(bound)
        case _:
            return


_HOLDERS = (tuple, ListArg, RecordArg, DictArg, SliceArg)


def map_arg(arg: Arg, function: Callable[[Arg], Arg]) -> Arg:
    """Rebuild an argument with `function` applied to its leaves; what does not change stays the same object.

    >>> map_arg((Ref("a"), 1), lambda leaf: Ref("b") if leaf == Ref("a") else leaf)
    (%b, 1)
    """
    match arg:
        case tuple():
            items = tuple([map_arg(item, function) for item in arg])
            return arg if _same(items, arg) else items
        case ListArg(old):
            items = tuple([map_arg(item, function) for item in old])
            return arg if _same(items, old) else ListArg(items)
        case RecordArg(type, old):
            items = tuple([map_arg(item, function) for item in old])
            return arg if _same(items, old) else RecordArg(type, items)
        case DictArg(old_pairs):
            pairs = tuple([(map_arg(k, function), map_arg(v, function)) for k, v in old_pairs])
            unchanged = all(k is ok and v is ov for (k, v), (ok, ov) in zip(pairs, old_pairs, strict=True))
            return arg if unchanged else DictArg(pairs)
        case SliceArg(start, stop, step):
            bounds = (map_arg(start, function), map_arg(stop, function), map_arg(step, function))
            return arg if _same(bounds, (start, stop, step)) else SliceArg(*bounds)
        case _:
            return function(arg)


def _same(new: tuple[Arg, ...], old: tuple[Arg, ...]) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))
