"""Images and masks of a data set on disk, and what can be known of them before they are used."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fullattn.segmentation.data.checks import Report
from fullattn.segmentation.data.classes import IGNORE_INDEX, STRAY, Classes, numbered
from fullattn.segmentation.data.decode import image_size, mask_size, read_image, read_labels
from fullattn.segmentation.data.errors import DataError
from fullattn.segmentation.data.layouts import LAYOUTS, MASKS, masks_folder
from fullattn.segmentation.data.listing import Listing, Problem, Sample, files, some

__all__ = ["SegmentationDataset", "SmallestImage", "open_dataset", "smallest_image"]

T = TypeVar("T")
R = TypeVar("R")


class SmallestImage(NamedTuple):
    """The smallest height and the smallest width in a data set, and whose they are."""

    height: int
    width: int
    lowest: Path
    narrowest: Path


class SegmentationDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images and their masks as they are on disk, without augmentation.

    `open_dataset` makes one from a known layout; this takes any list of files.

    Args:
        samples: images and masks.
        classes: the classes, in the order of their indices.
        table: uint8 (256,), the train id of every label in the files; 255 for ignored and 254 for
            a label that there must not be. None: the labels are the indices of the classes.
        name: of the data set.
        split: of the data set.
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
        dropped: Sequence[Problem] = (),
    ) -> None:
        self.name = name
        self.split = split
        self.samples = tuple(samples)
        self.classes = classes.names
        self.palette = classes.palette
        self.groups = classes.groups
        self.dropped = tuple(dropped)
        self._classes = classes
        self._table = classes.table() if table is None else table

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.read(index)

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode an image and its mask.

        Args:
            index: of the sample.

        Returns:
            The image, uint8 (3, H, W), and the train ids, uint8 (H, W), 255 where ignored; all of
            them 255 for an image without a mask.

        Raises:
            DataError: a file is missing, truncated or no picture, the sizes differ, or the mask
                holds labels that the data set does not have.
        """
        sample = self.samples[index]
        image = read_image(sample.image)
        if sample.mask is None:
            return image, torch.full(image.shape[1:], IGNORE_INDEX, dtype=torch.uint8)
        ids = self._train_ids(sample.mask)
        _check_sizes(sample, (image.shape[1], image.shape[2]), (ids.shape[0], ids.shape[1]))
        return image, torch.from_numpy(ids)

    def check(self, decode: bool = True, threads: int | None = None) -> Report:
        """Look at every file.

        Args:
            decode: decode all of each file and count the pixels of each class; otherwise only the
                heads of the files are read, which tells sizes and the worst damage.
            threads: how many files to decode at a time; None for a number that suits the machine.

        Returns:
            Counts, and what is wrong with which file.
        """
        sizes: dict[tuple[int, int], int] = {}
        pixels = np.zeros(256, np.int64)
        problems = []
        examine = self._examine if decode else self._examine_heads
        for seen in _threaded(examine, range(len(self)), threads):
            if isinstance(seen, Problem):
                problems.append(seen)
            else:
                size, counted = seen
                sizes[size] = sizes.get(size, 0) + 1
                pixels += counted
        return Report(
            name=self.name,
            split=self.split,
            images=len(self),
            sizes=sizes,
            pixels=dict(zip(self.classes, pixels.tolist(), strict=False)) if decode else {},
            ignored=int(pixels[IGNORE_INDEX]),
            problems=tuple(problems),
            dropped=self.dropped,
        )

    def without(self, problems: Iterable[Problem]) -> SegmentationDataset:
        """The same without the samples that have a problem, which are listed in `dropped`.

        Args:
            problems: from a report.

        Returns:
            A data set.

        Raises:
            DataError: nothing would be left.
        """
        problems = tuple(problems)
        bad = {problem.path for problem in problems}
        kept = [sample for sample in self.samples if bad.isdisjoint(sample)]
        if not kept:
            raise DataError(f"every image of {self.name} {self.split} is bad: {_listed(problems)}")
        return self._with(kept, (*self.dropped, *problems))

    def select(self, pattern: str) -> SegmentationDataset:
        """The samples whose image's name fits a pattern.

        Args:
            pattern: as a shell's, for the file name without its ending: "Seq05VD_*".

        Returns:
            A data set.

        Raises:
            DataError: nothing fits.
        """
        kept = [sample for sample in self.samples if fnmatch.fnmatchcase(sample.name, pattern)]
        if not kept:
            names = some(sample.name for sample in self.samples)
            raise DataError(
                f"no image of {self.name} {self.split} is named like {pattern!r}: they are {names}"
            )
        return self._with(kept, self.dropped)

    def _with(self, samples: Sequence[Sample], dropped: Sequence[Problem]) -> SegmentationDataset:
        return SegmentationDataset(
            samples,
            self._classes,
            self._table,
            name=self.name,
            split=self.split,
            dropped=dropped,
        )

    def _train_ids(self, mask: Path) -> NDArray[np.uint8]:
        labels = read_labels(mask)
        # A negative label would count from the end of the table, and one above 255 beyond it.
        within = labels if labels.dtype == np.uint8 else labels.clip(0, 255)
        ids: NDArray[np.uint8] = self._table[within]
        if within is not labels:
            ids[within != labels] = STRAY
        if (ids == STRAY).any():
            strays = labels[ids == STRAY]
            raise DataError(
                f"{mask} has labels that {self.name} does not have: "
                f"{some(np.unique(strays).tolist())} (pixels: {strays.size}); expected "
                f"{self._expected()}",
                mask,
            )
        return ids

    def _expected(self) -> str:
        """The labels that there may be: "0 to 10 and 255"."""
        labels = np.flatnonzero(self._table != STRAY)
        runs = np.split(labels, np.flatnonzero(np.diff(labels) > 1) + 1)
        return " and ".join(
            f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs
        )

    def _examine(self, index: int) -> tuple[tuple[int, int], NDArray[np.int64]] | Problem:
        try:
            image, ids = self.read(index)
        except DataError as error:
            return _problem(error)
        counted = np.bincount(ids.numpy().ravel(), minlength=256)
        return (image.shape[1], image.shape[2]), counted

    def _examine_heads(self, index: int) -> tuple[tuple[int, int], int] | Problem:
        sample = self.samples[index]
        try:
            size = image_size(sample.image)
            if sample.mask is not None:
                _check_sizes(sample, size, mask_size(sample.mask))
        except DataError as error:
            return _problem(error)
        return size, 0


def open_dataset(
    name: str, root: str | os.PathLike[str], split: str, *, skip_bad: bool = False
) -> SegmentationDataset:
    """Find the images and masks of a data set in its own layout.

    Files are listed, not opened; `check` opens them. For a folder without a list of classes all
    masks are read, to find the highest label.

    Args:
        name: "cityscapes", "ade20k", "voc", "camvid" or "folder".
        root: the folder of the data set.
        split: "train", "val" or "test", as far as the data set has them with masks; VOC also has
            "trainval" and "trainaug", a folder "all" and what its folders are called. Several are
            joined by "+": "train+val".
        skip_bad: leave out images without masks, masks without images and unreadable masks, and
            list them in `dropped`, instead of raising.

    Returns:
        The data set, in the order of the splits and then of the names, on every machine.

    Raises:
        DataError: another layout, an unknown or empty split, an image without mask or a mask
            without image; the message says what was expected and what was found where.

    Example:
        >>> dataset = open_dataset("camvid", "datasets/camvid", "train+val")  # doctest: +SKIP
        >>> image, mask = dataset.read(0)  # doctest: +SKIP
        >>> open_dataset("camvid", "nowhere", "train")
        Traceback (most recent call last):
        ...
        fullattn.segmentation.data.errors.DataError: nowhere is not laid out as CamVid: expected
        images/ and labels/ in it; nowhere does not exist
    """
    if name not in LAYOUTS:
        raise DataError(f"no data set {name!r}: expected one of {', '.join(LAYOUTS)}")
    layout = LAYOUTS[name]
    base = layout.base(Path(root))
    found = Listing()
    for part in split.split("+"):
        if layout.splits and part not in layout.splits:
            raise DataError(
                f"{name} has no split {part!r}: expected one of {', '.join(layout.splits)}, or "
                "several joined by +"
            )
        found.extend(layout.list_split(base, part))
    if found.problems and not skip_bad:
        raise DataError(
            f"{len(found.problems)} of the files of {name} {split} have no counterpart: "
            f"{_listed(found.problems)}",
            *(problem.path for problem in found.problems),
        )
    if not found.samples:
        raise DataError(f"{name} {split} in {base} is empty: {_listed(found.problems)}", base)
    if len(set(found.samples)) < len(found.samples):
        raise DataError(f"{name} {split} in {base} holds some images more than once", base)
    classes = layout.classes(base)
    if classes is None:
        classes = _numbered(base, skip_bad)
    return SegmentationDataset(
        found.samples,
        classes,
        layout.table(base, classes),
        name=name,
        split=split,
        dropped=found.problems,
    )


def smallest_image(dataset: SegmentationDataset, threads: int | None = None) -> SmallestImage:
    """The smallest height and width of the images, from the heads of the files.

    A crop that is higher or wider does not fit into every image. The two need not be of one image.

    Args:
        dataset: the images.
        threads: how many files to read at a time; None for a number that suits the machine.

    Returns:
        Height and width in pixels, each with the image that has it.

    Raises:
        DataError: an image is missing or no picture.
    """
    paths = [sample.image for sample in dataset.samples]
    sizes = list(_threaded(image_size, paths, threads))
    height, lowest = min((size[0], path) for size, path in zip(sizes, paths, strict=True))
    width, narrowest = min((size[1], path) for size, path in zip(sizes, paths, strict=True))
    return SmallestImage(height, width, lowest, narrowest)


def _numbered(base: Path, skip_bad: bool) -> Classes:
    """Classes without names, up to the highest label in any mask of any split."""
    masks = [path for paths in files(masks_folder(base), MASKS).values() for path in paths]
    highest, of = 0, base

    def labels(path: Path) -> int | DataError:
        try:
            values = read_labels(path)
        except DataError as error:
            return error
        return int(values[values != IGNORE_INDEX].max(initial=0))

    for path, found in zip(masks, _threaded(labels, masks, None), strict=True):
        if isinstance(found, DataError):
            if not skip_bad:
                raise found
        elif found > highest:
            highest, of = found, path
    if highest >= STRAY:
        raise DataError(
            f"{of} has the label {highest}: expected classes from 0 to {STRAY - 1}, and 255 for "
            "ignored",
            of,
        )
    if highest < 1:
        raise DataError(
            f"the masks below {masks_folder(base)} hold no label but 0 and 255, which means "
            "ignored: expected at least the classes 0 and 1, or a classes.txt",
            base,
        )
    return numbered(highest + 1)


def _check_sizes(sample: Sample, image: tuple[int, int], mask: tuple[int, int]) -> None:
    if image != mask:
        raise DataError(
            f"{sample.mask} is {mask[0]}×{mask[1]} (height × width), but its image "
            f"{sample.image} is {image[0]}×{image[1]}",
            *(path for path in reversed(sample) if path is not None),
        )


def _problem(error: DataError) -> Problem:
    path = error.paths[0]
    return Problem(path, str(error).removeprefix(f"{path} "))


def _listed(problems: Sequence[Problem]) -> str:
    return some((f"{path} {reason}" for path, reason in problems), limit=3)


def _threaded(
    function: Callable[[T], R], arguments: Sequence[T], threads: int | None
) -> Iterator[R]:
    """As map, with decoding in several threads: Pillow and NumPy let others run meanwhile."""
    with ThreadPoolExecutor(threads or min(16, 2 * (os.cpu_count() or 1))) as pool:
        yield from pool.map(function, arguments)
