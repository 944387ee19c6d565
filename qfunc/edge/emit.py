"""Emitting fx code and modules for a graph."""

from __future__ import annotations

import copy as copying
from typing import Any

from torch import Tensor, fx, nn

from qfunc.edge.custom_modules import make_custom_module
from qfunc.edge.evaluate import Evaluator
from qfunc.edge.leaves import LEAVES
from qfunc.edge.statements import AUGMENTED, StatementTracer
from qfunc.edge.tensors import is_saved, share
from qfunc.ir import (
    Arg,
    DictArg,
    Expression,
    Graph,
    ListArg,
    Name,
    Node,
    PostOp,
    RecordArg,
    Ref,
    SliceArg,
    Token,
    Written,
    fresh_id,
)
from qfunc.ir.node import NamedArgs
from qfunc.ops import BY_NAME, canonical_call, emit_target, resolve
from qfunc.params import Load, QParamsPart, WeightCodes, loads


class UncopyableModuleError(Exception):
    """A leaf module of the user's cannot be deep-copied."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"this leaf module cannot be copied: {reason}")
        self.path = path


class Emitter:
    """Builds the fx graph and the module tree of one graph; confined to one materialization.

    Each source tensor becomes one new parameter or buffer, so that ties are kept. A module that no pass changed is
    copied whole to its own path; a changed one becomes a new layer there, or beside it where the unchanged module is
    called as well.
    """

    def __init__(self, graph: Graph, *, copy: bool) -> None:
        self.root = nn.Module()
        self._graph = graph
        self._copy = copy
        self._evaluator = Evaluator(graph.sources)
        self._fx = fx.Graph(tracer_cls=StatementTracer if any(map(_is_statement, graph)) else None)
        self.values: dict[str, fx.Node] = {}
        """The fx node that gives the value of each node of the graph, by its id: the last of several."""
        self.memo: dict[int, Any] = {}
        """Source objects by id, and what stands for them: for `deepcopy`."""
        self._layers: dict[tuple[str, NamedArgs], str] = {}
        self._clones: dict[tuple[str, bool], str] = {}
        self._made: dict[str, str] = {}
        self._tensors: dict[Expression, Tensor] = {}
        self._late: list[tuple[fx.Node, str, Any]] = []
        self.unsaved: list[str] = []
        """The buffers that are no part of the `state_dict`, as in the source."""
        self._unchanged = {
            _target(node): _is_known(node) for node in graph if _calls_module(node) and _is_unchanged(node)
        }
        self._unchanged |= {_target(p): True for node in graph for p in node.post if _is_module_of_own(p)}

    def emit(self) -> fx.Graph:
        """The fx graph; `root` holds what it refers to."""
        for path in sorted(self._unchanged, key=lambda path: path.count(".")):
            self._clone(path, self._unchanged[path])  # a module comes before its parts, which it brings along
        for node in self._graph:
            self.values[node.id] = self._emit(node)
        for fx_node, target, value in self._late:
            fx_node.target = self._attach(target, value)
            owner, name = self._graph.sources["model"], target
            if isinstance(value, Tensor) and name in owner.tensors and not is_saved(owner, name):
                self.unsaved.append(str(fx_node.target))
        return self._fx

    def _emit(self, node: Node) -> fx.Node:
        match node.kind:
            case "placeholder":
                default = (self._arg(node.get("default")),) if node.has("default") else ()
                annotation = self._arg(node.get("type")) if node.has("type") else None
                return self._fx.create_node("placeholder", _target(node), default, {}, node.id, annotation)
            case "output":
                return self._fx.create_node("output", "output", (self._arg(node.get("value")),), {}, node.id)
            case "get_attr":
                return self._attribute(node.id, _target(node), node.get("value"))
            case kind if kind in LEAVES:
                return self._leaf(node)
            case "owned":
                return self._own(node)
            case "custom_module":
                return self._custom(node)
            case _:
                return self._post(node, self._operator(node))

    def _operator(self, node: Node) -> fx.Node:
        """The operator itself, without what is fused behind it."""
        written = node.origin.written
        known = _is_known(node)
        if written is None or (known and _has_gained(node, written)):
            return self._canonical(node.kind, node.args, node.id)
        args, kwargs = self._written(node, written)
        target = emit_target(written) if known else written.target
        if written.op == "call_function":
            function = self._object(Token(target[1:]) if target.startswith("$") else Name(target))
            return self._fx.create_node("call_function", function, args, kwargs, node.id)
        if written.op == "call_module":
            target = self._clone(target, known) if _is_unchanged(node) else self._layer(node, target)
        return self._fx.create_node(written.op, target, args, kwargs, node.id)

    def _canonical(self, kind: str, named: NamedArgs, id: str, first: fx.Node | None = None) -> fx.Node:
        """A call of a kind with no written form; `first`, where given, takes the place of its first argument."""
        target, names = canonical_call(BY_NAME[kind], named)
        values = dict(named)
        given = [
            (name, first if first is not None and i == 0 else self._arg(values[name.rstrip("=")]))
            for i, name in enumerate(names)
        ]
        args = tuple(value for name, value in given if not name.endswith("="))
        kwargs = {name.rstrip("="): value for name, value in given if name.endswith("=")}
        return self._fx.create_node("call_function", resolve(target), args, kwargs, id)

    def _post(self, node: Node, value: fx.Node) -> fx.Node:
        """What is fused behind an operator; a norm's module, which is there to be trained, is called as such."""
        for post in node.post:
            value = self._behind(node, post, value)
        return value

    def _behind(self, node: Node, post: PostOp, value: fx.Node) -> fx.Node:
        name = f"{node.id}_{post.kind}"
        if not _is_module_of_own(post):
            return self._canonical(post.kind, post.args, name, value)
        return self._fx.create_node("call_module", self._clone(_target(post), known=True), (value,), {}, name)

    def _own(self, node: Node) -> fx.Node:
        """A module that a user's fuser made: a copy, since the graph keeps it as it is."""
        module, path = node.get("module"), node.origin.module
        assert isinstance(module, Token)
        try:
            made = copying.deepcopy(self._graph.objects[module.id].value)
        except Exception as error:
            raise UncopyableModuleError(path, str(error)) from error
        return self._call(node, self._attach(path, made))

    def _custom(self, node: Node) -> fx.Node:
        """A module that a user's function makes now, one for all calls of it."""
        module = node.get("module")
        assert isinstance(module, Token)
        if module.id not in self._made:
            self._made[module.id] = self._attach(node.origin.module, make_custom_module(self._graph, module.id))
        return self._call(node, self._made[module.id])

    def _call(self, node: Node, path: str) -> fx.Node:
        """The call of a module with the inputs and keywords of a node."""
        inputs, keywords = node.get("inputs"), node.get("keywords")
        assert isinstance(inputs, tuple) and isinstance(keywords, tuple)
        kwargs = {str(pair[0]): self._arg(pair[1]) for pair in keywords if isinstance(pair, tuple)}
        return self._fx.create_node("call_module", path, tuple(self._arg(item) for item in inputs), kwargs, node.id)

    def _leaf(self, node: Node) -> fx.Node:
        """A module of qfunc's own: an observer, a quantizer, a kernel. Observers of one path are one module."""
        inputs = node.get("inputs")
        assert isinstance(inputs, tuple)
        path = node.origin.module or node.id
        if node.kind not in _SHARED or path not in self._made:
            self._made[path] = self._attach(path, LEAVES[node.kind](node, self._evaluator, self._graph.objects))
        path = self._made[path]
        return self._fx.create_node("call_module", path, tuple(self._arg(item) for item in inputs), {}, node.id)

    def _clone(self, path: str, known: bool) -> str:
        """The path of a copy of the source's module; one of a known kind does not write in place any more."""
        module = self._source_module(path)
        switched = known and getattr(module, "inplace", False) is True
        if (path, switched) not in self._clones:
            for tensor in (*module.parameters(), *module.buffers()):
                self._fresh(tensor)
            try:
                clone: Any = copying.deepcopy(module, {} if switched else self.memo)
            except Exception as error:
                raise UncopyableModuleError(path, str(error)) from error
            if switched:
                clone.inplace = False
            self._clones[path, switched] = self._attach(path, self._dressed(clone))
        return self._clones[path, switched]

    def _dressed(self, module: nn.Module) -> nn.Module:
        """What takes the place of an unchanged module."""
        return module

    def _layer(self, node: Node, path: str) -> str:
        """The path of a copy of the source's layer with the tensors that the node's expressions give."""
        known = node.kind in BY_NAME
        key = (path, node.args[1:] if known else _own_parameters(node))
        if key not in self._layers:
            made = self._refilled(node, path) if known else self._with_parameters(_own_parameters(node), path)
            place = fresh_id(path, self._unchanged) if path in self._unchanged else path
            self._layers[key] = self._attach(place, made)
        return self._layers[key]

    def _refilled(self, node: Node, path: str) -> nn.Module:
        """A copy of a layer of a known kind, with the tensors that the node has for it."""
        module = self._source_module(path)
        blank: dict[int, Any] = {id(t): t for t in (*module.parameters(), *module.buffers())}
        made = copying.deepcopy(module, blank)
        for name in BY_NAME[node.kind].weights:
            value = node.get(name)
            tensor = self._tensor(value) if isinstance(value, Expression) else None
            table = made._buffers if name in made._buffers else made._parameters
            table[name] = tensor  # type: ignore[assignment]
        return made

    def _with_parameters(self, changed: NamedArgs, path: str) -> nn.Module:
        """A copy of a module, in which some parameters are others wherever it holds them."""
        module = self._source_module(path)
        filled: dict[int, Any] = {
            id(tensor): self._fresh(tensor) for tensor in (*module.parameters(), *module.buffers())
        }
        for name, value in changed:
            assert isinstance(value, Expression), name
            filled[id(module.get_parameter(name))] = self._tensor(value)
        made: nn.Module = copying.deepcopy(module, filled)
        return made

    def _source_module(self, path: str) -> nn.Module:
        model: nn.Module = self._graph.sources["model"].model
        return model.get_submodule(path)

    def _tensor(self, expression: Expression) -> Tensor:
        """The new parameter or buffer for an expression."""
        if expression not in self._tensors:
            if isinstance(expression, Load):
                made = self._fresh(self._evaluator.source(expression))
            elif isinstance(expression, (WeightCodes, QParamsPart)):
                made = self._evaluator.tensor(expression)
            else:
                sources = [self._evaluator.source(load) for load in loads(expression)]
                trained = [tensor.requires_grad for tensor in sources if isinstance(tensor, nn.Parameter)]
                value = self._evaluator.tensor(expression)
                made = nn.Parameter(value, any(trained)) if trained and value.is_floating_point() else value
            self._tensors[expression] = made
        return self._tensors[expression]

    def _fresh(self, tensor: Tensor) -> Tensor:
        """The one new tensor that stands for a source tensor."""
        if id(tensor) not in self.memo:
            made = tensor.detach().clone() if self._copy else share(tensor)
            is_parameter = isinstance(tensor, nn.Parameter)
            made = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
            vars(made).update(vars(tensor))
            self.memo[id(tensor)] = made
        found: Tensor = self.memo[id(tensor)]
        return found

    def _attribute(self, name: str, target: str, value: Arg) -> fx.Node:
        """A `get_attr`; where the attribute lives is settled once all modules have their places."""
        made = self._tensor(value) if isinstance(value, Expression) else self._object(value)
        node = self._fx.create_node("get_attr", target, (), {}, name)
        self._late.append((node, target, made))
        return node

    def _attach(self, target: str, value: Any) -> str:
        """Put a module, tensor or object at `target`, or at a free name where that is taken; gives the path."""
        *parents, name = target.split(".")
        place: Any = self.root
        for parent in parents:
            if parent not in place._modules and type(place) is nn.Module:
                place.add_module(parent, nn.Module())
            place = getattr(place, parent, None)
            if not isinstance(place, nn.Module):
                return self._attach(self._free(target), value)
        if hasattr(place, name):
            return target if getattr(place, name) is value else self._attach(self._free(target), value)
        if type(place) is not nn.Module:
            return self._attach(self._free(target), value)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            place.register_buffer(name, value)
        else:
            setattr(place, name, value)
        return target

    def _free(self, target: str) -> str:
        flat = target.replace(".", "_")
        return fresh_id(flat, {name for name in (flat, *dir(self.root)) if hasattr(self.root, name)})

    def _written(self, node: Node, written: Written) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args: list[Any] = []
        for name in written.args:
            value = self._arg(node.get(name.lstrip("*")))
            args.extend(value if name.startswith("*") else (value,))
        return tuple(args), {keyword: self._arg(node.get(name)) for keyword, name in written.kwargs}

    def _arg(self, arg: Arg) -> Any:
        match arg:
            case Ref(id):
                return self.values[id]
            case tuple():
                return tuple(self._arg(item) for item in arg)
            case ListArg(items):
                return [self._arg(item) for item in items]
            case DictArg(pairs):
                return {self._arg(key): self._arg(value) for key, value in pairs}
            case SliceArg(start, stop, step):
                return slice(self._arg(start), self._arg(stop), self._arg(step))
            case RecordArg(type, items):
                return self._object(type)(*(self._arg(item) for item in items))
            case Expression():
                name = next(loads(arg)).name
                return self._attribute(f"{name.replace('.', '_')}_value", name, arg)
            case _:
                return self._object(arg)

    def _object(self, arg: Arg) -> Any:
        match arg:
            case Name(name):
                return resolve(name)
            case Token(id):
                return self._graph.objects[id].value
            case _:
                return arg


_SHARED = ("observe", "fake_quantize")
"""The leaves of which nodes of one path are one module."""


def _target(node: Node | PostOp) -> str:
    assert node.origin.written is not None
    return node.origin.written.target


def _is_statement(node: Node) -> bool:
    """Whether the call, written as a statement, is one that plain tracing would lose or refuse."""
    written = node.origin.written
    names = (*AUGMENTED, "setitem", "delitem")
    return written is not None and written.target in {f"operator.{name}" for name in names}


def _has_gained(node: Node, written: Written) -> bool:
    """Whether a call was written without a parameter that a pass has given it: the bias of a folded norm, say."""
    given = {*written.args, *(name for _, name in written.kwargs)}
    lacking = (name for name in BY_NAME[node.kind].weights if name not in given)
    return written.op != "call_module" and any(node.get(name) is not None for name in lacking)


def _calls_module(node: Node) -> bool:
    return node.origin.written is not None and node.origin.written.op == "call_module"


def _is_known(node: Node) -> bool:
    """Whether the vocabulary says what the node computes, out of place, whatever way it was written."""
    return node.kind in BY_NAME and not node.aliased


def _is_module_of_own(post: PostOp) -> bool:
    """Whether what is fused behind an operator is a module with parameters of its own, which no pass changed."""
    written = post.origin.written
    return (
        written is not None and written.op == "call_module" and bool(BY_NAME[post.kind].weights) and _is_unchanged(post)
    )


def _own_parameters(node: Node | PostOp) -> NamedArgs:
    """The parameters that a pass gave a call of a kind that the vocabulary does not know."""
    written = node.origin.written
    given = set() if written is None else {*written.args, *(name for _, name in written.kwargs)}
    return tuple((name, value) for name, value in node.args if isinstance(value, Expression) and name not in given)


def _is_unchanged(node: Node | PostOp) -> bool:
    """Whether every parameter of a module call is still the module's own."""
    if node.kind not in BY_NAME:
        return not _own_parameters(node)
    weights = ((name, node.get(name)) for name in BY_NAME[node.kind].weights)
    return all(value is None or _load_name(value) == f"{_target(node)}.{name}" for name, value in weights)


def _load_name(value: Arg) -> str | None:
    """The name of a plain source tensor."""
    return value.name if isinstance(value, Load) else None
