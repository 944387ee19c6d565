"""Float islands: operators without an integer kernel, with the conversions at their borders in one kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qfunc.backends.cpu import MOVES
from qfunc.config.kernel import CODES, FLOATS, ISLAND, Call, KernelRow, Plan, kernel_node
from qfunc.ir import Arg, Body, Expression, Node, PostOp, Ref, map_arg
from qfunc.ir.node import NamedArgs
from qfunc.numerics.grid import Affine
from qfunc.ops import KINDS, WEIGHTED


@dataclass(frozen=True, slots=True)
class IslandCall(Body):
    """What an island computes: `kind` with `args`, and `posts` behind it.

    In the arguments `Ref("0")`, `Ref("1")`, ... stand for what the kernel is called with; `grids` says which of these
    are codes, and `output` what the result becomes; None is for floats.
    """

    kind: str
    args: NamedArgs
    posts: tuple[PostOp, ...]
    grids: tuple[Affine | None, ...]
    output: Affine | None


def body_of(call: Call) -> tuple[IslandCall, tuple[str, ...]]:
    """What an operator computes, without its parameters, and the ids of what it is called with."""
    inputs: list[str] = []
    grids: list[Affine | None] = []
    operands = {slot: iter(found) for slot, found in call.operands.items()}

    def taken(slot: str) -> Callable[[Arg], Arg]:
        def leaf(value: Arg) -> Arg:
            if not isinstance(value, Ref):
                return value
            operand = next(operands[slot]) if slot in operands else None
            inputs.append(value.id if operand is None else operand.value)
            grids.append(operand.how if operand is not None and isinstance(operand.how, Affine) else None)
            return Ref(str(len(inputs) - 1))

        return leaf

    node = call.node
    weights = {name for name, value in node.args if isinstance(value, Expression)}
    args = tuple((name, map_arg(value, taken(name))) for name, value in node.args if name not in weights)
    posts = tuple(
        PostOp(post.kind, tuple((name, map_arg(value, taken(f"post.{i}.{name}"))) for name, value in post.args))
        for i, post in enumerate(node.post)
    )
    return IslandCall(node.kind, args, posts, tuple(grids), call.output), tuple(inputs)


def batched_rank(node: Node) -> int | None:
    """The rank of the batches of a module that also takes an input without one, where its function would not.

    The function of an instance norm takes the first axis of whatever it is given for that of the batch.

    >>> from qfunc.ir import Origin
    >>> batched_rank(Node("y", "instance_norm", origin=Origin("norm", "torch.nn.InstanceNorm2d")))
    4
    """
    _, norm, rank = node.origin.type.rpartition("InstanceNorm")
    return 2 + int(rank[0]) if norm and node.kind == "instance_norm" and rank[:1].isdecimal() else None


def island(kernel: str) -> KernelRow:
    """The row of an engine for operators that compute in float, whose results become codes and whose operands may be.

    It is the reference subgraph itself, so that there is nothing to check on a host.
    """

    def plan(call: Call) -> Plan:
        body, inputs = body_of(call)
        if any(isinstance(value, Expression) for post in body.posts for _, value in post.args):
            return "what is fused behind it has parameters"
        weights = {name: value for name, value in call.node.args if isinstance(value, Expression)}
        rank = batched_rank(call.node)
        options = {} if rank is None else {"batched_rank": rank}
        return kernel_node(call, kernel, inputs, call=body, **options, **weights)

    return KernelRow(ISLAND, _KINDS, plan, checked=False, takes=(*CODES, *FLOATS))


def open_island() -> KernelRow:
    """The same where the conversions at the borders stay nodes of their own, so that the graph can be scripted."""
    return KernelRow(ISLAND, _KINDS, lambda call: call.node, checked=False, takes=(*CODES, *FLOATS))


_KINDS = tuple(row.name for row in KINDS if row.name not in WEIGHTED | MOVES)
