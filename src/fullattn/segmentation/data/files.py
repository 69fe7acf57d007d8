"""Files of a dataset: finding images and masks, pairing them by name, and reporting bad ones."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

__all__ = [
    "DataError",
    "DatasetReport",
    "FileIssue",
    "Sample",
    "describe_folder",
    "find_files",
    "join_first",
    "pair",
]


class DataError(ValueError):
    """Files of a dataset are missing, unreadable, in an unknown layout or inconsistent.

    Args:
        message: names the files, what was expected and what was found.
        paths: the files concerned.
    """

    def __init__(self, message: str, *paths: Path) -> None:
        super().__init__(message)
        self.paths = paths


class Sample(NamedTuple):
    """An image and its mask; None for an image without labels."""

    image: Path
    mask: Path | None

    @property
    def name(self) -> str:
        """The image's file name without its extension."""
        return self.image.stem


class FileIssue(NamedTuple):
    """A bad file and the reason."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


@dataclass(frozen=True)
class DatasetReport:
    """Counts of a dataset and its bad files, from `SegmentationDataset.check`.

    Args:
        name: name of the dataset.
        split: its split.
        images: number of images, good and bad.
        sizes: number of good images of each (H, W).
        pixels: labelled pixels of each class in the good masks; empty if files were not decoded.
        ignored: number of pixels without a label.
        problems: one issue for each bad sample.
        dropped: issues of files that were left out before.
    """

    name: str
    split: str
    images: int
    sizes: Mapping[tuple[int, int], int]
    pixels: Mapping[str, int]
    ignored: int
    problems: tuple[FileIssue, ...]
    dropped: tuple[FileIssue, ...] = ()

    @property
    def absent(self) -> tuple[str, ...]:
        """The classes without a pixel in any mask."""
        return tuple(name for name, count in self.pixels.items() if count == 0)

    def raise_for_problems(self) -> None:
        """Raise a DataError with the first bad files, if there are any."""
        if self.problems:
            raise DataError(
                f"{len(self.problems)} of {self.images} samples of {self.name} {self.split} are "
                f"bad: {join_first(self.problems, limit=3)}",
                *(issue.path for issue in self.problems),
            )

    def __str__(self) -> str:
        head = f"{self.name} {self.split}: {self.images} images, {len(self.problems)} bad"
        if self.dropped:
            head += f", {len(self.dropped)} files left out"
        sizes = join_first(f"{n} of {height}×{width}" for (height, width), n in self.sizes.items())
        unlabelled = self.ignored / max(1, self.ignored + sum(self.pixels.values()))
        rows = [
            ("sizes (height × width)", sizes),
            ("pixels without label", f"{100 * unlabelled:.1f} %" if self.pixels else ""),
            ("classes in no mask", join_first(self.absent, limit=20)),
            *(("bad", str(issue)) for issue in self.problems),
            *(("left out", str(issue)) for issue in self.dropped),
        ]
        return "\n".join([head, *(f"  {what}: {text}" for what, text in rows if text)])


def find_files(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """Find the files below a folder that end in one of the lower-case suffixes, or raise.

    Hidden ones are left out. Keys are sorted paths relative to the folder, without the suffix.
    """
    found: dict[str, list[Path]] = {}
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            suffix = next((end for end in suffixes if name.lower().endswith(end)), None)
            if suffix is not None and not name.startswith("."):
                path = Path(parent, name)
                key = path.relative_to(folder).as_posix()[: -len(suffix)]
                found.setdefault(key, []).append(path)
    if not found:
        expected = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise DataError(f"no files {expected} below {folder}; {describe_folder(folder)}", folder)
    return {key: sorted(found[key]) for key in sorted(found)}


def pair(
    images: Mapping[str, Sequence[Path]], masks: Mapping[str, Sequence[Path]]
) -> tuple[list[Sample], list[FileIssue]]:
    """Pair images with the masks of the same name; return issues of files without counterpart."""
    issues = []
    for files, counterparts, kind in ((images, masks, "mask"), (masks, images, "image")):
        for name, (first, *duplicates) in files.items():
            issues += [FileIssue(path, f"has the same name as {first.name}") for path in duplicates]
            if name not in counterparts:
                issues.append(FileIssue(first, f"has no {kind}: expected one named {name!r}"))
    samples = [
        Sample(paths[0], masks[name][0])
        for name, paths in images.items()
        if len(paths) == 1 and name in masks
    ]
    return samples, issues


def describe_folder(folder: Path) -> str:
    """Describe a folder's contents for an error; if it does not exist, those of its ancestor."""
    if not folder.exists():
        nearest = next((parent for parent in folder.parents if parent.exists()), None)
        hint = "" if nearest is None else f"; {describe_folder(nearest)}"
        return f"{folder} does not exist{hint}"
    if not folder.is_dir():
        return f"{folder} is a file"
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    names = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    return f"{folder} holds {join_first(names) if names else 'nothing'}"


def join_first(items: Iterable[object], limit: int = 5) -> str:
    """Join the first items by commas and add the number of the others."""
    listed = [str(item) for item in items]
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
