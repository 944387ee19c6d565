"""From a call as written to the arguments of its kind, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from qfunc.ir.node import NamedArgs, Written
from qfunc.ir.value import Arg, ListArg, Ref
from qfunc.ops.kind import REQUIRED, Call, Form, Kind, Param, signature
from qfunc.ops.names import FORMS

_NUMPY = {"dim": "axis", "keepdim": "keepdims"}

Attribute = Callable[[str], Arg]


@dataclass(frozen=True, slots=True)
class Bound:
    """A call in terms of its kind: all of the kind's arguments, the written form, and whether it writes in place."""

    args: NamedArgs
    written: Written
    inplace: bool


def bind(
    row: Kind, form: Form, args: tuple[Arg, ...], kwargs: Mapping[str, Arg], attribute: Attribute | None = None
) -> Bound | None:
    """Bind a written call to its kind's signature; `None` when the call does not fit, for it then means something else.

    `attribute` reads an attribute of the module that is called.
    """
    given = _given(form, args, kwargs)
    if given is None:
        return None
    values, positional, keywords, inplace = given
    for text in form.attributes:
        (param,) = signature(text)
        value = attribute(param.keyword) if attribute is not None else REQUIRED
        if param.how == "only_default":
            if value != param.default:
                return None
        elif value is not REQUIRED:
            values[param.name] = value
    values.update(form.fixed)
    if isinstance(values.get("tensors"), Ref):
        return None  # a list that the graph computes: nothing here tells what is in it
    full = _complete(row, values)
    if full is None:
        return None
    written = Written(form.op, form.target, positional, keywords)
    return Bound(full, written, inplace or form.inplace)


def canonical_call(row: Kind, args: NamedArgs) -> Call:
    """The call that computes a node of this kind, whatever way it was written."""
    _, names = row.call
    given = {name.rstrip("=") for name in names}
    defaults = {param.name: param.default for param in row.params}
    left_out = any(key not in given and value != defaults.get(key) for key, value in args)
    return row.full_call if left_out and row.full_call[0] else row.call


def emit_target(written: Written) -> str:
    """What to call when a node of a known kind is materialized: the written target or its out-of-place twin."""
    known = FORMS.get((written.op, written.target))
    return (known[1].emit if known else "") or written.target


_Given = tuple[dict[str, Arg], tuple[str, ...], tuple[tuple[str, str], ...], bool]


def _given(form: Form, args: tuple[Arg, ...], kwargs: Mapping[str, Arg]) -> _Given | None:
    """The written arguments by name, the names in positional order, the keywords, and the in-place switch."""
    pairs: list[tuple[Param, Arg, str]] = []
    rest, left = list(args), dict(kwargs)
    dropped = False
    for param in form.params:
        if param.how == "spread" and rest:
            one = len(rest) == 1 and isinstance(rest[0], (tuple, ListArg))
            value = _items(rest[0]) if one else tuple(rest)
            if not all(isinstance(item, (int, Ref)) for item in value):
                return None
            pairs.append((param, value, param.name if one else f"*{param.name}"))
            rest = []
        elif rest:
            pairs.append((param, rest.pop(0), "" if dropped else param.name))
        elif (keyword := _keyword(param, left)) is not None:
            pairs.append((replace(param, keyword=keyword), left.pop(keyword), ""))
        elif param.default is not REQUIRED:
            pairs.append((param, param.default, "default"))
        elif param.name not in form.attributes:
            return None
        dropped = dropped or param.how in ("only_default", "inplace")
    if rest or left:
        return None
    return _sort(pairs)


def _keyword(param: Param, left: Mapping[str, Arg]) -> str | None:
    """The keyword that a parameter was given with: its own, or NumPy's, which torch takes as well."""
    return next((k for k in (param.keyword, _NUMPY.get(param.keyword)) if k is not None and k in left), None)


def _sort(pairs: list[tuple[Param, Arg, str]]) -> _Given | None:
    values: dict[str, Arg] = {}
    positional: list[str] = []
    keywords: list[tuple[str, str]] = []
    inplace = False
    for param, value, place in pairs:
        if param.how == "only_default":
            if value != param.default:
                return None
        elif param.how == "inplace":
            if not isinstance(value, bool):
                return None
            inplace = value
        else:
            values[param.name] = value
            if place == "":
                keywords.append((param.keyword, param.name))
            elif place != "default":
                positional.append(place)
    return values, tuple(positional), tuple(keywords), inplace


def _complete(row: Kind, values: dict[str, Arg]) -> NamedArgs | None:
    """All arguments of the kind in the order of its signature, sizes as tuples."""
    full: list[tuple[str, Arg]] = []
    for param in row.params:
        value = values.get(param.name, param.default)
        if value is REQUIRED:
            return None
        full.append((param.name, value))
    by_name = dict(full)
    for text in row.sizes:
        name, _, fallback = text.partition("=")
        value = by_name[name]
        if value is None and fallback:
            value = by_name[fallback]
        if row.rank and isinstance(value, Ref):
            return None  # one number for all dimensions, or a tuple of them: nothing here tells
        by_name[name] = _size(value, row.rank)
    return tuple(by_name.items())


def _size(value: Arg, rank: int) -> Arg:
    if isinstance(value, (tuple, ListArg)):
        items = _items(value)
        return items * rank if rank and len(items) == 1 else items
    return (value,) * rank if rank and isinstance(value, int) else value


def _items(value: Arg) -> tuple[Arg, ...]:
    assert isinstance(value, (tuple, ListArg))
    return value if isinstance(value, tuple) else value.items
