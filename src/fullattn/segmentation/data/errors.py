"""The error of this room: something about the files of a data set."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DataError"]


class DataError(ValueError):
    """Files of a data set that are missing, unreadable, laid out otherwise or do not fit together.

    Args:
        message: names the files and says what was expected and what was found.
        paths: the files that it is about.
    """

    def __init__(self, message: str, *paths: Path) -> None:
        super().__init__(message)
        self.paths = paths
