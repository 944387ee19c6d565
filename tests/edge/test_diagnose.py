"""Every cause is met by a module that has it; where the case names a cure, the cure is what the remedy says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

from qfunc.edge.diagnose import diagnose
from qfunc.errors import Untraceable, render


@dataclass(frozen=True)
class Case:
    forward: Callable[..., Any]
    cause: str
    remedy: str
    cure: Callable[..., Any] | None = None
    concrete_args: Mapping[str, Any] = field(default_factory=dict)


CASES: dict[str, Case] = {}


def case(cause: str, remedy: str, cure: Callable[..., Any] | None = None, **concrete_args: Any) -> Callable[..., Any]:
    """Register the decorated forward; the line that fails in it is marked `# here`."""

    def register(forward: Callable[..., Any]) -> Callable[..., Any]:
        CASES[forward.__name__] = Case(forward, cause, remedy, cure, concrete_args)
        return forward

    return register


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.hidden = [nn.Linear(3, 3)]
        self.steps = 3


def module(forward: Callable[..., Any]) -> nn.Module:
    return type("Model", (Base,), {"forward": forward})()


class Tracer(fx.Tracer):
    def __init__(self, leaves: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or super().is_leaf_module(m, module_qualified_name)


def verdict(root: nn.Module) -> Untraceable:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - any exception at all is diagnosed
        Tracer().trace(root)
    return diagnose(caught.value, root)


def line_of(function: Callable[..., Any], mark: str = "# here") -> tuple[int, str]:
    lines, start = inspect.getsourcelines(function)
    return next((start + i, line.strip()) for i, line in enumerate(lines) if mark in line)


# --- control flow


@case("a tensor's values", "torch.where", lambda self, x: torch.where(x.sum() > 0, x, -x))
def branch(self, x):
    if x.sum() > 0:  # here
        return x
    return -x


@case("a tensor's values", "torch.where")
def branch_in_expression(self, x):
    y = x + 1
    return (
        y
        if y.max() > 1  # here
        else torch.relu(y)
    )


@case("a tensor's values", "non_traceable_names")
def while_loop(self, x):
    while x.sum() < 3:  # here
        x = x + 1
    return x


@case("a tensor's values", "torch.where")
def branch_on_item(self, x):
    if x.sum().item() > 3:  # here
        return x
    return -x


@case("a shape", "__init__", lambda self, x: x if self.steps == 3 else -x)
def branch_on_shape(self, x):
    if x.shape[0] == x.size(1) * 2:  # here
        return x
    return -x


@case("a dtype or a device", "x.to(dtype)", lambda self, x: x.to(torch.float32))
def branch_on_dtype(self, x):
    if x.dtype == torch.float16:  # here
        return x.float()
    return x


@case("the input 'flag'", "concrete_args={'flag'", flag=True)
def branch_on_flag(self, x, flag):
    return x if flag else -x  # here


@case("the input 'mode'", "concrete_args={'mode'", mode="sum")
def branch_on_mode(self, x, mode="sum"):
    if mode == "sum":  # here
        return x.sum()
    return x


def checked(self, x):
    torch._assert(x.sum() > 0, "must be positive")
    return x


@case("an assert on a traced value", "torch._assert", checked)
def asserts(self, x):
    assert x.sum() > 0  # here
    return x


@case("bool() of a traced value", "torch.where")
def to_bool(self, x):
    return bool(x.any())  # here


@case("`in` on a traced value", "(x == value).any()", lambda self, x: (x == 3).any())
def contains(self, x):
    return 3 in x  # here


@case("`in` on a traced value", "non_traceable_names")
def contained(self, x):
    return x if x.dtype in (torch.float16, torch.float32) else -x  # here


@case("max(), min()", "torch.sym_max", lambda self, x: x * torch.sym_max(x.size(0), 3))
def builtin_max(self, x):
    return x * max(x.size(0), 3)  # here


def endless(x, n):
    return endless(x, n - 1) + x if n is not None else x  # here


@case("recursion without an end", "plain number")
def recursion(self, x):
    return endless(x, x.size(0))


# --- lengths and iteration


@case("len() of a traced value", "x.shape[0]", lambda self, x: x / x.shape[0])
def length(self, x):
    return x / len(x)  # here


@case("forward's *xs arguments", "one named parameter", lambda self, a, b: a + b)
def variadic(self, *xs):
    return sum(xs)  # here


@case("forward's *xs arguments", "constants", lambda self, *xs: xs[0] + xs[1])
def variadic_length(self, *xs):
    return xs[0] / len(xs)  # here


@case("forward's **named arguments", "kwargs['a']", lambda self, **named: named["a"] + named["b"])
def variadic_keywords(self, **named):
    return sum(named.values())  # here


@case("iterating over a traced value", "a, b = x.unbind(0)", lambda self, x: [r * 2 for r in (x[0], x[1])])
def iterate(self, x):
    return [row * 2 for row in x]  # here


@case("iterating over a traced value", "x.sum(0)", lambda self, x: x.sum(0))
def builtin_sum(self, x):
    return sum(x)  # here


@case("depends on the data", "torch.where")
def iterate_data(self, x):
    for index in torch.nonzero(x):  # here
        x = x + index
    return x


@case("starred target", "x.shape[1:]", lambda self, x: x.reshape(x.shape[0], x.shape[1:][0]))
def starred_target(self, x):
    batch, *rest = x.shape  # here
    return x.reshape(batch, rest[0])


@case("*unpacking or **unpacking", "torch.zeros(x.shape)", lambda self, x: torch.zeros(x.shape) + x)
def starred_argument(self, x):
    return torch.zeros(*x.shape) + x  # here


@case("*unpacking or **unpacking", "f(a=x['a'])", lambda self, x: torch.add(input=x["a"], other=x["b"]))
def unpacked_keywords(self, x):
    return torch.add(**x)  # here


@case("dict() of a traced value", "by its keys", lambda self, x: x["a"])
def to_dict(self, x):
    return dict(x)["a"]  # here


def repeated(self, x):
    y = x[0]
    for i in range(1, self.steps):
        y = y + x[i]
    return y


@case("range() of a traced value", "range(self.steps)", repeated)
def counted(self, x):
    y = 0
    for i in range(x.size(0)):  # here
        y = y + x[i]
    return y


@case("range() of a traced value", "concrete_args={'steps'", steps=2)
def counted_input(self, x, steps):
    for _ in range(steps):  # here
        x = x + 1
    return x


# --- conversions


@case("int(), float()", "x.long()", lambda self, x: x * x.sum().long())
def to_int(self, x):
    return x * int(x.sum())  # here


@case("int(), float()", "concrete_args={'scale'", scale="2")
def to_float(self, x, scale):
    return x * float(scale)  # here


@case(".tolist()", "stay with tensors", lambda self, x: x * 2)
def to_list(self, x):
    return [v * 2 for v in x.tolist()]  # here


@case("rounding", "torch.round", lambda self, x: torch.round(x))
def rounds(self, x):
    return round(x)  # here


@case("as an index", "torch.stack", lambda self, x: torch.stack([x, -x])[x.size(0)])
def list_index(self, x):
    return [x, -x][x.size(0)]  # here


@case("as an index, a key", "non_traceable_names")
def dict_key(self, x):
    return {1: x, 2: -x}[x.size(0)]  # here


@case("formatting a traced value", "remove the text", lambda self, x: x)
def formats(self, x):
    name = f"{x.sum():.2f}"  # here
    return x, name


@case("NumPy", "torch.exp", lambda self, x: torch.exp(x))
def numpy_function(self, x):
    return np.exp(x)  # here


@case("NumPy", "torch function")
def numpy_round_trip(self, x):
    return torch.from_numpy(x.numpy())  # here


@case("a tensor built from a traced value", "x.clone()", lambda self, x: x.clone())
def rebuilt(self, x):
    return torch.tensor(x)  # here


@case("separate sizes", "torch.zeros((x.size(0), 3))", lambda self, x: torch.zeros((x.size(0), 3)))
def separate_sizes(self, x):
    return torch.zeros(x.size(0), 3)  # here


# --- writing


@case("assignment into a traced tensor", "x.index_fill", lambda self, x: x.index_fill(0, torch.tensor([0]), 0))
def item_assignment(self, x):
    x[0] = 0  # here
    return x


@case("to a parameter", "torch.nn.functional.linear", lambda self, x: nn.functional.linear(x, self.fc.weight * 2))
def parameter_assignment(self, x):
    self.fc.weight = self.fc.weight * 2  # here
    return self.fc(x)


# --- calls


@case("check of types", "isinstance(x, (list, tuple))", lambda self, x: x)
def type_check(self, x):
    if not isinstance(x, torch.Tensor):
        raise TypeError("expected a tensor")  # here
    return x


@case("check of types", "where the model is called")
def type_assert(self, x):
    assert torch.is_tensor(x)  # here
    return x


@case("not registered in the model", "nn.ModuleList")
def unregistered(self, x):
    return self.hidden[0](x)  # here


@case("a graph cannot hold", "tensors, numbers")
def odd_argument(self, x):
    return nn.functional.relu(x, inplace=object())  # here


@case("takes no traced value", "torch function")
def c_function(self, x):
    return "".join([x])  # here


# --- ordinary errors


@case("AttributeError: 'Model' object has no attribute 'nope'", "mend the model")
def missing_attribute(self, x):
    return self.nope(x)  # here


@case("ZeroDivisionError: division by zero", "mend the model")
def division(self, x):
    return x * (1 / 0)  # here


@case("ValueError: {not} supported", "mend the model")
def raises(self, x):
    raise ValueError("{not} supported")  # here


@case("a tensor's values", "torch.where")
def hidden(self, x):
    try:
        return x if x.sum() > 0 else -x  # here
    except ValueError as error:
        raise RuntimeError("cannot run") from error


@pytest.mark.parametrize("name", CASES)
def test_a_cause_is_named_at_its_line(name):
    case = CASES[name]
    found = verdict(module(case.forward))
    line, source = line_of(endless if name == "recursion" else case.forward)
    assert (found.node, found.source) == (f"{Path(__file__).name}:{line}", source)
    assert case.cause in found.cause
    assert case.remedy in found.remedy
    assert "{" not in found.remedy.replace("concrete_args={", "").replace("f'{x}'", "")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.cure is not None])
def test_the_remedy_traces(name):
    Tracer().trace(module(CASES[name].cure))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.concrete_args])
def test_concrete_args_trace(name):
    Tracer().trace(module(CASES[name].forward), concrete_args=dict(CASES[name].concrete_args))


class Gate(nn.Module):
    def forward(self, x):
        return gated(x)


def gated(x):
    return x if x.sum() > 0 else -x  # here


class Nested(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), inner)

    def forward(self, x):
        return self.layers(x)


def test_a_submodule_is_named_and_tracing_goes_on_with_it_as_a_leaf():
    root = Nested(Gate())
    found = verdict(root)
    line, source = line_of(gated)
    assert (found.node, found.source) == (f"layers.1 at {Path(__file__).name}:{line}", source)
    assert "'layers.1'" in found.remedy
    assert "torch.fx.wrap('gated')" in found.remedy
    assert [n.target for n in Tracer(leaves=("layers.1",)).trace(root).nodes if n.op == "call_module"] == [
        "layers.0",
        "layers.1",
    ]


def test_a_wrapped_function_traces(monkeypatch):
    # what fx.wrap("gated") at the top of this file would add, without leaving it there for the other tests
    key = (id(globals()), "gated")
    monkeypatch.setitem(fx._symbolic_trace._wrapped_fns_to_patch, key, globals())
    assert any(n.target is gated for n in Tracer().trace(Nested(Gate())).nodes)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_compiled_parts():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    assert "ScriptModule" in verdict(scripted).cause
    Tracer(leaves=("layers.1",)).trace(Nested(scripted))

    double = torch.jit.script(plain_double)
    found = verdict(module(lambda self, x: double(x)))
    assert "torch.jit.script function" in found.cause
    Tracer().trace(module(lambda self, x: plain_double(x)))

    compiled = torch.compile(nn.Sequential(nn.Linear(3, 3)), backend="eager")
    found = verdict(Nested(compiled))
    assert "torch.compile" in found.cause
    assert "_orig_mod" in found.remedy
    Tracer().trace(Nested(compiled._orig_mod))
    Tracer(leaves=("layers.1",)).trace(Nested(compiled))


def plain_double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def test_without_a_running_line_the_place_is_forward():
    def returns_a_set(self, x):
        return {1, 2}

    found = verdict(module(returns_a_set))
    assert found.node == f"{Path(__file__).name}:{returns_a_set.__code__.co_firstlineno}"
    assert "an output that a graph cannot hold" in found.cause

    assert verdict(nn.Module()).node == "Module"
    assert "without a forward" in verdict(nn.Module()).cause


def test_an_error_without_traceback_or_source():
    found = diagnose(ValueError("no trace of it"), Gate())
    assert "ValueError: no trace of it" in found.cause

    space: dict[str, Any] = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x if x.sum() > 0 else -x\n", space)
    found = verdict(space["Typed"]())
    assert (found.node, found.source) == ("<string>:3", "")
    assert "a tensor's values" in found.cause


def test_deep_graphs_are_read_in_linear_time():
    def forward(self, x):
        y = x.size(0)
        for _ in range(2000):
            y = y + y
        return x if y > 3 else -x

    assert "a shape" in verdict(module(forward)).cause


def test_it_renders():
    assert render(verdict(module(CASES["length"].forward))).count("\n") == 2
