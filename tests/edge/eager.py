"""Material of the tests of eager fusion: layers with parameters of trained ones, and what fuses of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from returns.result import Failure
from torch import Tensor, nn

from qfunc.edge.fusers import FUSERS
from qfunc.errors import problems

ROWS = tuple(FUSERS)
FOLDED = tuple(types for types in ROWS if not types[0].__name__.startswith("Batch") and types[1] is not nn.ReLU)
TRAINED = tuple(types for types in ROWS if "Transpose" not in types[0].__name__)
IN_EVAL = {
    ("Conv", "BatchNorm"): "Conv",
    ("Conv", "BatchNorm", "ReLU"): "ConvReLU",
    ("ConvTranspose", "BatchNorm"): "ConvTranspose",
    ("Conv", "ReLU"): "ConvReLU",
    ("Linear", "BatchNorm"): "Linear",
    ("Linear", "ReLU"): "LinearReLU",
    ("BatchNorm", "ReLU"): "BNReLU",
}
IN_QAT = {
    **IN_EVAL,
    ("Conv", "BatchNorm"): "ConvBn",
    ("Conv", "BatchNorm", "ReLU"): "ConvBnReLU",
    ("Linear", "BatchNorm"): "LinearBn",
}


def label(types: tuple[type, ...]) -> str:
    return "+".join(type.__name__ for type in types)


rows = pytest.mark.parametrize("types", ROWS, ids=label)
folded_rows = pytest.mark.parametrize("types", FOLDED, ids=label)


def layer(kind: type, **options: Any) -> nn.Module:
    """A layer of 4 channels in, 8 out, with parameters and statistics of a trained one."""
    name, norm = kind.__name__, {k: v for k, v in options.items() if k in ("affine", "eps", "track_running_stats")}
    if kind is nn.ReLU:
        return nn.ReLU()
    if name.startswith("BatchNorm"):
        made: Any = kind(8, **norm)
        if made.running_mean is not None:
            made.running_mean.normal_()
            made.running_var.uniform_(0.1, 3)
        if made.affine:
            nn.init.normal_(made.weight)
            nn.init.normal_(made.bias)
        return made
    given = {"bias": options.get("bias", True)}
    return nn.Linear(4, 8, **given) if kind is nn.Linear else kind(4, 8, 3, groups=options.get("groups", 1), **given)


def chain(types: tuple[type, ...], seed: int = 0, **options: Any) -> nn.Sequential:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(*(layer(kind, **options) for kind in types)).eval()


def data(types: tuple[type, ...], batch: int = 3) -> Tensor:
    rank = 0 if types[0] is nn.Linear else int(types[0].__name__[-2])
    channels = 8 if types[0].__name__.startswith("Batch") else 4
    return torch.randn(batch, channels, *[6] * rank, generator=torch.Generator().manual_seed(1))


def names_of(model: nn.Sequential) -> list[str]:
    return [name for name, _ in model.named_children()]


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def stem(name: str) -> str:
    return name.rstrip("123d")


def found_in(result: Any) -> list[Any]:
    assert isinstance(result, Failure), result
    return list(problems(result.failure()))


def only(result: Any, kind: type, *words: str) -> Any:
    """The single problem, which is of this kind and has these words in its text."""
    (problem,) = found_in(result)
    assert type(problem) is kind, problem
    assert problem.remedy
    for word in words:
        assert word in f"{problem.node}: {problem.reason}", problem
    return problem


class Net(nn.Module):
    """Nested names, tied weights, one module under two names, attributes, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = chain((nn.Conv2d, nn.BatchNorm2d, nn.ReLU))
        self.also = self.stem
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.weight = self.a.weight
        self.relu = nn.ReLU()
        self.scale = nn.Buffer(torch.ones(1))
        self.hidden = nn.Buffer(torch.ones(1), persistent=False)
        self.notes = {"classes": ["cat", "dog"]}

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(self.stem(x).mean((2, 3)))) + self.b(self.also(x).mean((2, 3)))
        return x * self.scale + self.hidden


def net() -> Net:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Net().eval()


def spy(*args: Any) -> None:
    """A hook that does nothing."""


def scripted(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(module)


def sequence(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules).eval()
