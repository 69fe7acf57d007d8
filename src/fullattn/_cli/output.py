"""The output folder: checked before anything is measured, and never left with half a result."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fullattn._cli.errors import UsageError

__all__ = ["output_folder", "written_together"]


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make a folder and check that it can be written.

    Folders that were made are taken away again if the block is left by an error and they are empty.

    Args:
        path: of the folder.

    Yields:
        The path.

    Raises:
        UsageError: it cannot be made or written.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UsageError(
                f"expected an output folder that can be written, got {str(path)!r}: {reason}"
            ) from error
        yield path
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        raise


@contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder; its files are moved into `folder` when the block ends.

    Args:
        folder: which is made where it is missing.

    Yields:
        The folder to write into.

    Raises:
        UsageError: `folder` cannot be made or written.
    """
    with (
        output_folder(folder) as made,
        tempfile.TemporaryDirectory(prefix=".part", dir=made) as part,
    ):
        yield Path(part)
        for path in Path(part).iterdir():
            os.replace(path, made / path.name)
