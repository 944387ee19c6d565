import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from qfunc.numerics.batch_norm import fold_batch_norm


def trained_like(norm, seed=0):
    g = torch.Generator().manual_seed(seed)
    norm.running_mean.copy_(torch.randn(norm.num_features, generator=g))
    norm.running_var.copy_(torch.rand(norm.num_features, generator=g) * 3 + 0.01)
    if norm.affine:
        norm.weight.data.copy_(torch.randn(norm.num_features, generator=g))
        norm.bias.data.copy_(torch.randn(norm.num_features, generator=g))
    return norm.eval()


def folded(layer, norm):
    transpose = isinstance(layer, nn.modules.conv._ConvTransposeNd)
    groups = getattr(layer, "groups", 1)
    return fold_batch_norm(
        layer.weight,
        layer.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
        transpose,
        groups,
    )


def cases():
    torch.manual_seed(0)
    for groups in (1, 2, 4):
        for bias in (True, False):
            kw = {"groups": groups, "bias": bias}
            yield nn.Conv1d(4, 8, 3, **kw), nn.BatchNorm1d(8), (2, 4, 9)
            yield nn.Conv2d(4, 8, 3, **kw), nn.BatchNorm2d(8, affine=False), (2, 4, 9, 7)
            yield nn.Conv3d(4, 8, 3, **kw), nn.BatchNorm3d(8), (2, 4, 5, 6, 7)
            yield nn.ConvTranspose1d(4, 8, 3, **kw), nn.BatchNorm1d(8), (2, 4, 9)
            yield nn.ConvTranspose2d(4, 8, 3, **kw), nn.BatchNorm2d(8), (2, 4, 9, 7)
            yield nn.ConvTranspose3d(4, 8, 3, **kw), nn.BatchNorm3d(8, affine=False), (2, 4, 5, 6, 7)
    yield nn.Linear(6, 5), nn.BatchNorm1d(5), (3, 6)
    yield nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5, affine=False), (3, 6)


def name(value):
    return type(value).__name__ if isinstance(value, nn.Module) else None


@pytest.mark.parametrize(("layer", "norm", "shape"), list(cases()), ids=name)
def test_the_folded_layer_computes_both(layer, norm, shape):
    trained_like(norm)
    weight, bias = folded(layer, norm)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = norm(layer(x))
        if layer.bias is None:
            layer.register_parameter("bias", nn.Parameter(torch.zeros(norm.num_features)))
        actual = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    assert (actual - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
    assert not weight.requires_grad
    assert not bias.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("layer", "transpose"),
    [
        (nn.Conv1d(4, 8, 3, groups=2), False),
        (nn.Conv2d(4, 8, 3), False),
        (nn.Conv3d(4, 8, 3), False),
        (nn.ConvTranspose2d(4, 8, 3), True),
        (nn.Linear(4, 8), False),
    ],
    ids=name,
)
def test_agrees_with_torch_within_rounding(layer, transpose, dtype):
    norm = trained_like(nn.BatchNorm1d(8)).to(dtype)
    weight, bias = layer.weight.detach().to(dtype), layer.bias.detach().to(dtype)
    args = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    ours = fold_batch_norm(weight, bias, *args, transpose)
    theirs = fuse_conv_bn_weights(weight, bias, *args, transpose)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == dtype
        slack = 8 * torch.finfo(dtype).eps
        assert (a - b).abs().max() <= slack * b.abs().max()


def test_a_bias_of_another_type_keeps_it():
    layer, norm = nn.Conv2d(4, 8, 3), trained_like(nn.BatchNorm2d(8))
    layer.weight.data = layer.weight.data.bfloat16()
    weight, bias = folded(layer, norm)
    assert (weight.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
    layer.bias = None
    assert folded(layer, norm)[1].dtype == torch.bfloat16


def test_no_input_changes_and_the_memory_format_stays():
    layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    norm = trained_like(nn.BatchNorm2d(8))
    before = [t.detach().clone() for t in (layer.weight, layer.bias, *norm.state_dict().values())]
    weight, _ = folded(layer, norm)
    after = [layer.weight, layer.bias, *norm.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert weight.is_contiguous(memory_format=torch.channels_last)
