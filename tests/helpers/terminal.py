"""What the commands print on terminals of other widths."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

WIDTHS = (80, 100, 120)
each_width = pytest.mark.parametrize("width", WIDTHS)


def printed(show: Callable[[Console], object], width: int) -> str:
    """Return what a function prints on a console of that width."""
    console = Console(width=width, record=True, file=io.StringIO())
    show(console)
    return console.export_text()


def fitting(show: Callable[[Console], object], width: int, *titles: str) -> str:
    """Return the same, after checking that no line is too long and no word or number is cut.

    A whole word is one that is also printed where there is no end of room, or in `titles`.
    """
    text = printed(show, width)
    assert max(map(len, text.splitlines())) <= width, text
    whole = {*printed(show, 10**4).split(), *" ".join(titles).split()}
    # The lines of a table's head are as long as its columns.
    cut = {word for word in text.split() if not set(word) <= set("─━╺╸")} - whole
    assert not cut, text
    return text
