"""What the user leaves unfused, and the attributes that a fused model keeps."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc import CPU, CustomConfig, explain_fusion, fuse, materialize, trace, unwrap
from qfunc.errors import BadConfig
from tests.fusion.models import conv, fused, image, kinds, norm, traced, trained

X = image()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = conv(), norm(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.relu(self.bn(self.conv(x))) + x)


class Model(nn.Module):
    classes = ("cat", "dog")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = Block(), Block(), nn.Linear(2, 2)
        self.size = 3

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def predict(self, x: Tensor) -> list[str]:
        return [self.classes[int(row.argmax() % 2)] for row in self(x)]

    @staticmethod
    def scaled(x: Tensor) -> Tensor:
        return x / 2

    @property
    def doubled(self) -> int:
        return 2 * self.size


def built() -> nn.Module:
    torch.manual_seed(0)
    return trained(Model())


FUSED = ["conv2d + relu", "add + clamp"]
APART = ["conv2d", "batch_norm", "relu", "add", "clamp"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), FUSED * 2),
        (("first",), APART + FUSED),
        (("second",), FUSED + APART),
        (("first", "second"), APART * 2),
        (("",), APART * 2),
        (("first.relu",), ["conv2d", "relu", "add + clamp", *FUSED]),
        (("first.bn",), ["conv2d", "batch_norm", "relu", "add + clamp", *FUSED]),
        (("unused",), FUSED * 2),
    ],
)
def test_modules_left_unfused_with_all_that_is_in_them(names: tuple[str, ...], expected: list[str]) -> None:
    assert kinds(fused(built(), X, custom=CustomConfig(unfused_names=names))) == expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("add + clamp",), ["conv2d + relu", "add", "clamp"]),
        (("conv2d + batch_norm + relu",), ["conv2d", "relu", "add + clamp"]),
        (("conv2d + batch_norm + relu", "conv2d + batch_norm"), ["conv2d", "batch_norm + relu", "add + clamp"]),
    ],
)
def test_patterns_left_unfused(patterns: tuple[str, ...], expected: list[str]) -> None:
    custom = CustomConfig(unfused_patterns=patterns)
    assert kinds(fused(built(), X, custom=custom)) == expected * 2
    report = unwrap(explain_fusion(traced(built(), (X,)), custom=custom))
    assert not {chain.pattern for chain in report.fused} & set(patterns)


def test_a_report_prints_the_names_that_switch_its_patterns_off() -> None:
    graph = traced(built(), (X,))
    names = tuple(chain.pattern for chain in unwrap(explain_fusion(graph)).fused)
    off = CustomConfig(unfused_patterns=(*names, *(pattern.name for pattern in CPU.fusions)))
    assert unwrap(fuse(graph, custom=off)) is graph
    report = unwrap(explain_fusion(graph, custom=off))
    assert report.fused == ()
    (reason,) = {row.reason for row in report.unfused if row.operator == "add"}
    assert reason == "add + clamp: the custom configuration leaves it unfused here"


@pytest.mark.parametrize("when", ["trace", "fuse"])
def test_attributes_are_kept(when: str) -> None:
    source = built()
    custom = CustomConfig(preserved_attributes=("classes", "predict", "unused", "scaled", "doubled"))
    graph = unwrap(trace(source, X, custom=custom if when == "trace" else CustomConfig()))
    graph = unwrap(fuse(graph, custom=custom if when == "fuse" else CustomConfig()))
    module = unwrap(materialize(graph))
    for made in (module, copy.deepcopy(module)):
        assert (made.size, made.classes, made.doubled) == (3, ("cat", "dog"), 6)
        assert made.predict.__self__ is made
        assert made.predict(X) == source.predict(X)
        assert torch.equal(made.scaled(X), X / 2)
        assert torch.equal(made.unused.weight, source.unused.weight)
        assert made.unused is not source.unused


def test_only_data_is_kept_unasked() -> None:
    module = unwrap(materialize(unwrap(fuse(unwrap(trace(built(), X))))))
    assert module.size == 3
    assert not any(hasattr(module, name) for name in ("classes", "predict", "unused", "scaled", "doubled"))


@pytest.mark.parametrize("name", ["graph", "meta", "forward", "train"])
def test_what_a_graph_module_has_of_its_own_cannot_be_preserved(name: str) -> None:
    made = nn.Sequential(nn.ReLU()).eval()
    custom = CustomConfig(preserved_attributes=(name,))
    for result in (trace(made, custom=custom), fuse(unwrap(trace(made)), custom=custom)):
        assert isinstance(result.failure(), BadConfig)
