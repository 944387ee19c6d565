"""Which module computes a node of qfunc's own: an observer, a quantizer, a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import nn

from qfunc.edge.evaluate import Evaluator
from qfunc.ir import Node

Builder = Callable[[Node, Evaluator], nn.Module]

LEAVES: Mapping[str, Builder] = MappingProxyType({})
"""Kind of node -> how its module is made. Such a node's `inputs` argument holds what the module is called with."""
