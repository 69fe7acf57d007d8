"""Text that error messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name closest to an unknown one, or list the known names.

    Args:
        name: the unknown name.
        known: the valid names.

    Returns:
        The end of an error message.

    Example:
        >>> did_you_mean("fuly", ["fully", "channel"])
        "; did you mean 'fully'?"
        >>> did_you_mean("x", ["fully", "channel"])
        '; known are fully, channel'
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
