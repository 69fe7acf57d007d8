"""The output folder: checked before anything is measured, and never left with half a result."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fullattn._cli.errors import UsageError

__all__ = ["output_folder", "write_all", "written_together"]


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


def write_all(files: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write files so that each is there as a whole or not at all.

    Args:
        files: for each path, what writes it to the path that it is given. All are written beside
            their place first and then put there together.
    """
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    try:
        for path, write in files.items():
            write(parts[path])
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


@contextmanager
def written_together(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which are moved into `folder` when all of them are there.

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
