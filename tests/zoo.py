"""Small real architectures, each a few milliseconds a forward, with weights as training leaves them.

`ZOO` lists them; `case.build()` gives a fresh model in eval mode and its example inputs, `case.batches()` a few more
inputs. Everything is seeded by the case's name. Batch-norm statistics come from data, so that signals neither die nor
explode from layer to layer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Inputs = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class ZooCase:
    """An architecture: `model()` makes it, `inputs(batch)` makes random inputs for it.

    `aliasing`: an in-place operator writes to memory that another value reads. `oracle`: why torch.ao is no measure
    for it, with its x86 mapping; empty where it is one.
    """

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    aliasing: bool = False
    oracle: str = ""

    def build(self) -> tuple[nn.Module, Inputs]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._seed)
            model, inputs = self.model(), self.inputs(2)
            _train(model, self.inputs(16))
        return model.eval(), inputs

    def batches(self, count: int = 4, size: int = 4) -> list[Inputs]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1 + self._seed)
            return [self.inputs(size) for _ in range(count)]

    @property
    def _seed(self) -> int:
        return zlib.crc32(self.name.encode())

    def __str__(self) -> str:
        return self.name


def _train(model: nn.Module, inputs: Inputs) -> None:
    """Give batch norms the statistics of `inputs`, and weights and biases off one and zero."""
    norms = [module for module in model.modules() if isinstance(module, _NORMS)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    with torch.no_grad():
        model.train()(*inputs)
    for norm in norms:
        norm.momentum = 0.1


def _image(channels: int = 3, side: int = 12) -> Callable[[int], Inputs]:
    return lambda batch: (torch.randn(batch, channels, side, side),)


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class _Head(nn.Module):
    """Global average, flatten, linear."""

    def __init__(self, channels: int, classes: int = 5) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(x), 1))


class BasicBlock(nn.Module):
    """He et al. 2015; one in-place ReLU serves both sites, as in torchvision."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = None if stride == 1 and inputs == outputs else _conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.down is None else self.down(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.reduce, self.conv, self.expand = (
            _conv_bn(channels, width, 1),
            _conv_bn(width, width),
            _conv_bn(width, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.reduce(x))
        y = torch.relu(self.conv(y))
        return F.relu(torch.add(self.expand(y), x))


def resnet() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    pool = nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(stem, pool, BasicBlock(8, 8), BasicBlock(8, 16, 2), Bottleneck(16, 8), _Head(16))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))
        return F.hardsigmoid(self.fc2(scale)) * x


class InvertedResidual(nn.Module):
    """Howard et al. 2019: expand, depthwise, squeeze-excite, project."""

    def __init__(self, channels: int, hidden: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = stride == 1 and channels == outputs
        self.layers = nn.Sequential(
            *_conv_bn(channels, hidden, 1),
            nn.Hardswish(inplace=True),
            *_conv_bn(hidden, hidden, 3, stride, groups=hidden),
            SqueezeExcite(hidden),
            nn.ReLU6(inplace=True),
            *_conv_bn(hidden, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet() -> nn.Module:
    stem = nn.Sequential(*_conv_bn(3, 8, 3, 2), nn.Hardswish())
    blocks = (InvertedResidual(8, 16, 8), InvertedResidual(8, 16, 12, 2))
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 5))
    return nn.Sequential(stem, *blocks, *head)


class DenseLayer(nn.Module):
    """Huang et al. 2016: norm and ReLU come first; every layer reads all earlier ones."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.relu = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(self.relu(self.norm(torch.cat(features, 1))))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.layers = nn.ModuleList(DenseLayer(8 + 4 * index, 4) for index in range(3))
        self.transition = nn.Sequential(nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 8, 1), nn.AvgPool2d(2, 2))
        self.head = _Head(8)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(self.transition(torch.cat(features, 1)))


def _shuffle(x: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, groups, channels // groups, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


class ShuffleUnit(nn.Module):
    """Ma et al. 2018: half of the channels pass, the others are convolved, then both are interleaved."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            *_conv_bn(half, half, 1),
            nn.ReLU(inplace=True),
            *_conv_bn(half, half, 3, groups=half),
            *_conv_bn(half, half, 1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=1)
        return _shuffle(torch.cat((first, self.branch(second)), dim=1), 2)


def shufflenet() -> nn.Module:
    stem = nn.Sequential(*_conv_bn(3, 8, 3, 2), nn.ReLU(inplace=True))
    return nn.Sequential(stem, ShuffleUnit(8), ShuffleUnit(8), _Head(8))


class UNet(nn.Module):
    """Ronneberger et al. 2015, with both ways of scaling up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = _double(3, 6), _double(6, 8), _double(8, 8)
        self.pool = nn.MaxPool2d(2)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.up1, self.up2 = _double(16, 6), _double(12, 6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.bottom(F.max_pool2d(b, 2))
        d = self.up1(torch.cat([self.up(c), b], dim=1))
        up = F.interpolate(d, scale_factor=2.0, mode="nearest")
        return self.out(self.up2(torch.cat([up, a], dim=1)))


def _double(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(*_conv_bn(inputs, outputs), nn.ReLU(), *_conv_bn(outputs, outputs), nn.ReLU(inplace=True))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.size).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = torch.softmax(torch.matmul(q, k.transpose(-2, -1)) * self.size**-0.5, dim=-1)
        return self.out(torch.matmul(weights, v).transpose(1, 2).reshape(batch, tokens, width))


class LeafAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return y


class EncoderBlock(nn.Module):
    """Vaswani et al. 2017, norm first."""

    def __init__(self, attention: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attention = nn.LayerNorm(width), nn.LayerNorm(width), attention
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    def __init__(self, attention: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.positions = nn.Parameter(0.2 * torch.randn(1, 7, 16))
        self.blocks = nn.Sequential(*(EncoderBlock(attention(16, 4), 16) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.positions)).mean(dim=1))


def conv1d_net() -> nn.Module:
    block = (nn.Conv1d(8, 8, 3, padding="same", padding_mode="reflect", dilation=2), nn.BatchNorm1d(8), nn.ReLU())
    stem = (nn.Conv1d(4, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2))
    return nn.Sequential(*stem, *block, nn.AdaptiveAvgPool1d(2), nn.Flatten(), nn.Linear(16, 5))


def conv3d_net() -> nn.Module:
    stem = (nn.Conv3d(2, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6), nn.ReLU(), nn.MaxPool3d(2))
    block = (nn.Conv3d(6, 6, 3, padding=1, groups=6), nn.Hardtanh(0.0, 4.0), nn.Conv3d(6, 8, 1), nn.AvgPool3d(2))
    return nn.Sequential(*stem, *block, nn.Flatten(), nn.Linear(8, 5))


class Functional(nn.Module):
    """Parameters and functions, no submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.b1 = nn.Parameter(0.3 * torch.randn(8, 3, 3, 3)), nn.Parameter(0.1 * torch.randn(8))
        self.w2 = nn.Parameter(0.4 * torch.randn(8, 1, 3, 3))
        self.w3, self.b3 = nn.Parameter(0.3 * torch.randn(5, 8)), nn.Parameter(0.1 * torch.randn(5))
        self.mean, self.var = nn.Buffer(0.2 * torch.randn(8)), nn.Buffer(0.5 + torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.w1, self.b1, stride=2, padding=1)
        x.relu_()
        x = F.conv2d(x, weight=self.w2, bias=None, padding=(1, 1), groups=8)
        x = torch.relu(F.batch_norm(x, self.mean, self.var, training=False))
        x = x.clamp(max=6.0).mean((2, 3))
        return F.linear(x, self.w3, self.b3).sigmoid()


class ManyInputs(nn.Module):
    """A tensor, a pair, a dict, and a number with a default, into nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], extra: dict[str, Tensor], gain: float = 0.5):
        left, right = torch.relu(self.left(pair[0])), self.right(pair[1])
        image = self.image(x) * extra["mask"] * gain
        both = left + right
        return {
            "image": image.relu(),
            "vectors": (both, [left, {"shifted": right + extra["bias"]}]),
            "channels": x.size(1),
        }


def _many(batch: int) -> Inputs:
    pair = (torch.randn(batch, 6), torch.randn(batch, 6))
    return torch.randn(batch, 3, 6, 6), pair, {"mask": torch.rand(batch, 1, 6, 6), "bias": torch.randn(batch, 4)}


class TwoInputs(nn.Module):
    """A network that reads an image at two scales."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small, self.head = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(3, 6, 3, 1, 1), _Head(6)

    def forward(self, large: Tensor, small: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.large(large)) + F.relu(self.small(small))
        return self.head(x), x.mean((2, 3))


class Shared(nn.Module):
    """A Siamese network: one trunk, two sites; and one ReLU at three."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()
        self.fc = nn.Linear(6, 6)

    def _embed(self, x: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.relu(self.bn(self.conv(x))), 1).flatten(1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.relu(self._embed(a) * self._embed(b))


class Tied(nn.Module):
    """An autoencoder: the second module has the first one's weight, a function its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.first(x)))
        return F.linear(self.second(y), self.first.weight.t()) + self.first.bias


class Aliased(nn.Module):
    """In-place operators write to memory that a view, or the value before, still reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.relu = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x)
        flat = y.view(y.size(0), -1)
        z = self.conv2(self.relu(y))
        z.add_(y)
        half = z[:, :2]
        half.mul_(0.5)
        return torch.cat([flat, z.flatten(1)], 1)


class Inception(nn.Module):
    """Szegedy et al. 2014: four branches, one of them pooled, concatenated."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.one = nn.Sequential(*_conv_bn(inputs, 4, 1), nn.ReLU())
        self.three = nn.Sequential(*_conv_bn(inputs, 4, 1), nn.ReLU(), *_conv_bn(4, 6, 3), nn.ReLU())
        self.five = nn.Sequential(*_conv_bn(inputs, 2, 1), nn.ReLU(), *_conv_bn(2, 4, 5), nn.ReLU())
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), *_conv_bn(inputs, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in (self.one, self.three, self.five, self.pool)], 1)


class Fire(nn.Module):
    """Iandola et al. 2016: squeeze, then two expansions side by side; no batch norm."""

    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze, self.relu = nn.Conv2d(inputs, squeeze, 1), nn.ReLU(inplace=True)
        self.expand1, self.expand3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.squeeze(x))
        return torch.cat([self.relu(self.expand1(x)), self.relu(self.expand3(x))], 1)


def squeezenet() -> nn.Module:
    stem = (nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2, ceil_mode=True))
    return nn.Sequential(
        *stem, Fire(8, 3, 4), Fire(8, 4, 5), nn.Conv2d(10, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


class Sizes(nn.Module):
    """Patches by reshapes whose sizes are computed from the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.mix = nn.Linear(12, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[0], x.size(1)
        rows, columns = x.size(2) // 2, x.size(-1) // 2
        x = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5)
        x = self.proj(x.reshape(batch, rows * columns, channels * 4)).transpose(1, 2)
        return self.mix(x).relu().view(batch, -1, rows, columns).mean(dim=[2, 3])


class PaddingModes(nn.Module):
    """The four padding modes, "same" padding, an average pool that leaves the padding out, an average as a mean."""

    def __init__(self) -> None:
        super().__init__()
        modes = ("zeros", "reflect", "replicate", "circular")
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding="same", padding_mode=mode) for mode in modes)
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = self.pool(F.relu6(conv(x)) + x)
        return torch.mean(x, dim=(2, 3), keepdim=True)


ZOO: tuple[ZooCase, ...] = (
    ZooCase("resnet", resnet, _image(side=16)),
    ZooCase("mobilenet", mobilenet, _image()),
    ZooCase("densenet", DenseNet, _image()),
    ZooCase("shufflenet", shufflenet, _image()),
    ZooCase(
        "unet",
        UNet,
        _image(),
        oracle="its int8 transposed convolution is wrong by more than the signal on a CPU without VNNI",
    ),
    ZooCase("transformer", lambda: Transformer(Attention), lambda n: (torch.randn(n, 7, 6),)),
    ZooCase("transformer_leaf", lambda: Transformer(LeafAttention), lambda n: (torch.randn(n, 7, 6),)),
    ZooCase(
        "conv1d",
        conv1d_net,
        lambda n: (torch.randn(n, 4, 20),),
        oracle='"same" padding of a 1d convolution fails in convert',
    ),
    ZooCase("conv3d", conv3d_net, lambda n: (torch.randn(n, 2, 5, 6, 6),)),
    ZooCase("functional", Functional, _image(), oracle="a mean over positional dimensions fails in convert"),
    ZooCase("many_inputs", ManyInputs, _many, oracle="a number among the inputs is observed like a tensor, and fails"),
    ZooCase("two_inputs", TwoInputs, lambda n: (torch.randn(n, 3, 12, 12), torch.randn(n, 3, 6, 6))),
    ZooCase("shared", Shared, lambda n: (torch.randn(n, 3, 8, 8), torch.randn(n, 3, 8, 8))),
    ZooCase(
        "tied",
        Tied,
        lambda n: (torch.randn(n, 8),),
        oracle="a parameter of a quantized module used elsewhere has become a method",
    ),
    ZooCase(
        "aliased",
        Aliased,
        _image(side=6),
        aliasing=True,
        oracle="quantized convolutions are channels last, where a view fails; in-place writes are lost on aliases",
    ),
    ZooCase("inception", lambda: nn.Sequential(*_conv_bn(3, 6), nn.ReLU(), Inception(6), _Head(16)), _image(side=8)),
    ZooCase("squeezenet", squeezenet, _image()),
    ZooCase("sizes", Sizes, _image(side=8)),
    ZooCase("padding_modes", PaddingModes, _image(4, 8), oracle='"same" padding fails in convert'),
)
