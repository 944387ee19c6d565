"""What each pass makes of one small model, as text: a change of behaviour shows as a change of a file in `golden/`.

Run with `QFUNC_GOLDEN=write` to write the files anew, and read their diff.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qfunc
from qfunc.config.host_report import HostReport, Verdict
from qfunc.ir import to_text
from qfunc.numerics.saturation import UNPAIRED
from qfunc.passes import lower as passes
from qfunc.passes.observe import with_observers

GOLDEN = Path(__file__).parent / "golden"


class Block(nn.Module):
    """A little of everything: fused norm, activation and sum, shared qparams, a fixed range, a float head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.act = nn.ReLU6(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        z = torch.relu(self.conv2(y) + y)
        z = torch.cat([self.pool(z), self.pool(z * torch.sigmoid(z))], 1)
        return self.head(z.mean((2, 3)))


def _stages() -> dict[str, str]:
    torch.manual_seed(0)
    model = Block().eval()
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    batch = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    observer = qfunc.QConfig(qfunc.MinMax(), qfunc.CPU.qconfig_mapping.global_qconfig.weight)
    traced = qfunc.unwrap(qfunc.trace(model, batch))
    fused = qfunc.unwrap(qfunc.fuse(traced))
    prepared = qfunc.unwrap(qfunc.prepare(fused, qfunc.QConfigMapping().set_global(observer)))
    converted = qfunc.unwrap(qfunc.convert(qfunc.unwrap(qfunc.calibrate(prepared, [batch]))))
    lowered = qfunc.unwrap(passes.lower(converted, _vnni()))
    return {
        "traced": to_text(traced),
        "fused": to_text(fused),
        "prepared": to_text(with_observers(prepared)),
        "converted": to_text(converted.graph),
        "lowered": f"{to_text(lowered.graph)}\n\n{lowered.certificate}",
    }


def _vnni() -> HostReport:
    """A machine whose every kernel is right, so that the files do not depend on the one at hand."""
    here = qfunc.check_host()
    verdicts = tuple(Verdict(verdict.kernel, ok=True) for verdict in here.verdicts)
    return dataclasses.replace(
        here,
        cpu_capability="AVX512",
        isa=("avx512_vnni",),
        engines=("onednn",),
        onednn_layouts=UNPAIRED,
        verdicts=verdicts,
    )


def _rounded(text: str) -> str:
    """Numbers to four digits: how a CPU orders its sums decides on the last ones."""
    return re.sub(r"\d+\.\d{4,}(e[-+]\d+)?", lambda number: f"{float(number[0]):.4g}", text)


@pytest.mark.parametrize("stage", ["traced", "fused", "prepared", "converted", "lowered"])
def test_golden(stage: str) -> None:
    text = _rounded(_stages()[stage] + "\n")
    path = GOLDEN / f"{stage}.txt"
    if os.environ.get("QFUNC_GOLDEN") == "write":
        path.write_text(text)
    assert text == path.read_text()
