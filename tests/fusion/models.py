"""Small models for the tests of fusion, and the comparison of a fused model with its source."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qfunc import CPU, CustomConfig, fuse, materialize, trace, unwrap
from qfunc.config.backend_config import BackendConfig
from qfunc.ir import Graph
from qfunc.testing import relative_error, same_bits

NOTHING = CustomConfig()


def model(forward: Callable[..., object], **attributes: object) -> nn.Module:
    """A model in evaluation mode; its batch norms have statistics and parameters off zero and one."""
    made = type("Model", (nn.Module,), {"forward": forward})()
    for name, value in attributes.items():
        setattr(made, name, value)
    return trained(made)


def sequential(*modules: nn.Module) -> nn.Module:
    return trained(nn.Sequential(*modules))


def trained(made: nn.Module) -> nn.Module:
    for index, norm in enumerate(made.modules()):
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            generator = torch.Generator().manual_seed(index)
            if norm.running_mean is not None:
                norm.running_mean.uniform_(-1, 1, generator=generator)
                norm.running_var.uniform_(0.5, 2, generator=generator)
            if norm.weight is not None:
                nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
                nn.init.uniform_(norm.bias, -1, 1, generator=generator)
    return made.eval()


def conv(*sizes: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(*(sizes or (4, 4)), kernel, **options)


def norm(features: int = 4, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(features, **options)


def image(batch: int = 2, channels: int = 4, side: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)


def run(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a module computes of copies of inputs, which it may write to."""
    with torch.no_grad():
        return module(*copy.deepcopy(inputs))


def traced(made: nn.Module, inputs: tuple[Any, ...], *, examples: bool = True) -> Graph:
    return unwrap(trace(made, copy.deepcopy(inputs) if examples else None))


def fused(
    made: nn.Module,
    *inputs: Any,
    tolerance: float = 1e-5,
    custom: CustomConfig = NOTHING,
    backend: BackendConfig = CPU,
    examples: bool = True,
) -> Graph:
    """The fused graph of a model, which computes what the model does: bit for bit with a tolerance of zero.

    Fusing it again changes nothing.
    """
    graph = traced(made, inputs, examples=examples)
    result = unwrap(fuse(graph, custom=custom, backend=backend))
    expected, actual = run(made, inputs), run(unwrap(materialize(result)), inputs)
    if tolerance == 0:
        assert same_bits(expected, actual)
    else:
        assert relative_error(expected, actual) <= tolerance
    assert unwrap(fuse(result, custom=custom, backend=backend)) is result
    return result


def kinds(graph: Graph) -> list[str]:
    """The kinds of all operators, what is fused behind them included: `conv2d + relu`."""
    edges = ("placeholder", "output", "get_attr")
    return [" + ".join([node.kind, *(post.kind for post in node.post)]) for node in graph if node.kind not in edges]
