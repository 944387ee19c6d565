"""One model prepared for training by qfunc's parity backends and by torch.ao, and how their parts correspond."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from qfunc import fuse, materialize, prepare_qat, unwrap
from qfunc.backends.default_mappings import get_default_qat_qconfig_mapping
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.ir import Graph
from qfunc.passes.stages import Prepared
from qfunc.testing import oracle, oracle_training
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
        return oracle_training.prepare_qat(self.graphs.model, (), self.their_mapping, backend_config=self.their_config)

    def their_module_weights(self) -> Iterator[tuple[str, Described]]:
        for node in self.their_prepared.graph.nodes:
            module = self.their_prepared.get_submodule(node.target) if node.op == "call_module" else None
            if hasattr(module, "weight_fake_quant"):
                yield node.name, described(module.weight_fake_quant)


@dataclass(frozen=True)
class Training:
    """One model in training on both sides, from one state, under names of ours."""

    structure: TrainingStructure
    dtype: torch.dtype = torch.float32

    @cached_property
    def ours(self) -> fx.GraphModule:
        return unwrap(materialize(self.structure.prepared)).to(self.dtype)

    @cached_property
    def theirs(self) -> fx.GraphModule:
        """Torch.ao's; its fake quantizers compute in float32 only."""
        from torch.ao.quantization import FakeQuantizeBase

        model = copy.deepcopy(self.structure.their_prepared).to(self.dtype)
        for module in model.modules():
            if isinstance(module, FakeQuantizeBase):
                module.float()
        return model

    @cached_property
    def norms(self) -> dict[str, str]:
        """The batch norm behind each layer, by the layer's name; theirs is a part of the layer."""
        posts = ((node, post) for node in self.structure.prepared.graph for post in node.post)
        return {_path(node): _path(post) for node, post in posts if post.kind == "batch_norm"}

    @cached_property
    def fake_quantizers(self) -> dict[str, str]:
        """Our name of each of torch.ao's fake quantizers of activations."""
        ours, sites = {}, self.structure.prepared.sites
        for path, part in self.ours.named_modules():
            for kind, of in getattr(part, "owners", ()):
                if kind == "site":
                    ours[frozenset(map(self.structure.their_name, sites[of].taps))] = path
        modules = {id(module): ours[values] for module, values in self.structure.their_sites if values in ours}
        named = self.structure.their_prepared.named_modules(remove_duplicate=False)
        return {path: modules[id(module)] for path, module in named if id(module) in modules}

    def our_name(self, name: str) -> str | None:
        """The name of one of torch.ao's tensors; None for what is but a setting."""
        path, _, leaf = name.replace(".activation_post_process.", ".").rpartition(".")
        if leaf in ("eps", "fake_quant_enabled", "observer_enabled"):
            return None
        found = self.fake_quantizers.get(path, path)
        if path.endswith(".bn"):
            found = self.norms[path.removesuffix(".bn")]
        return f"{found}.{leaf}"

    def their_state(self) -> dict[str, Tensor]:
        """Parameters, statistics and qparams of torch.ao's."""
        state = {self.our_name(name): value.clone() for name, value in self.theirs.state_dict().items()}
        return {name: value for name, value in state.items() if name is not None}

    def our_state(self) -> dict[str, Tensor]:
        """The same of ours, without switches."""
        return {name: value for name, value in self.ours.state_dict().items() if value.dtype != torch.uint8}

    def named_gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Ours and theirs."""
        ours = dict(self.ours.named_parameters())
        theirs = {self.our_name(name): each.grad for name, each in self.theirs.named_parameters()}
        assert theirs.keys() == ours.keys()
        return {name: (ours[name].grad, grad) for name, grad in theirs.items()}

    def begin_alike(self) -> None:
        """Give ours the state that torch.ao's is in."""
        ours, theirs = self.ours.state_dict(), self.their_state()
        switches = {name: value for name, value in ours.items() if value.dtype == torch.uint8}
        shaped = {name: value.reshape(ours[name].shape) for name, value in theirs.items()}
        self.ours.load_state_dict({**switches, **shaped})


def _path(node: Any) -> str:
    assert node.origin.written is not None
    return str(node.origin.written.target)


def distance(ours: Tensor, theirs: Tensor) -> float:
    """In relative norm."""
    ours, theirs = ours.detach().double().reshape(-1), theirs.detach().double().reshape(-1)
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, target: Tensor) -> Tensor:
    """One training step; gives what the model computed. Dropout is the same in all models."""
    torch.manual_seed(0)
    optimizer.zero_grad()
    given = model(batch)
    functional.cross_entropy(given, target).backward()
    optimizer.step()
    result: Tensor = given.detach()
    return result


@dataclass(frozen=True)
class Rounded:
    """What a fake quantizer was given and gave, the last time in a forward pass."""

    given: Tensor
    made: Tensor
    scale: Tensor


def rounded(model: nn.Module, name_of: Callable[[str], str]) -> dict[str, Rounded]:
    """What each fake quantizer does in the next forward pass, by name, in the order in which they are done."""
    found: dict[str, Rounded] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], made: Tensor) -> None:
            found.pop(name, None)
            found[name] = Rounded(args[0].detach().clone(), made.detach().clone(), module.scale.detach().clone())

        return hook

    for path, module in model.named_modules():
        if hasattr(module, "fake_quant_enabled"):
            module.register_forward_hook(note(name_of(path)))
    return found


def ties(ours: dict[str, Rounded], theirs: dict[str, Rounded]) -> int:
    """How many values the first fake quantizer that differs rounds otherwise; all of them lie between two numbers.

    Nothing before it differs, so that its input differs by the rounding errors of float32 alone.
    """
    for name, one in ours.items():
        other = theirs[name]
        scale = one.scale.reshape(-1, *[1] * (one.given.dim() - 1)) if one.scale.dim() else one.scale
        flipped = (one.made - other.made).abs() > scale / 2
        if flipped.any():
            assert distance(one.given, other.given) < 1e-5, name
            steps = (one.given / scale)[flipped]
            assert ((steps - steps.floor() - 0.5).abs() < 1e-2).all(), name
            return int(flipped.sum())
    return 0
