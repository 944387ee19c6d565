"""The ways of writing that random programs choose from, where an expression is all there is to them.

A form that begins with "nn." is a module; others are expressions over `{x}`. `{y}` is a value of the same shape, `{c}`
the size of dimension 1, `{last}` of the last, `{n}` the number of those from 2 on.
"""

from __future__ import annotations

POOLS = (
    "nn.MaxPool{n}d(2)",
    "nn.MaxPool{n}d(3, stride=2, padding=1, ceil_mode=True)",
    "nn.AvgPool{n}d(2)",
    "nn.AvgPool{n}d(3, stride=1, padding=1, count_include_pad=False)",
    "nn.AdaptiveAvgPool{n}d(1)",
    "nn.AdaptiveMaxPool{n}d(2)",
    "F.max_pool{n}d({x}, 2)",
    "F.max_pool{n}d({x}, kernel_size=3, stride=1, padding=1)",
    "torch.max_pool{n}d({x}, 2)",
    "F.avg_pool{n}d({x}, 2, stride=1)",
    "F.adaptive_avg_pool{n}d({x}, 1)",
    "F.adaptive_avg_pool{n}d({x}, output_size=2)",
    "F.adaptive_max_pool{n}d({x}, 1)",
    "F.adaptive_max_pool{n}d({x}, output_size=3)",
)

CURVES = (
    "nn.Mish()",
    "F.mish({x})",
    "nn.SELU()",
    "F.celu({x}, 0.5)",
    "nn.CELU()",
    "nn.Softplus()",
    "F.softplus({x}, beta=2, threshold=10)",
    "nn.LogSigmoid()",
    "nn.Softsign()",
    "nn.Tanhshrink()",
    "nn.Hardshrink(0.3)",
    "F.softshrink({x}, 0.2)",
    "nn.Threshold(0.1, -0.5)",
    "torch.abs({x})",
    "abs({x})",
    "-{x}",
    "{x}.neg()",
    "torch.exp({x}.clamp(max=2))",
    "{x}.abs().add(0.1).sqrt()",
    "torch.rsqrt({x}.abs() + 0.5)",
    "torch.log(F.relu({x}) + 1)",
    "torch.reciprocal({x}.abs() + 1)",
    "torch.erf({x})",
    "torch.tanh({x}) ** 2",
    "torch.square({x}.clamp(-2, 2))",
    "2 ** {x}.clamp(-2, 2)",
    "nn.PReLU()",
    "nn.PReLU({c})",
    "F.prelu({x}, torch.full((1,), 0.3))",
)
"""Functions of one element."""

FLOATS = (
    "torch.sin({x})",
    "torch.where({x} > 0, {x}, {y})",
    "torch.maximum({x}, {y})",
    "{x}.unsqueeze(1).squeeze(1)",
    "torch.atan({x}) + {y}",
)
"""Mostly what no kind of the vocabulary stands for."""

DIFFERENCES = (
    "{x} - {y}",
    "torch.sub({x}, {y})",
    "{x}.sub({y}, alpha=2)",
    "{x}.subtract(0.5)",
    "1.5 - {x}",
    "{x} / 2.5",
    "{x} / (1 + {y}.abs())",
    "torch.div({x}, 0.73, rounding_mode='trunc')",
    "{x}.div({y}.abs() + 1)",
    "torch.true_divide({x}, other=3)",
    "F.relu({x} - {y})",
    "torch.add({x}, {y}, alpha=-0.5)",
    "1 / ({x}.abs() + 1)",
)
PRODUCTS = (
    "{x} @ {y}.transpose(-2, -1)",
    "torch.matmul({x}, {y}.transpose(-1, -2))",
    "{x}.matmul(other={y}.transpose(-1, -2))",
    "torch.matmul(torch.softmax({x}, -1), {y}.transpose(-1, -2))",
)
BATCHED_PRODUCTS = ("torch.bmm({x}, {y}.transpose(1, 2))", "{x}.bmm({y}.transpose(1, 2))")

NORMS = (
    "nn.LayerNorm({last})",
    "F.layer_norm({x}, ({last},))",
    "nn.LayerNorm({last}, elementwise_affine=False)",
)
GROUP_NORMS = ("nn.GroupNorm(1, {c})", "F.group_norm({x}, num_groups=1)", "nn.GroupNorm(1, {c}, affine=False)")
SPATIAL_NORMS = (
    "nn.InstanceNorm{n}d({c})",
    "nn.InstanceNorm{n}d({c}, affine=True)",
    "nn.InstanceNorm{n}d({c}, track_running_stats=True)",
    "F.instance_norm({x}, eps=0.001)",
    "F.layer_norm({x}, {x}.shape[2:])",
)
SOFTMAXES = (
    "nn.Softmax(dim=-1)",
    "F.softmax({x}, dim=1)",
    "torch.softmax({x}, -1)",
    "{x}.softmax(dim=-1)",
    "nn.LogSoftmax(1)",
    "F.log_softmax({x}, -1)",
)
RESIZES = (
    "F.interpolate({x}, scale_factor=2)",
    "nn.Upsample(scale_factor=2)",
    "F.interpolate({x}, size={x}.shape[2:])",
    "F.interpolate({x}, scale_factor=2, mode='nearest-exact')",
    "F.interpolate({x}, scale_factor=2, mode=('linear', 'bilinear', 'trilinear')[{n} - 1])",
    "F.interpolate({x}, size={x}.shape[2:], mode=('linear', 'bilinear', 'trilinear')[{n} - 1], align_corners=True)",
    "F.interpolate({x}, scale_factor=1.5, mode='area')",
    "nn.ZeroPad{n}d(1)",
    "nn.ConstantPad{n}d(1, 0.5)",
    "nn.ReflectionPad{n}d(1)",
    "nn.ReplicationPad{n}d(1)",
    "nn.CircularPad{n}d(1)",
    "F.pad({x}, (1, 0), value=-1.0)",
    "F.pad({x}, [0, 1])",
    "nn.ChannelShuffle({c})",
    "torch.channel_shuffle({x}, {c})",
)
PIXELS = ("nn.PixelShuffle(2)", "F.pixel_shuffle({x}, 2)", "F.pixel_unshuffle(F.pixel_shuffle({x}, 2), 2)")

PARTS = (
    "{x}[:, :1]",
    "{x}.narrow(1, 0, 1)",
    "torch.narrow({x}, -1, 0, 1)",
    "torch.chunk({x}, 2, 1)[0]",
    "{x}.split(1, dim=-1)[-1]",
    "torch.split({x}, 1, 1)[0]",
    "torch.cat({x}.chunk(2, 1)[::-1], 1)",
    "torch.cat({x}.chunk(2, -1), -1)",
)
SPATIAL_PARTS = ("{x}[:, :, 1:]", "{x}[..., 0]", "{x}.unbind(1)[0]", "torch.unbind({x}, dim=-1)[-1]", "{x}[:, 0, None]")

COPIES = (
    "torch.repeat_interleave({x}, 2, 1)",
    "{x}.repeat_interleave(2, dim=-1)",
    "{x}.mean(1, keepdim=True).expand({x}.shape)",
    "torch.broadcast_to({x}[:, :1], {x}.shape)",
    "torch.stack([{x}, {y}], 1).sum(1)",
    "torch.stack(({x}, {y}), dim=-1).sum(dim=-1)",
    "{x}.sum(1, keepdim=True)",
    "torch.sum({x}, dim=-1, keepdim=True)",
    "torch.stack([{x}, {y}], 2).flatten(1, 2)",
    "{x}.masked_fill({x} < -1, -1.0)",
    "torch.masked_fill({x}, {x} > 2, 2.0)",
    "{x}.unflatten(1, (1, -1)).flatten(1, 2)",
    "{x}.detach()",
)

IN_PLACE: tuple[str, ...] = (
    "{x}.relu_()",
    "nn.ReLU(inplace=True)",
    "F.relu({x}, inplace=True)",
    "torch.relu_({x})",
    "nn.ReLU6(inplace=True)",
    "F.relu6({x}, inplace=True)",
    "F.hardtanh_({x})",
    "nn.Hardtanh(-0.5, 2.0, inplace=True)",
    "{x}.clamp_(-1, 1)",
    "nn.Hardswish(inplace=True)",
    "nn.SiLU(inplace=True)",
    "F.leaky_relu_({x}, 0.1)",
    "F.elu({x}, inplace=True)",
    "{x}.sigmoid_()",
    "{x}.add_({y})",
    "{x}.mul_(0.5)",
    "{x}.add_(1)",
    "{x}.sub_({y})",
    "{x}.div_(1.5)",
    "{x}.masked_fill_({x} < -1, -1.0)",
)
"""Operators that write to `x` and give it back; `{y}` is another value of the same shape."""

ALIASES: tuple[str, ...] = (
    "{x}.flatten(1)",
    "{x}[:, :1]",
    "{x}.transpose(1, -1)",
    "{x}.narrow(1, 0, 1)",
    "{x}.detach()",
    "{x}.reshape({x}.size(0), -1)",
    "F.dropout({x}, 0.3, self.training)",
)
"""Operators that give the memory of `x` under another name."""
