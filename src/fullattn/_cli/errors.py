"""The one error that the command line shows as a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["UsageError", "describe", "sentences"]


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what was expected and what came."""


def describe(error: BaseException) -> str:
    """Write an exception as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def sentences() -> Iterator[None]:
    """Re-raise the library's user errors as UsageError (one line, exit status 2)."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error
