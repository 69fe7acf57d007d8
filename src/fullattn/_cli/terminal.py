"""Progress on the terminal: a line while something is done, a bar where something is counted."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["doing", "progress"]


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Show on standard error, if that is a terminal, what is done until the block ends."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{what} ...", end="", file=sys.stderr, flush=True)  # noqa: T201
    try:
        yield
    finally:
        if shown:  # back to the first column, and the line erased
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)  # noqa: T201


@contextmanager
def progress(total: int, unit: str, what: str = "") -> Iterator[Callable[[float, str], None]]:
    """Show a bar on standard error, if that is a terminal, until the block ends.

    Args:
        total: steps of the whole bar.
        unit: what a step is, in the plural.
        what: description before the first step.

    Yields:
        A function that advances the bar by a number of steps and replaces the description.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(None),
        TextColumn(f"{{task.completed:.0f}} of {total} {unit}"),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as shown:
        task = shown.add_task(what, total=total)
        yield lambda part, now: shown.update(task, advance=part, description=now)
