"""Read a trained network for a command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fullattn._cli.errors import UsageError, describe, sentences

if TYPE_CHECKING:
    from fullattn.segmentation.models.files import Trained

__all__ = ["read_trained"]


def read_trained(path: Path) -> Trained:
    """Read a file of `fullattn train`; raise a UsageError if it is not one."""
    with sentences():
        from fullattn.segmentation.models.files import load

        try:
            return load(path)
        except OSError as error:
            raise UsageError(
                f"expected a checkpoint that can be read at {str(path)!r}: {describe(error)}"
            ) from error
