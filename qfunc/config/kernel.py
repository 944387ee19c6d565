"""Kernels as rows of data: what an engine can run, and on which terms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from qfunc.config.host_report import HostReport
from qfunc.ir import ListArg, Node, Origin, Ref, map_arg, refs
from qfunc.ir.node import NamedArgs
from qfunc.ir.value import Arg
from qfunc.numerics.grid import Affine


@dataclass(frozen=True, slots=True)
class Operand:
    """An activation operand of a call: the id of its integer codes and their qparams."""

    codes: str
    affine: Affine


@dataclass(frozen=True, slots=True)
class Call:
    """A quantized operator to find a kernel for.

    `operands` maps each slot that takes activations to its quantized operands, `post.0.other` for a post-op's;
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


Codes: TypeAlias = tuple[str | tuple[str, ...], ...]
"""Ids of the codes that a kernel is called with; a tuple among them is given as a list."""


def kernel_node(call: Call, kernel: str, codes: Codes, **args: Arg) -> Plan:
    """The node that calls a kernel's module with codes; the other arguments say how the module is made, beforehand."""
    if any(True for arg in args.values() for _ in refs(arg)):
        return "an option is computed by the graph"
    written = call.node.origin.written
    own_path = written is not None and written.op == "call_module"
    origin = Origin(call.node.origin.module if own_path else "", call.node.origin.type)
    inputs = tuple(Ref(c) if isinstance(c, str) else ListArg(tuple(map(Ref, c))) for c in codes)
    named: NamedArgs = (("inputs", inputs), *args.items())
    return Node(call.node.id, kernel, named, origin=origin, fact=call.node.fact)


def on_codes(call: Call) -> Node:
    """The operator itself, computing on codes instead of floats."""
    turned = {slot: iter(operands) for slot, operands in call.operands.items()}
    node = call.node

    def codes_of(slot: str, value: Arg) -> Arg:
        if slot not in turned:
            return value
        return map_arg(value, lambda leaf: Ref(next(turned[slot]).codes) if isinstance(leaf, Ref) else leaf)

    args = tuple((slot, codes_of(slot, value)) for slot, value in node.args)
    return Node(node.id, node.kind, args, node.post, node.origin, node.fact, node.aliased)
