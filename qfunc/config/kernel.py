"""Kernels as rows of data: what an engine can run, and on which terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from qfunc.config.host_report import HostReport
from qfunc.errors import Problem
from qfunc.ir import Graph, ListArg, Node, Origin, Ref, map_arg, refs
from qfunc.ir.node import NamedArgs
from qfunc.ir.value import Arg
from qfunc.numerics.grid import Affine, Grid
from qfunc.numerics.unmeasured import Cast, Dynamic

How: TypeAlias = Affine | Grid | Dynamic | Cast | None
"""How an operand is given: as codes of known qparams, as floats that are quantized when the model runs, as floats that
are cast to a smaller type, or as floats."""

CODES: tuple[type, ...] = (Affine,)
FLOATS: tuple[type, ...] = (type(None),)

ISLAND = "float island"
"""The name of an engine's row for operators that compute in float between codes."""


@dataclass(frozen=True, slots=True)
class Operand:
    """An activation operand of a call: the id of its value, and how that is given.

    Of what is quantized or cast as the model runs, `value` is the float value before that.
    """

    value: str
    how: How

    @property
    def codes(self) -> str:
        """The id of its integer codes."""
        assert isinstance(self.how, Affine), self
        return self.value

    @property
    def affine(self) -> Affine:
        """The qparams of its codes."""
        assert isinstance(self.how, Affine), self
        return self.how


@dataclass(frozen=True, slots=True)
class Call:
    """A quantized operator to find a kernel for.

    `operands` maps each slot that takes activations to its operands, `post.0.other` for a post-op's;
    `output` are the qparams of the result, None for float32; `dead_after` holds the codes that nobody else reads.
    """

    node: Node
    operands: dict[str, tuple[Operand, ...]]
    output: Affine | None
    host: HostReport
    dead_after: frozenset[str] = field(default_factory=frozenset)

    @property
    def input(self) -> Operand:
        """The only operand of the first slot."""
        return next(iter(self.operands.values()))[0]


@dataclass(frozen=True, slots=True)
class Own:
    """A kernel of the user's: what makes it, and what it is checked on (see `qfunc.engines.own`)."""

    make: Callable[[Any], Callable[..., Any]]
    operators: tuple[str, ...]
    trials: tuple[Any, ...]


Plan: TypeAlias = Node | str
"""The node to put in place of the operator, or why this kernel cannot take it."""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel: its name, by which its contract is known, the kinds it computes, and how a call becomes its node."""

    name: str
    kinds: tuple[str, ...]
    plan: Callable[[Call], Plan]
    checked: bool = True
    """Whether a contract must hold on the host; false for what only moves elements."""
    takes: tuple[type, ...] = CODES
    """How its operands may be given; by default all as codes of one scale."""
    writes_floats: bool = False
    """Whether its result is always float, so that a quantization behind it stays a node of its own."""
    own: Own | None = None
    """What makes and checks a kernel of the user's; None for qfunc's."""

    def accepts(self, call: Call) -> bool:
        """Whether it takes operands that are given as these are."""
        return all(isinstance(operand.how, self.takes) for operands in call.operands.values() for operand in operands)


def no_kernel(node: Node) -> str:
    """Why an operator has no kernel in an engine that has no row for its kind."""
    return f"the engine has no kernel for {node.kind}"


def as_it_is(graph: Graph) -> tuple[Graph, list[Problem]]:
    """A lowered graph as most engines want it."""
    return graph, []


@dataclass(frozen=True, slots=True)
class Engine:
    """What runs a lowered graph: kernels, the preferred ones first, and how values pass between them.

    `moves` are the kinds that compute on codes as they do on floats, since they only move elements. `conversions` names
    the engine's own nodes between floats and codes of `uint8`; other codes go through the plain ones. `write` gives a
    lowered graph in the engine's own form, or what of it that form cannot say.
    """

    name: str
    rows: tuple[KernelRow, ...] = ()
    moves: frozenset[str] = frozenset()
    conversions: tuple[tuple[str, str], ...] = ()
    requantizes: bool = False
    """Whether it turns codes of one scale into those of another without going through floats."""
    why_none: Callable[[Node], str] = no_kernel
    """What the certificate says of an operator of a kind that no row is for."""
    write: Callable[[Graph], tuple[Graph, list[Problem]]] = as_it_is


Codes: TypeAlias = tuple[str | tuple[str, ...], ...]
"""Ids of the codes that a kernel is called with; a tuple among them is given as a list."""


def kernel_node(call: Call, kernel: str, codes: Codes, /, **args: Arg) -> Plan:
    """The node that calls a kernel's module with codes; the other arguments say how the module is made, beforehand."""
    inputs = tuple(Ref(c) if isinstance(c, str) else ListArg(tuple(map(Ref, c))) for c in codes)
    return module_node(call, kernel, inputs, **args)


def module_node(call: Call, kernel: str, inputs: tuple[Arg, ...], /, **args: Arg) -> Plan:
    """The same with any inputs: values of the graph, in tuples or not, and literals."""
    if any(True for arg in args.values() for _ in refs(arg)):
        return "an option is computed by the graph"
    written = call.node.origin.written
    own_path = written is not None and written.op == "call_module"
    origin = Origin(call.node.origin.module if own_path else "", call.node.origin.type)
    named: NamedArgs = (("inputs", inputs), *args.items())
    return Node(call.node.id, kernel, named, origin=origin, fact=call.node.fact)


def on_codes(call: Call) -> Node:
    """The operator itself, computing on codes instead of floats."""
    turned = {slot: iter(operands) for slot, operands in call.operands.items()}
    node = call.node

    def codes_of(slot: str, value: Arg) -> Arg:
        if slot not in turned:
            return value
        return map_arg(value, lambda leaf: Ref(next(turned[slot]).value) if isinstance(leaf, Ref) else leaf)

    args = tuple((slot, codes_of(slot, value)) for slot, value in node.args)
    return Node(node.id, node.kind, args, node.post, node.origin, node.fact, node.aliased)
