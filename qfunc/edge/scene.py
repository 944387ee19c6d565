"""What is known of an exception that symbolic tracing raised: where, in what syntax, about which traced value."""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import getattr_static
from itertools import islice
from pathlib import PurePath
from types import FrameType, TracebackType

from torch import fx, nn

_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "qfunc", "numpy"}
_COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge", "not_", "contains"})
_VIEWS = frozenset({"keys", "values", "items"})
_SHAPE = frozenset({"shape", "ndim", "size", "dim", "numel", "nelement", "ndimension", "stride"})
_TYPE = frozenset({"dtype", "device", "layout", "is_cuda", "requires_grad", "is_floating_point", "is_complex", "type"})


@dataclass(frozen=True, slots=True)
class Scene:
    """One exception, the user's line it came from, and which traced value it was about.

    `path` is the running module's dotted name, `function` the running function's where it is a global of its file,
    `syntax` the expression that was running, last, after all that it stands in, up to its statement.
    """

    error: BaseException
    root: nn.Module
    place: str = ""
    source: str = ""
    path: str = ""
    function: str = ""
    syntax: tuple[ast.AST, ...] = ()
    value: fx.Node | None = None

    @property
    def message(self) -> str:
        """The exception's own text."""
        return str(self.error)

    @property
    def origin(self) -> str:
        """What the value depends on: 'shape', 'type' (dtype, device), 'input', 'values', or '' where none is known."""
        return _origin(self.value) if self.value is not None else ""

    @property
    def input(self) -> str:
        """The root's input that the value is, or is compared from, with the stars of a variadic one; else ''."""
        if self.value is None or self.origin != "input":
            return ""
        return next((str(node.target) for node in ancestors(self.value) if node.op == "placeholder"), "")


def read_scene(error: BaseException, root: nn.Module) -> Scene:
    """Find the user's innermost line in the traceback of `error`, and what was running there."""
    frames = _traced_frames(error.__traceback__)
    ours = [i for i, (frame, _) in enumerate(frames) if _is_users(frame)]
    if not ours:
        return _scene_at_forward(error, root)
    frame, traceback = frames[ours[-1]]
    name = frame.f_code.co_filename
    syntax = _syntax(frame, traceback)
    return Scene(
        error,
        root,
        place=f"{PurePath(name).name}:{traceback.tb_lineno}",
        source=linecache.getline(name, traceback.tb_lineno, frame.f_globals).strip(),
        path=_module_path([f for f, _ in frames[: ours[-1] + 1]], root),
        function=_global_name(frame),
        syntax=syntax,
        value=_asked_value([f for f, _ in frames[ours[-1] + 1 :]]) or _named_input(syntax, frame),
    )


def _scene_at_forward(error: BaseException, root: nn.Module) -> Scene:
    """No line of the user's was running: the place is where the root's forward begins."""
    forward = getattr_static(type(root), "forward", None)
    code = getattr(forward, "__code__", None)
    if code is None or forward is nn.Module.forward:
        return Scene(error, root, place=type(root).__name__)
    source = linecache.getline(code.co_filename, code.co_firstlineno).strip()
    return Scene(error, root, f"{PurePath(code.co_filename).name}:{code.co_firstlineno}", source)


def _traced_frames(traceback: TracebackType | None) -> list[tuple[FrameType, TracebackType]]:
    """The frames inside the tracer's run of forward, outermost first; all of them where no tracer is found."""
    frames: list[tuple[FrameType, TracebackType]] = []
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "trace" and frame.f_globals.get("__name__") == "torch.fx._symbolic_trace":
            frames = []
        else:
            frames.append((frame, traceback))
        traceback = traceback.tb_next
    return frames


def _is_users(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    return package not in _LIBRARIES or frame.f_code.co_filename.startswith("<doctest")


def _global_name(frame: FrameType) -> str:
    """The name of the running function if its file can name it, else '' (of methods, closures)."""
    name = frame.f_code.co_name
    return name if callable(frame.f_globals.get(name)) and "self" not in frame.f_locals else ""


def _module_path(frames: list[FrameType], root: nn.Module) -> str:
    """The dotted name of the innermost submodule of `root` whose method is running."""
    names = {id(module): name for name, module in root.named_modules()}
    return next((names[id(f.f_locals["self"])] for f in reversed(frames) if id(f.f_locals.get("self")) in names), "")


def _syntax(frame: FrameType, traceback: TracebackType) -> tuple[ast.AST, ...]:
    """The syntax around the running instruction, from the function's first statement in to the expression."""
    line, end_line, column, end_column = next(islice(frame.f_code.co_positions(), traceback.tb_lasti // 2, None))
    if line is None or end_line is None or column is None or end_column is None:
        return ()
    try:
        tree = ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except SyntaxError:  # a notebook cell with magics, a template: the message has to do
        return ()
    around = tuple(n for n in ast.walk(tree) if _covers(n, (line, column), (end_line, end_column)))
    functions = [i for i, n in enumerate(around) if isinstance(n, ast.FunctionDef | ast.Lambda)]
    return around[functions[-1] + 1 :] if functions else around


def _covers(node: ast.AST, start: tuple[int, int], end: tuple[int, int]) -> bool:
    match node:
        case ast.stmt() | ast.expr():
            first = (node.lineno, node.col_offset)
            last = (node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)
            return first <= start and end <= last
    return False


def _asked_value(frames: list[FrameType]) -> fx.Node | None:
    """The traced value whose Python protocol (truth, length, iteration) torch refused in these frames of its own."""
    proxies = (f.f_locals.get("self") for f in frames)
    return next((proxy.node for proxy in proxies if isinstance(proxy, fx.Proxy)), None)


def _named_input(syntax: tuple[ast.AST, ...], frame: FrameType) -> fx.Node | None:
    """The input that is handed, by its bare name, to the expression that was running."""
    names = (child.id for node in syntax[-1:] for child in ast.iter_child_nodes(node) if isinstance(child, ast.Name))
    proxies = (frame.f_locals.get(name) for name in names)
    return next((p.node for p in proxies if isinstance(p, fx.Proxy) and p.node.op == "placeholder"), None)


def ancestors(node: fx.Node, *, stop: Callable[[fx.Node], bool] = lambda _: False) -> Iterator[fx.Node]:
    """The node and all it is computed from; nothing beyond a node at which to `stop`."""
    seen, todo = {node}, [node]
    while todo:
        yield (current := todo.pop())
        new = () if stop(current) else tuple(n for n in current.all_input_nodes if n not in seen)
        seen.update(new)
        todo.extend(new)


def operation(node: fx.Node) -> str:
    """The bare name of what a node does: 'size', 'shape' (of a getattr), 'add'."""
    if node.op == "call_function" and node.target is getattr:
        return str(node.args[1])
    return str(getattr(node.target, "__name__", node.target))


def _fact(node: fx.Node) -> str:
    """'shape' or 'type' for a node that asks a tensor for one, else ''."""
    name = operation(node) if node.op in ("call_method", "call_function") else ""
    return "shape" if name in _SHAPE else "type" if name in _TYPE else ""


def _origin(node: fx.Node) -> str:
    """What a value depends on: 'shape', 'type', 'input' (one as it came, or compared), else 'values' (of tensors)."""
    producers = tuple(ancestors(node, stop=lambda n: bool(_fact(n))))
    roots = {
        _fact(n) or n.op for n in producers if _fact(n) or (n.op != "call_function" and operation(n) not in _VIEWS)
    }
    if roots and roots <= {"shape", "type"}:
        return max(roots, key=("type", "shape").index)
    as_it_came = all(n.op == "placeholder" or operation(n) in _COMPARISONS | _VIEWS for n in producers)
    return "input" if roots == {"placeholder"} and as_it_came else "values"
