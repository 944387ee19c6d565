"""Making the modules of a user's `CustomModule`: to observe with, and quantized ones of those."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pyrsistent import PMap, pmap
from torch import fx, nn

from qfunc.edge.observer import ObserverError
from qfunc.edge.tensors import is_current, named_tensors
from qfunc.errors import Problem, StaleSource, UserFunctionFailed, told
from qfunc.ir import Graph, Opaque, Token
from qfunc.passes.custom_modules import KIND, ToObserve, ToQuantize
from qfunc.passes.stages import Prepared


class CustomModuleError(Exception):
    """A user's function failed; `problem` says it as a value."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.reason)
        self.problem = problem


def make_custom_module(graph: Graph, token: str) -> nn.Module:
    """A new module for what stands behind a node, or a `CustomModuleError`."""
    held = graph.objects[token].value
    match held:
        case ToObserve(swap, path):
            source = graph.sources["model"].model.get_submodule(path)
            made = _called(path, "observed", swap.module.observed, source, swap.qconfig)
            return made.train(source.training)
        case ToQuantize(swap, path, observed):
            return _called(path, "quantized", swap.module.quantized, observed.value).train(observed.value.training)
        case _:
            return _copied(held, token.partition(":")[2], "it")


def _called(path: str, name: str, function: Any, module: nn.Module, *args: Any) -> nn.Module:
    """What a function makes of a copy of a module; a copy of it, since it may be held elsewhere."""
    given = _copied(module, path, "it")
    try:
        made = function(given, *args)
    except ObserverError as error:
        raise CustomModuleError(replace(error.problem, node=f"{path}: {error.problem.node}")) from error
    except Exception as error:
        raise CustomModuleError(UserFunctionFailed(path, f"its {name}(...) raised {told(error)}")) from error
    if not isinstance(made, nn.Module):
        reason = f"its {name}(...) returned a {type(made).__name__}, not a torch.nn.Module"
        raise CustomModuleError(UserFunctionFailed(path, reason))
    return _copied(made, path, f"what its {name}(...) returned")


def _copied(module: nn.Module, path: str, what: str) -> nn.Module:
    try:
        return copying.deepcopy(module)
    except Exception as error:
        reason = f"{what} cannot be copied: {told(error)}"
        raise CustomModuleError(UserFunctionFailed(path, reason)) from error


def stale_modules(graph: Graph) -> Iterator[Problem]:
    """The tensors of modules still to be observed that changed since tracing."""
    source = graph.sources.get("model")
    for node in (node for node in graph if node.kind == KIND):
        token = node.get("module")
        assert isinstance(token, Token) and source is not None
        held = graph.objects[token.id].value
        if isinstance(held, ToObserve):
            for name, _ in named_tensors(source.model.get_submodule(held.path)):
                full = f"{held.path}.{name}"
                if full not in source.tensors or not is_current(source, full):
                    yield StaleSource(full)


def calibrated_modules(prepared: Prepared, module: fx.GraphModule) -> PMap[str, Opaque]:
    """The custom modules that data was run through, by the paths of the modules they stand for."""
    targets = {node.name: str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    graph = prepared.graph
    return pmap({graph[id].place: Opaque(module.get_submodule(targets[id])) for id in prepared.swapped})
