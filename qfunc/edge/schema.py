"""What torch's operators promise: whether a call gives a tensor, and whether that shares memory with its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from qfunc.ir import Node, Written
from qfunc.ops import BY_NAME
from qfunc.params import Load

VIEWS = frozenset(
    (
        *("flatten", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "unflatten", "contiguous", "detach"),
        *("getitem", "narrow", "chunk", "split", "unbind", "expand", "dropout", "identity"),
        *("pixel_shuffle", "pixel_unshuffle", "movedim", "select", "channel_shuffle", "interpolate"),
    )
)
"""The kinds whose result may share the memory of their input."""
_VIEWING_LAYERS = frozenset(
    f"torch.nn.{name}"
    for name in (
        "Flatten",
        "Unflatten",
        "Identity",
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "AlphaDropout",
        "FeatureAlphaDropout",
        "PixelShuffle",
        "PixelUnshuffle",
        "ChannelShuffle",
        "Upsample",
        "ZeroPad1d",
        "ZeroPad2d",
        "ZeroPad3d",
    )
)
# Functions from elsewhere that give their input back, or something new, and nothing that others hold: a dropout.
_FOREIGN_VIEWS = frozenset({"torchvision.ops.stochastic_depth.stochastic_depth"})
# Composite operators may give an input back without saying so in their schema; of these it is known that they do not.
_FRESH_COMPOSITES = frozenset(
    (
        "matmul",
        "softmax",
        "log_softmax",
        "layer_norm",
        "group_norm",
        "instance_norm",
        "rms_norm",
        "batch_norm",
        "pad",
        "linear",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "stack",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "avg_pool1d",
        "adaptive_avg_pool2d",
        "embedding",
        "bilinear",
        "prelu",
        "sub",
        "div",
        "where",
        "mean",
        "std",
        "var",
        "norm",
        "size",
        "selu",
        "relu6",
        "celu",
        "max",
        "min",
    )
)
_NUMBERS = frozenset(
    ("size", "dim", "numel", "nelement", "ndimension", "stride", "item", "tolist", "storage_offset", "element_size")
)
_NUMBER_ATTRIBUTES = frozenset(("shape", "ndim", "dtype", "device", "layout", "is_cuda", "requires_grad", "itemsize"))


def may_alias(node: Node, plain: Node) -> tuple[tuple[str, ...], bool]:
    """The inputs whose memory a call's result may share, and whether it may share memory from outside of the graph.

    `plain` is the call as written.
    """
    written = plain.origin.written
    if node.kind in ("placeholder", "get_attr") or written is None:
        return (), True
    if node.kind == "output":
        return (), False
    if node.kind in BY_NAME:
        return (tuple(node.uses())[:1] if node.kind in VIEWS else ()), False
    inputs = tuple(dict.fromkeys(plain.uses()))
    if written.op == "call_module":
        ours = plain.kind.startswith("torch.nn.")
        return (() if ours and plain.kind not in _VIEWING_LAYERS else inputs), not ours
    if written.target in _FOREIGN_VIEWS:
        return inputs, False
    if is_torch(written):
        return (() if _is_fresh(written.target.rpartition(".")[2]) else inputs), False
    return inputs, True


def is_torch(written: Written) -> bool:
    """Whether a call is of a tensor's method, of torch, or of Python's operators."""
    return written.op == "call_method" or written.target.startswith(("torch.", "operator.", "builtins.", "math."))


def is_tensor(plain: Node, known: Mapping[str, bool | None]) -> bool | None:
    """Whether the value of a call as written is a tensor (or a sequence of tensors); `None` where that is not known."""
    written = plain.origin.written
    if written is None or written.op in ("placeholder", "output"):
        return None
    if written.op == "get_attr":
        return True if isinstance(plain.get("value"), Load) else None
    if written.op == "call_module":
        return True if plain.kind.startswith("torch.nn.") else None
    name = written.target.rpartition(".")[2]
    if written.target == "builtins.getattr":
        return False if plain.get("1") in _NUMBER_ATTRIBUTES else None
    if written.op == "call_method" and name in _NUMBERS:
        return False
    if written.target.startswith("operator."):
        operands = {known.get(used) for used in plain.uses()}
        first = known.get(next(plain.uses(), ""))
        if name == "getitem":
            return first
        return True if True in operands else False if operands == {False} else None
    return True if is_torch(written) and _gives_tensors(name) else None


@cache
def _schemas(name: str) -> tuple[torch.FunctionSchema, ...]:
    """The schemas of an aten operator's overloads on tensors, but for those that write to an `out` argument."""
    packet = getattr(torch.ops.aten, name, None)
    found = [getattr(packet, overload)._schema for overload in packet.overloads()] if packet is not None else []
    plain = (schema for schema in found if not any(argument.is_out for argument in schema.arguments))
    return tuple(schema for schema in plain if torch._C._dispatch_has_kernel(_full_name(schema)))


@cache
def _is_fresh(name: str) -> bool:
    """Whether no overload of an aten operator gives a result that shares memory with its arguments."""
    schemas = _schemas(name)
    declared = all(returned.alias_info is None for schema in schemas for returned in schema.returns)
    composite = any(_is_composite(schema) for schema in schemas)
    return bool(schemas) and declared and (not composite or name in _FRESH_COMPOSITES)


def _is_composite(schema: torch.FunctionSchema) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(_full_name(schema), "CompositeImplicitAutograd")


def _full_name(schema: torch.FunctionSchema) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name


@cache
def _gives_tensors(name: str) -> bool:
    schemas = _schemas(name)
    kinds = {str(returned.type) for schema in schemas for returned in schema.returns}
    return bool(kinds) and kinds <= {"Tensor", "List[Tensor]"}
