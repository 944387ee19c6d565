"""A progress bar for long work, where a person is watching."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")


def tracked(
    items: Iterable[T], title: str, *, shown: bool | None, total: int | None = None, console: Console | None = None
) -> Generator[T, None, None]:
    """The items, with a progress bar on a terminal's standard error: rate, and time left where `total` is known.

    `shown=None` shows it exactly when standard error is a terminal. Close the iterator to take the bar away early.
    """
    if shown is False or (shown is None and console is None and not sys.stderr.isatty()):
        yield from items
        return
    # only here: it takes as much memory and time to import as a small model
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(_rate(task.finished_speed or task.speed))

    console = Console(stderr=True) if console is None else console
    if not (console.is_terminal if shown is None else shown):
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=title)


def _rate(speed: float | None) -> str:
    """Items per second, or seconds per item where that is less than one.

    >>> _rate(12.5), _rate(0.25), _rate(None)
    ('12.5/s', '4.0 s each', '')
    """
    if not speed:
        return ""
    return f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each"
