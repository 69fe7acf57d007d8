"""Progress on the terminal: bars where something is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)

__all__ = ["progress"]


@contextmanager
def progress(total: int, what: str = "") -> Iterator[Callable[[float, str], None]]:
    """Show a bar on standard error, if that is a terminal, until the block ends.

    Args:
        total: steps of the whole bar.
        what: description before the first step.

    Yields:
        A function that advances the bar by a number of steps and replaces the description.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<42}"),
        BarColumn(None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task(what, total=total)
        yield lambda part, now: shown.update(task, advance=part, description=now)
