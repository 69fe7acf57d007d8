"""Which image belongs to which mask: by folders whose files have the same names, or by a list."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fullattn.segmentation.data.errors import DataError

__all__ = ["Listing", "Problem", "Sample", "contents", "files", "pair", "stems"]


class Sample(NamedTuple):
    """An image and its mask; None for an image without labels."""

    image: Path
    mask: Path | None

    @property
    def name(self) -> str:
        """The image's file name without its ending."""
        return self.image.stem


class Problem(NamedTuple):
    """What is wrong with a file."""

    path: Path
    reason: str


@dataclass
class Listing:
    """What was found in the folders of a split."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def extend(self, other: Listing) -> None:
        """Add what was found elsewhere."""
        self.samples += other.samples
        self.problems += other.problems


def files(folder: Path, endings: Sequence[str]) -> dict[str, list[Path]]:
    """The files below a folder whose names end so, hidden ones left out.

    Args:
        folder: where to look, at any depth.
        endings: ends of names, in lower case.

    Returns:
        The files by their path in the folder without the ending, in the order of these paths.
    """
    found: dict[str, list[Path]] = {}
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            ending = next((end for end in endings if name.lower().endswith(end)), None)
            if ending is None or name.startswith("."):
                continue
            path = Path(place, name)
            key = path.relative_to(folder).as_posix()[: -len(ending)]
            found.setdefault(key, []).append(path)
    return dict(sorted(found.items()))


def pair(images: dict[str, list[Path]], masks: dict[str, list[Path]]) -> Listing:
    """Images with the masks of the same name.

    Args:
        images: by name, from `files`.
        masks: by name, from `files`.

    Returns:
        The pairs in the order of their names; a problem for every file that is not in a pair.
    """
    listing = Listing()
    for name, (image, *others) in images.items():
        listing.problems += [
            Problem(other, f"has the name of {image.name} too: which has the mask?")
            for other in others
        ]
        if name not in masks:
            listing.problems.append(Problem(image, f"has no mask: none is named {name!r}"))
        elif not others:
            listing.samples.append(Sample(image, masks[name][0]))
    for name, (mask, *others) in masks.items():
        listing.problems += [
            Problem(other, f"has the name of {mask.name} too: which is the mask?")
            for other in others
        ]
        if name not in images:
            listing.problems.append(Problem(mask, f"has no image: none is named {name!r}"))
    return listing


def stems(path: Path) -> list[str]:
    """The names in a list of VOC's: one a line, or the paths of image and mask on each line.

    Args:
        path: of the list.

    Returns:
        The images' names without folder and ending.

    Raises:
        DataError: the list cannot be read.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", path) from error
    return [Path(line.split()[0]).stem for line in lines if line.strip()]


def contents(folder: Path) -> str:
    """What stands in a folder, for a message: the names of the first few entries."""
    if not folder.exists():
        return f"{folder} does not exist"
    if not folder.is_dir():
        return f"{folder} is a file"
    names = sorted(
        entry.name + "/" * entry.is_dir()
        for entry in os.scandir(folder)
        if not entry.name.startswith(".")
    )
    return f"{folder} holds {some(names) if names else 'nothing'}"


def some(names: Iterable[object], limit: int = 5) -> str:
    """The first few of many things, and how many more there are."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
