"""What the commands of this room share: kinds of arguments, and errors as one sentence."""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fullattn.arguments import Adds
from fullattn.bench.errors import UsageError, describe
from fullattn.bench.output import output_folder

if TYPE_CHECKING:
    from fullattn.models.files import Trained

__all__ = [
    "add_device",
    "index",
    "number",
    "point",
    "read_trained",
    "sentences",
    "size",
    "written_together",
]


def add_device(parser: Adds) -> None:
    """Add --device."""
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda, cuda:1 (cpu)")


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def index(text: str) -> int:
    """A whole number from 0."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def _pair(text: str, separator: str, form: str) -> tuple[int, int]:
    numbers = text.split(separator)
    if len(numbers) != 2 or not all(n.isascii() and n.isdigit() for n in numbers):
        raise argparse.ArgumentTypeError(f"expected {form}, got {text!r}")
    return int(numbers[0]), int(numbers[1])


def size(text: str) -> tuple[int, int]:
    """HxW."""
    return _pair(text, "x", "HxW such as 512x1024")


def point(text: str) -> tuple[int, int]:
    """X,Y."""
    return _pair(text, ",", "X,Y such as 320,240")


@contextmanager
def sentences() -> Iterator[None]:
    """What a library finds wrong with what the user gave it, as the user's one sentence."""
    try:
        yield
    except (ValueError, ImportError) as error:
        raise UsageError(str(error)) from error


def read_trained(path: Path) -> Trained:
    """A trained network from a file of `fullattn train`, or the user's one sentence."""
    with sentences():
        from fullattn.models.files import load

        try:
            return load(path)
        except OSError as error:
            raise UsageError(
                f"expected a checkpoint that can be read at {str(path)!r}: {describe(error)}"
            ) from error


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
