"""Images and masks of a dataset on disk, and checks of its files before training."""

from __future__ import annotations

import copy
import fnmatch
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fullattn.segmentation.data.classes import IGNORE_INDEX, STRAY, Classes, Colour, numbered
from fullattn.segmentation.data.decode import image_size, read_image, read_labels
from fullattn.segmentation.data.files import (
    DataError,
    DatasetReport,
    FileIssue,
    Sample,
    find_files,
    join_first,
)
from fullattn.segmentation.data.folder_layouts import (
    LAYOUTS,
    MASK_SUFFIXES,
    find_classes,
    find_layout,
)

__all__ = [
    "ErrorsAsValues",
    "SegmentationDataset",
    "SmallestImage",
    "open_dataset",
    "smallest_image",
]

T = TypeVar("T")
R = TypeVar("R")


class SmallestImage(NamedTuple):
    """The smallest height and the smallest width in a dataset, and the images that have them."""

    height: int
    width: int
    lowest: Path
    narrowest: Path


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and their masks as they are on disk, without augmentation.

    `open_dataset` finds the files of a known layout; this class takes any list of files.

    Args:
        samples: images and masks.
        classes: the classes, in the order of their indices.
        table: uint8 (256,), the train id of every label in the files: 255 for ignored labels, 254
            for invalid ones. None: the labels are the indices of the classes.
        name: name of the dataset.
        split: name of the split.
        dropped: files that were left out, with the reason.

    Example:
        >>> photo = Sample(Path("street.jpg"), None)
        >>> dataset = SegmentationDataset([photo], numbered(2))
        >>> len(dataset), dataset.classes
        (1, ('0', '1'))
    """

    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        samples: Sequence[Sample],
        classes: Classes,
        table: NDArray[np.uint8] | None = None,
        *,
        name: str = "folder",
        split: str = "all",
        dropped: Sequence[FileIssue] = (),
    ) -> None:
        self.name: str = name
        self.split: str = split
        self.samples: tuple[Sample, ...] = tuple(samples)
        self.dropped: tuple[FileIssue, ...] = tuple(dropped)
        self.classes: tuple[str, ...] = classes.names
        self.palette: tuple[Colour, ...] = classes.palette
        self.groups: dict[str, tuple[str, ...]] = classes.groups
        self._table = classes.table() if table is None else table

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.read(index)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode an image, uint8 (3, H, W), and its mask to train ids, uint8 (H, W).

        They are 255 where ignored, all of them for an image without a mask.

        Raises:
            DataError: a file is missing, truncated or not an image, the sizes differ, or the mask
                has invalid labels.
        """
        sample = self.samples[index]
        image = read_image(sample.image)
        if sample.mask is None:
            return image, torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8)
        ids = self._train_ids(sample.mask)
        _check_sizes(sample.image, image.shape[1:], sample.mask, ids.shape)
        return image, torch.from_numpy(ids)

    def check(self, decode: bool = True, threads: int | None = None) -> DatasetReport:
        """Check every file, and report counts and the bad files with reasons.

        Args:
            decode: decode each file and count the pixels of each class; otherwise only the headers
                are read, which give sizes and reveal the worst damage.
            threads: number of files decoded at a time; None for a number that suits the machine.
        """

        def size_and_pixels(index: int) -> tuple[tuple[int, ...], NDArray[np.int64]]:
            if decode:
                ids = self.read(index)[1]
                return tuple(ids.shape), np.bincount(ids.numpy().ravel(), minlength=256)
            sample = self.samples[index]
            size = image_size(sample.image)
            if sample.mask is not None:
                mask_size = image_size(sample.mask, oriented=False)
                _check_sizes(sample.image, size, sample.mask, mask_size)
            return size, np.zeros(256, np.int64)

        found = _map_threaded(or_error(size_and_pixels), range(len(self)), threads)
        good = [each for each in found if not isinstance(each, DataError)]
        errors = [(each.paths[0], str(each)) for each in found if isinstance(each, DataError)]
        pixels = sum((counts for _, counts in good), start=np.zeros(256, np.int64))
        return DatasetReport(
            name=self.name,
            split=self.split,
            images=len(self),
            sizes=Counter((height, width) for (height, width), _ in good),
            pixels=dict(zip(self.classes, pixels.tolist(), strict=False)) if decode else {},
            ignored=int(pixels[IGNORE_INDEX]),
            problems=tuple(FileIssue(path, e.removeprefix(f"{path} ")) for path, e in errors),
            dropped=self.dropped,
        )

    def without(self, problems: Iterable[FileIssue]) -> SegmentationDataset:
        """Return the dataset without the samples that have issues, which `dropped` lists.

        Raises:
            DataError: no sample would be left.
        """
        problems = tuple(problems)
        bad = {issue.path for issue in problems}
        kept = [sample for sample in self.samples if bad.isdisjoint(sample)]
        if not kept:
            listed = join_first(problems, limit=3)
            raise DataError(f"every image of {self.name} {self.split} is bad: {listed}")
        return self._subset(kept, problems)

    def select(self, pattern: str) -> SegmentationDataset:
        """Return the dataset of the samples whose image's file name matches a pattern.

        Args:
            pattern: a shell pattern for the name with or without its extension: "Seq05VD_*".

        Raises:
            DataError: no name matches.
        """
        matches = re.compile(fnmatch.translate(pattern)).match
        kept = [each for each in self.samples if matches(each.name) or matches(each.image.name)]
        if not kept:
            names = join_first(sample.image.name for sample in self.samples)
            raise DataError(
                f"no image of {self.name} {self.split} matches {pattern!r}: the names are {names}"
            )
        return self._subset(kept)

    def _subset(
        self, samples: Sequence[Sample], dropped: Sequence[FileIssue] = ()
    ) -> SegmentationDataset:
        subset = copy.copy(self)
        subset.samples, subset.dropped = tuple(samples), (*self.dropped, *dropped)
        return subset

    def _train_ids(self, mask: Path) -> NDArray[np.uint8]:
        labels = read_labels(mask)
        # A negative label would index from the end of the table, one above 255 outside of it.
        clipped = labels.clip(0, 255)
        ids = np.where(clipped == labels, self._table[clipped], np.uint8(STRAY))
        if (ids == STRAY).any():
            valid = np.flatnonzero(self._table != STRAY)
            runs = np.split(valid, np.flatnonzero(np.diff(valid) > 1) + 1)
            expected = (f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
            strays = labels[ids == STRAY]
            raise DataError(
                f"{mask} has invalid labels for {self.name}: expected {' and '.join(expected)}, "
                f"got {join_first(np.unique(strays).tolist())} (pixels: {strays.size})",
                mask,
            )
        return ids


def or_error(function: Callable[[T], R]) -> Callable[[T], R | DataError]:
    """Return the function with a DataError as a value, where it would raise one."""

    def call(argument: T) -> R | DataError:
        try:
            return function(argument)
        except DataError as error:
            return error

    return call


@dataclass(eq=False, repr=False)
class ErrorsAsValues(Dataset[T | DataError], Generic[T]):
    """A dataset that returns a DataError in place of an item that cannot be read.

    An error raised in a worker process would end the data loader, and its message would be a
    traceback.

    Args:
        dataset: the dataset; keys and items are its own.
    """

    dataset: Dataset[T]

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, key: object) -> T | DataError:
        return or_error(self.dataset.__getitem__)(key)


def open_dataset(
    name: str, root: str | os.PathLike[str], split: str, *, skip_bad: bool = False
) -> SegmentationDataset:
    """Find the images and masks of a dataset in its own layout.

    Files are listed, not opened; `SegmentationDataset.check` opens them. For a folder without a
    class list, all masks are read to find the highest label.

    Args:
        name: "cityscapes", "ade20k", "voc", "camvid" or "folder".
        root: the folder of the dataset.
        split: "train", "val" or "test", if the dataset has it with masks; VOC also has "trainval"
            and "trainaug", a folder "all" and the names of its subfolders. Several are joined by
            "+": "train+val".
        skip_bad: leave out images without masks, masks without images and unreadable masks, and
            list them in `dropped`, instead of raising.

    Returns:
        The dataset, sorted by split and then by name, the same on every machine.

    Raises:
        DataError: another layout, an unknown or empty split, an image without mask or a mask
            without image; the message says what was expected and what was found.

    Example:
        >>> dataset = open_dataset("camvid", "datasets/camvid", "train+val")  # doctest: +SKIP
        >>> image, mask = dataset.read(0)  # doctest: +SKIP
        >>> open_dataset("camvid", "nowhere", "train")
        Traceback (most recent call last):
        ...
        fullattn.segmentation.data.files.DataError: nowhere is not laid out as CamVid: expected
        ...images/ and labels/ in it; nowhere does not exist...
    """
    if name not in LAYOUTS:
        raise DataError(f"unknown dataset {name!r}: expected one of {', '.join(LAYOUTS)}")
    layout, base = find_layout(name, Path(root))
    parts = [layout.find_samples(base, part) for part in split.split("+")]
    samples = [sample for found, _ in parts for sample in found]
    issues = [issue for _, found in parts for issue in found]
    listed = join_first(issues, limit=3)
    if issues and not skip_bad:
        raise DataError(
            f"{len(issues)} of the files of {name} {split} have no counterpart: {listed}",
            *(issue.path for issue in issues),
        )
    if not samples:
        raise DataError(f"{name} {split} in {base} is empty: {listed}", base)
    if len(set(samples)) < len(samples):
        raise DataError(f"{name} {split} in {base} has some images more than once", base)
    classes = find_classes(name, base) or _count_classes(base / layout.masks.format(""), skip_bad)
    table = classes.table(layout.labels, layout.ignored)
    return SegmentationDataset(samples, classes, table, name=name, split=split, dropped=issues)


def smallest_image(dataset: SegmentationDataset, threads: int | None = None) -> SmallestImage:
    """Find the smallest height and the smallest width of the images from the files' headers.

    A higher or wider crop does not fit into every image. The two may be of different images.
    `threads` files are read at a time; None for a number that suits the machine.

    Raises:
        DataError: an image is missing or not an image.
    """
    paths = [sample.image for sample in dataset.samples]
    heights, widths = zip(*_map_threaded(image_size, paths, threads), strict=True)
    height, lowest = min(zip(heights, paths, strict=True))
    width, narrowest = min(zip(widths, paths, strict=True))
    return SmallestImage(height, width, lowest, narrowest)


def _count_classes(folder: Path, skip_bad: bool) -> Classes:
    """Return classes without names, up to the highest label in any mask of any split."""

    def highest_label(path: Path) -> tuple[int, Path]:
        labels = read_labels(path)
        return int(labels[labels != IGNORE_INDEX].max(initial=0)), path

    masks = [path for paths in find_files(folder, MASK_SUFFIXES).values() for path in paths]
    read = or_error(highest_label) if skip_bad else highest_label
    found = [each for each in _map_threaded(read, masks) if not isinstance(each, DataError)]
    highest, path = max(found, default=(0, folder))
    if highest >= STRAY:
        raise DataError(
            f"{path} has the label {highest}: expected classes from 0 to {STRAY - 1}, and 255 for "
            "ignored",
            path,
        )
    if highest < 1:
        raise DataError(
            f"the masks below {folder} have no label but 0 and 255 (ignored): expected at least "
            "the classes 0 and 1, or a classes.txt",
            folder,
        )
    return numbered(highest + 1)


def _check_sizes(image: Path, size: Sequence[int], mask: Path, mask_size: Sequence[int]) -> None:
    if tuple(size) != tuple(mask_size):
        raise DataError(
            f"{mask} is {mask_size[0]}×{mask_size[1]} (height × width), but its image "
            f"{image} is {size[0]}×{size[1]}",
            mask,
            image,
        )


def _map_threaded(
    function: Callable[[T], R], arguments: Sequence[T], threads: int | None = None
) -> list[R]:
    """Apply the function in several threads (Pillow and NumPy release the GIL)."""
    with ThreadPoolExecutor(threads or min(16, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(function, arguments))
