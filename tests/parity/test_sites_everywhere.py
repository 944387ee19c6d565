"""On every model, with every backend's default, the sites, their observers and what shares one are torch.ao's."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from functools import cache
from itertools import islice
from typing import Any

import pytest
import torch
from returns.result import Failure
from torch import nn

from qfunc import trace, unwrap
from qfunc.testing import ModelCase, build, oracle, write_program
from tests.parity import common_models
from tests.parity.exceptions import CAUSES
from tests.parity.structure import Quantized, Structure, Traced
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(not oracle.available(), reason="needs torch.ao")

COMMON = common_models.cases() if oracle.available() and common_models.available() else ()
BACKENDS = oracle.BACKENDS


DEEP = os.environ.get("HYPOTHESIS_PROFILE") == "deep"

UNPREPARED = (
    (
        "no per-channel weights of transposed convolutions, which its default configuration asks for",
        *("onednn", AssertionError, "Per channel weight observer is not supported yet for ConvTranspose"),
        lambda graphs: any(node.origin.type.startswith("torch.nn.ConvTranspose") for node in graphs.traced),
    ),
    (
        "a fixed range for tanh, and another configuration for the linear it fuses it with",
        *("onednn", LookupError, "we need to specify the same qconfigs"),
        lambda graphs: isinstance(getattr(graphs.model, "tanh", None), nn.Tanh),
    ),
)
"""What torch.ao cannot prepare by a backend's own configuration: why, the backend, how it fails, which models."""

UNTRACEABLE = {"TestHelperModules.ControlFlow": "higher-order operators take no traced value"}
"""What torch.fx cannot trace, for either side."""


@cache
def _built(case: Any) -> Traced:
    return Traced(*case.build())


def differences(ours: Quantized, theirs: Quantized) -> list[str]:
    """In words, a line for each."""
    return [
        *(f"only there: {sorted(group.values)} {tuple(group.observer)}" for group in theirs.groups - ours.groups),
        *(f"only here: {sorted(group.values)} {tuple(group.observer)}" for group in ours.groups - theirs.groups),
        *(f"only there: weight of {name} {tuple(observer)}" for name, observer in theirs.weights - ours.weights),
        *(f"only here: weight of {name} {tuple(observer)}" for name, observer in ours.weights - theirs.weights),
    ]


def compare(graphs: Traced, backend: str, name: str = "") -> None:
    """Both sides agree, but for causes; for a model with a name those are listed, and each makes a difference."""
    sides = Structure(graphs, backend)
    for reason, where, error, message, concerned in UNPREPARED:
        if backend == where and concerned(graphs):
            assert sides.prepared.sites, reason
            with pytest.raises(error, match=message):
                sides.their_prepared  # noqa: B018 - fails
            return
    theirs, found = sides.theirs, set[str]()
    for cause, (_, mended, *_) in CAUSES.items():
        before, theirs = theirs, mended(sides, theirs)
        found |= {cause} if theirs != before else set()
    assert not sorted(differences(sides.ours, theirs))
    assert not name or found == {cause for cause, row in CAUSES.items() if row.concerns(name, backend)}


def test_what_is_compared_tells_backends_apart():
    graphs = _built(next(case for case in ZOO if case.name == "transformer_leaf"))
    ours = [Structure(graphs, backend).ours for backend in BACKENDS]
    theirs = [Structure(graphs, backend).theirs for backend in BACKENDS]
    alike = {
        frozenset(backend for backend, side in zip(BACKENDS, ours, strict=True) if side == other) for other in theirs
    }
    assert alike == {frozenset({"fbgemm", "x86"}), *(frozenset({b}) for b in BACKENDS if b not in ("fbgemm", "x86"))}


def test_causes_name_models():
    names = {case.name for case in ZOO} | {str(case) for case in COMMON} | {*TORCHVISION}
    own = {SigmoidOfInput.__name__, SigmoidBesideAnother.__name__}
    assert not COMMON or {name for row in CAUSES.values() for name in row.models} <= names | own


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_zoo(case, backend):
    compare(_built(case), backend, case.name)


def pairs() -> Iterator[tuple[common_models.CommonCase, str]]:
    """Every class with every backend; the variants of sums, which onednn alone fuses, with the others when deep."""
    for case in (case for case in COMMON if case.name not in UNTRACEABLE):
        of_sums = case.name == "ConvBnAddReluModel" and not all(flag for _, flag in case.options)
        yield from ((case, backend) for backend in BACKENDS if DEEP or not of_sums or backend == "onednn")


@pytest.mark.parametrize(("case", "backend"), list(pairs()), ids=str)
def test_common(case, backend):
    compare(_built(case), backend, case.name)


class SigmoidOfInput(nn.Module):
    def forward(self, x):
        return torch.sigmoid(x)


class SigmoidBesideAnother(nn.Module):
    def forward(self, x):
        return torch.cat([torch.sigmoid(x + x), x], 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", [SigmoidOfInput, SigmoidBesideAnother], ids=lambda model: model.__name__)
def test_causes_of_no_model_above(model, backend):
    compare(Traced(model().eval(), (torch.rand(2, 3),)), backend, model.__name__)


UNCOMPARED = {
    r"gain|\.shape|\.size": "a number that the graph is given or computes is observed like a tensor",
    r"tensors=": "a list of operands given by its keyword shares no range",
    r"::-1|cat\(\w+\.chunk": "a list that the graph computes is observed like a tensor",
    r"\.reshape\(": "of a float value, it counts as quantized; more is lost by that than in the model above",
    r"\n    (?!v\d|s\d|return)\S": "the effect of a write in place is lost where another name is read",
    r"ConvTranspose.*groups=[2-9].*BatchNorm": "a norm cannot be folded into a transposed convolution with groups",
    r"alpha=": "a sum's alpha is dropped",
    r"PReLU|prelu": "a value that is read with two ranges is observed with the first",
    r"return .*, 1\)": "a number among the results fails",
    r"nn\.Linear.*\n(.*\n)*.*nn\.BatchNorm1d": "a batch norm is folded into a linear of any rank",
    r"output_size=\[": "a transposed convolution whose padding depends on its input's size is kept as it is",
}
"""What torch.ao gets wrong in generated programs, and the last, for which there is no rule here."""


GENERATED = 200 if DEEP else 12


@cache
def _generated(count: int) -> list[ModelCase]:
    programs = (write_program(random.Random(seed).choice, max_nodes=10) for seed in range(10**6))
    fitting = (p for p in programs if not any(re.search(pattern, p.description) for pattern in UNCOMPARED))
    cases = (build(program) for program in fitting)
    return list(islice((case for case in cases if not _norms_in_a_row(case)), count))


def _norms_in_a_row(case: ModelCase) -> bool:
    """Of these torch.ao folds one into a layer, and then takes that layer and the other one for one operator."""
    traced = unwrap(trace(case.module, case.batches(1)[0]))
    norms = (node for node in traced if node.kind == "batch_norm")
    return any(traced[used].kind == "batch_norm" for node in norms for used in node.uses())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", range(GENERATED))
def test_generated(index, backend):
    """Operators of all families in any order, also those that no backend quantizes."""
    case = _generated(GENERATED)[index]
    compare(Traced(case.module, case.batches(1)[0]), backend)


@pytest.mark.parametrize("case", [case for case in COMMON if case.name in UNTRACEABLE], ids=str)
def test_untraceable(case):
    graphs = _built(case)
    assert isinstance(trace(graphs.model, graphs.inputs), Failure)
    with pytest.raises(RuntimeError):
        oracle.fuse(graphs.model)


@cache
def _torchvision(zoo: Any, name: str) -> Traced:
    """As the shared zoo builds them, but with the statistics that they begin with: nothing is computed with them."""
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    model: nn.Module = getattr(zoo.import_torchvision().models, name)(**options)
    side = 224 if name == "vit_b_16" else 64
    return Traced(model.eval(), (torch.randn(1, 3, side, side),))


TORCHVISION = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "densenet121"),
    *("shufflenet_v2_x1_0", "googlenet", "regnet_y_400mf", "squeezenet1_1", "vit_b_16", "swin_t", "convnext_tiny"),
)
OFTEN = ("shufflenet_v2_x1_0", "swin_t")
"""Compared for every backend; the others for x86, and for every backend in the deep profile."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(torchvision_zoo, name, backend):
    if not (DEEP or backend == "x86" or name in OFTEN):
        pytest.skip("in the deep profile")
    compare(_torchvision(torchvision_zoo, name), backend, name)


def test_all_torchvision_models_are_compared(torchvision_zoo):
    assert set(torchvision_zoo.NAMES) == set(TORCHVISION)
