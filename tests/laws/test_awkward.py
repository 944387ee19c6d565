"""The laws on small models that are awkward in one way each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc import CPU, X86, QConfig, QConfigMapping, check_host
from qfunc.errors import UnsupportedDType, problems
from qfunc.numerics import observers as o
from qfunc.numerics import qparams as q
from qfunc.numerics.saturation import PairLayouts
from qfunc.testing import Case, check_laws, sqnr, walk


def model(forward: Callable[..., object], **attributes: object) -> nn.Module:
    made = type("Model", (nn.Module,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return made.eval()


def conv(kernel: int = 1, **options: object) -> nn.Module:
    return nn.Conv2d(4, 4, kernel, **options)


def image(batch: int | None) -> tuple[Tensor]:
    return (torch.randn(*(() if batch is None else (batch,)), 4, 8, 8),)


def _twice(x: Tensor) -> Tensor:
    return x + x


def _both(x: Tensor) -> Tensor:
    return torch.cat([x, x], -3)


def _zeros() -> nn.Module:
    made = nn.Sequential(conv(), nn.ReLU(), conv())
    nn.init.zeros_(made[0].weight)
    return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a parameter of the batch's size is added": lambda: model(
        lambda self, x: F.relu(self.c(x) + self.p), c=conv(), p=nn.Parameter(torch.randn(1, 4, 8, 8))
    ),
    "sum with itself": lambda: model(lambda self, x: _twice(self.c(x)), c=conv(3)),
    "cat of one value twice": lambda: model(lambda self, x: _both(self.c(x)), c=conv()),
    "cat of a tuple that a function gives": lambda: model(
        lambda self, x: self.d(torch.cat(self.c(x).chunk(2, 1)[::-1], 1)), c=conv(), d=conv()
    ),
    "a pool as large as the input": lambda: model(
        lambda self, x: self.d(F.avg_pool2d(self.c(x), x.size(2) - 2)), c=conv(), d=conv()
    ),
    "arithmetic with sizes": lambda: model(
        lambda self, x: self.d(self.c(x) * x.size(1) ** -0.5 + x.shape[0]), c=conv(), d=conv()
    ),
    "two norms in a row": lambda: nn.Sequential(conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.ReLU(), nn.ReLU()),
    "an identity between": lambda: nn.Sequential(conv(), nn.Identity(), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()),
    "a layer called twice": lambda: model(lambda self, x: self.d(self.c(F.relu(self.c(x)))), c=conv(), d=conv()),
    "an expanded operand": lambda: model(
        lambda self, x: self.d(self.c(x) + self.c(x)[:, :1].expand(-1, 4, -1, -1)), c=conv(), d=conv()
    ),
    "clamps above zero": lambda: model(lambda self, x: self.d(self.c(x).clamp(0.5, 1.5)), c=conv(), d=conv()),
    "weights of zero": _zeros,
    "nothing to quantize": lambda: model(lambda self, x: (x, 3, None)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("backend", "engine"), [(CPU, "onednn"), (X86, "quantized")], ids=["cpu", "x86"])
def test_laws_hold(name: str, backend: object, engine: str) -> None:
    torch.manual_seed(0)
    case = Case(MODELS[name]().eval(), image(1), (image(3),), backend, engine)
    assert check_laws(case) == ()
    assert walk(case).failure is None


@pytest.mark.parametrize("engine", ["onednn", "quantized"])
def test_laws_hold_without_a_batch_dimension(engine: str) -> None:
    torch.manual_seed(0)
    head = (nn.Flatten(0), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 2))
    made = nn.Sequential(conv(3), nn.ReLU(), nn.MaxPool2d(2), *head)
    case = Case(made.eval(), image(None), (image(None),), X86, engine)
    assert check_laws(case) == ()
    assert walk(case).failure is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_floats_are_told(dtype: torch.dtype) -> None:
    made = nn.Sequential(conv(), nn.ReLU()).to(dtype).eval()
    failure = walk(Case(made, (image(2)[0].to(dtype),), ())).failure
    assert failure is not None
    assert [type(problem) for problem in problems(failure)] == [UnsupportedDType]


@pytest.mark.parametrize("features", [(6, 6), (5, 7)])
@pytest.mark.parametrize("layout", ["none", "channels", "any"])
def test_a_weight_with_one_scale_can_be_limited(features: tuple[int, int], layout: str) -> None:
    torch.manual_seed(0)
    mapping = QConfigMapping().set_global(QConfig(o.MinMax(), o.MinMax(q.INT8_SYMMETRIC)))
    x = torch.randn(32, features[0])
    made = nn.Linear(*features)
    with torch.no_grad():
        made.weight[1] *= 0.3
        made.weight[2].fill_(1)
    host = replace(check_host(), onednn_layouts=PairLayouts(layout, layout)) if layout != "none" else check_host()
    case = Case(made.eval(), (x,), ((x,),), qconfig_mapping=mapping, host=host)
    assert check_laws(case) == ()
    way = walk(case)
    assert sqnr(made(x).detach(), way.run("lower", (x,))) > 30
