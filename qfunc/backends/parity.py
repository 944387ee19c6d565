"""The reference's backends and their default configurations, for parity.

Only the ways of writing that the reference lists are fused and quantized. Left float, unlike there, are PReLU and what
the vocabulary does not know: layer, group and instance norms, softmax, matmul, embeddings, recurrent layers and more.
Transposed convolutions are quantized as there, and no engine has a kernel for them yet. The reference's bounds on the
scales and ranges of `int8` activations and their weights (qnnpack, executorch) are not checked.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional

from qfunc.backends.fusions import EXECUTORCH_FUSIONS, NATIVE_FUSIONS, ONEDNN_FUSIONS, TENSORRT_FUSIONS
from qfunc.backends.operators import (
    EXECUTORCH_OPERATORS,
    INT8_TOO,
    NATIVE_OPERATORS,
    TENSORRT_OPERATORS,
    with_dtypes,
)
from qfunc.config.backend_config import BackendConfig
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.numerics.observers import Histogram, MinMax, Observer, PerChannelMinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC, INT8_SYMMETRIC_PER_CHANNEL, UINT8, UINT8_REDUCED, QuantSpec

_TRANSPOSED = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
)
_LEAST_SCALE = 2.0**-12


def _mapping(activation: QuantSpec, weight: Observer[Any]) -> QConfigMapping:
    """One configuration for all, but one scale for the weight of a transposed convolution."""
    mapping, per_tensor = QConfigMapping().set_global(QConfig(Histogram(activation), weight)), MinMax(INT8_SYMMETRIC)
    if isinstance(weight, PerChannelMinMax):
        for form in _TRANSPOSED:
            mapping = mapping.set_object_type(form, QConfig(Histogram(activation), per_tensor))
    return mapping


_SEVEN_BITS = _mapping(UINT8_REDUCED, PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL))

NATIVE = BackendConfig("native", NATIVE_FUSIONS, NATIVE_OPERATORS, _SEVEN_BITS)
"""The backend that the reference takes where none is given."""

FBGEMM = BackendConfig("fbgemm", NATIVE_FUSIONS, NATIVE_OPERATORS, _SEVEN_BITS)
"""Server CPUs: activations use 7 bits."""

X86 = BackendConfig("x86", NATIVE_FUSIONS, NATIVE_OPERATORS, _SEVEN_BITS)
"""The reference's default configuration, for server CPUs: activations use 7 bits."""

QNNPACK = BackendConfig(
    "qnnpack", NATIVE_FUSIONS, with_dtypes(INT8_TOO, *NATIVE_OPERATORS), _mapping(UINT8, MinMax(INT8_SYMMETRIC))
)
"""ARM CPUs: activations use 8 bits, weights have one scale."""

ONEDNN = BackendConfig(
    "onednn", ONEDNN_FUSIONS, NATIVE_OPERATORS, _mapping(UINT8, PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL))
)
"""Server CPUs with more fusions: sums behind 2d convolutions, leaky ReLU and tanh behind linear layers. 8 bits."""

TENSORRT = BackendConfig(
    "tensorrt", TENSORRT_FUSIONS, TENSORRT_OPERATORS, _mapping(INT8_SYMMETRIC, MinMax(INT8_SYMMETRIC))
)
"""GPUs: activations are `int8` as well. The reference has no default configuration; this one is symmetric all over."""

EXECUTORCH = BackendConfig(
    "executorch",
    EXECUTORCH_FUSIONS,
    EXECUTORCH_OPERATORS,
    _mapping(
        QuantSpec("int8", -128, 127, eps=_LEAST_SCALE),
        MinMax(QuantSpec("int8", -127, 127, "per_tensor_symmetric", eps=_LEAST_SCALE)),
    ),
)
"""Mobile devices: 2d convolutions and linear layers. The reference has no default configuration; this is the one it has
for XNNPACK: `int8` activations, symmetric weights, no scale below 2^-12."""
