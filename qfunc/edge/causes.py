"""Why tracing fails: one table from what is seen of an exception to a cause in plain words and the ways out."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from qfunc.edge.scene import Scene, ancestors, operation

_CONVERSIONS = frozenset({"item", "tolist", "numpy", "__array__"})
_COUNTS_DATA = frozenset({"nonzero", "argwhere", "unique", "unique_consecutive", "masked_select"})
_FACTORIES = frozenset({"zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "eye", "linspace"})
_TYPE_CHECKS = frozenset({"isinstance", "issubclass", "type", "is_tensor", "callable", "hasattr"})

Test: TypeAlias = Callable[[Scene], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """A cause and its ways out, for the scenes that pass all tests.

    The texts may name `{leaf}` (how to keep this code whole), `{fix}` (how to fix the input in question), `{input}`
    and `{error}`; a way out that comes to nothing is left out.
    """

    tests: tuple[Test, ...]
    cause: str
    remedies: tuple[str, ...]


def _says(*texts: str) -> Test:
    return lambda scene: any(text in scene.message for text in texts)


def _is(*types: type[BaseException]) -> Test:
    return lambda scene: isinstance(scene.error, types)


def _origin_is(origin: str) -> Test:
    return lambda scene: scene.origin == origin


def _comes_from(operations: frozenset[str]) -> Test:
    return lambda scene: scene.value is not None and any(operation(n) in operations for n in ancestors(scene.value))


def _called(node: ast.AST) -> str:
    """The last name of a call's function: 'zeros' of `torch.zeros(...)`."""
    function = node.func if isinstance(node, ast.Call) else None
    return (
        function.attr if isinstance(function, ast.Attribute) else function.id if isinstance(function, ast.Name) else ""
    )


def _in_call_of(*names: str) -> Test:
    """The expression that was running is a call of one of these."""
    return lambda scene: bool(scene.syntax) and _called(scene.syntax[-1]) in names


def _inside(*types: type[ast.AST]) -> Test:
    return lambda scene: any(isinstance(node, types) for node in scene.syntax)


def _on_membership(scene: Scene) -> bool:
    return any(isinstance(n, ast.Compare) and isinstance(n.ops[0], ast.In | ast.NotIn) for n in scene.syntax[-1:])


def _on_unpacked_argument(scene: Scene) -> bool:
    calls = [n for n in scene.syntax[-1:] if isinstance(n, ast.Call | ast.List | ast.Tuple)]
    return any(
        isinstance(child, ast.Starred) or (isinstance(child, ast.keyword) and child.arg is None)
        for call in calls
        for child in ast.iter_child_nodes(call)
    )


def _on_starred_target(scene: Scene) -> bool:
    return bool(scene.syntax) and any(
        isinstance(n, ast.Starred) and isinstance(n.ctx, ast.Store) for n in ast.walk(scene.syntax[-1])
    )


def _on_variadic(scene: Scene) -> bool:
    return scene.input.startswith("*")


def _after_type_check(scene: Scene) -> bool:
    """The user raises, or asserts, because a test of types said no."""
    raises = any(isinstance(n, ast.Raise | ast.Assert) for n in scene.syntax)
    tests = [n.test for n in scene.syntax if isinstance(n, ast.If | ast.Assert)]
    return raises and any(_called(n) in _TYPE_CHECKS for test in tests for n in ast.walk(test))


_BRANCHES = _says("cannot be used as inputs to control flow")
_ITERATES = _says("Proxy object cannot be iterated")
_WANTS_INTEGER = _says("cannot be interpreted as an integer", "indices must be integers or slices, not Proxy")

ORDINARY = Rule(
    (),
    "the model's own code raised {error}",
    (
        "run model(*inputs) without tracing: if it fails there too, mend the model",
        "if it only fails here, {leaf}",
    ),
)

CAUSES: tuple[Rule, ...] = (
    Rule(
        (lambda scene: isinstance(scene.root, torch.jit.ScriptModule),),
        "a compiled torch.jit.ScriptModule, whose forward is no longer Python that can be traced",
        (
            "pass the Python module it was made from",
            "put it whole into another module (CustomConfig's non_traceable_names)",
        ),
    ),
    Rule(
        (_says('missing the required "forward" function'),),
        "a module without a forward method",
        ("define forward", "pass the model that calls this container's layers"),
    ),
    Rule(
        (_says("dynamo-optimized"),),
        "a part of the model is already compiled with torch.compile",
        (
            "trace the original (compiled._orig_mod) and compile the module that materialize returns",
            "keep the compiled part whole (CustomConfig's non_traceable_names)",
        ),
    ),
    Rule(
        (_says("found type 'Proxy'", "Unable to cast Proxy"),),
        "a call of a compiled torch.jit.script function, which takes real tensors only",
        ("call the Python function without @torch.jit.script", "{leaf}"),
    ),
    Rule(
        (_says("is not installed as a submodule"),),
        "a call of a module that is not registered in the model (kept in a list or dict, or made in forward)",
        ("keep it in an nn.ModuleList or nn.ModuleDict, or assign it to an attribute in __init__",),
    ),
    Rule(
        (_is(RecursionError),),
        "recursion without an end",
        (
            "let the depth depend on a plain number of the module, not on a traced value",
            "run model(*inputs) without tracing: if it does not end there either, mend the model",
            "{leaf}",
        ),
    ),
    Rule(
        (_on_variadic,),
        "the length or the names of forward's {input} arguments, which are unknown while tracing",
        (
            "give forward one named parameter for each input, instead of {input}",
            "index it with constants only, as in args[0] or kwargs['a']",
        ),
    ),
    Rule(
        (_BRANCHES, _inside(ast.Assert)),
        "an assert on a traced value",
        ("write torch._assert(condition, message), which is recorded", "remove the assert"),
    ),
    Rule(
        (_BRANCHES, _on_membership),
        "`in` on a traced value",
        ("{fix}", "compute it with tensors: (x == value).any()", "{leaf}"),
    ),
    Rule(
        (_BRANCHES, _in_call_of("max", "min", "sorted")),
        "Python's max(), min() or sorted() of traced values, which compares them",
        (
            "use torch.maximum, torch.minimum or torch.sort for tensors, torch.sym_max or torch.sym_min for sizes",
            "{leaf}",
        ),
    ),
    Rule(
        (_BRANCHES, _in_call_of("bool")),
        "bool() of a traced value",
        ("{fix}", "stay with tensors: x.bool(), torch.logical_and, torch.where", "{leaf}"),
    ),
    Rule(
        (_BRANCHES, _origin_is("shape")),
        "control flow that depends on a shape, which is unknown while tracing",
        (
            "decide in __init__, from a number the module keeps, if the model always runs one way",
            "{leaf}",
        ),
    ),
    Rule(
        (_BRANCHES, _origin_is("type")),
        "control flow that depends on a dtype or a device, which are unknown while tracing",
        ("convert without asking: x.to(dtype) does nothing where nothing is to do", "{leaf}"),
    ),
    Rule(
        (_BRANCHES, _origin_is("input")),
        "control flow that depends on the input {input!r}",
        ("{fix}", "compute both sides and choose with torch.where(condition, a, b) if it is a tensor", "{leaf}"),
    ),
    Rule(
        (_BRANCHES,),
        "control flow that depends on a tensor's values",
        ("compute both sides and choose with torch.where(condition, a, b)", "{leaf}"),
    ),
    Rule(
        (_ITERATES, _comes_from(_CONVERSIONS)),
        "a traced tensor converted to Python numbers, by .tolist(), .numpy() or .item()",
        ("stay with tensors: most loops over numbers are one tensor operation", "{leaf}"),
    ),
    Rule(
        (_ITERATES, _on_starred_target),
        "unpacking of a traced value into a starred target, of unknown length",
        ("index and slice it: a, rest = x.shape[0], x.shape[1:]", "name every target: a, b, c = x.shape", "{leaf}"),
    ),
    Rule(
        (_ITERATES, _on_unpacked_argument),
        "*unpacking or **unpacking of a traced value, whose length or names are unknown while tracing",
        (
            "hand over the value itself where the function takes one: torch.zeros(x.shape), x.view(y.shape)",
            "unpack by hand: f(x[0], x[1]) or f(a=x['a'])",
            "{leaf}",
        ),
    ),
    Rule(
        (_ITERATES, _on_membership),
        "`in` on a traced value",
        ("compute it with tensors: (x == value).any()", "{leaf}"),
    ),
    Rule(
        (_ITERATES, _in_call_of("dict")),
        "dict() of a traced value, whose keys are unknown while tracing",
        ("use it by its keys, x['a']", "take each tensor as an input of its own", "{leaf}"),
    ),
    Rule(
        (_ITERATES, _comes_from(_COUNTS_DATA)),
        "iterating over a result whose length depends on the data (nonzero, unique, masked_select)",
        ("stay with masks of a fixed shape: torch.where(mask, a, b), x * mask", "{leaf}"),
    ),
    Rule(
        (_ITERATES,),
        "iterating over a traced value, whose length is unknown while tracing",
        (
            "unpack a fixed number: a, b = x.unbind(0), or index it: for i in range(self.steps): x[i]",
            "use one tensor operation over the dimension: x.sum(0), torch.cat, torch.stack",
            "{leaf}",
        ),
    ),
    Rule(
        (_says("'len' is not supported in symbolic tracing"),),
        "len() of a traced value",
        ("use x.shape[0] or x.size(0)", "record the call: torch.fx.wrap('len') at the top of the file", "{leaf}"),
    ),
    Rule(
        (_WANTS_INTEGER, _in_call_of("range")),
        "range() of a traced value: the number of repetitions is unknown while tracing",
        (
            "{fix}",
            "repeat a fixed number of times, which the module keeps: range(self.steps)",
            "use one tensor operation over the dimension: x.sum(0), torch.cumsum, torch.arange",
            "{leaf}",
        ),
    ),
    Rule(
        (lambda scene: _WANTS_INTEGER(scene) or (isinstance(scene.error, KeyError) and "Proxy(" in scene.message),),
        "a traced value where Python needs a number: as an index, a key or a count",
        ("{fix}", "index a tensor or torch.stack of the choices, with torch.index_select or torch.gather", "{leaf}"),
    ),
    Rule(
        (_is(TypeError), _says("argument must be a string", "must be real number, not Proxy", "can't convert Proxy")),
        "int(), float() or complex() of a traced value",
        (
            "{fix}",
            "stay with tensors: x.long(), x.float(), and // for sizes",
            "record the call: torch.fx.wrap('int') at the top of the file",
            "{leaf}",
        ),
    ),
    Rule(
        (_says("__round__", "__trunc__", "__index__"),),
        "Python's rounding of a traced value",
        ("use torch.round, torch.floor or torch.trunc, and // for sizes", "{leaf}"),
    ),
    Rule(
        (_says("does not support item assignment", "doesn't support item deletion"), _says("Proxy")),
        "assignment into a traced tensor, x[...] = value, which is not recorded",
        ("make a new tensor: torch.where(mask, value, x), x.index_fill, x.index_copy, torch.cat", "{leaf}"),
    ),
    Rule(
        (_says("cannot assign 'torch.fx"),),
        "assignment of a traced value to a parameter, buffer or submodule",
        ("keep it in a local variable and hand it on: torch.nn.functional.linear(x, weight)", "{leaf}"),
    ),
    Rule(
        (_says("Proxy.__format__"),),
        "formatting a traced value as text, in an f-string or str.format",
        ("remove the text from forward, or print without a format: f'{{x}}'", "{leaf}"),
    ),
    Rule(
        (_says("__array", "np.ndarray"),),
        "a call into NumPy, which takes real arrays only",
        ("use the torch function of the same name, such as torch.exp for numpy.exp", "{leaf}"),
    ),
    Rule(
        (_says("__cuda_array_interface__", "not a storage"),),
        "a tensor built from a traced value, with torch.tensor, torch.as_tensor or torch.Tensor",
        ("use the value itself, x.clone() or x.to(dtype)", "{leaf}"),
    ),
    Rule(
        (_is(TypeError), _says("positional argument"), _in_call_of(*_FACTORIES)),
        "a tensor made from separate sizes, of which the first is traced",
        ("give the sizes as one tuple: torch.zeros((x.size(0), 3))", "use x.new_zeros(x.size(0), 3)"),
    ),
    Rule(
        (_says("argument of type: <class", "Keys for dictionaries used as an argument"),),
        "an argument or an output that a graph cannot hold ({error})",
        ("use tensors, numbers, strings, and tuples, lists or dicts of them with plain keys", "{leaf}"),
    ),
    Rule(
        (_after_type_check,),
        "a check of types, which the stand-ins used for tracing do not pass ({error})",
        (
            "check where the model is called, not in forward",
            "refuse what you do not want: isinstance(x, (list, tuple))",
        ),
    ),
    Rule(
        (_says("Proxy"),),
        "a call that takes no traced value ({error})",
        ("{fix}", "use a torch function or a tensor method instead", "{leaf}"),
    ),
)
