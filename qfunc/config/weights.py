"""The parameters of a node that are quantized as its weight."""

from __future__ import annotations

import re

import torch

from qfunc.ir import Expression, Graph, Node
from qfunc.params import Load

RECURRENT = frozenset(f"torch.nn.{name}" for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"))
"""Layers whose weights are several matrices."""

RECURRENT_KERNELS = ("recurrent_dynamic", "recurrent_cast")
"""The kinds of the nodes that take their place when they are lowered."""

_MATRIX = re.compile(r"weight_(ih|hh|hr)(_l\d+(_reverse)?)?")


def weights_of(graph: Graph, node: Node) -> dict[str, Expression]:
    """The weights of a node, by the names of its arguments or of its module's parameters; empty where it has none.

    A recurrent layer has several; those that hooks or parametrizations compute are none of its parameters.
    """
    weight = node.get("weight") if node.has("weight") else None
    if isinstance(weight, Expression):
        return {"weight": weight}
    written = node.origin.written
    if node.kind not in RECURRENT or written is None or written.op != "call_module":
        return {}
    path = written.target
    fact = graph.modules.get(path)
    if fact is not None and fact.own:
        return {}
    prefix = f"{path}." if path else ""
    found: dict[str, Expression] = {}
    for name, (tensor, _) in graph.sources["model"].tensors.items():
        leaf = name.removeprefix(prefix)
        if name.startswith(prefix) and _MATRIX.fullmatch(leaf):
            found[leaf] = _load(name, tensor)
    return found


def _load(name: str, tensor: torch.Tensor) -> Load:
    return Load(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
