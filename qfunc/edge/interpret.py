"""`interpret`: run the graph of a stage operator by operator, and look at every value on the way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from returns.result import Failure, Success
from torch import fx
from torch.utils._pytree import tree_leaves

from qfunc.edge.facts import bind_inputs, fact_of, may_write, own_inputs
from qfunc.edge.materialize import Emitted, emitted, graph_to_run, not_a_stage
from qfunc.edge.observer import ObserverError
from qfunc.errors import BadBatch, BadConfig, Problem, UserFunctionFailed, told
from qfunc.ir import Graph
from qfunc.passes.observe import erase_observers, with_observers
from qfunc.passes.stages import Calibrated, Prepared
from qfunc.result import R

Hook: TypeAlias = Callable[[str, Any], object]
"""Is called with the id of a value and the value; what it returns is ignored."""


def interpret(stage: Any, batch: Any, hook: Hook | None = None) -> R[Any]:
    """What the graph of a stage computes of a batch, as its materialized module would, operator by operator.

    `hook(value_id, value)` is called for each value of the graph in its order, inputs and the output among them, right
    after it was computed; what is fused behind an operator belongs to it. Ids are those that a graph prints. A value
    is the one that the graph goes on with, not a copy: it is not to be written to, and where operators write in place
    it may be another one later. Values are let go when nothing uses them any more. Without autograd.

    Args:
        stage: a `Graph`, `Prepared` or `Calibrated` (without their observers), `Converted` or `Lowered`.
        batch: a tensor, a tuple or list of positional inputs, or a dict of keyword inputs; it is not changed.
        hook: is shown each value; by default nothing is.

    Returns:
        The output; or `BadBatch` for a batch that does not fit the inputs, `UserFunctionFailed` for an operator that
        fails on it or a hook that raises, at that node, `BadConfig` for a hook that cannot be called, `WrongStage`, or
        what `materialize` reports.

    >>> from torch import nn
    >>> from qfunc import fuse, trace
    >>> graph = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval()).bind(fuse).unwrap()
    >>> interpret(graph, torch.ones(4, 2), lambda id, value: print(id, tuple(value.shape))).unwrap().shape
    input_1 (4, 2)
    _1 (4, 3)
    output (4, 3)
    torch.Size([4, 3])
    """
    return interpreter(stage).bind(lambda made: made.run(batch, hook))


def _observed(stage: Any) -> Graph | None:
    """The graph that calibration runs, without the observers; None for a stage that has none."""
    match stage:
        case Prepared():
            return erase_observers(with_observers(stage))
        case Calibrated(prepared):
            return erase_observers(with_observers(prepared, stage.modules))
        case _:
            return None


def interpreter(stage: Any) -> R[Interpreter]:
    """What `interpret` runs, made once for many batches; fails as `materialize` does."""
    graph = _observed(stage) or graph_to_run(stage)
    if graph is None:
        return Failure(not_a_stage(stage))
    return emitted(graph).map(lambda made: Interpreter(graph, made))


class NodeError(Exception):
    """An operator failed; `problem` says it as a value."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(f"{problem.node}: {problem.reason}")
        self.problem = problem


class Interpreter:
    """Runs one graph on batches. `graph` is what is run, `module` holds its parameters and leaf modules.

    It keeps nothing of a run, but modules of the user's may. Runs on several threads at a time need one each.
    """

    def __init__(self, graph: Graph, made: Emitted) -> None:
        self.graph, self.module = graph, made.module
        self._ids: Mapping[fx.Node, str] = {node: id for id, node in made.values.items()}
        self._nodes = tuple(made.module.graph.nodes)
        self._writes = may_write(graph)
        self._walker = fx.Interpreter(made.module)
        self._hook: Hook | None = None
        # The model's own hooks run around `forward` of the module, as ever.
        vars(self.module)["forward"] = self._forward

    def run(self, batch: Any, hook: Hook | None = None) -> R[Any]:
        """`interpret` of this graph."""
        if hook is not None and not callable(hook):
            reason = f"expected a function of a value's id and the value, got {hook!r:.60}"
            return Failure(BadConfig("hook", reason, "pass such a function, or leave it out"))
        inputs = bind_inputs(self.module.graph, batch)
        if isinstance(inputs, str):
            return Failure(BadBatch(0, inputs))
        try:
            return Success(self.forward(inputs, None if hook is None else self.guarded(hook)))
        except (NodeError, ObserverError) as error:
            return Failure(error.problem)
        except Exception as error:  # noqa: BLE001 - what is left are hooks of the model itself, the user's code
            return Failure(UserFunctionFailed("model", f"a hook of its own raised {told(error)}"))

    def forward(self, inputs: tuple[Any, ...], hook: Hook | None = None) -> Any:
        """The output for positional inputs, as `bind_inputs` gives them.

        Raises `NodeError` or, from within a module of the user's that observes, `ObserverError`; what a hook raises
        comes out as it is.
        """
        before, self._hook = self._hook, hook
        try:
            with torch.no_grad():
                return self.module(*(own_inputs(inputs) if self._writes else inputs))
        finally:
            self._hook = before

    def _forward(self, *inputs: Any) -> Any:
        hook, walker, output = self._hook, copy.copy(self._walker), None
        values: dict[fx.Node, Any] = {}
        walker.env, walker.args_iter = values, iter(inputs)
        for node in self._nodes:
            try:
                values[node] = walker.run_node(node)
            except ObserverError:
                raise
            except Exception as error:
                raise NodeError(self._failed(node, values, error)) from error
            # As in the code of a module: what is used for the last time is gone before the value is looked at.
            for used in walker.user_to_last_uses.get(node, ()):
                del values[used]
            if hook is not None and node in self._ids:
                hook(self._ids[node], values[node])
            if node.op == "output":
                output = values[node]
            if not node.users:
                del values[node]
        return output

    def _failed(self, at: fx.Node, values: Mapping[fx.Node, Any], error: Exception) -> Problem:
        """That an operator fails, at the place of the node that it is, or that it is fused behind."""
        owner = at
        while owner not in self._ids:
            owner = owner.next
        node = self.graph[self._ids[owner]]
        fused = f", one of {len(node.post) + 1} fused operators," if node.post else ""
        inputs = ", ".join(f"{used.name} {_shown(values[used])}" for used in at.all_input_nodes)
        reason = f"{self._operator(at)}{fused} fails on ({inputs}): {told(error)}"
        return UserFunctionFailed(node.place, reason, "pass a batch on which the model runs, or mend the model there")

    def _operator(self, at: fx.Node) -> str:
        if at.op == "call_module":
            return type(self.module.get_submodule(str(at.target))).__name__
        return str(getattr(at.target, "__name__", at.target))

    def guarded(self, hook: Hook) -> Hook:
        """The hook, whose exceptions become a `NodeError` at the node it was called for."""
        name = getattr(hook, "__qualname__", type(hook).__qualname__)

        def call(id: str, value: Any) -> None:
            before = _versions(value)
            try:
                hook(id, value)
            except Exception as error:
                reason = f"the hook {name} raised {told(error)}"
                raise NodeError(UserFunctionFailed(self.graph[id].place, reason)) from error
            if _versions(value) != before:
                reason = f"the hook {name} writes to the value, with which the model goes on"
                raise NodeError(UserFunctionFailed(self.graph[id].place, reason, "have it work on a copy"))

        return call


def _versions(value: Any) -> list[int]:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _shown(value: Any) -> str:
    """Shapes and dtypes of tensors; other values as they are."""
    fact = fact_of(value)
    known = fact is not None and all(leaf is not None for leaf in tree_leaves(fact))
    return repr(fact) if known else f"{value!r:.60}"
