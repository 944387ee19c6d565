"""Writing a random program, one line at a time, from a source of choices: hypothesis, or a random number generator."""

from __future__ import annotations

from collections.abc import Sequence

from qfunc.testing.draft import Draft, Pick
from qfunc.testing.forms import ALIASES, IN_PLACE
from qfunc.testing.operations import FAMILIES, OPERATIONS
from qfunc.testing.program import Input, Program, Shape

_SHAPES: tuple[Shape, ...] = (
    (2, 4),
    (2, 4, 6),
    (2, 4, 6, 6),
    (1, 3, 8, 5),
    (3, 6, 7),
    (2, 2, 4, 5, 6),
    (1, 8),
    (2, 1, 6, 6),
)
_GAIN = (("gain", 1.5),)


def write_program(
    pick: Pick, *, max_nodes: int = 12, families: Sequence[str] = FAMILIES, aliasing: bool = False
) -> Program:
    """A program of at most about `max_nodes` operators of the given families, every choice made by `pick`.

    With `aliasing`, in-place operators may write to memory that other values still read (though never to an input's);
    without, what they overwrite is not read again. `max_nodes` counts steps; a few write two or three operators.

    >>> import random
    >>> write_program(random.Random(1).choice, max_nodes=0).body
    ()
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"unknown families {unknown}; known are {FAMILIES}")
    draft = Draft(pick(range(1000)), _inputs(pick), pick([(), _GAIN]))
    for _ in range(pick(range(max_nodes + 1))):
        _step(draft, pick, families, aliasing)
    return draft.program(_result(draft, pick))


def _inputs(pick: Pick) -> tuple[Input, ...]:
    shape = pick(_SHAPES)
    like = (shape[0], *shape[1:])
    pooled = (*shape[:2], *(1 for _ in shape[2:]))
    first = Input("x0", (shape,))
    return pick(
        [
            (first,),
            (first, Input("x1", (like,))),
            (first, Input("x1", (pooled,))),
            (first, Input("x1", (like, pooled), "tuple")),
            (first, Input("x1", (like, pooled), "dict")),
            (Input("x0", (shape, like), "dict"),),
        ]
    )


def _step(draft: Draft, pick: Pick, families: Sequence[str], aliasing: bool) -> None:
    x = pick(draft.latest())
    fitting = [row for row in OPERATIONS if row.family in families and row.fits(draft, x)]
    kinds = list(dict.fromkeys(row.family for row in fitting))
    if "inplace" in families and draft.writable(x):
        kinds += ["inplace"] * (2 if aliasing else 1)
    if not kinds:
        return
    family = pick(kinds)
    if family == "inplace":
        _write_in_place(draft, x, pick, aliasing)
    else:
        draft.value(pick([row for row in fitting if row.family == family]).write(draft, x, pick))


def _write_in_place(draft: Draft, x: str, pick: Pick, aliasing: bool) -> None:
    """An in-place operator on `x`; later lines read its result, or `x` under its old name.

    With `aliasing` it may also be an assignment to a part of `x`, which plain fx refuses; plain fx also takes `x += y`
    for an addition into new memory.
    """
    if aliasing and not draft.aliases(x):
        draft.value(pick(ALIASES).format(x=x))
    aliases = draft.aliases(x)
    others = [y for y in draft.partners(x) if y != x and y not in aliases]
    form = pick([form for form in IN_PLACE if others or "{y}" not in form])
    text = form.format(x=x, y=pick(others) if "{y}" in form else x)
    styles = ["result", "statement"] + ["augmented"] * bool(others) + ["item"] * aliasing
    if text.startswith("nn."):
        text, styles = f"{pick([*_existing(draft, text), None]) or draft.attribute('m', text)}({x})", ["result"]
    style = pick(styles)
    if style == "result":
        draft.value(text, always=True)
    else:
        draft.statement({"augmented": f"{x} += {pick([*others, x])}", "item": f"{x}[:, 0] = 0.25"}.get(style, text))
    if not aliasing:
        draft.forget(aliases if style != "result" else [x, *aliases])
    elif aliases:
        draft.value(f"{pick(aliases)} * 0.5")


def _existing(draft: Draft, constructor: str) -> list[str]:
    return [f"self.{target}" for target, expression in draft.setup if expression == constructor]


def _result(draft: Draft, pick: Pick) -> str:
    last, *earlier = draft.latest()
    other = pick([*earlier, last])
    return pick(
        [
            last,
            f"({last}, {other})",
            f"[{other}, {last}]",
            f"{{'out': {last}, 'aux': {other}}}",
            f"({last}, {{'aux': [{other}], 'same': {last}}})",
            f"({last}, ({other}, {last}), 1)",
        ]
    )
