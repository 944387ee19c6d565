"""The reference's default configurations of whole models, by backend, and some for kinds of quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from types import MappingProxyType
from typing import Any

from returns.result import Failure, Success
from torch import nn
from torch.nn import functional

from qfunc.backends import qconfigs
from qfunc.config.qconfig import Choice, QConfig
from qfunc.config.qconfig_mapping import QConfigMapping
from qfunc.errors import UnknownName
from qfunc.numerics.fake_quantize import FakeQuantize
from qfunc.numerics.observers import (
    FixedQParams,
    Histogram,
    MinMax,
    MovingAverageMinMax,
    MovingAveragePerChannelMinMax,
    Observer,
    PerChannelMinMax,
)
from qfunc.numerics.qparams import (
    INT8_NARROW_PER_CHANNEL,
    INT8_SYMMETRIC,
    INT8_SYMMETRIC_PER_CHANNEL,
    UINT8,
    UINT8_REDUCED,
    QuantSpec,
)
from qfunc.numerics.unmeasured import KeepFloat
from qfunc.result import R

TRANSPOSED = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
)
"""The ways of writing transposed convolutions."""
_LAYER_NORMS = (nn.LayerNorm, functional.layer_norm)

_FIXED: tuple[tuple[str, FixedQParams], ...] = (
    *(
        (form, qconfigs.UNIT_RANGE)
        for form in (
            *("torch.nn.Hardsigmoid", "torch.nn.functional.hardsigmoid", ".hardsigmoid", ".hardsigmoid_"),
            *("torch.nn.Sigmoid", "torch.sigmoid", ".sigmoid", ".sigmoid_", "torch.nn.Softmax"),
        )
    ),
    *((form, qconfigs.SIGNED_UNIT_RANGE) for form in ("torch.nn.Tanh", "torch.tanh", ".tanh", ".tanh_")),
)
"""The operators whose range is known beforehand, in the ways of writing that the reference lists."""

_BY_BACKEND: Mapping[str, tuple[QuantSpec, bool]] = MappingProxyType(
    {
        "fbgemm": (UINT8_REDUCED, True),
        "x86": (UINT8_REDUCED, True),
        "qnnpack": (UINT8, False),
        "onednn": (UINT8, True),
    }
)
"""Backend -> the numbers of its activations, and whether weights have a scale per channel."""


def get_default_qconfig_mapping(backend: str = "x86") -> R[QConfigMapping]:
    """The default configuration of one of the reference's backends, for quantization of a trained model.

    Returns:
        The mapping, or `UnknownName` for another backend than "fbgemm", "x86", "qnnpack" and "onednn".

    >>> print(get_default_qconfig_mapping("onednn").unwrap().global_qconfig)
    activation: Histogram uint8 0..255 per_tensor_affine; weight: PerChannelMinMax int8 -128..127 per_channel_symmetric
    """
    return _default(backend, qat=False)


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> R[QConfigMapping]:
    """The default configuration of one of the reference's backends, for training.

    Args:
        backend: "fbgemm", "x86", "qnnpack" or "onednn".
        version: 0 or 1, which rounds in training with the qparams of torch's fused operator: see `FakeQuantize`.

    Returns:
        The mapping, or `UnknownName` for another backend or version.

    >>> get_default_qat_qconfig_mapping("cuda").failure().reason
    "there is no backend with a default configuration 'cuda'"
    """
    if version not in (0, 1):
        return Failure(UnknownName(str(version), "version of the default configuration", ("0", "1")))
    return _default(backend, qat=True, fused=version == 1)


def _default(backend: str, *, qat: bool, fused: bool = False) -> R[QConfigMapping]:
    if not isinstance(backend, str) or backend not in _BY_BACKEND:
        return Failure(UnknownName(str(backend), "backend with a default configuration", tuple(_BY_BACKEND)))
    spec, per_channel = _BY_BACKEND[backend]
    activation, weight, per_tensor = _observers(spec, per_channel=per_channel, qat=qat, fused=fused)
    mapping = _with_types(QConfig(activation, weight), per_tensor, qat=qat)
    transposed = QConfig(activation, per_tensor if backend in ("fbgemm", "x86") else weight)
    for form in TRANSPOSED:
        mapping = mapping.set_object_type(form, transposed)
    return Success(mapping)


def _observers(
    spec: QuantSpec, *, per_channel: bool, qat: bool, fused: bool
) -> tuple[Observer[Any], Observer[Any], Observer[Any]]:
    """Those of activations, of weights, and of weights that can have but one scale."""
    if not qat:
        per_tensor = MinMax(INT8_SYMMETRIC)
        weights = PerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL) if per_channel else per_tensor
        return Histogram(spec), weights, per_tensor
    average = MovingAverageMinMax(INT8_SYMMETRIC)
    channels = MovingAveragePerChannelMinMax(INT8_SYMMETRIC_PER_CHANNEL)
    weight = FakeQuantize(channels if per_channel else average, fused=fused)
    return FakeQuantize(MovingAverageMinMax(spec), fused=fused), weight, FakeQuantize(average)


def _with_types(qconfig: QConfig, per_tensor: Observer[Any], *, qat: bool) -> QConfigMapping:
    """The entries of types that all backends have in common."""
    mapping = (
        QConfigMapping()
        .set_global(qconfig)
        .set_object_type("reshape", qconfigs.DEFAULT_REUSE_INPUT)
        .set_object_type(nn.PReLU, qconfigs.DEFAULT_QUINT8_WEIGHT)
    )
    for form in _LAYER_NORMS:
        mapping = mapping.set_object_type(form, replace(qconfig, weight=KeepFloat()))
    return _with_fixed(mapping, per_tensor, qat=qat)


def _with_fixed(mapping: QConfigMapping, weight: Observer[Any], *, qat: bool) -> QConfigMapping:
    types = mapping.object_types
    for form, fixed in _FIXED:
        types = types.set(form, QConfig(FakeQuantize(fixed) if qat else fixed, weight))
    return replace(mapping, object_types=types)


def symmetric_qnnpack_mapping(*, qat: bool = False) -> QConfigMapping:
    """The reference's configuration for XNNPACK: `int8` activations for all but what has a fixed range."""
    qconfig = qconfigs.DEFAULT_SYMMETRIC_QNNPACK_QAT if qat else qconfigs.DEFAULT_SYMMETRIC_QNNPACK
    types = _default("qnnpack", qat=qat).unwrap().object_types
    for form in types.keys() - dict(_FIXED).keys():
        types = types.set(form, qconfig)
    return QConfigMapping(qconfig, types)


def is_ready_made(form: str, qconfig: Choice) -> bool:
    """Whether an entry by type is one of a default configuration's: meant for any model, whatever it has.

    >>> is_ready_made("torch.nn.Softmax", get_default_qconfig_mapping().unwrap().object_types["torch.nn.Softmax"])
    True
    """
    return (form, qconfig) in _entries_by_type()


@cache
def _entries_by_type() -> frozenset[tuple[str, Choice]]:
    mappings = [symmetric_qnnpack_mapping(qat=qat) for qat in (False, True)]
    kinds = ((False, False), (True, False), (True, True))
    mappings += [_default(backend, qat=qat, fused=fused).unwrap() for backend in _BY_BACKEND for qat, fused in kinds]
    return frozenset(entry for mapping in mappings for entry in mapping.object_types.items())


DYNAMIC = QConfigMapping().set_global(qconfigs.PER_CHANNEL_DYNAMIC)
"""Linear and recurrent layers quantize their inputs as the model runs: no calibration."""

FLOAT16_DYNAMIC = QConfigMapping().set_global(qconfigs.FLOAT16_DYNAMIC)
"""The same layers cast their inputs and weights to float16 as the model runs."""

FLOAT16_STATIC = QConfigMapping().set_global(qconfigs.FLOAT16_STATIC)
"""All values and weights are cast to float16."""

WEIGHT_ONLY = QConfigMapping().set_global(QConfig(KeepFloat(), PerChannelMinMax(INT8_NARROW_PER_CHANNEL)))
"""Only the weights of layers are quantized; all computation is in float."""
