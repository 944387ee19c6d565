"""A node: one computed value, in the vocabulary of `qfunc.ops`, and how the user wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from qfunc.ir.value import Arg, Ref, map_arg, refs

Op: TypeAlias = Literal["placeholder", "get_attr", "call_function", "call_method", "call_module", "output"]
NamedArgs: TypeAlias = tuple[tuple[str, Arg], ...]


@dataclass(frozen=True, slots=True)
class TensorFact:
    """What an example showed of a tensor: rank, dtype, channels may be relied on, batch and spatial sizes may not."""

    shape: tuple[int, ...]
    dtype: str
    device: str

    def __repr__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


Fact: TypeAlias = "TensorFact | tuple[Fact, ...] | None"


def fact_in(fact: Fact, dtype: str) -> Fact:
    """The fact of a tensor of the same shape and device in another dtype.

    >>> fact_in(TensorFact((2, 3), "float32", "cpu"), "uint8")
    uint8[2, 3]
    """
    return TensorFact(fact.shape, dtype, fact.device) if isinstance(fact, TensorFact) else fact


@dataclass(frozen=True, slots=True)
class Written:
    """The call as the user wrote it: which of the node's arguments stood where.

    `args` are argument names in positional order, a leading `*` meaning that the value was spread; `kwargs` pairs the
    keyword as written with the argument's name. Arguments in neither come from the module that is called.
    """

    op: Op
    target: str
    args: tuple[str, ...] = ()
    kwargs: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from: `module` is the path of the module called, or of the one whose forward contains it."""

    module: str = ""
    type: str = ""
    written: Written | None = None
    line: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class PostOp:
    """An operator fused behind another: its input is the value before it; `args` are its other arguments."""

    kind: str
    args: NamedArgs = ()
    origin: Origin = Origin()

    def get(self, name: str) -> Arg:
        """The argument called `name`."""
        return _get(self.args, name)

    def __repr__(self) -> str:
        return f"{self.kind}({', '.join(f'{k}={v!r}' for k, v in self.args)})" if self.args else self.kind


@dataclass(frozen=True, slots=True)
class Node:
    """A value: `kind` of operator, arguments by name, operators fused behind it, origin, and facts about the value.

    `aliased` says that the value shares memory with one that is changed in place, so that no pass may touch it.
    """

    id: str
    kind: str
    args: NamedArgs = ()
    post: tuple[PostOp, ...] = ()
    origin: Origin = Origin()
    fact: Fact = None
    aliased: bool = False

    @property
    def place(self) -> str:
        """Where a user finds it: the path of a module, the name of an input, or its id and the module it is in."""
        written, module = self.origin.written, self.origin.module
        if written is not None and written.op == "placeholder":
            return f"input {written.target!r}"
        if written is not None and written.op == "call_module" and module:
            return module
        return f"{self.id} in {module}" if module else self.id

    def get(self, name: str) -> Arg:
        """The argument called `name`; a `KeyError` when this kind has none."""
        return _get(self.args, name)

    def has(self, name: str) -> bool:
        """Whether there is an argument called `name`."""
        return any(key == name for key, _ in self.args)

    def uses(self) -> Iterator[str]:
        """The ids this node refers to, in argument order, with repetition."""
        yield from refs(tuple([value for _, value in self.args]))
        for post in self.post:
            yield from refs(tuple([value for _, value in post.args]))

    def map(self, function: Callable[[Arg], Arg]) -> Node:
        """This node with `function` applied to the leaves of its arguments; the same object when none changes."""
        args = map_named(self.args, function)
        post = tuple([_map_post(p, function) for p in self.post])
        if args is self.args and all(a is b for a, b in zip(post, self.post, strict=True)):
            return self
        return Node(self.id, self.kind, args, post, self.origin, self.fact, self.aliased)

    def with_args(self, **changes: Arg) -> Node:
        """This node with some arguments replaced or added."""
        known = {key for key, _ in self.args}
        args = tuple([(pair[0], changes[pair[0]]) if pair[0] in changes else pair for pair in self.args])
        args += tuple([(key, value) for key, value in changes.items() if key not in known])
        return Node(self.id, self.kind, args, self.post, self.origin, self.fact, self.aliased)


def map_named(args: NamedArgs, function: Callable[[Arg], Arg]) -> NamedArgs:
    """Named arguments with `function` applied to their leaves; the same object when none changes."""
    mapped = tuple([_map_pair(pair, function) for pair in args])
    return args if all(a is b for a, b in zip(mapped, args, strict=True)) else mapped


def _map_pair(pair: tuple[str, Arg], function: Callable[[Arg], Arg]) -> tuple[str, Arg]:
    value = map_arg(pair[1], function)
    return pair if value is pair[1] else (pair[0], value)


def substitute(changes: dict[str, str]) -> Callable[[Arg], Arg]:
    """A leaf function that redirects references."""
    return lambda leaf: Ref(changes[leaf.id]) if isinstance(leaf, Ref) and leaf.id in changes else leaf


def _map_post(post: PostOp, function: Callable[[Arg], Arg]) -> PostOp:
    args = map_named(post.args, function)
    return post if args is post.args else PostOp(post.kind, args, post.origin)


def _get(args: NamedArgs, name: str) -> Arg:
    for key, value in args:
        if key == name:
            return value
    raise KeyError(name)
