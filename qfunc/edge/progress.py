"""A progress bar for long work, where a person is watching."""

from __future__ import annotations

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
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True) if console is None else console
    if not (console.is_terminal if shown is None else shown):
        yield from items
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(items, total=total, description=title)
