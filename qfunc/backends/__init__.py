"""Backends as values: qfunc's own `CPU`, the default, and parity values of the reference's.

`qconfigs` are the reference's named configurations of operators, `default_mappings` those of whole models.
"""

from qfunc.backends import qconfigs
from qfunc.backends.cpu import CPU
from qfunc.backends.default_mappings import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from qfunc.backends.parity import EXECUTORCH, FBGEMM, NATIVE, ONEDNN, QNNPACK, TENSORRT, X86

__all__ = [
    "CPU",
    "EXECUTORCH",
    "FBGEMM",
    "NATIVE",
    "ONEDNN",
    "QNNPACK",
    "TENSORRT",
    "X86",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig_mapping",
    "qconfigs",
]
