"""The combinations of dtypes that operators of the reference's backends take, by what they are for."""

from __future__ import annotations

from dataclasses import replace

from qfunc.config.dtype_config import DTypeConfig, DTypeWithConstraints

LEAST_SCALE = 2.0**-12
"""XNNPACK's: with smaller scales its requantization underflows."""

LAYER = DTypeConfig("uint8", "uint8", "int8", "float32")
"""Layers with weights."""

PLAIN = DTypeConfig("uint8", "uint8", None)
"""Operators without weights."""

FLOAT_WEIGHT = DTypeConfig("uint8", "uint8", "float32", "float32")
"""Layer norms, whose kernel takes float weights."""

INT8_LAYER = DTypeConfig("int8", "int8", "int8", "float32")
INT8_PLAIN = DTypeConfig("int8", "int8", None)

DYNAMIC_INT8 = DTypeConfig("uint8", "float32", "int8", "float32", is_dynamic=True)
DYNAMIC_SIGNED = DTypeConfig("int8", "float32", "int8", "float32", is_dynamic=True)
DYNAMIC_FLOAT16 = DTypeConfig("float16", "float32", "float16", "float32", is_dynamic=True)
STATIC_FLOAT16 = DTypeConfig("float16", "float16", "float16", "float16")
PLAIN_FLOAT16 = DTypeConfig("float16", "float16", None)

WEIGHT_UINT8 = DTypeConfig("float32", "float32", "uint8")
WEIGHT_UINT4 = DTypeConfig("float32", "float32", "uint4")
WEIGHT_INT8 = DTypeConfig("float32", "float32", "int8")

_XNNPACK_VALUE = DTypeWithConstraints("int8", scale_min_lower_bound=LEAST_SCALE)
_XNNPACK_WEIGHT = DTypeWithConstraints("int8", -127, 127, scale_min_lower_bound=LEAST_SCALE)

XNNPACK_LAYER = DTypeConfig(_XNNPACK_VALUE, _XNNPACK_VALUE, _XNNPACK_WEIGHT, "float32")
XNNPACK_PLAIN = DTypeConfig(_XNNPACK_VALUE, _XNNPACK_VALUE, None)
XNNPACK_DYNAMIC = DTypeConfig(_XNNPACK_VALUE, "float32", _XNNPACK_WEIGHT, "float32", is_dynamic=True)


def with_fixed_output(dtypes: tuple[DTypeConfig, ...], scale: float, zero_point: int) -> tuple[DTypeConfig, ...]:
    """Combinations whose `uint8` results must have just these qparams; other dtypes are as they were.

    The reference asks the same of the operand, where it is wrong: a sigmoid's input is not between 0 and 1.

    >>> with_fixed_output((PLAIN,), 1 / 256, 0)[0].output_dtype.scale_exact_match
    0.00390625
    """
    value = DTypeWithConstraints("uint8", 0, 255)
    result = replace(value, scale_exact_match=scale, zero_point_exact_match=zero_point)
    return tuple(
        replace(one, input_dtype=value, output_dtype=result) if one.output_dtype == "uint8" else one for one in dtypes
    )
