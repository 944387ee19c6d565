"""One model quantized by qfunc's parity backend and by torch.ao, on the same data, and how their values correspond."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import fx, nn

from qfunc import X86, QConfig, QConfigMapping, convert, fuse, lower, materialize, prepare, trace, unwrap
from qfunc import calibrate as calibrated
from qfunc.ir import Graph
from qfunc.numerics.observers import MinMax, MovingAverageMinMax, Observer, PerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8, UINT8_REDUCED
from qfunc.params import DequantizeWeight
from qfunc.testing import oracle
from tests.zoo import ZOO, ZooCase

CASES = tuple(case for case in ZOO if not case.oracle)
CONFIGS = ("histogram", "minmax", "moving_average")
TORCHVISION = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "googlenet", "squeezenet1_1")


def our_mapping(config: str) -> QConfigMapping:
    activation: dict[str, Observer[Any]] = {"minmax": MinMax(UINT8), "moving_average": MovingAverageMinMax(UINT8_REDUCED)}
    weight = {"minmax": MinMax(INT8_SYMMETRIC), "moving_average": PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)}
    if config == "histogram":
        return X86.qconfig_mapping
    return QConfigMapping().set_global(QConfig(activation[config], weight[config]))


def their_mapping(config: str) -> Any:
    import torch.ao.quantization as ao

    mapping = ao.get_default_qconfig_mapping("x86")
    per_tensor = ao.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    per_channel = ao.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    if config == "minmax":
        mapping.set_global(ao.QConfig(ao.MinMaxObserver.with_args(dtype=torch.quint8), per_tensor))
    if config == "moving_average":
        average = ao.MovingAverageMinMaxObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=127)
        mapping.set_global(ao.QConfig(average, per_channel))
    return mapping


@dataclass(frozen=True)
class Sides:
    """`model` calibrated on `batches` by both; everything else follows."""

    model: nn.Module
    batches: tuple[tuple[object, ...], ...]
    config: str = "histogram"

    @cached_property
    def traced(self) -> Graph:
        return unwrap(trace(self.model, self.batches[0]))

    @cached_property
    def fused(self) -> Graph:
        return unwrap(fuse(self.traced, backend=X86))

    @cached_property
    def ours(self):
        prepared = unwrap(prepare(self.fused, our_mapping(self.config), backend=X86))
        return unwrap(calibrated(prepared, self.batches, progress=False))

    @cached_property
    def converted(self):
        return unwrap(convert(self.ours))

    @cached_property
    def theirs(self) -> fx.GraphModule:
        prepared = oracle.prepare(self.model, self.batches[0], their_mapping(self.config))
        return oracle.calibrate(prepared, self.batches)

    def reference(self) -> fx.GraphModule:
        return unwrap(materialize(self.converted))

    def lowered(self, engine: str) -> fx.GraphModule:
        return unwrap(materialize(unwrap(lower(self.converted, engine=engine))))

    def their_name(self, id: str) -> str:
        """A fused node has the id of its chain's last node here; torch.ao keeps a fused module's, the first one's."""
        root = self.traced[id]
        while root.kind != self.fused[id].kind:
            root = self.traced[next(root.uses())]
        written = root.origin.written
        return root.id if written is not None and written.op == "call_module" else id

    def our_groups(self) -> dict[frozenset[str], Any]:
        """The qparams of each site, by torch.ao's names of the values that share it."""
        states = self.ours.statistics.states
        return {
            frozenset(map(self.their_name, site.taps)): site.observer.finish(states[site.key])
            for site in self.ours.prepared.sites.values()
        }

    def their_groups(self) -> dict[frozenset[str], oracle.QParams]:
        observed = oracle.observed_values(self.theirs)
        return {frozenset(o.shared): o.qparams for o in observed if o.qparams is not None}

    def our_weights(self) -> dict[str, Any]:
        """The qparams of the weights of layers, by their modules' names."""
        found = {}
        for node in self.converted.graph:
            weight = node.get("weight") if node.has("weight") else None
            written = node.origin.written
            if isinstance(weight, DequantizeWeight) and written is not None and written.op == "call_module":
                found[node.origin.module] = weight
        return found


@cache
def zoo_sides(case: ZooCase, config: str = "histogram") -> Sides:
    model, _ = case.build()
    return Sides(model, tuple(case.batches()), config)


def outputs(module: nn.Module, batches: Iterable[tuple[object, ...]]) -> list[Any]:
    with torch.no_grad():
        return [module(*batch) for batch in batches]
