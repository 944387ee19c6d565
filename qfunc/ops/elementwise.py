"""The vocabulary of activations, of what goes element by element, and of products of matrices."""

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


def _options(name: str, layer: str, options: str = "", *more: Form) -> Kind:
    """An elementwise activation with numbers as options, as module and function."""
    params = f"input, {options}" if options else "input"
    keys = [option.partition("=")[0] for option in options.split(", ")] if options else []
    return kind(
        name,
        params,
        module(f"torch.nn.{layer}", " ".join(keys)),
        function(f"{_F}.{name}", params),
        *more,
        call=f"{_F}.{name}({', '.join(['input', *keys])})",
    )


def _methods(name: str, params: str) -> tuple[Form, ...]:
    """`torch.f` and `x.f()`."""
    return function(f"torch.{name}", params), method(name, params)


def _function(name: str, *more: Form) -> Kind:
    """A function of one element, as function and method, with their in-place twins."""
    return kind(name, "input", *_twins(name), *more, call=f"torch.{name}(input)")


def _twins(name: str) -> tuple[Form, ...]:
    """`torch.f`, `x.f()` and their in-place twins."""
    return (
        function(f"torch.{name}", "input"),
        function(f"torch.{name}_", "input", emit=f"torch.{name}", inplace=True),
        method(name, "input"),
        method(f"{name}_", "input", emit=name, inplace=True),
    )


def _binary(name: str, operator: str, option: str = "", aliases: str = "") -> Kind:
    """An operator of two operands, of which either may be a number; `option` is by keyword alone."""
    params = f"input, other, {option}" if option else "input, other"
    key = option.partition("=")[0]
    return kind(
        name,
        params,
        function(f"operator.{operator}", "input, other"),
        function(f"operator.i{operator}", "input, other", emit=f"operator.{operator}", inplace=True),
        *(
            form
            for alias in (name, *aliases.split())
            for form in (
                function(f"torch.{alias}", params),
                method(alias, params),
                method(f"{alias}_", params, emit=alias, inplace=True),
            )
        ),
        tensors="input other",
        call=f"operator.{operator}(input, other)",
        full_call=f"torch.{name}(input, other, {key}=)" if option else "",
    )


def _softmax(name: str, *layers: Form) -> Kind:
    """A normalization to weights along a dimension; torch chooses the dimension where none is given."""
    return kind(
        name,
        "input, dim=None, dtype=None",
        *layers,
        function(f"{_F}.{name}", "input, dim=None, !_stacklevel=3, dtype=None"),
        function(f"torch.{name}", "input, dim, dtype=None"),
        function(f"torch.special.{name}", "input, dim, dtype=None"),
        method(name, "input, dim, dtype=None"),
        call=f"{_F}.{name}(input, dim, dtype=)",
    )


ELEMENTWISE: tuple[Kind, ...] = (
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
    _softmax("softmax", module("torch.nn.Softmax", "dim"), module("torch.nn.Softmax2d", dim=-3)),
    _softmax("log_softmax", module("torch.nn.LogSoftmax", "dim")),
    _binary("add", "add", "alpha=1"),
    _binary("sub", "sub", "alpha=1", "subtract"),
    _binary("mul", "mul", aliases="multiply"),
    _binary("div", "truediv", "rounding_mode=None", "divide true_divide"),
    _binary("floor_divide", "floordiv"),
    kind(
        "matmul",
        "input, other",
        function("operator.matmul", "input, other"),
        function("torch.matmul", "input, other"),
        function("torch.linalg.matmul", "input, other"),
        method("matmul", "input, other"),
        tensors="input other",
        call="torch.matmul(input, other)",
    ),
    kind(
        "bmm",
        "input, other",
        function("torch.bmm", "input, other:mat2"),
        method("bmm", "input, other:mat2"),
        tensors="input other",
        call="torch.bmm(input, other)",
    ),
    kind(
        "attention",
        "input, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False",
        function(
            f"{_F}.scaled_dot_product_attention",
            "input:query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False",
        ),
        tensors="input key value",
        call=f"{_F}.scaled_dot_product_attention"
        "(input, key, value, attn_mask, dropout_p, is_causal, scale=, enable_gqa=)",
    ),
    kind(
        "masked_fill",
        "input, mask, value",
        function("torch.masked_fill", "input, mask, value"),
        method("masked_fill", "input, mask, value"),
        method("masked_fill_", "input, mask, value", emit="masked_fill", inplace=True),
        call="torch.masked_fill(input, mask, value)",
    ),
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
    _unary("mish", "Mish"),
    _unary(
        "selu",
        "SELU",
        function("torch.selu", "input"),
        function("torch.selu_", "input", emit="torch.selu", inplace=True),
    ),
    kind(
        "celu",
        "input, alpha=1.0",
        module("torch.nn.CELU", "alpha"),
        function(f"{_F}.celu", "input, alpha=1.0, ~inplace=False"),
        function("torch.celu", "input, alpha=1.0"),
        function("torch.celu_", "input, alpha=1.0", emit="torch.celu", inplace=True),
        call=f"{_F}.celu(input, alpha)",
    ),
    _options("softplus", "Softplus", "beta=1.0, threshold=20.0"),
    _options("logsigmoid", "LogSigmoid"),
    _options("softsign", "Softsign"),
    _options("tanhshrink", "Tanhshrink"),
    _options("hardshrink", "Hardshrink", "lambd=0.5", *_methods("hardshrink", "input, lambd=0.5")),
    _options("softshrink", "Softshrink", "lambd=0.5"),
    kind(
        "threshold",
        "input, threshold, value",
        module("torch.nn.Threshold", "threshold value"),
        function(f"{_F}.threshold", "input, threshold, value, ~inplace=False"),
        function("torch.threshold", "input, threshold, value"),
        function("torch.threshold_", "input, threshold, value", emit="torch.threshold", inplace=True),
        call=f"{_F}.threshold(input, threshold, value)",
    ),
    _function(
        "abs",
        function("operator.abs", "input"),
        *_methods("absolute", "input"),
        method("absolute_", "input", emit="absolute", inplace=True),
    ),
    _function("neg", function("operator.neg", "input"), *_twins("negative")),
    *(_function(name) for name in ("exp", "log", "sqrt", "rsqrt", "reciprocal")),
    _function("erf", function("torch.special.erf", "input")),
    kind(
        "pow",
        "input, other",
        function("operator.pow", "input, other"),
        function("operator.ipow", "input, other", emit="operator.pow", inplace=True),
        function("torch.pow", "input, other:exponent"),
        method("pow", "input, other:exponent"),
        method("pow_", "input, other:exponent", emit="pow", inplace=True),
        function("torch.square", "input", other=2),
        method("square", "input", other=2),
        method("square_", "input", emit="square", inplace=True, other=2),
        tensors="input other",
        call="operator.pow(input, other)",
    ),
    kind("identity", "input", module("torch.nn.Identity"), call="qfunc.ops.reference.identity(input)"),
)
"""The rows of what goes element by element, and of products."""
