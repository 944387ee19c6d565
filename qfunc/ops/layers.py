"""The vocabulary of layers: operators with weights, and norms."""

from __future__ import annotations

from qfunc.ops.kind import Kind, function, kind, method, module

_F = "torch.nn.functional"


def _conv(rank: int) -> Kind:
    params = "input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1"
    return kind(
        f"conv{rank}d",
        f"{params}, padding_mode='zeros'",
        module(f"torch.nn.Conv{rank}d", "weight bias stride padding dilation groups padding_mode"),
        function(f"{_F}.conv{rank}d", params),
        function(f"torch.conv{rank}d", params),
        weights="weight bias",
        sizes="stride padding dilation",
        rank=rank,
        call=f"{_F}.conv{rank}d(input, weight, bias, stride, padding, dilation, groups)",
        full_call="qfunc.ops.reference.padded_conv"
        "(input, weight, bias, stride, padding, dilation, groups, padding_mode)",
    )


def _conv_transpose(rank: int) -> Kind:
    params = "input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1"
    names = "weight bias stride padding output_padding groups dilation"
    name = f"conv_transpose{rank}d"
    return kind(
        name,
        params,
        # An `output_size` makes the padding depend on the size of the input: such a call stays as it is written.
        module(f"torch.nn.ConvTranspose{rank}d", f"{names} !padding_mode='zeros'", "input, !output_size=None"),
        function(f"{_F}.{name}", params),
        function(f"torch.{name}", params),
        weights="weight bias",
        sizes="stride padding output_padding dilation",
        rank=rank,
        call=f"{_F}.{name}(input, {', '.join(names.split())})",
    )


_BATCH_NORM = "running_mean running_var weight bias training momentum eps"
_LAYER_NORM = "input, normalized_shape, weight=None, bias=None, eps=1e-05"
_GROUP_NORM = "input, num_groups, weight=None, bias=None, eps=1e-05"
_INSTANCE_NORM = (
    "input, running_mean=None, running_var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-05"
)
_EMBEDDING = "input, weight, padding_idx=None, !max_norm=None, !norm_type=2.0, scale_grad_by_freq=False, sparse=False"
_EMBEDDING_BAG = (
    "input, weight, offsets=None, !max_norm=None, !norm_type=2, scale_grad_by_freq=False, mode='mean', sparse=False, "
    "per_sample_weights=None, include_last_offset=False, padding_idx=None"
)

LAYERS: tuple[Kind, ...] = (
    *map(_conv, (1, 2, 3)),
    *map(_conv_transpose, (1, 2, 3)),
    kind(
        "linear",
        "input, weight, bias=None",
        module("torch.nn.Linear", "weight bias"),
        function(f"{_F}.linear", "input, weight, bias=None"),
        weights="weight bias",
        call=f"{_F}.linear(input, weight, bias)",
    ),
    kind(
        "batch_norm",
        "input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05",
        *(module(f"torch.nn.BatchNorm{rank}d", _BATCH_NORM) for rank in (1, 2, 3)),
        function(
            f"{_F}.batch_norm",
            "input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-05",
        ),
        weights="running_mean running_var weight bias",
        call=f"{_F}.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)",
    ),
    kind(
        "layer_norm",
        _LAYER_NORM,
        module("torch.nn.LayerNorm", "normalized_shape weight bias eps"),
        function(f"{_F}.layer_norm", _LAYER_NORM),
        function("torch.layer_norm", f"{_LAYER_NORM}, !cudnn_enable=True"),
        weights="weight bias",
        sizes="normalized_shape",
        call=f"{_F}.layer_norm(input, normalized_shape, weight, bias, eps)",
    ),
    kind(
        "group_norm",
        _GROUP_NORM,
        module("torch.nn.GroupNorm", "num_groups weight bias eps"),
        function(f"{_F}.group_norm", _GROUP_NORM),
        function("torch.group_norm", f"{_GROUP_NORM}, !cudnn_enabled=True"),
        weights="weight bias",
        call=f"{_F}.group_norm(input, num_groups, weight, bias, eps)",
    ),
    # Without running statistics a module norms by those of its input in evaluation as well, as batch norms do.
    kind(
        "instance_norm",
        _INSTANCE_NORM,
        *(
            module(
                f"torch.nn.InstanceNorm{rank}d",
                "running_mean running_var weight bias use_input_stats:training momentum eps",
            )
            for rank in (1, 2, 3)
        ),
        function(f"{_F}.instance_norm", _INSTANCE_NORM),
        weights="running_mean running_var weight bias",
        call=f"{_F}.instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)",
    ),
    # The input are indices, no activations. A `max_norm` writes to the weight: such a call stays as it is written.
    kind(
        "embedding",
        "input, weight, padding_idx=None, scale_grad_by_freq=False, sparse=False",
        module("torch.nn.Embedding", "weight padding_idx !max_norm=None scale_grad_by_freq sparse"),
        function(f"{_F}.embedding", _EMBEDDING),
        tensors="",
        weights="weight",
        call=f"{_F}.embedding(input, weight, padding_idx, scale_grad_by_freq=, sparse=)",
    ),
    kind(
        "embedding_bag",
        "input, weight, offsets=None, scale_grad_by_freq=False, mode='mean', sparse=False, per_sample_weights=None, "
        "include_last_offset=False, padding_idx=None",
        module(
            "torch.nn.EmbeddingBag",
            "weight !max_norm=None scale_grad_by_freq mode sparse include_last_offset padding_idx",
            "input, offsets=None, per_sample_weights=None",
        ),
        function(f"{_F}.embedding_bag", _EMBEDDING_BAG),
        tensors="",
        weights="weight",
        call=f"{_F}.embedding_bag(input, weight, offsets, scale_grad_by_freq=, mode=, sparse=, per_sample_weights=, "
        "include_last_offset=, padding_idx=)",
    ),
    kind(
        "addmm",
        "bias, input, weight, beta=1, alpha=1",
        function("torch.addmm", "bias:input, input:mat1, weight:mat2, beta=1, alpha=1"),
        method("addmm", "bias:input, input:mat1, weight:mat2, beta=1, alpha=1"),
        weights="weight bias",
        call="torch.addmm(bias, input, weight, beta=, alpha=)",
    ),
)
"""The rows of layers."""
