"""Backends as values: qfunc's own `CPU`, the default, and parity values of the reference's."""

from qfunc.backends.cpu import CPU
from qfunc.backends.x86 import X86

__all__ = ["CPU", "X86"]
