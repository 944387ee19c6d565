"""Batch norms of every make, behind and before every layer, with pools between: folded where exact, else left."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from qfunc import CustomConfig, explain_fusion, fuse, materialize, quantize, trace, unwrap
from qfunc.testing import sqnr
from tests.fusion.models import conv, fused, image, kinds, model, norm, sequential, traced, trained

X = image()


NORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": norm,
    "without affine": lambda: norm(affine=False),
    "large eps": lambda: norm(eps=10.0),
    "no eps": lambda: norm(eps=0.0),
    "no momentum": lambda: norm(momentum=None),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_norms_of_every_make_are_folded(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    made = sequential(conv(4, 6, kernel=3, bias=bias), nn.BatchNorm2d(6), conv(6, 4), NORMS[name](), nn.ReLU())
    assert kinds(fused(made, X)) == ["conv2d", "conv2d + relu"]


def test_a_gamma_of_zero_leaves_the_shift() -> None:
    torch.manual_seed(0)
    made = sequential(conv(), norm())
    nn.init.zeros_(made[1].weight)
    assert kinds(fused(made, X)) == ["conv2d"]


def test_a_norm_without_running_statistics_stays() -> None:
    torch.manual_seed(0)
    made = sequential(conv(), norm(track_running_stats=False), nn.ReLU())
    assert kinds(fused(made, X, tolerance=0)) == ["conv2d", "batch_norm + relu"]
    (row,) = unwrap(explain_fusion(traced(made, (X,)))).unfused
    assert row.reason == "1: the batch norm uses the statistics of the batch"


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)],
)
def test_norms_of_every_precision_are_folded(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    made = sequential(conv(kernel=3), norm(), nn.ReLU(), conv(), norm()).to(dtype)
    assert kinds(fused(made, image(dtype=dtype), tolerance=tolerance)) == ["conv2d + relu", "conv2d"]


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"groups": 2},
        {"groups": 4, "stride": 2},
        {"stride": 2, "output_padding": 1, "dilation": 2, "groups": 2},
        {"padding": 1, "bias": False},
    ],
    ids=str,
)
def test_norms_behind_transposed_convolutions_are_folded(rank: int, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1](4, 8, 3, **options)
    batch_norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1](8)
    x = torch.randn(2, 4, *[5] * rank)
    assert kinds(fused(sequential(layer, batch_norm), x)) == [f"conv_transpose{rank}d"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_norms_in_a_row_are_folded(count: int) -> None:
    torch.manual_seed(0)
    behind = sequential(conv(), *[norm() for _ in range(count)], nn.ReLU())
    assert kinds(fused(behind, X)) == ["conv2d + relu"]
    before = sequential(*[norm() for _ in range(count)], conv(), norm(), nn.ReLU())
    assert kinds(fused(before, X)) == ["conv2d + relu"]
    pooled = sequential(conv(), nn.AvgPool2d(2), *[norm() for _ in range(count)])
    assert kinds(fused(pooled, X)) == ["conv2d", "avg_pool2d"]


def test_a_norm_with_another_user_is_folded_alone() -> None:
    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.bn(self.c(x))
        return F.relu(y), y

    assert kinds(fused(model(forward, c=conv(), bn=norm()), X)) == ["conv2d", "relu"]


def test_a_layer_with_another_user_keeps_its_norm() -> None:
    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.c(x)
        return F.relu(self.bn(y)), y

    made = model(forward, c=conv(), bn=norm())
    assert kinds(fused(made, X, tolerance=0)) == ["conv2d", "batch_norm + relu"]
    (row,) = unwrap(explain_fusion(traced(made, (X,)))).unfused
    assert row.reason == "its value has 2 users: bn, output"


# The axis that a norm acts on


@pytest.mark.parametrize(("shape", "folds"), [((5, 4), True), ((5, 4, 4), False)])
def test_a_linear_layers_norm_is_folded_where_axis_1_is_its_output(shape: tuple[int, ...], folds: bool) -> None:
    torch.manual_seed(0)
    made = sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    x = torch.randn(shape)
    assert kinds(fused(made, x)) == (["linear + relu"] if folds else ["linear", "batch_norm + relu"])
    assert kinds(fused(made, x, examples=False)) == ["linear", "batch_norm + relu"]
    (row,) = unwrap(explain_fusion(traced(made, (x,), examples=False))).unfused
    assert row.reason == "1: a batch norm acts on axis 1, and the linear's shape is unknown: trace with example_inputs"


@pytest.mark.parametrize(("shape", "folds"), [((5, 4), True), ((5, 4, 4), False)])
def test_a_norm_before_a_linear_layer(shape: tuple[int, ...], folds: bool) -> None:
    torch.manual_seed(0)
    made = sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
    assert kinds(fused(made, torch.randn(shape))) == (["linear"] if folds else ["batch_norm", "linear"])


@pytest.mark.parametrize("order", ["behind", "before"])
def test_a_convolution_without_a_batch_axis_keeps_its_norm(order: str) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))
    made = sequential(*(layers if order == "behind" else layers[::-1]))
    assert "batch_norm" in kinds(fused(made, torch.randn(4, 4), tolerance=0))
    assert "batch_norm" not in kinds(fused(made, torch.randn(2, 4, 4)))


@pytest.mark.parametrize("examples", [True, False])
def test_the_rank_of_a_norm_tells_that_there_is_no_batch_axis(examples: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 4, 4)
    behind, before = sequential(conv(), nn.BatchNorm1d(4)), sequential(nn.BatchNorm1d(4), conv())
    pooled = sequential(conv(), nn.AvgPool2d(1), nn.BatchNorm1d(4))
    for made in (behind, before, pooled):
        assert "batch_norm" in kinds(fused(made, x, tolerance=0, examples=examples))


# A norm before a layer


@pytest.mark.parametrize(
    ("mode", "padding", "groups"),
    [*product(["zeros", "reflect", "replicate", "circular"], [0, 1, "same", "valid"], [1, 2])],
)
def test_a_norm_before_a_convolution_is_folded_unless_zeros_are_padded(
    mode: str, padding: int | str, groups: int
) -> None:
    torch.manual_seed(0)
    made = sequential(norm(), conv(4, 6, kernel=3, padding=padding, padding_mode=mode, groups=groups), nn.ReLU())
    stays = mode == "zeros" and padding in (1, "same")
    assert kinds(fused(made, X)) == (["batch_norm", "conv2d + relu"] if stays else ["conv2d + relu"])
    report = unwrap(explain_fusion(traced(made, (X,))))
    reason = "not folded into 1: the convolution pads with zeros, which the batch norm does not see"
    assert [row.reason for row in report.unfused] == ([reason] if stays else [])


def test_an_activation_between_keeps_norm_and_layer_apart() -> None:
    torch.manual_seed(0)
    assert kinds(fused(sequential(norm(), nn.ReLU(), conv()), X, tolerance=0)) == ["batch_norm + relu", "conv2d"]


def test_a_norm_that_the_sum_behind_the_layer_reads_too_stays() -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.bn(x)
        return F.relu(self.c(y) + y)

    made = model(forward, c=conv(), bn=norm())
    assert kinds(fused(made, X, tolerance=0)) == ["batch_norm", "conv2d + add + relu"]
    (row,) = unwrap(explain_fusion(traced(made, (X,)))).unfused
    assert row.reason == "not folded into c: what is added behind the layer reads it as well"


# A norm behind a pool

POOLS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "plain": (lambda x: F.avg_pool2d(x, 2), True),
    "padded, counted": (lambda x: F.avg_pool2d(x, 3, 2, 1), False),
    "padded, not counted": (lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), True),
    "divisor": (lambda x: F.avg_pool2d(x, 3, divisor_override=2), False),
    "ceil": (lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True), True),
    "ceil, padded": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), True),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x, 3), True),
    "adaptive, uneven": (lambda x: F.adaptive_avg_pool2d(x, (5, None)), True),
    "mean, kept": (lambda x: x.mean((2, 3), keepdim=True), True),
    "mean of none": (lambda x: x.mean((1, 2), keepdim=True).expand(-1, 4, -1, -1), False),
    "max": (lambda x: F.max_pool2d(x, 2), False),
}


@pytest.mark.parametrize("name", POOLS)
def test_norms_change_places_with_averages(name: str) -> None:
    torch.manual_seed(0)
    pool, moves = POOLS[name]
    made = model(lambda self, x: F.relu(self.bn(pool(self.c(x)))), c=conv(), bn=norm())
    assert any("batch_norm" in kind for kind in kinds(fused(made, X))) is not moves


@pytest.mark.parametrize("dims", [(2, 3), [-1, -2], [2, -1], 3, -1, 2])
def test_norms_change_places_with_means(dims: object) -> None:
    torch.manual_seed(0)
    made = model(lambda self, x: self.bn(x.mean(dims) if self.c is None else self.c(x).mean(dims)), c=conv())
    made.bn = nn.BatchNorm1d(4).eval()
    nn.init.uniform_(made.bn.running_mean)
    assert kinds(fused(made, X)) == ["conv2d", "mean"]
    assert kinds(fused(made, X, tolerance=0, examples=False)) == ["conv2d", "mean", "batch_norm"]


@pytest.mark.parametrize("dims", [1, -3, 0])
def test_norms_stay_behind_means_over_other_axes(dims: int) -> None:
    torch.manual_seed(0)
    made = model(lambda self, x: self.bn(self.c(x).mean(dims)), c=conv(), bn=nn.BatchNorm1d(8))
    assert "batch_norm" in kinds(fused(made, X, tolerance=0))


@pytest.mark.parametrize(
    "custom",
    [
        CustomConfig(unfused_patterns=("conv2d + batch_norm",)),
        CustomConfig(unfused_patterns=("mean + batch_norm",)),
        CustomConfig(unfused_names=("c",)),
        CustomConfig(unfused_names=("bn",)),
    ],
    ids=["fold", "move", "layer", "norm"],
)
def test_a_norm_that_may_not_be_folded_does_not_move(custom: CustomConfig) -> None:
    torch.manual_seed(0)
    made = model(lambda self, x: self.bn(self.c(x).mean((2, 3))), c=conv(), bn=nn.BatchNorm1d(4))
    assert kinds(fused(made, X, tolerance=0, custom=custom)) == ["conv2d", "mean", "batch_norm"]


class ComputedGroups(nn.Module):
    """A depthwise convolution for however many channels there are, with a norm before, behind, both or none."""

    def __init__(self, function: Callable[..., Tensor], before: bool, behind: bool) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(4, 1, 3, 3))
        self.before, self.behind = (trained(norm()) if wanted else nn.Identity() for wanted in (before, behind))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.behind(self.function(self.before(x), self.weight, groups=x.size(1))))


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d])
def test_a_number_of_groups_may_be_computed(function: Callable[..., Tensor], before: bool, behind: bool) -> None:
    """Folding needs it before a layer and behind a transposed one; kernels need it, and stay away."""
    torch.manual_seed(0)
    made, x = ComputedGroups(function, before, behind).eval(), torch.randn(2, 4, 8, 8)
    graph = fused(made, x)
    left = sum(kind.startswith("batch_norm") for kind in kinds(graph))
    assert left == before + (behind and function is F.conv_transpose2d)
    assert unwrap(materialize(unwrap(fuse(unwrap(trace(made, x)), qat=True))))(x).shape == made(x).shape
    for engine in ("onednn", "quantized"):
        int8 = unwrap(materialize(unwrap(quantize(made, [x], engine=engine, progress=False))))
        assert sqnr(made(x), int8(x)) > 20


@pytest.mark.parametrize("function", [F.conv2d, F.conv_transpose2d, F.linear])
@pytest.mark.parametrize("before", [True, False])
def test_a_function_without_a_bias_gains_that_of_the_norm(function: Callable[..., Tensor], before: bool) -> None:
    torch.manual_seed(0)
    linear = function is F.linear
    made_norm = trained(nn.BatchNorm1d(4)) if linear else norm()
    weight = nn.Parameter(torch.randn(*((4, 4) if linear else (4, 4, 1, 1))))

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return function(self.b(x), self.w) if before else self.b(function(x, self.w))  # type: ignore[operator]

    made = model(forward, b=made_norm, w=weight)
    graph = fused(made, torch.randn(5, 4) if linear else X)
    assert ("batch_norm" in kinds(graph)) is (before and function is F.conv_transpose2d)
