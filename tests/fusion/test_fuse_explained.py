"""The report of fusion as a user reads it: every kind of fusion and every kind of reason, once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations

from qfunc import CustomConfig, CustomFusion, MatchAllNode, explain_fusion, fuse, trace, unwrap
from qfunc.ir import Graph
from tests.fusion.models import conv, image, model, norm, sequential

GOLDEN = Path(__file__).parents[1] / "golden"
X = image()


class Everything(nn.Module):
    """A chain for each fusion, and one for each reason against one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(), norm(), nn.ReLU(), nn.Dropout())
        self.residual, self.before = conv(), nn.Sequential(norm(), conv())
        self.pooled = nn.Sequential(conv(), nn.AvgPool2d(1), norm())
        self.mine = nn.Sequential(conv(), nn.Sigmoid())
        self.shared, self.last, self.padded = conv(), conv(), nn.Sequential(norm(), conv(kernel=3, padding=1))
        self.hooked, self.hooked_norm = conv(), nn.Sequential(conv(), norm())
        self.hooked.register_forward_hook(lambda *_: None)
        self.hooked_norm[1].register_forward_pre_hook(lambda *_: None)
        self.parametrized = parametrizations.weight_norm(conv())
        self.subclass = NonDynamicallyQuantizableLinear(8, 8)
        self.kept, self.batch, self.rows = conv(), norm(track_running_stats=False), nn.Linear(8, 4)
        self.columns, self.up, self.written = nn.BatchNorm1d(8), nn.ConvTranspose2d(4, 4, 1), conv()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.mine(self.pooled(self.before(self.stem(x))))
        x = F.relu(self.residual(x) + x)
        y = self.shared(x)
        x = F.relu(y) + y.mean()
        x = self.batch(self.last(x))
        x = self.padded(x).mul(2)
        x = F.relu(self.hooked(x)).sigmoid()
        x = F.relu(self.hooked_norm(x)).sigmoid()
        x = self.parametrized(x).sigmoid()
        x = self.subclass(x).sigmoid()
        x = F.relu(self.kept(x)).sigmoid()
        x = torch.add(self.last(x), x, alpha=2).sigmoid()
        x = (self.last(x) + x[:1]).sigmoid()
        x = self.last(x).clamp(1, 2)
        x = self.up(x, output_size=(8, 8))
        z = self.written(x)
        view = z[:1]
        z.relu_()
        return self.columns(self.rows(z.flatten(0, 1))), view


def traced(examples: bool = True) -> Graph:
    torch.manual_seed(0)
    return unwrap(trace(Everything().eval(), X if examples else None))


CUSTOM = CustomConfig(
    fusions=(CustomFusion(lambda is_qat, *parts: nn.Sequential(*parts), pattern=(nn.Conv2d, nn.Sigmoid)),),
    unfused_names=("kept",),
)


@pytest.mark.parametrize("name", ["with examples", "without examples", "qat", "fused already"])
def test_golden(name: str) -> None:
    graph = traced(name != "without examples")
    if name == "fused already":
        graph = unwrap(fuse(graph, custom=CUSTOM))
    report = unwrap(explain_fusion(graph, custom=CUSTOM, qat=name == "qat"))
    text = "\n".join(line.rstrip() for line in f"{report}\n".split("\n"))
    path = GOLDEN / f"fusion {name}.txt".replace(" ", "_")
    if os.environ.get("QFUNC_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()


def test_a_model_in_training_mode_is_told_as_a_whole() -> None:
    report = unwrap(explain_fusion(unwrap(trace(sequential(conv(), norm()).train()))))
    why = "it is in training mode: call model.eval() and trace again, or fuse for training with qat=True"
    assert str(report).splitlines() == [
        "cpu: 0 fusions, 2 left alone",
        "node  left  operator    why",
        f"_0    0     conv2d      {why}",
        f"_1    1     batch_norm  {why}",
    ]


def test_nothing_to_tell() -> None:
    report = unwrap(explain_fusion(unwrap(trace(model(lambda self, x: x.sigmoid())))))
    assert str(report) == "cpu: 0 fusions, 0 left alone"


def test_a_tree_of_the_users_is_told() -> None:
    made = sequential(conv(), nn.ReLU())
    fusion = CustomFusion(lambda is_qat, *parts: nn.Identity(), complex_pattern=(nn.ReLU, (nn.Conv2d, MatchAllNode)))
    report = unwrap(
        explain_fusion(
            unwrap(trace(made, X)),
            custom=CustomConfig(
                fusions=(CustomFusion(fusion.fuser, (), fusion.complex_pattern, lambda nodes: nodes[1][0]),)
            ),
        )
    )
    (chain,) = report.fused
    assert chain.pattern == "(torch.nn.ReLU, (torch.nn.Conv2d, MatchAllNode))"
    assert (chain.places, chain.module) == (("0", "1"), "what its fuser makes")
