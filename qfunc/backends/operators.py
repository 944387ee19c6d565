"""The operators that the reference's backends quantize, as far as the vocabulary knows them, in the ways each lists."""

from __future__ import annotations

from dataclasses import replace

from qfunc.backends.fusions import ADDS, MULS, F, modules
from qfunc.config.backend_config import Observation, OperatorConfig
from qfunc.config.dtype_config import DTypeConfig
from qfunc.numerics.observers import FixedQParams
from qfunc.numerics.qparams import UINT8

INT8_ONLY = (DTypeConfig("int8", "int8"),)
INT8_TOO = (*INT8_ONLY, DTypeConfig())

_RANKS = (1, 2, 3)
_POOLS = tuple(f"{name}{rank}d" for name in ("adaptive_avg_pool", "avg_pool", "max_pool") for rank in _RANKS)
_POOL_MODULES = (f"{name}{rank}d" for name in ("AdaptiveAvgPool", "AvgPool", "MaxPool") for rank in _RANKS)
_SIGMOIDS = modules("Hardsigmoid", "Sigmoid") | {f"{F}.hardsigmoid", f"{F}.sigmoid", "torch.sigmoid"}
_SIGMOID_METHODS = frozenset({".hardsigmoid", ".hardsigmoid_", ".sigmoid", ".sigmoid_"})
_SHARED_KINDS = ("clamp", "relu", "cat", "flatten", "mean", "permute", "reshape", "squeeze")
_SHARED_METHODS = ("clamp", "mean", "permute", "reshape", "relu", "relu_", "squeeze")

_TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

LAYERS = OperatorConfig(("conv1d", "conv2d", "conv3d", "linear", *_TRANSPOSED), Observation.OWN)
BINARIES = OperatorConfig(
    ("add", "mul"), Observation.OWN, forms=ADDS | MULS, by_tensor_count=((1, Observation.SHARED),)
)
SHARED = OperatorConfig(
    (*_POOLS, *_SHARED_KINDS, "identity", "transpose", "unsqueeze", "contiguous"),
    Observation.SHARED,
    forms=modules(*_POOL_MODULES, "Hardtanh", "Identity", "ReLU", "ReLU6")
    | {f"{F}.{name}" for name in (*_POOLS, "hardtanh", "hardtanh_", "relu", "relu6")}
    | {"torch.adaptive_avg_pool1d", "torch.avg_pool1d"}  # what torch.nn.functional exports under its own name
    | {f"torch.{name}" for name in ("cat", "clamp", "flatten", "mean", "transpose", "squeeze", "unsqueeze")}
    | {f".{name}" for name in (*_SHARED_METHODS, "contiguous", "transpose", "unsqueeze", "view")},
)

NATIVE_OPERATORS = (
    LAYERS,
    BINARIES,
    OperatorConfig(
        ("elu", "hardswish", "leaky_relu", "dropout"),
        Observation.OWN,
        forms=modules("ELU", "Hardswish", "LeakyReLU", "Dropout")
        | {f"{F}.{name}" for name in ("elu", "hardswish", "leaky_relu", "dropout")},
    ),
    OperatorConfig(("batch_norm",), Observation.OWN, forms=modules("BatchNorm2d", "BatchNorm3d")),
    OperatorConfig(
        ("sigmoid", "hardsigmoid"),
        Observation.OWN,
        forms=_SIGMOIDS | _SIGMOID_METHODS,
        fixed=FixedQParams(UINT8, 1 / 256, 0),
    ),
    OperatorConfig(
        ("tanh",),
        Observation.OWN,
        forms=modules("Tanh") | {"torch.tanh", ".tanh", ".tanh_"},
        fixed=FixedQParams(UINT8, 2 / 256, 128),
    ),
    SHARED,
)
"""Of native, fbgemm, x86 and onednn; those of qnnpack take `int8` activations as well."""


def with_dtypes(dtypes: tuple[DTypeConfig, ...], *rows: OperatorConfig) -> tuple[OperatorConfig, ...]:
    """Rows that take other integer types."""
    return tuple(replace(row, dtypes=dtypes) for row in rows)


TENSORRT_OPERATORS = with_dtypes(INT8_ONLY, LAYERS, BINARIES, SHARED)

EXECUTORCH_OPERATORS = with_dtypes(
    INT8_TOO,
    OperatorConfig(("conv2d", "linear"), Observation.OWN),
    BINARIES,
    OperatorConfig(("batch_norm",), Observation.OWN, forms=modules("BatchNorm2d")),
    OperatorConfig(
        ("adaptive_avg_pool2d", "max_pool2d", "elu", "leaky_relu", *_SHARED_KINDS),
        Observation.SHARED,
        forms=modules("AdaptiveAvgPool2d", "ELU", "Flatten", "Hardtanh", "LeakyReLU", "MaxPool2d", "ReLU6")
        | {f"{F}.{name}" for name in ("adaptive_avg_pool2d", "elu", "hardtanh", "leaky_relu", "leaky_relu_")}
        | {f"{F}.{name}" for name in ("max_pool2d", "relu", "relu6")}
        | {
            f"torch.{name}"
            for name in ("cat", "concat", "concatenate", "clamp", "flatten", "mean", "permute", "squeeze")
        }
        | {f".{name}" for name in _SHARED_METHODS},
    ),
)
