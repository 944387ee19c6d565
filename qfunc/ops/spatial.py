"""The vocabulary of what works on the spatial dimensions: pools, padding, changes of size."""

from __future__ import annotations

from qfunc.ops.kind import Form, Kind, function, kind, module

_F = "torch.nn.functional"


def _max_pool(rank: int) -> Kind:
    params = "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False"
    return kind(
        f"max_pool{rank}d",
        params,
        module(f"torch.nn.MaxPool{rank}d", "kernel_size stride padding dilation ceil_mode !return_indices=False"),
        function(f"{_F}.max_pool{rank}d", f"{params}, !return_indices=False"),
        function(f"torch.max_pool{rank}d", params),
        sizes="kernel_size stride=kernel_size padding dilation",
        rank=rank,
        call=f"torch.max_pool{rank}d(input, kernel_size, stride, padding, dilation, ceil_mode)",
    )


def _avg_pool(rank: int) -> Kind:
    params = "input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True"
    names = "kernel_size stride padding ceil_mode count_include_pad"
    if rank > 1:
        params, names = f"{params}, divisor_override=None", f"{names} divisor_override"
    return kind(
        f"avg_pool{rank}d",
        params,
        module(f"torch.nn.AvgPool{rank}d", names),
        function(f"{_F}.avg_pool{rank}d", params),
        *([function("torch.avg_pool1d", params)] if rank == 1 else []),
        sizes="kernel_size stride=kernel_size padding",
        rank=rank,
        call=f"{_F}.avg_pool{rank}d(input, {', '.join(names.split())})",
    )


def _adaptive_avg_pool(rank: int) -> Kind:
    name = f"adaptive_avg_pool{rank}d"
    return kind(
        name,
        "input, output_size",
        module(f"torch.nn.AdaptiveAvgPool{rank}d", "output_size"),
        function(f"{_F}.{name}", "input, output_size"),
        *([function(f"torch.{name}", "input, output_size")] if rank == 1 else []),
        sizes="output_size",
        rank=rank,
        call=f"{_F}.{name}(input, output_size)",
    )


def _adaptive_max_pool(rank: int) -> Kind:
    name = f"adaptive_max_pool{rank}d"
    return kind(
        name,
        "input, output_size",
        module(f"torch.nn.AdaptiveMaxPool{rank}d", "output_size !return_indices=False"),
        function(f"{_F}.{name}", "input, output_size, !return_indices=False"),
        sizes="output_size",
        rank=rank,
        call=f"{_F}.{name}(input, output_size)",
    )


def _pads() -> tuple[Form, ...]:
    """The modules that pad. Zeros are the padding of no `value`."""
    return tuple(
        form
        for rank in (1, 2, 3)
        for form in (
            module(f"torch.nn.ZeroPad{rank}d", "pad:padding", mode="constant", value=None),
            module(f"torch.nn.ConstantPad{rank}d", "pad:padding value", mode="constant"),
            module(f"torch.nn.ReflectionPad{rank}d", "pad:padding", mode="reflect"),
            module(f"torch.nn.ReplicationPad{rank}d", "pad:padding", mode="replicate"),
            module(f"torch.nn.CircularPad{rank}d", "pad:padding", mode="circular"),
        )
    )


def _shuffle(name: str, layer: str, option: str) -> Kind:
    """An exchange of channels and positions, as module and function."""
    return kind(
        name,
        f"input, {option}",
        module(f"torch.nn.{layer}", option),
        *(function(f"{place}.{name}", f"input, {option}") for place in (_F, "torch")),
        call=f"torch.{name}(input, {option})",
    )


_SCALED = "size scale_factor mode align_corners recompute_scale_factor"
_INTERPOLATE = (
    "input, size=None, scale_factor=None, mode='nearest', align_corners=None, recompute_scale_factor=None, "
    "antialias=False"
)

SPATIAL: tuple[Kind, ...] = (
    *map(_max_pool, (1, 2, 3)),
    *map(_avg_pool, (1, 2, 3)),
    *map(_adaptive_avg_pool, (1, 2, 3)),
    *map(_adaptive_max_pool, (1, 2, 3)),
    kind(
        "interpolate",
        _INTERPOLATE,
        *(module(f"torch.nn.{name}", _SCALED) for name in ("Upsample", "UpsamplingNearest2d")),
        module("torch.nn.UpsamplingBilinear2d", "size scale_factor", mode="bilinear", align_corners=True),
        function(f"{_F}.interpolate", _INTERPOLATE),
        call=f"{_F}.interpolate(input, {', '.join(_SCALED.split())}, antialias)",
    ),
    kind(
        "pad",
        "input, pad, mode='constant', value=None",
        *_pads(),
        function(f"{_F}.pad", "input, pad, mode='constant', value=None"),
        sizes="pad",
        call=f"{_F}.pad(input, pad, mode, value)",
    ),
    _shuffle("pixel_shuffle", "PixelShuffle", "upscale_factor"),
    _shuffle("pixel_unshuffle", "PixelUnshuffle", "downscale_factor"),
    _shuffle("channel_shuffle", "ChannelShuffle", "groups"),
)
"""The rows of what works on spatial dimensions."""
