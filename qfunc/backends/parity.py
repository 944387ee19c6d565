"""The reference's backends and their default configurations, for parity.

Only the ways of writing that the reference lists are fused and quantized, with the dtypes and bounds that it lists.
Much of that no engine has a kernel for: transposed convolutions, norms, recurrent layers and more are computed in float
between quantized values, as in the reference.
"""

from __future__ import annotations

from qfunc.backends.default_mappings import get_default_qconfig_mapping, symmetric_qnnpack_mapping
from qfunc.backends.fusions import EXECUTORCH_FUSIONS, NATIVE_FUSIONS, ONEDNN_FUSIONS, TENSORRT_FUSIONS
from qfunc.backends.operators import (
    EXECUTORCH_OPERATORS,
    FBGEMM_OPERATORS,
    NATIVE_OPERATORS,
    ONEDNN_OPERATORS,
    QNNPACK_OPERATORS,
    TENSORRT_OPERATORS,
    X86_OPERATORS,
)
from qfunc.config.backend_config import BackendConfig
from qfunc.config.qconfig import QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.numerics.observers import Histogram, MinMax
from qfunc.numerics.qparams import INT8_SYMMETRIC

_SEVEN_BITS = get_default_qconfig_mapping("x86").unwrap()

NATIVE = BackendConfig("native", NATIVE_FUSIONS, NATIVE_OPERATORS, _SEVEN_BITS)
"""The backend that the reference takes where none is given."""

FBGEMM = BackendConfig("fbgemm", NATIVE_FUSIONS, FBGEMM_OPERATORS, _SEVEN_BITS)
"""Server CPUs: activations use 7 bits."""

X86 = BackendConfig("x86", NATIVE_FUSIONS, X86_OPERATORS, _SEVEN_BITS)
"""The reference's default configuration, for server CPUs: activations use 7 bits."""

QNNPACK = BackendConfig("qnnpack", NATIVE_FUSIONS, QNNPACK_OPERATORS, get_default_qconfig_mapping("qnnpack").unwrap())
"""ARM CPUs: activations use 8 bits, weights have one scale."""

ONEDNN = BackendConfig("onednn", ONEDNN_FUSIONS, ONEDNN_OPERATORS, get_default_qconfig_mapping("onednn").unwrap())
"""Server CPUs with more fusions: sums behind 2d convolutions, leaky ReLU and tanh behind linear layers. 8 bits."""

TENSORRT = BackendConfig(
    "tensorrt",
    TENSORRT_FUSIONS,
    TENSORRT_OPERATORS,
    QConfigMapping().set_global(QConfig(Histogram(INT8_SYMMETRIC), MinMax(INT8_SYMMETRIC))),
)
"""GPUs: activations are `int8` as well. The reference has no default configuration; this one is symmetric all over."""

EXECUTORCH = BackendConfig("executorch", EXECUTORCH_FUSIONS, EXECUTORCH_OPERATORS, symmetric_qnnpack_mapping())
"""Mobile devices: 2d convolutions and linear layers. The reference has no default configuration; this is the one it has
for XNNPACK: `int8` activations, symmetric weights, no scale below 2^-12."""
