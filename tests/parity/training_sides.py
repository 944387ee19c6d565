"""One model prepared for training by qfunc's parity backends and by torch.ao, and how their parts correspond."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import fx

from qfunc import fuse, prepare_qat, unwrap
from qfunc.backends.default_mappings import get_default_qat_qconfig_mapping
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.ir import Graph
from qfunc.passes.stages import Prepared
from qfunc.testing import oracle
from tests.parity.structure import Described, Structure, described

BACKENDS = ("x86", "fbgemm", "qnnpack", "onednn", "native")


def named(backend: str) -> str:
    """The backend whose default mapping one is trained with: native has none of its own."""
    return "x86" if backend == "native" else backend


@dataclass(frozen=True)
class TrainingStructure(Structure):
    """A model prepared for training by both with the default mapping of `backend`."""

    version: int = 1

    @property
    def our_mapping(self) -> QConfigMapping:
        return unwrap(get_default_qat_qconfig_mapping(named(self.backend), self.version))

    @property
    def their_mapping(self) -> Any:
        return oracle.default_mapping(named(self.backend), qat=True, version=self.version)

    @cached_property
    def fused(self) -> Graph:
        return unwrap(fuse(self.graphs.traced, qat=True, backend=self.config))

    @cached_property
    def prepared(self) -> Prepared:
        return unwrap(prepare_qat(self.fused, self.our_mapping, backend=self.config))

    @cached_property
    def their_prepared(self) -> fx.GraphModule:
        return oracle.prepare_qat(self.graphs.model, (), self.their_mapping, backend_config=self.their_config)

    def their_module_weights(self) -> Iterator[tuple[str, Described]]:
        for node in self.their_prepared.graph.nodes:
            module = self.their_prepared.get_submodule(node.target) if node.op == "call_module" else None
            if hasattr(module, "weight_fake_quant"):
                yield node.name, described(module.weight_fake_quant)
