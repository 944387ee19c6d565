"""One model quantized by qfunc's parity backends and by torch.ao, on the same data, and how their values correspond."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from typing import Any

import torch
from torch import fx, nn

import qfunc
from qfunc import X86, QConfig, QConfigMapping, convert, fuse, lower, materialize, prepare, trace, unwrap
from qfunc import calibrate as calibrated
from qfunc.config.backend_config import BackendConfig
from qfunc.ir import Graph
from qfunc.numerics.observers import Histogram, MinMax, MovingAverageMinMax, Observer, PerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8, UINT8_REDUCED
from qfunc.params import DequantizeWeight, FoldBatchNorm
from qfunc.testing import ModelCase, build, oracle, write_program
from tests.zoo import ZOO, ZooCase

CASES = tuple(case for case in ZOO if not case.oracle)
CONFIGS = ("histogram", "minmax", "moving_average")
TORCHVISION = ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "googlenet", "squeezenet1_1")


def our_mapping(config: str) -> QConfigMapping:
    by_config: dict[str, tuple[Observer[Any], Observer[Any]]] = {
        "histogram": (Histogram(UINT8_REDUCED), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)),
        "minmax": (MinMax(UINT8), MinMax(INT8_SYMMETRIC)),
        "moving_average": (MovingAverageMinMax(UINT8_REDUCED), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)),
    }
    activation, weight = by_config[config]
    return X86.qconfig_mapping.set_global(QConfig(activation, weight))


def their_default(backend: str) -> Any:
    """The default of a backend; where it has none, the one of torch.ao's that `qfunc.backends.parity` takes."""
    import torch.ao.quantization as ao
    from torch.ao.quantization.qconfig_mapping import _get_symmetric_qnnpack_qconfig_mapping

    if backend == "executorch":
        return _get_symmetric_qnnpack_qconfig_mapping()
    if backend == "tensorrt":
        symmetric = ao.HistogramObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
        return ao.QConfigMapping().set_global(ao.QConfig(symmetric, ao.default_weight_observer))
    return ao.get_default_qconfig_mapping("x86" if backend == "native" else backend)


def their_mapping(config: str) -> Any:
    import torch.ao.quantization as ao

    mapping = ao.get_default_qconfig_mapping("x86")
    per_tensor = ao.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    per_channel = ao.PerChannelMinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    average = ao.MovingAverageMinMaxObserver.with_args(dtype=torch.quint8, quant_min=0, quant_max=127)
    qconfig = {
        "histogram": mapping.global_qconfig,
        "minmax": ao.QConfig(ao.MinMaxObserver.with_args(dtype=torch.quint8), per_tensor),
        "moving_average": ao.QConfig(average, per_channel),
    }[config]
    # the default mapping has an entry of its own for layer norms, whose output a linear reads
    return mapping.set_global(qconfig).set_object_type(nn.LayerNorm, qconfig)


@dataclass(frozen=True)
class Sides:
    """`model` calibrated on `batches` by both; everything else follows."""

    model: nn.Module
    batches: tuple[tuple[object, ...], ...]
    config: str = "histogram"
    """One of `CONFIGS` for x86, or the name of a backend, with its default."""

    @cached_property
    def backend(self) -> BackendConfig:
        return X86 if self.config in CONFIGS else getattr(qfunc, self.config.upper())

    @property
    def their_backend(self) -> dict[str, Any]:
        """The option that names it; torch.ao's default is native, which lists layer norms beyond x86."""
        return {} if self.config in CONFIGS else {"backend_config": oracle.backend_config(self.config)}

    @cached_property
    def traced(self) -> Graph:
        return unwrap(trace(self.model, self.batches[0]))

    @cached_property
    def fused(self) -> Graph:
        return unwrap(fuse(self.traced, backend=self.backend))

    @cached_property
    def ours(self):
        mapping = our_mapping(self.config) if self.config in CONFIGS else None
        prepared = unwrap(prepare(self.fused, mapping, backend=self.backend))
        return unwrap(calibrated(prepared, self.batches, progress=False))

    @cached_property
    def converted(self):
        return unwrap(convert(self.ours))

    @cached_property
    def theirs(self) -> fx.GraphModule:
        mapping = their_mapping(self.config) if self.config in CONFIGS else their_default(self.config)
        prepared = oracle.prepare(self.model, self.batches[0], mapping, **self.their_backend)
        return oracle.calibrate(prepared, self.batches)

    def reference(self) -> fx.GraphModule:
        return unwrap(materialize(self.converted))

    def lowered(self, engine: str) -> fx.GraphModule:
        return unwrap(materialize(unwrap(lower(self.converted, engine=engine))))

    def their_name(self, id: str) -> str:
        """A fused node has the id of its chain's last node here; torch.ao keeps a fused module's, the first one's.

        It has no fused module for functions, nor for a linear with batch norm and ReLU: there it observes the last one.
        """
        fused, found = self.fused[id], [self.traced[id]]
        while (found[0].kind, found[0].origin) != (fused.kind, fused.origin):
            found = [*found[1:], *map(self.traced.nodes.__getitem__, found[0].uses())]
        written = found[0].origin.written
        is_module = written is not None and written.op == "call_module"
        folded = fused.has("weight") and isinstance(fused.get("weight"), FoldBatchNorm)
        return found[0].id if is_module and not (fused.kind == "linear" and folded and fused.post) else id

    @cached_property
    def our_groups(self) -> dict[frozenset[str], Any]:
        """The qparams of each site, by torch.ao's names of the values that share it."""
        return {
            frozenset(map(self.their_name, site.taps)): site.observer.finish(self.ours.statistics.state(site.folds))
            for site in self.ours.prepared.sites.values()
        }

    @cached_property
    def their_groups(self) -> dict[frozenset[str], oracle.QParams]:
        """Of activations: weights that functions are given are parameter expressions here, and have no site."""
        weights = {node.name for node in self.theirs.graph.nodes if node.op == "get_attr"}
        observed = [o for o in oracle.observed_values(self.theirs) if o.dtype == torch.quint8 or o.value not in weights]
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


FAMILIES = (
    "conv",
    "conv_transpose",
    "linear",
    "norm",
    "block",
    "activation",
    "pool",
    "identity",
    "cat",
    "arithmetic",
    "mean",
)

UNFIT = {
    r"tensors=|input=|weight=": "keyword operands are observed wrongly, or fail in convert",
    r"padding='same'|padding_mode='[rc]": "padding modes are ignored or fail in convert",
    r"F\.conv\dd": "integer options of functions fail in convert",
    r"affine=False": "a batch norm without weight fails in convert",
    r"return.*\b([vx]\d+)\b.*\b\1\b|return .*, 1\)": "a value returned twice, and a number, fail in convert",
    r"gain": "a number among the inputs is observed like a tensor",
    r"alpha=": "a sum's alpha is dropped",
    r"nn\.Linear.*\n(.*\n)*.*nn\.BatchNorm1d": "a batch norm is folded into a linear of any rank",
}
"""What torch.ao gets wrong in generated programs: patterns of their text."""


UNLISTED = {r"output_size=\[": "a transposed convolution whose padding depends on its input's size is kept as it is"}
"""What the parity backend has no rule for, and torch.ao quantizes: patterns of a program's text."""


def generated(count: int) -> list[ModelCase]:
    """Random models that torch.ao can quantize rightly. Drawn without shrinking, which would take minutes."""
    programs = (write_program(random.Random(seed).choice, max_nodes=8, families=FAMILIES) for seed in range(10**6))
    fitting = (p for p in programs if not any(re.search(pattern, p.description) for pattern in (*UNFIT, *UNLISTED)))
    return [build(program) for program in islice(fitting, count)]
