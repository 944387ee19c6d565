"""Calling a user's fuser, on copies of the modules that its pattern matched."""

from __future__ import annotations

import copy as copying
from collections.abc import Iterator
from typing import Any

from returns.result import Failure, Success
from torch import nn

from qfunc.config.custom_fusion import CustomFusion
from qfunc.edge.tensors import is_current
from qfunc.errors import StaleSource, UserFunctionFailed, several, told
from qfunc.ir import Graph, Node, Opaque, Token
from qfunc.match import MatchAllNode
from qfunc.ops import resolve
from qfunc.result import R

_RELU = "torch.nn.functional.relu"


def call_fuser(graph: Graph, fusion: CustomFusion, nodes: Any, root: Node, qat: bool) -> R[Opaque]:
    """The module that a fuser makes of a match; see `CustomFusion`.

    Returns:
        The module, or `StaleSource` for tensors that changed since tracing, `UserFunctionFailed`.
    """
    source = graph.sources["model"]
    matched = [node for node in _flat(nodes, fusion.reversed) if _is_call(node)]
    names = [name for node in matched for name in _tensors(source.model, node.origin.module)]
    stale = [name for name in names if name not in source.tensors or not is_current(source, name)]
    if stale:
        return Failure(several(map(StaleSource, stale)))
    try:
        # One memo for all, so that what the modules share stays shared.
        given = _given(graph, nodes, fusion.reversed, root, {})
        parts = tuple(reversed(tuple(_in_line(given)))) if fusion.pattern else given
        made = fusion.fuser(qat, *parts)
    except Exception as error:  # noqa: BLE001 - the fuser and the copying of modules are the user's code
        return Failure(UserFunctionFailed(root.place, f"{fusion.name}: {told(error)}"))
    if not isinstance(made, nn.Module):
        reason = f"the fuser of {fusion.name} returned a {type(made).__name__}, not a torch.nn.Module"
        return Failure(UserFunctionFailed(root.place, reason))
    try:
        owned = copying.deepcopy(made)
    except Exception as error:  # noqa: BLE001 - the copying of a user's object is the user's code
        return Failure(UserFunctionFailed(root.place, f"{fusion.name}: its module cannot be copied: {told(error)}"))
    # What is fused for evaluation evaluates, whatever mode the fuser makes its module in.
    return Success(Opaque(owned if graph.trains(root) else owned.eval()))


def _tensors(model: nn.Module, path: str) -> Iterator[str]:
    """The names of a module's parameters and buffers."""
    module = model.get_submodule(path)
    yield from (f"{path}.{name}" for name, _ in (*module.named_parameters(), *module.named_buffers()))


def _given(graph: Graph, nodes: Any, pattern: Any, root: Node, memo: dict[int, Any]) -> Any:
    """What a fuser is given for matched nodes, nested as they are."""
    if isinstance(nodes, tuple) and isinstance(pattern, tuple):
        return tuple(_given(graph, n, p, root, memo) for n, p in zip(nodes, pattern, strict=True))
    if pattern is MatchAllNode or not isinstance(nodes, Node):
        return MatchAllNode if pattern is MatchAllNode else nodes
    model: nn.Module = graph.sources["model"].model
    written = nodes.origin.written
    assert written is not None
    match written.op:
        case "call_module":
            return copying.deepcopy(model.get_submodule(written.target), memo)
        case "call_method":
            return written.target
        case _ if written.target == _RELU:
            return nn.ReLU().train(graph.trains(root))
        case _:
            target = written.target
            return graph.objects[Token(target[1:]).id].value if target.startswith("$") else resolve(target)


def _in_line(nested: Any) -> Iterator[Any]:
    """The items of a chain, the last first."""
    while isinstance(nested, tuple):
        yield nested[0]
        nested = nested[1]
    yield nested


def _flat(nodes: Any, pattern: Any) -> Iterator[Any]:
    if isinstance(nodes, tuple) and isinstance(pattern, tuple):
        for pair in zip(nodes, pattern, strict=True):
            yield from _flat(*pair)
    elif pattern is not MatchAllNode:
        yield nodes


def _is_call(node: Any) -> bool:
    return isinstance(node, Node) and node.origin.written is not None and node.origin.written.op == "call_module"
