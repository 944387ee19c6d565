"""Backends as values: qfunc's own `CPU`, the default, and parity values of the reference's."""

from qfunc.backends.cpu import CPU
from qfunc.backends.parity import EXECUTORCH, FBGEMM, NATIVE, ONEDNN, QNNPACK, TENSORRT, X86

__all__ = ["CPU", "EXECUTORCH", "FBGEMM", "NATIVE", "ONEDNN", "QNNPACK", "TENSORRT", "X86"]
