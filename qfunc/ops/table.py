"""The vocabulary: every kind of operator that qfunc knows by meaning, and every way of writing it.

A form that this table does not list keeps the kind of its own name, and stays float.
"""

from __future__ import annotations

from qfunc.ops.kind import Form, Kind, function, kind, method, module

_F = "torch.nn.functional"


def _unary(name: str, layer: str, *more: Form) -> Kind:
    """An elementwise activation without options, as module, function and method."""
    return kind(
        name,
        "input",
        module(f"torch.nn.{layer}"),
        function(f"{_F}.{name}", "input, ~inplace=False"),
        *more,
        call=f"{_F}.{name}(input)",
    )


def _curved(name: str, layer: str, option: str) -> Kind:
    """An elementwise activation with one option, as module and function, and its in-place twin."""
    params, key = f"input, {option}", option.partition("=")[0]
    return kind(
        name,
        params,
        module(f"torch.nn.{layer}", key),
        function(f"{_F}.{name}", f"{params}, ~inplace=False"),
        function(f"{_F}.{name}_", params, emit=f"{_F}.{name}", inplace=True),
        call=f"{_F}.{name}(input, {key})",
    )


def _twins(name: str) -> tuple[Form, ...]:
    """`torch.f`, `x.f()` and their in-place twins."""
    return (
        function(f"torch.{name}", "input"),
        function(f"torch.{name}_", "input", emit=f"torch.{name}", inplace=True),
        method(name, "input"),
        method(f"{name}_", "input", emit=name, inplace=True),
    )


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


def _binary(name: str, *aliases: str) -> Kind:
    params = "input, other" + (", alpha=1" if name == "add" else "")
    return kind(
        name,
        params,
        function(f"operator.{name}", "input, other"),
        function(f"operator.i{name}", "input, other", emit=f"operator.{name}", inplace=True),
        function(f"torch.{name}", params),
        method(name, params),
        method(f"{name}_", params, emit=name, inplace=True),
        *(
            form
            for alias in aliases
            for form in (
                function(f"torch.{alias}", params),
                method(alias, params),
                method(f"{alias}_", params, emit=alias, inplace=True),
            )
        ),
        tensors="input other",
        call=f"operator.{name}(input, other)",
        full_call="torch.add(input, other, alpha=)" if name == "add" else "",
    )


def _copy(name: str, params: str, *forms: Form) -> Kind:
    """A rearrangement of elements, as `torch.f` and `x.f()`; what has a default is given where it differs."""
    written = params.replace("*", "")
    required, _, optional = written.partition("=")[0].rpartition(", ")
    full = f"torch.{name}({required}, {optional})"
    return kind(
        name,
        written,
        function(f"torch.{name}", written),
        method(name, params),
        *forms,
        call=f"torch.{name}({required})" if "=" in written else full,
        full_call=full if "=" in written else "",
    )


_BATCH_NORM = "running_mean running_var weight bias training momentum eps"

KINDS: tuple[Kind, ...] = (
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
    _unary("relu", "ReLU", *_twins("relu"), function(f"{_F}.relu_", "input", emit="torch.relu", inplace=True)),
    _unary("hardswish", "Hardswish"),
    _unary("hardsigmoid", "Hardsigmoid"),
    _unary("silu", "SiLU"),
    _curved("leaky_relu", "LeakyReLU", "negative_slope=0.01"),
    _curved("elu", "ELU", "alpha=1.0"),
    kind(
        "gelu",
        "input, approximate='none'",
        module("torch.nn.GELU", "approximate"),
        function(f"{_F}.gelu", "input, approximate='none'"),
        call=f"{_F}.gelu(input, approximate=)",
    ),
    kind(
        "prelu",
        "input, weight",
        module("torch.nn.PReLU", "weight"),
        function(f"{_F}.prelu", "input, weight"),
        function("torch.prelu", "input, weight"),
        method("prelu", "input, weight"),
        weights="weight",
        call=f"{_F}.prelu(input, weight)",
    ),
    kind(
        "sigmoid",
        "input",
        module("torch.nn.Sigmoid"),
        function(f"{_F}.sigmoid", "input"),
        *_twins("sigmoid"),
        function("torch.special.expit", "input"),
        call="torch.sigmoid(input)",
    ),
    kind(
        "tanh",
        "input",
        module("torch.nn.Tanh"),
        function(f"{_F}.tanh", "input"),
        *_twins("tanh"),
        call="torch.tanh(input)",
    ),
    kind(
        "clamp",
        "input, min=None, max=None",
        module("torch.nn.ReLU6", min=0.0, max=6.0),
        function(f"{_F}.relu6", "input, ~inplace=False", min=0.0, max=6.0),
        module("torch.nn.Hardtanh", "min:min_val max:max_val"),
        function(f"{_F}.hardtanh", "input, min:min_val=-1.0, max:max_val=1.0, ~inplace=False"),
        function(f"{_F}.hardtanh_", "input, min:min_val=-1.0, max:max_val=1.0", emit=f"{_F}.hardtanh", inplace=True),
        *(
            form
            for name, params in (("clamp", "input, min=None, max=None"), ("clip", "input, min=None, max=None"))
            for form in (
                function(f"torch.{name}", params),
                function(f"torch.{name}_", params, emit=f"torch.{name}", inplace=True),
                method(name, params),
                method(f"{name}_", params, emit=name, inplace=True),
            )
        ),
        *(
            form
            for name in ("min", "max")
            for form in (
                function(f"torch.clamp_{name}", f"input, {name}"),
                function(f"torch.clamp_{name}_", f"input, {name}", emit=f"torch.clamp_{name}", inplace=True),
                method(f"clamp_{name}", f"input, {name}"),
                method(f"clamp_{name}_", f"input, {name}", emit=f"clamp_{name}", inplace=True),
            )
        ),
        call="torch.clamp(input, min, max)",
    ),
    _binary("add"),
    _binary("mul", "multiply"),
    kind(
        "cat",
        "tensors, dim=0",
        *(function(f"torch.{name}", "tensors, dim=0") for name in ("cat", "concat", "concatenate")),
        tensors="tensors",
        call="torch.cat(tensors, dim)",
    ),
    *map(_max_pool, (1, 2, 3)),
    *map(_avg_pool, (1, 2, 3)),
    *map(_adaptive_avg_pool, (1, 2, 3)),
    kind(
        "mean",
        "input, dim=None, keepdim=False, dtype=None",
        function("torch.mean", "input, dim=None, keepdim=False, dtype=None"),
        method("mean", "input, dim=None, keepdim=False, dtype=None"),
        call="torch.mean(input, dim, keepdim, dtype=)",
    ),
    kind(
        "flatten",
        "input, start_dim=0, end_dim=-1",
        module("torch.nn.Flatten", "start_dim end_dim"),
        function("torch.flatten", "input, start_dim=0, end_dim=-1"),
        method("flatten", "input, start_dim=0, end_dim=-1"),
        function("torch.ravel", "input"),
        method("ravel", "input"),
        call="torch.flatten(input, start_dim, end_dim)",
    ),
    # A view of channels-last memory may be impossible where the same view of the float model's memory is not.
    _copy("reshape", "input, *shape", method("view", "input, *shape", emit="reshape")),
    _copy("permute", "input, *dims"),
    _copy(
        "transpose",
        "input, dim0, dim1",
        *(
            form
            for name, first, second in (("swapaxes", "axis0", "axis1"), ("swapdims", "dim0", "dim1"))
            for params in (f"input, dim0:{first}, dim1:{second}",)
            for form in (function(f"torch.{name}", params), method(name, params))
        ),
    ),
    _copy("squeeze", "input, dim=None"),
    _copy("unsqueeze", "input, dim"),
    kind("contiguous", "input", method("contiguous", "input"), call="torch.clone(input)"),
    kind(
        "dropout",
        "input, p=0.5, training=True",
        *(module(f"torch.nn.{name}", "p training") for name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d")),
        *(
            function(f"{_F}.{name}", "input, p=0.5, training=True, ~inplace=False")
            for name in ("dropout", "dropout1d", "dropout2d", "dropout3d")
        ),
        function("torch.dropout", "input, p:p, training:train"),
        call=f"{_F}.dropout(input, p, training)",
    ),
    kind("identity", "input", module("torch.nn.Identity"), call="qfunc.ops.reference.identity(input)"),
)
"""Every row of the vocabulary."""
