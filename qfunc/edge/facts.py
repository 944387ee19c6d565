"""What an example shows of every value: shape, dtype, device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pyrsistent import pmap
from returns.result import Failure, Success
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from qfunc.edge.materialize import materialize
from qfunc.errors import BadExampleInputs, told
from qfunc.ir import Graph, TensorFact
from qfunc.ir.node import Fact
from qfunc.ops import BY_NAME
from qfunc.result import R


def with_facts(graph: Graph, example_inputs: Any) -> R[Graph]:
    """The graph with the shape, dtype and device of each value, seen by running a copy of it on the example."""
    made = materialize(graph, copy=True)
    if isinstance(made, Failure):
        return made
    module = made.unwrap()
    bound = bind_inputs(module.graph, tree_map_only(Tensor, torch.clone, example_inputs))
    if isinstance(bound, str):
        return Failure(BadExampleInputs("example_inputs", bound))
    recorder = _Recorder(module)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            recorder.run(*bound)
    except Exception as error:  # noqa: BLE001 - operators raise anything on inputs that do not fit
        at = graph.nodes.get(recorder.at)
        return Failure(
            BadExampleInputs(recorder.at if at is None else at.place, f"the model fails on them: {told(error)}")
        )
    facts = recorder.facts
    nodes = {node.id: replace(node, fact=facts.get(node.id)) for node in graph}
    return Success(replace(graph, nodes=pmap(nodes)))


def bind_inputs(graph: fx.Graph, inputs: Any) -> tuple[Any, ...] | str:
    """A batch (tensor, tuple, list or dict) as positional inputs of the graph, or in words why it does not fit."""
    slots = [(str(node.target), bool(node.args)) for node in graph.nodes if node.op == "placeholder"]
    names = [name for name, _ in slots]
    takes = f"the model takes {', '.join(map(repr, names)) or 'no inputs'}"
    if isinstance(inputs, Mapping):
        extra = [str(key) for key in inputs if key not in names]
        lacking = [name for name, optional in slots if name not in inputs and not optional]
        if extra or lacking:
            wrong = [f"no {name!r} was given" for name in lacking] + [f"there is no input {name!r}" for name in extra]
            return f"{takes}: {', '.join(wrong)}"
        return tuple(inputs[node.target] if node.target in inputs else node.args[0] for node in _placeholders(graph))
    given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    least = sum(not optional for _, optional in slots)
    if not least <= len(given) <= len(slots):
        return f"{takes}, but {len(given)} {'input was' if len(given) == 1 else 'inputs were'} given"
    return given + tuple(node.args[0] for node in _placeholders(graph)[len(given) :])


def may_write(graph: Graph) -> bool:
    """Whether running a graph may change its inputs: it writes in place, or calls what the vocabulary does not know."""
    return any(node.aliased or not (node.kind in BY_NAME or node.kind in _HARMLESS) for node in graph)


_HARMLESS = frozenset({"placeholder", "output", "get_attr", "observe", "quantize", "dequantize"})


def own_inputs(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copies of the inputs, for a graph that writes in place to memory that may be theirs: batches stay as they are."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in inputs)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def fact_of(value: Any) -> Fact:
    """What there is to tell of a value without its elements; None for what holds no tensor."""
    if isinstance(value, Tensor):
        return TensorFact(tuple(value.shape), str(value.dtype).removeprefix("torch."), str(value.device))
    if isinstance(value, (tuple, list)):
        return tuple(fact_of(item) for item in value)
    return None


class _Recorder(fx.Interpreter):
    """Runs a module node by node and writes down what each value looks like."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.facts: dict[str, Fact] = {}
        self.at = "example_inputs"
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        self.at = n.name
        value = super().run_node(n)
        self.facts[n.name] = fact_of(value)
        return value
