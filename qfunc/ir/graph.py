"""The graph: a persistent map of nodes, their total order, and the sources of their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pyrsistent import PMap, pmap

from qfunc.ir.node import Node


class Opaque:
    """An object of the user's, held and compared by identity."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Opaque) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copy of the object would be another object


class Source:
    """A model that tensors and modules are read from, held by identity.

    Graphs of two models are never equal, nor are those of one model whose tensors changed in between.

    `tensors` maps each dotted name to the tensor it had when the graph was traced, with a fingerprint of its state, so
    that a later change can be told. Where modules were replaced before tracing, `model` is a copy that shares its other
    modules with `original`, and `replaced` maps the path of each to the module it stood for and that one's tensors.
    A copied graph is of the same model; how one is pickled, the edge says, which alone can read tensors.
    """

    __slots__ = ("model", "original", "replaced", "tensors", "title")

    def __init__(
        self,
        model: Any,
        title: str,
        tensors: Mapping[str, tuple[Any, object]],
        original: Any = None,
        replaced: Mapping[str, tuple[Any, tuple[Any, ...]]] = pmap(),
    ) -> None:
        self.model = model
        self.title = title
        self.tensors = tensors
        self.original = model if original is None else original
        self.replaced = replaced

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Source) or other.model is not self.model:
            return False
        pairs = ((self.tensors[name], other.tensors.get(name, (None, None))) for name in self.tensors)
        same = all(a is b and before == after for (a, before), (b, after) in pairs)
        return same and len(self.tensors) == len(other.tensors)

    def __hash__(self) -> int:
        return id(self.model)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # a copied graph is of the same model, and costs no weights

    def __repr__(self) -> str:
        return f"Source({self.title})"


@dataclass(frozen=True, slots=True)
class Note:
    """Something that deserves telling and is no error, of a node or of an entry of a configuration.

    >>> print(Note("conv", "is kept as it was written"))
    note: conv is kept as it was written
    """

    node: str
    text: str

    def __str__(self) -> str:
        return f"note: {self.node} {self.text}"


@dataclass(frozen=True, slots=True)
class Step:
    """One recorded pure step: its name, its configuration as text, and the digests before and after."""

    name: str
    config: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class ModuleFact:
    """A module of a source: the canonical name of its type, and whether it was in training mode.

    `base` names the type of `torch.nn` that its type is a subclass of, where it is one; `own` says, in words, what a
    call of it does beside its class's forward: hooks, parametrizations.
    """

    type: str
    training: bool = False
    base: str = ""
    own: str = ""


@dataclass(frozen=True, slots=True)
class Graph:
    """An immutable program. Equality looks at nodes, order, inputs' sources and mode; not at history and notes."""

    nodes: PMap[str, Node]
    order: tuple[str, ...]
    title: str = ""
    training: bool = False
    sources: PMap[str, Source] = pmap()
    objects: PMap[str, Opaque] = pmap()
    modules: PMap[str, ModuleFact] = pmap()
    """Every module path of the source, and what is known of the module."""
    preserved: tuple[str, ...] = ()
    """Attributes of the model that materialized modules are to have."""
    history: tuple[Step, ...] = field(default=(), compare=False, repr=False)
    notes: tuple[Note, ...] = field(default=(), compare=False, repr=False)
    _digest: str | None = field(default=None, init=False, compare=False, repr=False)
    """What `digest` has computed, kept: it and the next are all that is ever written to a graph, and unobservable."""
    _structure: str | None = field(default=None, init=False, compare=False, repr=False)
    """What `structure_digest` has."""

    __hash__ = None  # type: ignore[assignment]

    def __iter__(self) -> Iterator[Node]:
        nodes = self.nodes
        return (nodes[id] for id in self.order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, id: str) -> Node:
        return self.nodes[id]

    def trains(self, node: Node) -> bool:
        """Whether the module that a call is of, or that contains it, was in training mode."""
        fact = self.modules.get(node.origin.module)
        return self.training if fact is None else fact.training
