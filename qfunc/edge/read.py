"""Reading fx nodes: arguments to immutable values, calls to kinds of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any, get_type_hints

from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from qfunc.edge.alias import Write
from qfunc.edge.schema import is_torch
from qfunc.edge.statements import AUGMENTED
from qfunc.ir import (
    Arg,
    DictArg,
    ListArg,
    ModuleFact,
    Name,
    Node,
    Note,
    Opaque,
    Origin,
    RecordArg,
    Ref,
    SliceArg,
    Source,
    Token,
    Written,
    refs,
)
from qfunc.ir.node import NamedArgs
from qfunc.ops import FORMS, Kind, bind, name_of, type_name
from qfunc.params import Load

_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
_AUGMENTED = frozenset(f"operator.{name}" for name in (*AUGMENTED, "imatmul", "iconcat"))


class Reader:
    """Reads the nodes of one fx graph, in order; gathers the objects without a name and what nodes write to."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        source: Source,
        scopes: Mapping[str, tuple[str, Any]],
        attributes: Mapping[str, Any],
        own: frozenset[type] = frozenset(),
    ) -> None:
        self.objects: dict[str, Opaque] = {}
        self.writes: dict[str, Write] = {}
        self.as_written: dict[str, Node] = {}
        self.notes: list[Note] = []
        self._tokens: dict[int, Token] = {}
        self._modules = modules
        self._source = source
        self._scopes = scopes
        self._attributes = attributes
        self._own = own
        self._hints = _type_hints(modules[""])
        self._parameters: dict[str, Load] = {}

    def read(self, node: fx.Node) -> Node:
        """The node in terms of the vocabulary; one that the vocabulary does not know keeps the kind of its own name."""
        match node.op:
            case "placeholder":
                default: NamedArgs = (("default", self.arg(node.args[0])),) if node.args else ()
                hint = self._hints.get(str(node.target)) if isinstance(node.type, str) else node.type
                typed: NamedArgs = (("type", self.arg(hint)),) if hint is not None else ()
                args = default + typed
                return Node(node.name, "placeholder", args, origin=self._origin(node, str(node.target)))
            case "output":
                return Node(
                    node.name, "output", (("value", self.arg(node.args[0])),), origin=self._origin(node, "output")
                )
            case "get_attr":
                return self._get_attr(node)
            case _:
                return self._call(node)

    def arg(self, value: Any) -> Arg:
        """An fx argument as an immutable value."""
        if isinstance(value, fx.Node):
            return Ref(value.name)
        if type(value) in _PLAIN:
            return value  # type: ignore[no-any-return]
        if isinstance(value, tuple):
            items = tuple(self.arg(item) for item in value)
            named = hasattr(value, "_fields")
            return RecordArg(self._named(type(value)), items) if named else items
        if isinstance(value, list):
            return ListArg(tuple(self.arg(item) for item in value))
        if isinstance(value, dict):
            return DictArg(tuple((self.arg(k), self.arg(v)) for k, v in value.items()))
        if isinstance(value, slice):
            return SliceArg(self.arg(value.start), self.arg(value.stop), self.arg(value.step))
        return self._named(value)

    def _named(self, value: Any) -> Name | Token:
        name = None if isinstance(value, (Tensor, nn.Module)) else name_of(value)
        if name is not None:
            return Name(name)
        if id(value) not in self._tokens:
            token = Token(f"object_{len(self._tokens)}")
            self._tokens[id(value)] = token
            self.objects[token.id] = Opaque(value)
        return self._tokens[id(value)]

    def _origin(self, node: fx.Node, target: str, written: Written | None = None) -> Origin:
        path, cls = self._scopes.get(node.name, ("", None))
        line = _user_line(node.stack_trace)
        return Origin(path, type_name(cls) if cls else "", written or Written(node.op, target), line)  # type: ignore[arg-type]

    def _get_attr(self, node: fx.Node) -> Node:
        target = str(node.target)
        value: Arg
        if target in self._source.tensors:
            value = self._parameters[node.name] = self._load(target)
        else:
            value = self._named(self._attributes[target])
        return Node(node.name, "get_attr", (("value", value),), origin=self._origin(node, target))

    def _load(self, name: str) -> Load:
        tensor, _ = self._source.tensors[name]
        return Load(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    def _call(self, node: fx.Node) -> Node:
        args = tuple(self.arg(value) for value in node.args)
        kwargs = {str(key): self.arg(value) for key, value in node.kwargs.items()}
        target, module, attribute = self._target(node)
        plain = self._plain(node, target, args, kwargs)
        self.as_written[node.name] = plain
        known = FORMS.get((node.op, target if module is None else type_name(type(module))))
        if module is not None and type(module) in self._own:
            known = None  # the user's own module takes its place, whatever the vocabulary says of it
        bound = None
        own = "" if module is None else own_behaviour(module)
        if known is not None and not own:
            bound = bind(*known, args, kwargs, attribute)
        elif known is not None:
            self.notes.append(Note(node.name, f"kept as it is: the module {own}"))
        write = _write(node, target, module, plain)
        if write is None and bound is not None and bound.inplace:
            write = Write(tuple(refs(bound.args[0][1])))
        if write is not None:
            self.writes[node.name] = write
        if known is None or bound is None:
            return plain
        bound_args = tuple((key, self._weight(known[0], key, value)) for key, value in bound.args)
        written = Written(bound.written.op, target, bound.written.args, bound.written.kwargs)
        return Node(node.name, known[0].name, bound_args, origin=self._origin(node, target, written))

    def _weight(self, row: Kind, key: str, value: Arg) -> Arg:
        """A parameter given to a functional operator is an expression, as that of a module is."""
        if key in row.weights and isinstance(value, Ref):
            return self._parameters.get(value.id, value)
        return value

    def _target(self, node: fx.Node) -> tuple[str, nn.Module | None, Callable[[str], Arg] | None]:
        if node.op == "call_method":
            return str(node.target), None, None
        if node.op == "call_function":
            named = self._named(node.target)
            return (named.name if isinstance(named, Name) else f"${named.id}"), None, None
        path = str(node.target)
        module = self._modules[path]

        def attribute(name: str) -> Arg:
            if f"{path}.{name}" in self._source.tensors:
                return self._load(f"{path}.{name}")
            if name == "training" and getattr(module, "running_mean", self) is None:
                return True  # a batch norm without running statistics takes the batch's in evaluation as well
            return self.arg(getattr(module, name))

        return path, module, attribute

    def _plain(self, node: fx.Node, target: str, args: tuple[Arg, ...], kwargs: Mapping[str, Arg]) -> Node:
        """The node exactly as written, its kind the name of what it calls."""
        kind = type_name(type(self._modules[target])) if node.op == "call_module" else target
        kind = f".{kind}" if node.op == "call_method" else kind
        mode = _parameters(node.target).index("training") if "training" in _parameters(node.target) else None
        # whether the model trains is told by name wherever it is told, so that passes find it
        positional = tuple(("training" if i == mode else str(i), value) for i, value in enumerate(args))
        written = Written(node.op, target, tuple(k for k, _ in positional), tuple((k, k) for k in kwargs))  # type: ignore[arg-type]
        named = tuple(kwargs.items())
        return Node(node.name, kind, positional + named, origin=self._origin(node, target, written))


def module_fact(module: nn.Module) -> ModuleFact:
    """What a graph is to know of a module."""
    known = [type_name(cls) for cls in type(module).__mro__[:-1] if cls.__module__.startswith("torch.nn.")]
    bases = [name for name in known if ("call_module", name) in FORMS]
    name = type_name(type(module))
    base = bases[0] if bases and bases[0] != name else ""
    return ModuleFact(name, module.training, base, own_behaviour(module))


def own_behaviour(module: nn.Module) -> str:
    """What calling the module does beside its class's `forward`; empty where that is all."""
    if parametrize.is_parametrized(module):
        return "is parametrized"
    if "forward" in vars(module):
        return "has a forward of its own"
    kinds = [kind for kind, table in _HOOKS if getattr(module, table)]
    return f"has {' and '.join(kinds)}" if kinds else ""


_HOOKS = (
    ("forward hooks", "_forward_hooks"),
    ("forward pre-hooks", "_forward_pre_hooks"),
    ("backward hooks", "_backward_hooks"),
    ("backward pre-hooks", "_backward_pre_hooks"),
)


def _write(node: fx.Node, target: str, module: nn.Module | None, plain: Node) -> Write | None:
    """What a call writes to, by torch's conventions of naming; `None` where it writes nothing."""
    out = next((value for key, value in plain.args if key == "out" and value is not None), None)
    if out is not None:
        return Write(tuple(refs(out)), returns_target=isinstance(out, Ref))
    by_name = dict(plain.args)
    first = by_name.get("0", by_name.get("input"))
    targets = tuple(refs(first))
    name = target.rpartition(".")[2]
    if module is not None:
        ours = plain.kind.startswith("torch.nn.")
        return Write(targets, ours) if getattr(module, "inplace", False) is True else None
    if target in _AUGMENTED:
        return Write(targets, statement=True)
    if target in ("operator.setitem", "operator.delitem") or (node.op == "call_method" and name == "__setitem__"):
        return Write(targets, returns_target=False)
    if (name.endswith("_") and not name.endswith("__")) or _is_switched(node):
        written = plain.origin.written
        return Write(targets, isinstance(first, Ref) and written is not None and is_torch(written))
    return None


def _is_switched(node: fx.Node) -> bool:
    """Whether a function is called with `inplace=True`, by keyword or by position."""
    if node.kwargs.get("inplace") is True:
        return True
    names = _parameters(node.target)
    return any(key == "inplace" and value is True for key, value in zip(names, node.args, strict=False))


def _parameters(target: object) -> list[str]:
    """The names of a function's parameters; none of what is no function, or a builtin without a signature."""
    try:
        return list(signature(target).parameters) if callable(target) else []
    except ValueError:
        return []


def _type_hints(model: nn.Module) -> Mapping[str, Any]:
    """The types of the inputs where the user wrote them as text, as `from __future__ import annotations` does."""
    try:
        return get_type_hints(type(model).forward)
    except (AttributeError, NameError, TypeError):  # names that only a type checker sees
        return {}


def _user_line(stack_trace: str | None) -> str:
    lines = (stack_trace or "").strip().splitlines()
    return lines[-1].strip() if lines else ""
