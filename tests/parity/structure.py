"""What qfunc and torch.ao mean to quantize in one model: values, observers, groups that share one, and weights.

No data runs: both sides are prepared, neither is calibrated.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import fx, nn

import qfunc
from qfunc import fuse, prepare, trace, unwrap
from qfunc.config.backend_config import BackendConfig
from qfunc.ir import Graph
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import FixedQParams, Observer
from qfunc.passes.stages import Prepared
from qfunc.testing import oracle
from tests.parity.sides import their_default


class Described(NamedTuple):
    """An observer of either side."""

    name: str
    dtype: str
    quant_min: int
    quant_max: int
    qscheme: str
    ch_axis: int | None
    eps: float | None
    fixed: tuple[float, int] | None


class Group(NamedTuple):
    """The values that one observer sees, by torch.ao's names."""

    values: frozenset[str]
    observer: Described


class Quantized(NamedTuple):
    """All that a side quantizes; weights by torch.ao's names of the nodes that use them."""

    groups: Counter[Group]
    weights: frozenset[tuple[str, Described]]


_NAMES = {
    "HistogramObserver": "Histogram",
    "MinMaxObserver": "MinMax",
    "PerChannelMinMaxObserver": "PerChannelMinMax",
    "MovingAverageMinMaxObserver": "MovingAverageMinMax",
    "MovingAveragePerChannelMinMaxObserver": "MovingAveragePerChannelMinMax",
    "FixedQParamsObserver": "FixedQParams",
}
_DTYPES = {torch.quint8: "uint8", torch.qint8: "int8", torch.qint32: "int32"}


@dataclass(frozen=True)
class Traced:
    """What is the same for every backend."""

    model: nn.Module
    inputs: tuple[object, ...]

    @cached_property
    def traced(self) -> Graph:
        return unwrap(trace(self.model, self.inputs))

    @cached_property
    def their_ids(self) -> dict[str, str]:
        """The names there of our nodes, which differ for some: `x += y` is no operator of its own for its tracer."""
        from torch.ao.quantization.fx.tracer import QuantizationTracer

        traced = QuantizationTracer([], []).trace(copy.deepcopy(self.model))
        names = [node.name for node in traced.nodes if not node.name.endswith("activation_post_process")]
        return dict(zip(self.traced.order, names, strict=True))


@dataclass(frozen=True)
class Structure:
    """A model prepared by both with the default mapping of `backend`, which is a name."""

    graphs: Traced
    backend: str

    @cached_property
    def config(self) -> BackendConfig:
        found: BackendConfig = getattr(qfunc, self.backend.upper())
        return found

    @cached_property
    def fused(self) -> Graph:
        return unwrap(fuse(self.graphs.traced, backend=self.config))

    @cached_property
    def prepared(self) -> Prepared:
        return unwrap(prepare(self.fused, backend=self.config))

    @cached_property
    def ours(self) -> Quantized:
        prepared = self.prepared
        weights = {(self.chain(id)[0], _our(observer)) for id, observer in prepared.weights.items()}
        # A weight that the graph computes is quantized where it is used.
        computed = {edge: site for edge, site in prepared.inputs.items() if edge.slot == "weight"}
        weights |= {(self.chain(edge.user)[0], _our(prepared.sites[site].observer)) for edge, site in computed.items()}
        of_activations = {*prepared.outputs.values(), *(s for e, s in prepared.inputs.items() if e not in computed)}
        sites = [prepared.sites[site] for site in of_activations]
        groups = (Group(frozenset(map(self.their_name, site.taps)), _our(site.observer)) for site in sites)
        return Quantized(Counter(groups), frozenset(weights))

    @cached_property
    def their_config(self) -> Any:
        """Torch.ao's table of the backend."""
        return oracle.backend_config(self.backend)

    @property
    def their_mapping(self) -> Any:
        """Torch.ao's default mapping."""
        return their_default(self.backend)

    @cached_property
    def their_prepared(self) -> fx.GraphModule:
        with _quiet():
            return oracle.prepare(self.graphs.model, (), self.their_mapping, backend_config=self.their_config)

    def their_module_weights(self) -> Iterator[tuple[str, Described]]:
        """The weights of modules, by the names of the nodes that call them."""
        return _module_weights(self.their_prepared, self.their_config)

    @cached_property
    def theirs(self) -> Quantized:
        with _quiet():
            weights = set(self.their_module_weights())
        for node, module in self.their_observers.items():
            weights |= {(user.name, described(module)) for user in node.users if _is_weight(user, node)}
        groups = (Group(values, described(module)) for module, values in self.their_sites)
        return Quantized(Counter(groups), frozenset(weights))

    @cached_property
    def their_sites(self) -> tuple[tuple[Any, frozenset[str]], ...]:
        """The observers of activations, and what each sees."""
        sites: dict[int, tuple[Any, set[str]]] = {}
        for node, module in self.their_observers.items():
            if not node.users or not all(_is_weight(user, node) for user in node.users):
                sites.setdefault(id(module), (module, set()))[1].add(self.observed(node))
        return tuple((module, frozenset(values)) for module, values in sites.values())

    @cached_property
    def their_observers(self) -> dict[fx.Node, Any]:
        """Their calls, with the module of each."""
        from torch.ao.quantization import FakeQuantizeBase, ObserverBase

        prepared = self.their_prepared
        calls = [(n, prepared.get_submodule(n.target)) for n in prepared.graph.nodes if n.op == "call_module"]
        return {node: module for node, module in calls if isinstance(module, (FakeQuantizeBase, ObserverBase))}

    def observed(self, node: fx.Node) -> str:
        """The value that an observer sees; those of one value may stand one behind another."""
        while node in self.their_observers:
            node = node.args[0]
        return node.name

    @cached_property
    def their_usual(self) -> Described:
        """The observer of activations for which the default mapping says nothing else."""
        with _quiet():
            return described(self.their_mapping.global_qconfig.activation())

    def is_fixed(self, node: fx.Node) -> bool:
        """Whether torch.ao means to give a node's value a range that is known beforehand."""
        observer = _made(node, "output_act_obs_or_fq_ctr")
        return observer is not None and observer.fixed is not None

    def their_inputs(self, node: fx.Node) -> Described | None:
        """The observer that torch.ao means for the inputs of a node, if there is one."""
        return _made(node, "input_act_obs_or_fq_ctr")

    def chain(self, id: str) -> tuple[str, ...]:
        """The first and the last of the traced nodes that a fused node stands for."""
        traced, names = self.graphs.traced, self.graphs.their_ids
        fused, found = self.fused[id], [traced[id]]
        while (found[0].kind, found[0].origin) != (fused.kind, fused.origin):
            found = [*found[1:], *map(traced.nodes.__getitem__, found[0].uses())]
        return names[found[0].id], names[id]

    def their_name(self, id: str) -> str:
        """A fused node has the id of its chain's last node here; where torch.ao has a fused module, the first one's."""
        first, last = self.chain(id)
        return last if last in self._their_nodes else first

    @cached_property
    def _their_nodes(self) -> frozenset[str]:
        return frozenset(node.name for node in self.their_prepared.graph.nodes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.ao's warnings about its own defaults, and about configurations that it leaves aside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _made(node: fx.Node, what: str) -> Described | None:
    make = (node.meta.get("target_dtype_info") or {}).get(what)
    with _quiet():
        module = make() if make is not None else None
    return described(module) if getattr(module, "quant_min", None) is not None else None


def _our(observer: Observer[Any] | FakeQuantize) -> Described:
    if isinstance(observer, FakeQuantize):
        inner = _our(observer.observer)
        return inner._replace(name=_training(inner.name, getattr(observer.observer, "averaging_constant", None)))
    spec, fixed = observer.spec, None
    if isinstance(observer, FixedQParams):
        fixed = (observer.scale, observer.zero_point)
    eps = None if fixed else float(torch.tensor(spec.eps, dtype=torch.float32))
    name = type(observer).__name__
    return Described(name, spec.dtype, spec.quant_min, spec.quant_max, spec.qscheme, spec.ch_axis, eps, fixed)


def described(module: Any) -> Described:
    """An observer of torch.ao's, or what it calls a fake quantizer."""
    if hasattr(module, "activation_post_process"):
        observer = module.activation_post_process
        inner = described(observer)
        return inner._replace(name=_training(inner.name, getattr(observer, "averaging_constant", None)))
    name, qscheme = type(module).__name__, str(getattr(module, "qscheme", "")).removeprefix("torch.")
    fixed = (float(module.scale), int(module.zero_point)) if name == "FixedQParamsObserver" else None
    eps = float(module.eps) if hasattr(module, "eps") and fixed is None else None
    axis = module.ch_axis if qscheme.startswith("per_channel") else None
    dtype = _DTYPES.get(module.dtype, str(module.dtype))
    return Described(_NAMES.get(name, name), dtype, module.quant_min, module.quant_max, qscheme, axis, eps, fixed)


def _training(name: str, averaging_constant: float | None) -> str:
    """The name of an observer whose values are rounded in training."""
    return f"FakeQuantize {name}" + ("" if averaging_constant is None else f" {averaging_constant}")


def _is_weight(user: fx.Node, node: fx.Node) -> bool:
    from torch.ao.quantization.fx.utils import node_arg_is_weight

    return node_arg_is_weight(user, node)


def _module_weights(prepared: fx.GraphModule, config: Any) -> Iterator[tuple[str, Described]]:
    """The weights of modules that convert would quantize."""
    from torch.ao.nn.intrinsic import _FusedModule
    from torch.ao.quantization.backend_config.utils import (
        get_pattern_to_dtype_configs,
        get_root_module_to_quantized_reference_module,
    )
    from torch.ao.quantization.fx.qconfig_mapping_utils import _is_qconfig_supported_by_dtype_configs
    from torch.ao.quantization.utils import weight_is_quantized

    state = prepared.meta["_observed_graph_module_attrs"]
    roots, dtypes = get_root_module_to_quantized_reference_module(config), get_pattern_to_dtype_configs(config)
    for node in prepared.graph.nodes:
        if node.op != "call_module" or node.name not in state.observed_node_names:
            continue
        module: Any = prepared.get_submodule(node.target)
        root, qconfig = module[0] if isinstance(module, _FusedModule) else module, getattr(module, "qconfig", None)
        if type(root) not in roots or qconfig is None or state.node_name_to_qconfig.get(node.name) is None:
            continue
        if _is_qconfig_supported_by_dtype_configs(qconfig, dtypes.get(type(module), [])) and weight_is_quantized(
            qconfig
        ):
            yield node.name, described(qconfig.weight())
