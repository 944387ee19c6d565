"""The whole way from a model to kernels as one value, whose every stage a law can look at."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from returns.result import Failure
from torch import Tensor, nn

from qfunc.backends import CPU
from qfunc.config.backend_config import BackendConfig
from qfunc.config.custom_config import CustomConfig
from qfunc.config.host_report import HostReport
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.edge.calibrate import calibrate
from qfunc.edge.materialize import materialize
from qfunc.edge.trace import NOTHING, trace
from qfunc.errors import QuantError, render
from qfunc.ir import Graph, Opaque, Source, to_text
from qfunc.passes.convert import convert
from qfunc.passes.lower import Lowered
from qfunc.passes.prepare import prepare
from qfunc.passes.stages import Calibrated, Converted, Prepared
from qfunc.quantize import fuse, lower
from qfunc.result import R


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A model and how to quantize it. `inputs` and each of `batches` are tuples of the model's positional inputs."""

    model: nn.Module
    inputs: tuple[Any, ...]
    batches: tuple[tuple[Any, ...], ...]
    backend: BackendConfig = CPU
    engine: str = "onednn"
    qconfig_mapping: QConfigMapping | None = None
    host: HostReport | None = None
    custom: CustomConfig = NOTHING

    def __repr__(self) -> str:
        # As a table: the `repr` of a long configuration fills pages.
        mapping = "" if self.qconfig_mapping is None else f",\n{self.qconfig_mapping}\n"
        return f"Case({getattr(self.model, 'program', self.model)!r}, {self.backend.name}, {self.engine}{mapping})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # noqa: ARG002 - the protocol's signature
        """How Hypothesis prints a failing example: a backend by its name, not by all its rows."""
        printer.text(repr(self))


Step = tuple[str, Callable[[Any], R[Any]]]
"""A function of the way: its name, and the function of the stage before."""


def steps(case: Case) -> tuple[Step, ...]:
    """The functions that lead from a case's model to its lowered stage, each of the stage before it."""
    return (
        ("trace", lambda model: trace(model, case.inputs, custom=case.custom)),
        ("fuse", lambda graph: fuse(graph, backend=case.backend, custom=case.custom)),
        ("prepare", lambda graph: prepare(graph, case.qconfig_mapping, backend=case.backend, custom=case.custom)),
        ("calibrate", lambda prepared: calibrate(prepared, case.batches, progress=False)),
        ("convert", convert),
        ("lower", lambda converted: lower(converted, engine=case.engine, host=case.host)),
    )


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """The stages that a case reaches; those behind a failure are missing.

    `stages` maps the names of the steps to what they gave, in order.
    """

    case: Case
    stages: Mapping[str, Any]
    failure: QuantError | None = None
    # The modules made so far: several laws run one and the same stage.
    _modules: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def run(self, name: str, inputs: tuple[Any, ...]) -> Any:
        """What the stage that the step `name` gave computes of inputs."""
        if name not in self._modules:
            self._modules[name] = made(self.stages[name])
        return run(self._modules[name], inputs)

    @property
    def graph(self) -> Graph | None:
        """What `trace` gave."""
        return self.stages.get("trace")

    @property
    def fused(self) -> Graph | None:
        """What `fuse` gave."""
        return self.stages.get("fuse")

    @property
    def prepared(self) -> Prepared | None:
        """What `prepare` gave."""
        return self.stages.get("prepare")

    @property
    def calibrated(self) -> Calibrated | None:
        """What `calibrate` gave."""
        return self.stages.get("calibrate")

    @property
    def converted(self) -> Converted | None:
        """What `convert` gave."""
        return self.stages.get("convert")

    @property
    def lowered(self) -> Lowered | None:
        """What `lower` gave."""
        return self.stages.get("lower")

    def inputs(self) -> Iterator[tuple[Any, ...]]:
        """The example inputs and the first batch, which may be of another size."""
        yield self.case.inputs
        yield from self.case.batches[:1]


def walk(case: Case) -> Walk:
    """Go the whole way, or as far as it leads.

    >>> from torch import nn
    >>> x = torch.randn(2, 3)
    >>> list(walk(Case(nn.Linear(3, 3).eval(), (x,), ((x,),))).stages)
    ['trace', 'fuse', 'prepare', 'calibrate', 'convert', 'lower']
    """
    stages: dict[str, Any] = {}
    stage: Any = case.model
    for name, function in steps(case):
        result = function(stage)
        if isinstance(result, Failure):
            return Walk(case, stages, result.failure())
        stage = stages[name] = result.unwrap()
    return Walk(case, stages)


def graph_of(stage: Any) -> Graph:
    """The graph that a stage is about."""
    found: Graph = stage if isinstance(stage, Graph) else stage.graph
    return found


class BrokenError(Exception):
    """A law does not hold; what is broken."""


def made(stage: Any) -> nn.Module:
    """The module of a stage; a stage that cannot be materialized breaks the law in hand."""
    module = materialize(stage)
    if isinstance(module, Failure):
        raise BrokenError(f"{type(stage).__name__} cannot be materialized: {render(module.failure())}")
    return module.unwrap()


def run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a module computes of inputs, without autograd."""
    with torch.no_grad():
        return module(*inputs)


def fingerprint(value: Any) -> str:
    """A digest of all that a value holds, tensors with every bit: equal before and after what must not change it.

    >>> fingerprint((torch.zeros(2), "a")) == fingerprint((torch.zeros(2), "a")) != fingerprint((torch.ones(2), "a"))
    True
    """
    return hashlib.sha256("\n".join(_lines(value)).encode()).hexdigest()


def _lines(value: Any) -> Iterator[str]:
    match value:
        case Tensor():
            yield f"{value.dtype} {tuple(value.shape)} {value.requires_grad} {_bits(value)}"
        case Graph():
            yield to_text(value, full=True)
            yield f"{value.history!r} {value.notes!r} {sorted(value.objects)} {sorted(value.modules.items())}"
            yield from _lines(value.sources)
        case Source():
            yield from _lines({name: tensor for name, (tensor, _) in value.tensors.items()})
        case nn.Module():
            yield from _module_lines(value)
        case Opaque():
            yield str(id(value.value))
        case _:
            yield from _container_lines(value)


def _container_lines(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        parts = [part for key in sorted(value, key=repr) for part in (repr(key), value[key])]
    elif isinstance(value, tuple | list):
        parts = list(value)
    elif is_dataclass(value) and not isinstance(value, type):
        parts = [part for each in fields(value) for part in (each.name, getattr(value, each.name))]
    else:
        yield repr(value)
        return
    yield f"{type(value).__name__} {len(parts)}"
    for part in parts:
        yield from _lines(part)


def _bits(tensor: Tensor) -> str:
    values = tensor.detach().dequantize() if tensor.is_quantized else tensor.detach()
    dense = values.contiguous()
    held = ctypes.string_at(dense.data_ptr(), dense.nbytes) if dense.nbytes else b""
    return hashlib.sha256(held).hexdigest()


def _module_lines(model: nn.Module) -> Iterator[str]:
    """State, hooks, flags and every attribute by identity."""
    for path, module in model.named_modules(remove_duplicate=False):
        yield f"{path} {id(module)} {module.training}"
        for name, attribute in vars(module).items():
            held = list(attribute.items()) if isinstance(attribute, dict) else attribute
            identities = [(key, id(item)) for key, item in held] if isinstance(attribute, dict) else id(held)
            yield f"{name} {identities}"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        yield f"{name} {id(tensor)} {tensor._version} {tensor.grad is None}"
        yield from _lines(tensor)
