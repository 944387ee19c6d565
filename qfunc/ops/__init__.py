"""The vocabulary of operators: kinds, their signatures, and the written forms of each."""

from qfunc.ops.bind import Bound, bind, canonical_call, emit_target
from qfunc.ops.kind import Form, Kind, Param
from qfunc.ops.names import BY_NAME, FORMS, name_of, resolve, type_name
from qfunc.ops.table import KINDS, WEIGHTED

__all__ = [
    "BY_NAME",
    "FORMS",
    "KINDS",
    "WEIGHTED",
    "Bound",
    "Form",
    "Kind",
    "Param",
    "bind",
    "canonical_call",
    "emit_target",
    "name_of",
    "resolve",
    "type_name",
]
