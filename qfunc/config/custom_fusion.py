"""Fusions of the user's own: a pattern, and a function that makes one module of the matched ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qfunc.errors import BadConfig, Problem
from qfunc.ir import Arg, Graph, Node, Ref
from qfunc.match import Anything, Chain, Constant, Match, MatchAllNode, Matched, Pattern, Side, Step, operands
from qfunc.ops import name_of, type_name


@dataclass(frozen=True, slots=True)
class CustomFusion:
    """A pattern and its fuser, `fuser(is_qat, *modules) -> nn.Module`, called on deep copies of what matched.

    `pattern` is a chain of two or three operators in forward order, `(nn.Conv2d, nn.ReLU)`; the fuser is given their
    modules in that order. `complex_pattern` is a tree in reversed order: a tuple holds an operator and then what its
    positional arguments must be, `(nn.ReLU, (operator.add, (nn.BatchNorm2d, nn.Conv2d), MatchAllNode))`; the fuser is
    given the parts of that tuple, nested as there. An operator is a module class (exactly that one), a function, or the
    name of a method. Functions and names are given to the fuser as themselves, but for `torch.nn.functional.relu`,
    for which there is a new `nn.ReLU`; `MatchAllNode`, any value, as itself.

    The fused module takes the place of the chain's last call. It is called with the arguments of the root's call, which
    must be a module's, and with the extra inputs. Both getters are given the matched nodes, nested as in
    `complex_pattern`: `root_node_getter` returns the root (by default the last item of the tuple, of its last item,
    and so on), `extra_inputs_getter` a sequence of further nodes.

    >>> from torch import nn
    >>> fusion = CustomFusion(lambda is_qat, conv, act: nn.Sequential(conv, act), pattern=(nn.Conv2d, nn.Sigmoid))
    >>> fusion.name
    'torch.nn.Conv2d + torch.nn.Sigmoid'
    """

    fuser: Callable[..., Any]
    pattern: tuple[Any, ...] = ()
    complex_pattern: tuple[Any, ...] = ()
    root_node_getter: Callable[[Any], Node] | None = None
    extra_inputs_getter: Callable[[Any], Sequence[Node]] | None = None

    @property
    def name(self) -> str:
        """The operators in forward order."""
        return " + ".join(_label(item) for item in self.pattern) or _label(self.complex_pattern)

    @property
    def reversed(self) -> Any:
        """The pattern as a nested tuple in reversed order."""
        nested: Any = self.complex_pattern
        for item in self.pattern:
            nested = (item, nested) if nested else item
        return nested


def compiled(fusion: CustomFusion) -> Pattern:
    """The pattern as data for the matcher."""
    return Pattern(fusion.name, tuple(_steps(fusion.reversed)))


def wrong_fusion(fusion: object) -> Iterator[Problem]:
    """What is wrong with a fusion as a configuration."""
    remedy = "pass CustomFusion(fuser, pattern=(nn.Conv2d, nn.ReLU)), or a complex_pattern"
    if not isinstance(fusion, CustomFusion):
        yield BadConfig("fusions", f"expected a CustomFusion, got a {type(fusion).__name__}", remedy)
        return
    if not callable(fusion.fuser):
        yield BadConfig("fuser", f"expected a function, got a {type(fusion.fuser).__name__}", remedy)
    flat = isinstance(fusion.pattern, tuple) and not any(isinstance(item, tuple) for item in fusion.pattern)
    if bool(fusion.pattern) == bool(fusion.complex_pattern) or not flat or len(fusion.pattern) not in (0, 2, 3):
        yield BadConfig("pattern", "give a flat pattern of two or three operators, or a complex_pattern", remedy)
    elif not isinstance(fusion.complex_pattern, tuple):
        yield BadConfig("complex_pattern", f"expected a tuple, got a {type(fusion.complex_pattern).__name__}", remedy)
    else:
        for item in dict.fromkeys(_no_operators(fusion)):
            reason = f"{item} stands where an operator is expected: a module class, a function or a method's name"
            yield BadConfig(fusion.name, reason, remedy)
        if any(len(item) == 1 for item in _tuples(fusion.complex_pattern)):
            reason = "a tuple holds an operator and what its arguments must be: one of one item matches nothing"
            yield BadConfig(fusion.name, reason, "write the operator without a tuple, or with MatchAllNode")
        for item in _leaves(fusion.reversed):
            if callable(item) and _form(item) is None:
                reason = f"{_label(item)} cannot be matched: it has no name that an import would find again"
                yield BadConfig(fusion.name, reason, "define the function at the top level of a module")


def nested(graph: Graph, found: Match) -> Any:
    """The matched nodes, nested as the reversed pattern is; a matched constant stands for itself."""
    return _nested(graph, found.parts)


def _nested(graph: Graph, chain: Chain) -> Any:
    *before, part = chain
    if not part.taken and not part.sides:
        return part.node
    sides = dict(part.sides)
    items = (
        _nested(graph, tuple(before)) if slot == part.taken else _side(graph, sides[position])
        for position, slot in enumerate(operands(part.node))
        if slot == part.taken or position in sides
    )
    return (part.node, *items)


def _side(graph: Graph, side: Arg | Chain) -> Any:
    if isinstance(side, tuple):
        chain = tuple(part for part in side if isinstance(part, Matched))
        return _nested(graph, chain) if chain else side
    return graph[side.id] if isinstance(side, Ref) else side


def _steps(item: Any) -> Iterator[Step]:
    """The chain to the end of a reversed pattern, along what is last in each tuple."""
    if not isinstance(item, tuple):
        yield Step(forms=frozenset({_form(item) or ""}))
        return
    operator, *operands = item
    if operator is getattr and len(operands) == 1:
        yield Step(forms=frozenset({"builtins.getattr"}), sides=((1, Constant(operands[0])),))
        return
    along = max((i for i, operand in enumerate(operands) if _is_operator(operand)), default=None)
    sides = tuple((i, _as_side(operand)) for i, operand in enumerate(operands) if i != along)
    if along is not None:
        yield from _steps(operands[along])
    takes = () if along is None else (f"#{along}",)
    yield Step(forms=frozenset({_form(operator) or ""}), takes=takes, sides=sides, arity=len(operands))


def _as_side(operand: Any) -> Side:
    if operand is MatchAllNode:
        return Anything()
    return tuple(_steps(operand)) if _is_operator(operand) else Constant(operand)


def _is_operator(item: Any) -> bool:
    return isinstance(item, (tuple, str)) or (callable(item) and item is not MatchAllNode)


def _leaves(item: Any) -> Iterator[Any]:
    for part in item if isinstance(item, tuple) else (item,):
        if isinstance(part, tuple):
            yield from _leaves(part)
        elif part is not MatchAllNode:
            yield part


def _tuples(item: Any) -> Iterator[tuple[Any, ...]]:
    """All tuples of a pattern that stand for a call, the outermost first."""
    if isinstance(item, tuple):
        yield item
        for part in item[1:]:
            yield from _tuples(part)


def _no_operators(fusion: CustomFusion) -> Iterator[str]:
    """What stands where the pattern must have an operator, and is none."""
    operators = [*fusion.pattern, *(item[0] for item in _tuples(fusion.complex_pattern) if item)]
    yield from (_label(item) for item in operators if isinstance(item, tuple) or not _is_operator(item))


def _form(item: Any) -> str | None:
    """What the matcher calls an operator of a pattern."""
    if isinstance(item, str):
        return f".{item}"
    return type_name(item) if isinstance(item, type) else name_of(item)


def _label(item: Any) -> str:
    if isinstance(item, tuple):
        return f"({', '.join(map(_label, item))})"
    if item is MatchAllNode:
        return "MatchAllNode"
    return (_form(item) if callable(item) or isinstance(item, str) else None) or repr(item)
