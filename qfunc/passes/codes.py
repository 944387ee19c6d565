"""Nodes between floats and codes in the reference form, and models that take and give codes."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeAlias

from qfunc.ir import Arg, DictArg, Draft, Graph, ListArg, Node, Origin, RecordArg, Ref
from qfunc.ir.node import NamedArgs, fact_in
from qfunc.numerics.grid import Affine, Grid
from qfunc.numerics.unmeasured import Cast, Dynamic
from qfunc.ops import BY_NAME
from qfunc.params import DeriveQParams
from qfunc.passes.borders import output_elements
from qfunc.passes.stages import Prepared

How: TypeAlias = Affine | Grid | DeriveQParams | Dynamic | Cast
"""How the reference form quantizes a value: with known qparams, with those known when weights are read, or anew."""


def code_dtype(how: How) -> str:
    """The plain dtype of codes."""
    assert not isinstance(how, (Dynamic, Cast)), how
    return how.dtype if isinstance(how, Affine) else str(how.spec.torch_dtype).removeprefix("torch.")


def insert_behind(
    draft: Draft, node: Node, suffix: str, kind: str, args: NamedArgs, dtype: str = "", origin: Origin | None = None
) -> str:
    """Put a node behind a value and what was put there before; gives its id."""
    id = draft.fresh(f"{node.id}_{suffix}")
    fact = fact_in(node.fact, dtype) if dtype else node.fact
    draft.insert_after(node.id, Node(id, kind, args, fact=fact, origin=origin or Origin(id)))
    return id


def decode(draft: Draft, node: Node, how: How) -> str:
    """Make an input codes; gives the id of the floats that they stand for."""
    assert not isinstance(how, (Dynamic, Cast)), how
    draft.put(replace(node, fact=fact_in(node.fact, code_dtype(how))))
    return insert_behind(draft, node, "dq", "dequantize", (("inputs", (Ref(node.id),)), ("input", how)))


def given_codes(prepared: Prepared) -> dict[int, str]:
    """The values that leave the model as codes, by their positions in its output."""
    elements = output_elements(prepared.graph)
    found = {index: elements[index] for index in sorted(prepared.quantized_outputs)}
    return {index: element.id for index, element in found.items() if isinstance(element, Ref)}


def with_codes_given(graph: Graph, positions: frozenset[int]) -> Graph:
    """The reference form whose output has, at some positions, the codes instead of the floats that they stand for."""
    if not positions:
        return graph
    (output,) = (node for node in graph if node.kind == "output")
    (name,) = (name for name, _ in output.args)
    elements = tuple(
        _codes_of(element, graph) if index in positions else element
        for index, element in enumerate(output_elements(graph))
    )
    draft = Draft(graph)
    draft.put(output.with_args(**{name: _rebuilt(output.get(name), elements)}))
    return draft.commit()


def _codes_of(element: Arg, graph: Graph) -> Arg:
    assert isinstance(element, Ref), element
    decoded = graph[element.id]
    assert decoded.kind == "dequantize", decoded
    inputs = decoded.get("inputs")
    assert isinstance(inputs, tuple), decoded
    return inputs[0]


def _rebuilt(result: Arg, elements: tuple[Arg, ...]) -> Arg:
    match result:
        case tuple():
            return elements
        case ListArg():
            return ListArg(elements)
        case RecordArg(type):
            return RecordArg(type, elements)
        case DictArg(items):
            return DictArg(tuple((key, element) for (key, _), element in zip(items, elements, strict=True)))
        case _:
            return elements[0]


def without_unread(graph: Graph, before: Graph) -> Graph:
    """The graph without what nobody reads: nodes that `before` does not have, and operators that do nothing else."""
    read: set[str] = set()
    unread: list[str] = []
    for node in (graph[id] for id in reversed(graph.order)):
        if node.id in read or (node.id in before.nodes and not _only_computes(node)):
            read.update(node.uses())
        else:
            unread.append(node.id)
    draft = Draft(graph)
    draft.erase(unread)
    return draft.commit()


def _only_computes(node: Node) -> bool:
    """Whether a node does nothing but give a value: it writes to no memory and draws no random numbers."""
    if node.kind not in BY_NAME or node.aliased:
        return False
    match node.kind:
        case "attention":
            return node.get("dropout_p") == 0
        case "instance_norm":
            updated = node.get("running_mean") is not None or node.get("running_var") is not None
            return not updated or node.get("use_input_stats") is False
        case _:
            return not node.has("training") or node.get("training") is False
