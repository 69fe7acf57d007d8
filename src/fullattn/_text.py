"""Text for messages and tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["NOTHING", "counted", "did_you_mean", "digits", "installing", "si"]

NOTHING = "–"  # in tables


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean 'x'?" for the known name closest to `name`, or "" if none is close.

    The name that is proposed stands behind `prefix`.
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {prefix + close[0]!r}?" if close else ""


def counted(number: int, noun: str) -> str:
    """Write a number and its noun, in the plural unless it is 1: "1 thread", "2 threads"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def installing(extra: str) -> str:
    """Return how the packages of an extra are installed, from an index or in a clone."""
    return f"pip install 'fullattn[{extra}]', or '.[{extra}]' in a clone"


def si(number: float | None) -> str:
    """Format a number in three digits with K, M, G or T; a dash for None.

    Example:
        >>> si(525_313), si(19.6e9), si(0), si(None)
        ('525K', '19.6G', '0', '–')
    """
    if number is None:
        return NOTHING
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{digits(number / factor)}{letter}"
    return f"{number:g}"


def digits(number: float) -> str:
    """Format a number in three digits, or all of those before its point."""
    return (
        f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"
    )
