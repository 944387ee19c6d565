"""`trace`: from an `nn.Module` to an immutable `Graph`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pyrsistent import pmap
from returns.result import Failure, Success
from torch import fx, nn

from qfunc.config.custom_config import CustomConfig
from qfunc.edge.alias import settle_aliases
from qfunc.edge.diagnose import diagnose
from qfunc.edge.facts import with_facts
from qfunc.edge.read import Reader
from qfunc.edge.statements import StatementTracer
from qfunc.edge.tensors import named_tensors, source_of
from qfunc.errors import NotAModule, QuantError, SeveralDevices, UnknownName, several
from qfunc.ir import Graph, Node
from qfunc.ops import type_name
from qfunc.result import R

NOTHING = CustomConfig()


def trace(model: nn.Module, example_inputs: Any = None, *, custom: CustomConfig = NOTHING) -> R[Graph]:
    """The graph of what `model` computes, traced symbolically; the model is left as it was.

    Modules of `torch.nn` (but `nn.Sequential`) and those named in `custom` are leaves, as in the reference. In-place
    operators whose memory no other value shares become their out-of-place twins; where memory is shared, the values
    concerned are marked `aliased` and kept exactly as written.

    Args:
        model: any module that `torch.fx` can trace, in training or evaluation mode, or a `GraphModule`.
        example_inputs: a tensor, a tuple of positional inputs or a dict of keyword inputs; where given, each value of
            the graph carries its shape, dtype and device.
        custom: leaves and fixed arguments.

    Returns:
        The graph, or `NotAModule`, `SeveralDevices`, `UnknownName`, `Untraceable`, `BadExampleInputs`.

    >>> from qfunc.ir import to_text
    >>> print(to_text(trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU())).unwrap()))
    graph Sequential
      %input = placeholder()
      %_0 = linear(input=%input, weight=load(0.weight), bias=load(0.bias))
      %_1 = relu(input=%_0)
      %output = output(value=%_1)
    """
    if not isinstance(model, nn.Module):
        return Failure(NotAModule(type(model).__name__))
    modules = dict(model.named_modules(remove_duplicate=False))
    errors = _check(model, modules, custom)
    if errors is not None:
        return Failure(errors)
    tracer = _Tracer(custom)
    try:
        with _unchanged(modules.values()):
            fx_graph = tracer.trace(model, concrete_args=dict(custom.concrete_args) or None)
            constants = {name: value for name, value in vars(model).items() if name.startswith("_tensor_constant")}
    except Exception as error:  # noqa: BLE001 - the model's forward is the user's code: anything may come out of it
        return Failure(diagnose(error, model))
    source = source_of(model, constants)
    graph = _graph(fx_graph, tracer, model, modules, source)
    return with_facts(graph, example_inputs) if example_inputs is not None else Success(graph)


def _graph(
    fx_graph: fx.Graph, tracer: _Tracer, model: nn.Module, modules: Mapping[str, nn.Module], source: Any
) -> Graph:
    reader = Reader(modules, source, tracer.node_name_to_scope)
    read: list[Node] = [reader.read(node) for node in fx_graph.nodes]
    nodes = settle_aliases(read, reader.writes, reader.as_written).nodes
    return Graph(
        pmap({node.id: node for node in nodes}),
        tuple(node.id for node in nodes),
        title=type(model).__name__,
        training=model.training,
        sources=pmap({"model": source}),
        objects=pmap(reader.objects),
        modules=pmap({path: type_name(type(module)) for path, module in modules.items()}),
        notes=tuple(reader.notes),
    )


def _check(model: nn.Module, modules: Mapping[str, nn.Module], custom: CustomConfig) -> QuantError | None:
    errors: list[QuantError] = [
        UnknownName(name, "module", tuple(modules)) for name in custom.non_traceable_names if name not in modules
    ]
    devices = sorted({str(tensor.device) for _, tensor in named_tensors(model)})
    if len(devices) > 1:
        errors.append(SeveralDevices(tuple(devices)))
    return several(errors) if errors else None


class _Tracer(StatementTracer):
    """Symbolic tracing with the reference's leaf rule."""

    def __init__(self, custom: CustomConfig) -> None:
        super().__init__()
        self._names = custom.non_traceable_names
        self._types = custom.non_traceable_types

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        library = m.__module__.startswith(("torch.nn", "torch.ao.nn"))
        chosen = module_qualified_name in self._names or isinstance(m, self._types)
        return chosen or (library and not isinstance(m, nn.Sequential))


@contextmanager
def _unchanged(modules: Any) -> Iterator[None]:
    """Undo what running `forward` writes on the modules: attributes set by the user's code, constants set by fx."""
    before = [(vars(module), dict(vars(module))) for module in dict.fromkeys(modules)]
    try:
        yield
    finally:
        for attributes, saved in before:
            if attributes.keys() != saved.keys() or any(attributes[key] is not saved[key] for key in saved):
                attributes.clear()
                attributes.update(saved)
