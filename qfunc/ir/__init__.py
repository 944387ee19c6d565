"""The immutable intermediate representation: values, nodes, graphs; functions that edit, check and print them."""

from qfunc.ir.edit import Draft, fresh_id, users
from qfunc.ir.graph import Graph, ModuleFact, Note, Opaque, Source, Step
from qfunc.ir.node import Node, Origin, PostOp, TensorFact, Written
from qfunc.ir.text import digest, structure_digest, to_text
from qfunc.ir.value import Arg, Body, DictArg, Expression, ListArg, Name, RecordArg, Ref, SliceArg, Token, map_arg, refs
from qfunc.ir.verify import verify

__all__ = [
    "Arg",
    "Body",
    "DictArg",
    "Draft",
    "Expression",
    "Graph",
    "ListArg",
    "ModuleFact",
    "Name",
    "Node",
    "Note",
    "Opaque",
    "Origin",
    "PostOp",
    "RecordArg",
    "Ref",
    "SliceArg",
    "Source",
    "Step",
    "TensorFact",
    "Token",
    "Written",
    "digest",
    "fresh_id",
    "map_arg",
    "refs",
    "structure_digest",
    "to_text",
    "users",
    "verify",
]
