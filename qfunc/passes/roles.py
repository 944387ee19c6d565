"""Which arguments of an operator are what to a backend: activations, a weight that is quantized, neither."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, cast

from qfunc.backends.cpu import TRANSPOSED
from qfunc.config.backend_config import PARAMETERS, OperatorConfig
from qfunc.config.qconfig import QConfig
from qfunc.config.weights import RECURRENT
from qfunc.errors import BadConfig, Problem, UnsupportedDType
from qfunc.ir import Expression, Node, Ref, TensorFact
from qfunc.numerics.fake_quantize import FakeQuantize, is_fixed
from qfunc.numerics.qparams import QuantSpec
from qfunc.ops import BY_NAME, WEIGHTED
from qfunc.params import loads


def inputs_of(node: Node, row: OperatorConfig) -> tuple[str, ...]:
    """The arguments that are activations."""
    named = row.inputs if row.inputs is not None else BY_NAME[node.kind].tensors if node.kind in BY_NAME else ("0",)
    if node.kind in RECURRENT and not node.has("0"):
        named = ("input",)  # called by its name
    return tuple(slot for slot in named if node.has(slot))


def weight_slot(node: Node, row: OperatorConfig) -> str | None:
    """The argument that is a weight which is quantized, if the operator has one."""
    slot = row.weight or ("weight" if node.kind in WEIGHTED else None)
    return slot if slot is not None and (node.has(slot) or _has_parameters(node, row)) else None


def _has_parameters(node: Node, row: OperatorConfig) -> bool:
    """Whether it is a call of a module whose weights are no arguments."""
    written = node.origin.written
    return row.weight == PARAMETERS and written is not None and written.op == "call_module"


def computes_weight(node: Node, row: OperatorConfig) -> bool:
    """Whether the weight is a value of the graph."""
    slot = weight_slot(node, row)
    return slot is not None and node.has(slot) and isinstance(node.get(slot), Ref)


def has_weight(node: Node, row: OperatorConfig) -> bool:
    """Whether the node has a weight that is quantized, and that is a parameter."""
    slot = weight_slot(node, row)
    return _weight_of(node, row) is not None or (slot is not None and _has_parameters(node, row))


def _weight_of(node: Node, row: OperatorConfig) -> Expression | None:
    """The weight that is an argument and a parameter."""
    slot = weight_slot(node, row)
    weight = node.get(slot) if slot is not None and node.has(slot) else None
    return weight if isinstance(weight, Expression) else None


def can_write_float(node: Node, row: OperatorConfig) -> bool:
    """Whether the operator's kernel can leave its result in float; one that adds cannot."""
    return row.float_output and all(post.kind != "add" for post in node.post)


def axis_problems(node: Node, row: OperatorConfig, spec: QuantSpec) -> Iterator[Problem]:
    """A channel axis that the weight does not have."""
    weight = _weight_of(node, row)
    shape = () if weight is None else next(loads(weight)).shape
    if weight is not None and spec.ch_axis is not None and spec.ch_axis >= len(shape):
        reason = f"ch_axis {spec.ch_axis} is no axis of its weight of shape {tuple(shape)}"
        yield BadConfig(node.place, reason, "use ch_axis=0, the axis of the output channels")


def along_outputs(node: Node, qconfig: QConfig) -> QConfig:
    """A configuration that is meant for many types, with the output channels of this node's weight as `ch_axis`.

    Axis 0 is that of all layers but transposed convolutions, whose output channels are axis 1.
    """
    weight = _of_axis_1(qconfig.weight) if node.kind in TRANSPOSED else qconfig.weight
    return qconfig if weight is qconfig.weight else replace(qconfig, weight=weight)


def _of_axis_1(weight: Any) -> Any:
    """What observes channels along axis 0, for axis 1; anything else as it is."""
    if isinstance(weight, FakeQuantize):
        inner = _of_axis_1(weight.observer)
        return weight if inner is weight.observer else replace(weight, observer=inner)
    spec = getattr(weight, "spec", None)
    own = {each.name for each in fields(weight) if each.init} if is_dataclass(weight) else set()
    if "spec" not in own or is_fixed(weight) or not isinstance(spec, QuantSpec) or spec.ch_axis != 0:
        return weight
    return replace(cast("Any", weight), spec=replace(spec, ch_axis=1))


def weight_problems(node: Node, row: OperatorConfig) -> Iterator[Problem]:
    """A weight that is no float32."""
    dtypes = {load.dtype for load in loads(_weight_of(node, row))}
    for dtype in sorted(dtypes - {"float32"}):
        remedy = "convert the model and its inputs with .float(), or keep the module float with set_module_name"
        yield UnsupportedDType(
            node.place, f"kernels take the place of float32 operators, its weight is {dtype}", remedy
        )


def is_not_float(node: Node) -> bool:
    """Whether an example showed the value to be something else than a float32 tensor, whose place kernels take."""
    fact = node.fact
    return isinstance(fact, tuple) or (isinstance(fact, TensorFact) and fact.dtype != "float32")
