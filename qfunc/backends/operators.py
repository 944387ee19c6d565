"""The operators that the reference's backends quantize: the ways of writing that each lists, and their dtypes.

A row has the kinds of the vocabulary, and for what that does not know, the kinds that are named as written: recurrent
layers, `x.resize_()`, attributes. A function of one family makes its rows for given dtypes, for each backend anew.
"""

from __future__ import annotations

from qfunc.backends import dtypes as d
from qfunc.backends.fusions import ADDS, MULS, SUBS, F, modules
from qfunc.config.backend_config import PARAMETERS, Observation, OperatorConfig
from qfunc.config.dtype_config import DTypeConfig

Dtypes = tuple[DTypeConfig, ...]
Rows = tuple[OperatorConfig, ...]

_RANKS = (1, 2, 3)
_POOLS = tuple(f"{name}{rank}d" for name in ("adaptive_avg_pool", "avg_pool", "max_pool") for rank in _RANKS)
_POOL_MODULES = tuple(f"{name}{rank}d" for name in ("AdaptiveAvgPool", "AvgPool", "MaxPool") for rank in _RANKS)


def _methods(*names: str) -> frozenset[str]:
    return frozenset(f".{name}" for name in names)


def _torch(*names: str) -> frozenset[str]:
    return frozenset(f"torch.{name}" for name in names)


def _functional(*names: str) -> frozenset[str]:
    return frozenset(f"{F}.{name}" for name in names)


def layers(convolutions: Dtypes, linears: Dtypes) -> Rows:
    """Convolutions of all ranks, transposed ones, and linear layers."""
    convs = tuple(f"conv{rank}d" for rank in _RANKS)
    ups = tuple(f"conv_transpose{rank}d" for rank in _RANKS)
    classes = modules(*(f"{name}{rank}d" for name in ("Conv", "ConvTranspose") for rank in _RANKS))
    return (
        OperatorConfig((*convs, *ups), Observation.OWN, convolutions, classes | _torch(*convs, *ups)),
        linear(linears),
    )


def linear(dtypes: Dtypes) -> OperatorConfig:
    """Linear layers."""
    return OperatorConfig(("linear",), Observation.OWN, dtypes, modules("Linear") | _functional("linear"))


def binaries(dtypes: Dtypes, kinds: tuple[str, ...] = ("add", "mul")) -> OperatorConfig:
    """Sums and products, which have the range of their operand where the other one is a number."""
    forms = frozenset().union(*({"add": ADDS, "mul": MULS, "sub": SUBS}[kind] for kind in kinds))
    return OperatorConfig(kinds, Observation.OWN, dtypes, forms, by_tensor_count=((1, Observation.SHARED),))


def matmul(dtypes: Dtypes) -> OperatorConfig:
    """Products of two values."""
    return OperatorConfig(("matmul",), Observation.OWN, dtypes, _torch("matmul"))


def plain(dtypes: Dtypes) -> OperatorConfig:
    """What has a range of its own, and no weight that is quantized."""
    activations, more = ("elu", "hardswish", "leaky_relu", "dropout"), ("group_norm", "instance_norm")
    classes = modules("ELU", "LeakyReLU", "Hardswish", "Dropout", "PReLU", *(f"InstanceNorm{n}d" for n in _RANKS))
    kinds = (*activations, *more, "prelu")
    return OperatorConfig(kinds, Observation.OWN, dtypes, classes | _functional(*activations, *more))


def fixed_qparams(dtypes: Dtypes) -> Rows:
    """What has a range that is known beforehand, which a configuration must give it."""
    sigmoids = ("hardsigmoid", "hardsigmoid_", "sigmoid", "sigmoid_")
    unit = modules("Hardsigmoid", "Sigmoid", "Softmax") | _functional("hardsigmoid") | _torch("sigmoid")
    return (
        OperatorConfig(
            ("hardsigmoid", "sigmoid", "softmax", ".hardsigmoid", ".hardsigmoid_"),
            Observation.OWN,
            d.with_fixed_output(dtypes, 1 / 256, 0),
            unit | _methods(*sigmoids),
        ),
        OperatorConfig(
            ("tanh",),
            Observation.OWN,
            d.with_fixed_output(dtypes, 2 / 256, 128),
            modules("Tanh") | _torch("tanh") | _methods("tanh", "tanh_"),
        ),
    )


def shared(dtypes: Dtypes) -> OperatorConfig:
    """What has the range of its input."""
    rearrangements = ("repeat_interleave", "squeeze", "stack", "transpose", "unsqueeze", "flatten", "narrow", "cat")
    return OperatorConfig(
        (
            *(*_POOLS, *rearrangements, "clamp", "relu", "mean", "identity", "reshape", "permute", "contiguous"),
            *("detach", "repeat", "interpolate", "pixel_shuffle", "pixel_unshuffle", "floor_divide", ".resize_"),
        ),
        Observation.SHARED,
        dtypes,
        modules(*_POOL_MODULES, "Hardtanh", "Identity", "PixelShuffle", "PixelUnshuffle", "ReLU", "ReLU6")
        | _functional(*_POOLS, "hardtanh", "hardtanh_", "interpolate", "relu", "relu6")
        | _torch("adaptive_avg_pool1d", "avg_pool1d", "pixel_shuffle", "pixel_unshuffle")
        | _torch(*rearrangements, "clamp", "mean")
        | _methods("clamp", "contiguous", "detach", "detach_", "mean", "permute", "relu", "relu_", "repeat")
        | _methods("repeat_interleave", "reshape", "resize_", "squeeze", "squeeze_", "transpose", "unsqueeze")
        | _methods("unsqueeze_", "view")
        | {"operator.floordiv"},
    )


def sizes(dtypes: Dtypes) -> OperatorConfig:
    """What asks a value for its size, and nothing of its numbers."""
    forms = frozenset({"builtins.getattr", ".size"})
    return OperatorConfig(("builtins.getattr", ".size"), Observation.NOT_OBSERVED, dtypes, forms)


def batch_norms(dtypes: Dtypes, *ranks: int) -> OperatorConfig:
    """Batch norms that are fused with no layer."""
    return OperatorConfig(("batch_norm",), Observation.OWN, dtypes, modules(*(f"BatchNorm{rank}d" for rank in ranks)))


def layer_norms() -> Rows:
    """Layer norms; the reference asks the weight's dtype of the function alone."""
    dtypes = (d.FLOAT_WEIGHT,)
    return (
        OperatorConfig(("layer_norm",), Observation.OWN, dtypes, modules("LayerNorm")),
        OperatorConfig(("layer_norm",), Observation.OWN, dtypes, _functional("layer_norm"), weight="weight"),
    )


def recurrent(dtypes: Dtypes) -> OperatorConfig:
    """Recurrent layers and cells."""
    forms = modules("GRUCell", "LSTMCell", "RNNCell", "LSTM", "GRU")
    return OperatorConfig(tuple(sorted(forms)), Observation.OWN, dtypes, forms, weight=PARAMETERS)


def embeddings(*dtypes: DTypeConfig) -> OperatorConfig:
    """Tables of vectors, of which the weight alone is quantized."""
    return OperatorConfig(("embedding", "embedding_bag"), Observation.OWN, dtypes, modules("Embedding", "EmbeddingBag"))


def _native(dtypes: Dtypes, convolutions: Dtypes, dynamic: Dtypes, embedded: Dtypes) -> Rows:
    """What native, fbgemm, x86, qnnpack and onednn have in common."""
    return (
        *layers(convolutions, (*convolutions, *dynamic)),
        binaries(dtypes),
        matmul(dtypes),
        plain(dtypes),
        *fixed_qparams(dtypes),
        shared(dtypes),
        batch_norms(dtypes, 2, 3),
        recurrent(dynamic),
        embeddings(*embedded),
    )


_DYNAMIC = (d.DYNAMIC_INT8, d.DYNAMIC_FLOAT16)
_TABLES = (d.WEIGHT_UINT8, d.WEIGHT_UINT4)

FBGEMM_OPERATORS = (*_native((d.PLAIN,), (d.LAYER,), _DYNAMIC, _TABLES), sizes((d.PLAIN,)))

NATIVE_OPERATORS = (*FBGEMM_OPERATORS, *layer_norms())

X86_OPERATORS = (
    *(binaries((d.LAYER,)), matmul((d.LAYER,)), *fixed_qparams((d.LAYER,))),
    *(row for row in FBGEMM_OPERATORS if not {"add", "matmul", "sigmoid", "tanh"} & {*row.kinds}),
)
"""As fbgemm's, but that some operators without weights name the dtype of one."""

QNNPACK_OPERATORS = _native((d.XNNPACK_PLAIN, d.PLAIN), (d.XNNPACK_LAYER, d.LAYER), _DYNAMIC, _TABLES)

ONEDNN_OPERATORS = (*_native((d.PLAIN,), (d.LAYER,), (d.DYNAMIC_INT8,), (d.WEIGHT_INT8,)), *layer_norms())

TENSORRT_OPERATORS = (
    *layers((d.INT8_LAYER,), (d.INT8_LAYER,)),
    OperatorConfig(
        ("addmm",), Observation.OWN, (d.INT8_LAYER,), _torch("addmm"), inputs=("input",), weight="weight", bias="bias"
    ),
    *(binaries((d.INT8_LAYER,)), matmul((d.INT8_LAYER,))),
    *(shared((d.INT8_PLAIN,)), sizes((d.INT8_PLAIN,))),
)

_EXECUTORCH = (d.XNNPACK_PLAIN, d.PLAIN)
_FLATTENINGS = ("flatten", "mean", "permute", "permute_copy", "squeeze", "cat", "concat", "concatenate", "clamp")

EXECUTORCH_OPERATORS = (
    linear((d.XNNPACK_LAYER, d.LAYER, d.DYNAMIC_INT8, d.XNNPACK_DYNAMIC, d.DYNAMIC_FLOAT16)),
    OperatorConfig(("conv2d",), Observation.OWN, (d.XNNPACK_LAYER, d.LAYER), modules("Conv2d") | _torch("conv2d")),
    binaries((d.XNNPACK_PLAIN, d.LAYER), ("add", "sub", "mul")),
    OperatorConfig(
        (
            *("adaptive_avg_pool2d", "max_pool2d", "elu", "leaky_relu", "pad", "clamp", "relu", "cat", "flatten"),
            *("mean", "permute", "reshape", "squeeze", ".leaky_relu"),
        ),
        Observation.SHARED,
        _EXECUTORCH,
        modules("AdaptiveAvgPool2d", "ConstantPad2d", "ELU", "Flatten", "Hardtanh", "LeakyReLU", "MaxPool2d", "ReLU6")
        | _functional("adaptive_avg_pool2d", "elu", "hardtanh", "leaky_relu", "leaky_relu_", "max_pool2d", "pad")
        | _functional("relu", "relu6")
        | _torch(*_FLATTENINGS)
        | _methods("clamp", "mean", "permute", "reshape", "relu", "relu_", "squeeze", "squeeze_", "leaky_relu"),
    ),
    batch_norms(_EXECUTORCH, 2),
    OperatorConfig(
        ("embedding", "embedding_bag"),
        Observation.OWN,
        (d.WEIGHT_UINT8,),
        modules("Embedding", "EmbeddingBag") | _functional("embedding"),
    ),
)
