"""Graphs as values: equality, invariants, text and digest."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyrsistent import pmap
from torch import nn

from qfunc.edge.trace import trace
from qfunc.errors import InvalidGraph, problems
from qfunc.ir import (
    DictArg,
    Graph,
    ListArg,
    Name,
    Node,
    Note,
    Opaque,
    RecordArg,
    Ref,
    SliceArg,
    Step,
    Token,
    digest,
    map_arg,
    refs,
    to_text,
    users,
    verify,
)
from qfunc.result import unwrap
from tests.zoo import ZOO

ROOT = Path(__file__).resolve().parents[2]


def graph(*nodes: Node) -> Graph:
    return Graph(pmap({node.id: node for node in nodes}), tuple(node.id for node in nodes))


X = Node("x", "placeholder")
Y = Node("y", "relu", (("input", Ref("x")),))
OUT = Node("out", "output", (("value", (Ref("y"), Ref("x"))),))
GOOD = graph(X, Y, OUT)


def test_equality_looks_at_meaning() -> None:
    assert graph(X, Y, OUT) == GOOD
    assert replace(GOOD, notes=(Note("x", "?"),), history=(Step("a", "", "", ""),)) == GOOD
    assert replace(GOOD, training=True) != GOOD
    assert replace(GOOD, order=("y", "x", "out")) != GOOD
    assert graph(X, replace(Y, kind="tanh"), OUT) != GOOD
    with pytest.raises(TypeError):
        hash(GOOD)


def test_traces_of_one_model_are_equal_until_it_changes() -> None:
    model, twin = nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2))
    first = unwrap(trace(model))
    assert unwrap(trace(model)) == first
    assert unwrap(trace(twin)) != first
    with torch.no_grad():
        model[0].weight.add_(1)
    assert unwrap(trace(model)) != first
    assert digest(unwrap(trace(model))) == digest(first) == digest(unwrap(trace(twin)))


BROKEN = {
    "unlisted": (replace(GOOD, order=("x", "out")), "each node exactly once"),
    "listed twice": (replace(GOOD, order=("x", "y", "y", "out")), "each node exactly once"),
    "listed without being there": (replace(GOOD, order=("x", "y", "z", "out")), "each node exactly once"),
    "other id": (replace(GOOD, nodes=GOOD.nodes.set("y", replace(Y, id="z"))), "another id"),
    "used before": (replace(GOOD, order=("y", "x", "out")), "before its definition"),
    "used by itself": (graph(X, replace(Y, args=(("input", Ref("y")),)), OUT), "before its definition"),
    "undefined": (graph(X, replace(Y, args=(("input", ListArg((Ref("z"),))),)), OUT), "'z' before its definition"),
    "no output": (graph(X, Y), "exactly one output"),
    "two outputs": (graph(X, Y, OUT, replace(OUT, id="out2")), "exactly one output"),
    "output in between": (graph(X, replace(OUT, args=(("value", Ref("x")),)), Y), "exactly one output"),
    "no object": (graph(X, replace(Y, args=(("input", Ref("x")), ("f", (Token("object_0"),)))), OUT), "not there"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_verify_tells_what_is_broken(name: str) -> None:
    broken, says = BROKEN[name]
    found = problems(verify(broken).failure())
    assert all(isinstance(problem, InvalidGraph) for problem in found)
    assert any(says in problem.reason for problem in found)


def test_verify_passes_what_is_well_formed() -> None:
    assert unwrap(verify(GOOD)) is GOOD
    with_object = replace(
        graph(X, replace(Y, args=(("input", Ref("x")), ("f", Token("o")))), OUT), objects=pmap({"o": Opaque(1)})
    )
    assert unwrap(verify(with_object)) is with_object


def test_verify_tells_all_at_once() -> None:
    broken = graph(replace(Y, args=(("input", Ref("a")), ("other", Ref("b")))))
    assert len(problems(verify(broken).failure())) == 3


def test_users_and_refs() -> None:
    assert users(GOOD) == {"x": ("y", "out"), "y": ("out",), "out": ()}
    value = (
        ListArg((Ref("a"), 1)),
        DictArg((("k", Ref("b")),)),
        SliceArg(None, Ref("c"), 2),
        RecordArg(Name("P"), (Ref("a"),)),
    )
    assert list(refs(value)) == ["a", "b", "c", "a"]
    assert map_arg(value, lambda leaf: leaf) is value
    assert list(refs(map_arg(value, lambda leaf: Ref("z") if leaf == Ref("c") else leaf))) == ["a", "b", "z", "a"]


def test_text_is_for_reading() -> None:
    assert to_text(replace(GOOD, title="Net")) == (
        "graph Net\n  %x = placeholder()\n  %y = relu(input=%x)\n  %out = output(value=(%y, %x))"
    )


DIGESTS = """
from tests.zoo import ZOO
from qfunc.edge.trace import trace
from qfunc.ir import digest
for case in ZOO:
    model, inputs = case.build()
    print(case.name, digest(trace(model, inputs).unwrap()))
"""


def test_digests_do_not_depend_on_the_hash_seed() -> None:
    outputs = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-c", DIGESTS]
        outputs.add(
            subprocess.run(command, env=environment, check=True, cwd=ROOT, capture_output=True, text=True).stdout
        )
    (text,) = outputs
    assert len(text.splitlines()) == len(ZOO)
