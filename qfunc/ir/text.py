"""Graphs as text, for people and for digests. Independent of the hash seed: everything follows the graph's order."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from qfunc.ir.graph import Graph, Step
from qfunc.ir.node import NamedArgs, Node
from qfunc.ir.value import Arg, Expression
from qfunc.numerics.grid import Grid


def to_text(graph: Graph, *, full: bool = False) -> str:
    """One line per node; `full` adds everything that counts for equality, as digests need it."""
    return "\n".join([_head(graph), *(_line(node, full) for node in graph)])


def digest(graph: Graph) -> str:
    """The SHA-256 of the graph's full text: structure, configuration and tensor handles, never tensors."""
    if graph._digest is None:
        object.__setattr__(graph, "_digest", hashlib.sha256(to_text(graph, full=True).encode()).hexdigest())
    assert graph._digest is not None
    return graph._digest


def structure_digest(graph: Graph) -> str:
    """The same without what an example showed: equal for graphs of one model traced with examples of other shapes."""
    if graph._structure is None:
        bare = "\n".join([_head(graph), *(_line(replace(node, fact=None), full=True) for node in graph)])
        object.__setattr__(graph, "_structure", hashlib.sha256(bare.encode()).hexdigest())
    assert graph._structure is not None
    return graph._structure


def with_history(graph: Graph, history: tuple[Step, ...]) -> Graph:
    """The graph with another history, which its digest does not cover, so that it keeps that."""
    changed = replace(graph, history=history)
    object.__setattr__(changed, "_digest", graph._digest)
    object.__setattr__(changed, "_structure", graph._structure)
    return changed


def _head(graph: Graph) -> str:
    return f"graph {graph.title or '?'}" + (" (training)" if graph.training else "")


def _text(value: Arg, full: bool) -> str:
    return str(value) if isinstance(value, (Expression, Grid)) and not full else repr(value)


def _args(args: NamedArgs, full: bool) -> str:
    return ", ".join(f"{key}={_text(value, full)}" for key, value in args)


def _line(node: Node, full: bool) -> str:
    post = "".join(f" + {p.kind}" + (f"({_args(p.args, full)})" if p.args else "") for p in node.post)
    text = f"  %{node.id} = {node.kind}({_args(node.args, full)}){post}"
    if node.fact is not None:
        text += f" : {node.fact!r}"
    if full:
        origins = (node.origin, *(p.origin for p in node.post))
        text += "".join(f" @ {o.module!r} {o.type} {o.written!r}" for o in origins) + (" aliased" * node.aliased)
    return text
