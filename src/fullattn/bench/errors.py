"""The one error that the command line shows as a sentence."""

from __future__ import annotations

__all__ = ["UsageError", "describe"]


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what was expected and what came."""


def describe(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
