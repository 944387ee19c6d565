"""`trace`: from an `nn.Module` to an immutable `Graph`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from pyrsistent import pmap
from returns.result import Failure, Success
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from qfunc.config.arguments import wrong_arguments
from qfunc.config.custom_config import CustomConfig, preserved_problems
from qfunc.edge.alias import settle_aliases
from qfunc.edge.batches import as_tensors
from qfunc.edge.diagnose import diagnose
from qfunc.edge.facts import with_facts
from qfunc.edge.read import Reader, module_fact
from qfunc.edge.replace_modules import LeafModule, Replaced, replace_modules
from qfunc.edge.schema import VIEWS
from qfunc.edge.statements import StatementTracer
from qfunc.edge.tensors import named_tensors, source_of
from qfunc.edge.unchanged import unchanged
from qfunc.errors import BadExampleInputs, NotAModule, Problem, SeveralDevices, UnknownName, Untraceable, several
from qfunc.errors import problems as problems_in
from qfunc.ir import Graph, Note, Source
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
        example_inputs: a tensor or numpy array, a tuple of positional inputs or a dict of keyword inputs; where given,
            each value of the graph carries its shape, dtype and device.
        custom: leaves, fixed arguments, and what is to replace modules.

    Returns:
        The graph, or `NotAModule`, `SeveralDevices`, `UnknownName`, `Untraceable`, `BadExampleInputs`,
        `UserFunctionFailed` for a function that is to replace a module.

    >>> from qfunc.ir import to_text
    >>> print(to_text(trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU()).eval()).unwrap()))
    graph Sequential
      %input_1 = placeholder()
      %_0 = linear(input=%input_1, weight=load(0.weight), bias=load(0.bias))
      %_1 = relu(input=%_0)
      %output = output(value=%_1)
    """
    if not isinstance(model, nn.Module):
        return Failure(NotAModule(type(model).__name__))
    wrong = wrong_arguments(custom=custom)
    if wrong:
        return Failure(several(wrong))
    made = replace_modules(model, custom)
    replaced = made.value_or(Replaced(model, model, {}))
    modules = dict(replaced.model.named_modules(remove_duplicate=False))
    problems = [*_check(model, modules, custom), *(problems_in(made.failure()) if isinstance(made, Failure) else ())]
    if problems:
        return Failure(several(problems))
    recorded = _record(replaced, modules, custom)
    if isinstance(recorded, Untraceable):
        return Failure(recorded)
    graph, converted = recorded.graph()
    if example_inputs is None:
        return Success(graph)
    read = as_tensors(example_inputs)
    if isinstance(read, Failure):
        return Failure(BadExampleInputs("example_inputs", read.failure()))
    example = read.unwrap()
    seen = with_facts(graph, example)
    if isinstance(seen, Failure):
        return seen
    promoted = _promoted(seen.unwrap(), converted)
    return with_facts(recorded.graph(promoted)[0], example) if promoted else seen


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What fx recorded of a model, once the model is as it was before."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    fx_graph: fx.Graph
    scopes: Mapping[str, tuple[str, Any]]
    source: Source
    attributes: Mapping[str, Any]
    notes: tuple[Note, ...]
    preserved: tuple[str, ...]
    own: frozenset[type]

    def graph(self, frozen: Collection[str] = ()) -> tuple[Graph, Mapping[str, str]]:
        """The graph, with the in-place operators in `frozen` kept; and those not kept, with what each writes to."""
        reader = Reader(self.modules, self.source, self.scopes, self.attributes, self.own)
        read = [reader.read(node) for node in self.fx_graph.nodes]
        settled = settle_aliases(read, reader.writes, reader.as_written, frozen)
        graph = Graph(
            pmap({node.id: node for node in settled.nodes}),
            tuple(node.id for node in settled.nodes),
            title=type(self.model).__name__,
            training=self.model.training,
            sources=pmap({"model": self.source}),
            objects=pmap(reader.objects),
            modules=pmap({path: module_fact(module) for path, module in self.modules.items()}),
            preserved=self.preserved,
            notes=(*self.notes, *reader.notes),
        )
        return graph, settled.converted


def _record(replaced: Replaced, modules: Mapping[str, nn.Module], custom: CustomConfig) -> _Recorded | Untraceable:
    """Trace with buffers as traced values, so that reading and writing them is recorded; failing that, as constants.

    A forward that decides by a buffer's value can only be traced the second way. Where both fail, what is told is the
    failure of the way that came further: the other one stumbled over what the user could have left as it is.
    """
    model = replaced.model
    failures: list[tuple[int, Untraceable]] = []
    for buffers in (True, False):
        tracer = _Tracer(custom, replaced, buffers=buffers)
        notes = replaced.notes
        if not buffers:
            notes += (Note("model", "what its forward decides by values of its buffers was decided now"),)
        kept = tuple(model.buffers()) if not buffers else ()
        try:
            with unchanged(modules.values(), kept) as written:
                fx_graph = tracer.trace(model, concrete_args=dict(custom.concrete_args) or None)
                attributes = {
                    str(n.target): _attribute(model, str(n.target)) for n in fx_graph.nodes if n.op == "get_attr"
                }
        except Exception as error:  # noqa: BLE001 - the model's forward is the user's code: anything may come out of it
            failures.append((_recorded_of_inputs(tracer), diagnose(error, model)))
        else:
            if written:
                failures.append((_recorded_of_inputs(tracer), Untraceable(type(model).__name__, "", *_WRITTEN)))
            else:
                tensors = {k: v for k, v in attributes.items() if isinstance(v, Tensor)}
                source = source_of(model, tensors, replaced.original, replaced.originals)
                scopes, preserved = tracer.node_name_to_scope, custom.preserved_attributes
                own = frozenset(module.float_type for module in custom.custom_modules)
                return _Recorded(model, modules, fx_graph, scopes, source, attributes, notes, preserved, own)
        if not any(True for _ in model.buffers()):
            break
    return max(failures, key=lambda failure: failure[0])[1]


def _recorded_of_inputs(tracer: fx.Tracer) -> int:
    """How many operators on what comes from inputs a tracer has recorded; those on buffers alone may be constants."""
    found: set[fx.Node] = set()
    for node in tracer.graph.nodes if hasattr(tracer, "graph") else ():
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return len(found)


_WRITTEN = (
    "its forward writes in place to a tensor that is neither an input, a parameter nor a buffer, which is not recorded",
    "register the tensor with register_buffer, or make a new one instead of writing to it",
)


def _attribute(model: nn.Module, target: str) -> Any:
    found: Any = model
    for part in target.split("."):
        found = getattr(found, part)
    return found


def _promoted(graph: Graph, converted: Mapping[str, str]) -> frozenset[str]:
    """The out-of-place twins that give another dtype or shape than writing in place does.

    Those that only change the shape, `x.unsqueeze_(0)`, do so in place as well.
    """
    writes = ((id, operand) for id, operand in converted.items() if graph[id].kind not in VIEWS)
    pairs = ((id, graph[id].fact, graph[operand].fact) for id, operand in writes)
    return frozenset(id for id, after, before in pairs if before is not None and after != before)


def _check(model: nn.Module, modules: Mapping[str, nn.Module], custom: CustomConfig) -> list[Problem]:
    errors: list[Problem] = [
        UnknownName(name, "module", tuple(modules))
        for name in (*custom.non_traceable_names, *custom.standalone_names)
        if name not in modules
    ]
    errors += preserved_problems(model, custom.preserved_attributes)
    if custom.concrete_args:
        inputs = signature(model.forward).parameters
        errors += [UnknownName(name, "input", tuple(inputs)) for name in custom.concrete_args if name not in inputs]
    errors += [
        Untraceable(name, "", "a lazy module, whose parameters have no shape yet", "run the model once on an example")
        for name, tensor in named_tensors(model)
        if is_lazy(tensor)
    ]
    devices = sorted({str(tensor.device) for _, tensor in named_tensors(model)})
    if len(devices) > 1:
        errors.append(SeveralDevices(tuple(devices)))
    return errors


_FLOAT_FUNCTIONAL = "torch.ao.nn.quantized.modules.functional_modules.FloatFunctional"


class _Tracer(StatementTracer):
    """Symbolic tracing with the reference's leaf rule.

    Compiled parts cannot be looked into; what a `GraphModule` calls was a leaf when that was made, unless it is
    replaced. Of the reference's wrapper `FloatFunctional` only the operators are recorded, as there.
    """

    def __init__(self, custom: CustomConfig, replaced: Replaced, *, buffers: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers
        root = replaced.model
        called = root.graph.find_nodes(op="call_module") if isinstance(root, fx.GraphModule) else ()
        leaves = {str(node.target) for node in called} - set(replaced.originals)
        self._names = {*custom.non_traceable_names, *leaves}
        self._types = custom.non_traceable_types
        self._own = frozenset(module.float_type for module in custom.custom_modules)
        wrappers = (path for path, module in root.named_modules() if type_name(type(module)) == _FLOAT_FUNCTIONAL)
        self._observed = {f"{path}.activation_post_process".lstrip(".") for path in wrappers}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        library = m.__module__.startswith(("torch.nn", "torch.ao.nn"))
        compiled = isinstance(m, torch.jit.ScriptModule) or type(m).__module__.startswith("torch._dynamo")
        chosen = (
            module_qualified_name in self._names or isinstance(m, (*self._types, LeafModule)) or type(m) in self._own
        )
        if type(m) is nn.Identity and module_qualified_name in self._observed:
            return chosen  # where a wrapper would have its observer
        return chosen or compiled or (library and not isinstance(m, nn.Sequential))
