"""The reference's named configurations of single operators, as values: `default_dynamic_qconfig` is `DEFAULT_DYNAMIC`.

Those for training wrap the observers of what trains in `FakeQuantize`. Inputs that are quantized as the model runs are
`Dynamic` for training as well, and what needs no observer is a `Cast` or `KeepFloat`.
"""

from __future__ import annotations

from qfunc.backends.dtypes import LEAST_SCALE
from qfunc.config.qconfig import QConfig
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import (
    FixedQParams,
    Histogram,
    MinMax,
    MovingAverageMinMax,
    MovingAveragePerChannelMinMax,
    PerChannelMinMax,
)
from qfunc.numerics.qparams import (
    INT8_SYMMETRIC,
    INT8_SYMMETRIC_PER_CHANNEL,
    UINT4_FLOAT_QPARAMS,
    UINT8,
    UINT8_FLOAT_QPARAMS,
    UINT8_REDUCED,
    QuantSpec,
)
from qfunc.numerics.unmeasured import Cast, Dynamic, KeepFloat, ReuseInput

UNIT_RANGE = FixedQParams(UINT8, 1 / 256, 0)
"""Of results from 0 to 1, such as a sigmoid's."""

SIGNED_UNIT_RANGE = FixedQParams(UINT8, 2 / 256, 128)
"""Of results from -1 to 1, such as a tanh's."""

_WEIGHT, _WEIGHTS = MinMax(INT8_SYMMETRIC), PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
_TRAINED_WEIGHT = FakeQuantize(MovingAverageMinMax(INT8_SYMMETRIC))
_TRAINED = FakeQuantize(MovingAverageMinMax(UINT8_REDUCED))

DEFAULT = QConfig(MinMax(UINT8_REDUCED), _WEIGHT)
DEFAULT_PER_CHANNEL = QConfig(MinMax(UINT8_REDUCED), _WEIGHTS)
DEFAULT_QUINT8_WEIGHT = QConfig(Histogram(UINT8), MinMax(UINT8))
"""Of a PReLU, whose slopes are quantized like activations."""

DEFAULT_DYNAMIC = QConfig(Dynamic(UINT8), _WEIGHT)
PER_CHANNEL_DYNAMIC = QConfig(Dynamic(UINT8), _WEIGHTS)
FLOAT16_DYNAMIC = QConfig(Cast("float16", dynamic=True), Cast("float16"))
FLOAT16_STATIC = QConfig(Cast("float16"), Cast("float16"))

FLOAT_QPARAMS_WEIGHT_ONLY = QConfig(KeepFloat(), PerChannelMinMax(UINT8_FLOAT_QPARAMS))
"""Of embeddings: a range per row, whose zero point is no integer."""

FLOAT_QPARAMS_WEIGHT_ONLY_4BIT = QConfig(KeepFloat(), PerChannelMinMax(UINT4_FLOAT_QPARAMS))
DEFAULT_WEIGHT_ONLY = QConfig(KeepFloat(), _TRAINED_WEIGHT)
DEFAULT_ACTIVATION_ONLY = QConfig(_TRAINED, KeepFloat())
DEFAULT_REUSE_INPUT = QConfig(ReuseInput(), KeepFloat())
"""Of what only rearranges its input."""

DEFAULT_QAT = QConfig(_TRAINED, _TRAINED_WEIGHT)
DEFAULT_QAT_V2 = QConfig(
    FakeQuantize(MovingAverageMinMax(UINT8), fused=True), FakeQuantize(MovingAverageMinMax(INT8_SYMMETRIC), fused=True)
)
DEFAULT_DYNAMIC_QAT = QConfig(Dynamic(UINT8), _TRAINED_WEIGHT)
DEFAULT_EMBEDDING_QAT = QConfig(KeepFloat(), FakeQuantize(MovingAveragePerChannelMinMax(UINT8_FLOAT_QPARAMS, 1.0)))
DEFAULT_EMBEDDING_QAT_4BIT = QConfig(KeepFloat(), FakeQuantize(MovingAveragePerChannelMinMax(UINT4_FLOAT_QPARAMS, 1.0)))

_XNNPACK = QuantSpec("int8", -128, 127, eps=LEAST_SCALE)
_XNNPACK_WEIGHT = QuantSpec("int8", -127, 127, "per_tensor_symmetric", eps=LEAST_SCALE)
_XNNPACK_WEIGHTS = QuantSpec("int8", -127, 127, "per_channel_symmetric", 0, LEAST_SCALE)
_TRAINED_XNNPACK = FakeQuantize(MovingAverageMinMax(_XNNPACK), fused=True)

DEFAULT_SYMMETRIC_QNNPACK = QConfig(Histogram(_XNNPACK), MinMax(_XNNPACK_WEIGHT))
"""Of XNNPACK's kernels: `int8` activations, symmetric weights, no scale below 2^-12."""

DEFAULT_PER_CHANNEL_SYMMETRIC_QNNPACK = QConfig(Histogram(_XNNPACK), PerChannelMinMax(_XNNPACK_WEIGHTS))
DEFAULT_SYMMETRIC_QNNPACK_QAT = QConfig(
    _TRAINED_XNNPACK, FakeQuantize(MovingAverageMinMax(_XNNPACK_WEIGHT), fused=True)
)
DEFAULT_PER_CHANNEL_SYMMETRIC_QNNPACK_QAT = QConfig(
    _TRAINED_XNNPACK, FakeQuantize(MovingAveragePerChannelMinMax(_XNNPACK_WEIGHTS), fused=True)
)
