"""Kernels of the user's own, as rows for `lower(kernels=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from pyrsistent import pmap
from returns.result import Failure, Success

from qfunc.config.kernel import Call, Engine, KernelRow, Own, Plan, kernel_node
from qfunc.engines.island import IslandCall, body_of
from qfunc.errors import BadConfig, Problem, UnknownName, UserFunctionFailed, several, told
from qfunc.ir import Graph, Node, Opaque, Token
from qfunc.ops import BY_NAME
from qfunc.result import R

OWN = "own_kernel"
"""The kind of a node that is computed by a kernel of the user's."""

Make: TypeAlias = Callable[[IslandCall], Callable[..., Any]]
"""Makes a kernel for one call of an operator: a module or function from `uint8` codes to `uint8` codes.

What it is given says what to compute: `kind`; `args`, the operator's arguments by name, in which `Ref("0")`,
`Ref("1")` stand for the operands; `posts`, what is fused behind it; `grids`, the qparams (scale, zero point, bounds) of
the operands; and `output`, those of the result."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A call on which a kernel is checked: the shapes of the operands, and the other arguments of the operator.

    `operator` is one of the kernel's; empty for its first. Codes, scales and zero points are chosen by the check; with
    `same_qparams` they are one for all operands and the result, as a `constraint` may ask for.
    """

    shapes: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any] = pmap()
    operator: str = ""
    same_qparams: bool = False


def own_kernel(
    name: str,
    operators: tuple[str, ...],
    make: Make,
    *,
    constraint: Callable[[Call], str] | None = None,
    trials: tuple[Trial, ...] = (),
) -> R[KernelRow]:
    """A kernel of the user's: a row that `lower` and `quantize` try before those of the engine.

    It takes and gives plain `uint8` codes. Its contract is the meaning of the operator: `check_kernels` runs it on each
    trial, and `lower` uses it where it was right within one step. A materialized module can be pickled if what `make`
    gives can: a module, or a function that can be imported.

    Args:
        name: a name with a dot, such as `"mine.hardswish"`; it stands in the certificate.
        operators: what it computes, in the certificate's words: `("hardswish", "add + relu")`.
        make: gives the kernel of one call; it is called when a graph is materialized.
        constraint: why it cannot take a call, or an empty text; may look at the call's `node`, `operands` and `output`.
            Where it raises, `lower` reports `UserFunctionFailed`.
        trials: what to check it on; by default each operator without options, on two shapes.

    Returns:
        The row, or `BadConfig` and `UnknownName` for all that is wrong.

    >>> own_kernel("mine.relu", ("relu",), lambda call: None).unwrap().name
    'mine.relu'
    >>> own_kernel("mine.erfinv", ("erfinv",), lambda call: None).failure().what
    'operator'
    """
    problems = list(_wrong(name, operators, make, constraint, trials))
    if problems:
        return Failure(several(problems))
    kinds = tuple(dict.fromkeys(operator.partition(" + ")[0] for operator in operators))
    tried = trials or tuple(trial for operator in operators for trial in _plain_trials(operator))
    return Success(KernelRow(name, kinds, _Plan(name, operators, constraint), own=Own(make, operators, tried)))


def _plain_trials(operator: str) -> tuple[Trial, ...]:
    head, *posts = operator.split(" + ")
    count = len(BY_NAME[head].tensors) + sum(len(BY_NAME[post].tensors) - 1 for post in posts)
    if BY_NAME[head].tensors == ("tensors",):
        count += 1
    return tuple(Trial((shape,) * count, operator=operator) for shape in ((2, 5, 7, 6), (3, 16)))


class OwnKernelError(Exception):
    """A function of the user's that is asked for a kernel raised, or gave what it may not."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a call becomes the node of a kernel of the user's."""

    name: str
    operators: tuple[str, ...]
    constraint: Callable[[Call], str] | None

    def __call__(self, call: Call) -> Plan:
        """The node, or why the kernel cannot take the call."""
        operator = " + ".join((call.node.kind, *(post.kind for post in call.node.post)))
        if operator not in self.operators:
            return f"it computes {' and '.join(self.operators)}"
        grids = [operand.affine for operands in call.operands.values() for operand in operands]
        if call.output is None:
            return "the result is read in float"
        if any(grid.dtype != "uint8" for grid in (*grids, call.output)):
            return "it takes and gives uint8 activations"
        declined = self._declined(call)
        if declined:
            return declined
        body, inputs = body_of(call)
        if len(inputs) != len(grids):
            return "an option is computed by the graph"
        return kernel_node(call, OWN, inputs, call=body, make=_token(self.name))

    def _declined(self, call: Call) -> str:
        """Why the user's constraint does not let it take the call; empty where it does."""
        if self.constraint is None:
            return ""
        reason = _asked(self.constraint, call, f"the constraint of {self.name}", (str, type(None)), "a text")
        return reason or ""


def guarded(kernels: tuple[KernelRow, ...]) -> tuple[KernelRow, ...]:
    """Rows given to `lower`, of which plans that the user wrote fail with an `OwnKernelError` alone."""
    return tuple(row if isinstance(row.plan, _Plan) else replace(row, plan=_Guarded(row)) for row in kernels)


@dataclass(frozen=True, slots=True)
class _Guarded:
    """How a call becomes a node by a plan that the user wrote."""

    row: KernelRow

    def __call__(self, call: Call) -> Plan:
        """What the plan gives."""
        planned: Plan = _asked(self.row.plan, call, f"the plan of {self.row.name}", (Node, str), "a node or a reason")
        return planned


def _asked(function: Callable[[Call], Any], call: Call, whose: str, expected: tuple[type, ...], what: str) -> Any:
    """What a function of the user's gives for a call, where it is what it should be."""
    place = call.node.place
    try:
        given = function(call)
    except Exception as error:
        raise OwnKernelError(UserFunctionFailed(place, f"{whose} raised {told(error)}")) from error
    if not isinstance(given, expected):
        raise OwnKernelError(UserFunctionFailed(place, f"{whose} gave {given!r}, not {what}"))
    return given


def _token(name: str) -> Token:
    return Token(f"kernel:{name}")


def is_own(node: Node) -> bool:
    """Whether a kernel of the user's computes a node."""
    return node.kind == OWN


def objects_of(graph: Graph, kernels: tuple[KernelRow, ...]) -> Graph:
    """The graph with the functions that make its kernels of the user's."""
    used = {token.id for node in graph if is_own(node) and isinstance(token := node.get("make"), Token)}
    made = {_token(row.name).id: Opaque(row.own.make) for row in kernels if row.own is not None}
    found = {id: made[id] for id in used if id in made}
    return replace(graph, objects=graph.objects.update(found)) if found else graph


def misplaced(kernels: tuple[KernelRow, ...], engine: Engine) -> list[Problem]:
    """What keeps kernels of the user's from an engine."""
    own = [row for row in kernels if row.own is not None]
    names = [row.name for row in own]
    problems: list[Problem] = []
    if own and engine.conversions:
        reason = f"{names[0]} takes plain codes, and engine {engine.name!r} passes quantized tensors"
        problems.append(BadConfig("kernels", reason, "lower with engine='onednn'"))
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    remedy = "give each a name of its own"
    return [*problems, *(BadConfig("kernels", f"there are several called {name!r}", remedy) for name in twice)]


def _wrong(name: object, operators: object, make: object, constraint: object, trials: object) -> list[Problem]:
    problems: list[Problem] = []
    if not isinstance(name, str) or "." not in name.strip("."):
        problems.append(BadConfig("name", f"{name!r} is no name with a dot", "pass one such as 'mine.hardswish'"))
    elif name.partition(".")[0] in _TAKEN:
        problems.append(BadConfig("name", f"{name!r} begins as qfunc's own do", "begin with a word of your own"))
    if not isinstance(operators, tuple) or not operators or not all(isinstance(o, str) for o in operators):
        problems.append(BadConfig("operators", "expected a tuple of str", "pass one such as ('hardswish',)"))
    else:
        kinds = [kind for operator in operators for kind in operator.split(" + ")]
        problems += [UnknownName(kind, "operator", tuple(BY_NAME)) for kind in kinds if kind not in BY_NAME]
        weighted = [kind for kind in kinds if kind in BY_NAME and BY_NAME[kind].weights]
        remedy = "leave it to qfunc's kernels"
        problems += [BadConfig("operators", f"{kind} has weights", remedy) for kind in weighted]
    if not callable(make):
        problems.append(BadConfig("make", "expected a function", "pass a function from a call to its kernel"))
    if constraint is not None and not callable(constraint):
        problems.append(BadConfig("constraint", "expected a function", "pass one from a call to a reason, or None"))
    if not isinstance(trials, tuple) or not all(isinstance(trial, Trial) for trial in trials):
        problems.append(BadConfig("trials", "expected a tuple of Trial", "pass one such as (Trial(((2, 3),)),)"))
    elif not all(isinstance(trial.operator, str) for trial in trials):
        problems.append(BadConfig("trials", "the operator of a Trial is a str", "pass one of the kernel's operators"))
    elif isinstance(operators, tuple):
        wrong = [t.operator for t in trials if t.operator and t.operator not in operators]
        problems += [UnknownName(operator, "operator", operators) for operator in wrong]
    return problems


_TAKEN = ("onednn", "quantized", "codes")
