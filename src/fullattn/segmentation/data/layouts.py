"""The layouts of the datasets on disk: where each keeps images, masks and splits.

cityscapes   leftImg8bit/{train,val,test}/<city>/*_leftImg8bit.png
             gtFine/{train,val,test}/<city>/*_gtFine_labelIds.png   34 ids -> 19 train ids
ade20k       [ADEChallengeData2016/]images/{training,validation}/*.jpg
             [ADEChallengeData2016/]annotations/{training,validation}/*.png   0 is ignored
voc          [VOCdevkit/][VOC2012/]JPEGImages/*.jpg, SegmentationClass/*.png,
             ImageSets/Segmentation/{train,val,trainval}.txt; with the augmented masks of
             Hariharan et al. also trainaug.txt and SegmentationClassAug/*.png
camvid       images/{train,val,test}/*.jpg, labels/{train,val,test}/*.png, [classes.json]; or
             SegNet's {train,val,test}/*.png, {train,val,test}annot/*.png, where 11 is ignored
folder       images/{split}/**, masks/{split}/** (or labels/), [classes.json or classes.txt];
             split "all" is everything below images/, with or without splits
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fullattn.segmentation.data import classes as class_lists
from fullattn.segmentation.data.classes import Classes, label_table
from fullattn.segmentation.data.files import (
    DataError,
    FileIssue,
    Sample,
    describe_folder,
    find_files,
    pair,
)

__all__ = ["LAYOUTS", "MASK_SUFFIXES", "Layout", "find_classes", "find_layout"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# No JPEG: lossy compression changes the labels.
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".gif")

# The ids, among 0 to 33, of the 19 classes in the order of their train ids.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class Layout:
    """The folders of a dataset and the labels in its masks.

    Args:
        title: the dataset's name in error messages.
        required: folders that identify the layout.
        images: folder of images; {} stands for the split's folder.
        masks: folder of masks, likewise.
        splits: names of the splits; None if the subfolders of the images' folder are the splits.
        split_folders: the folder of each split, if it is not the split's name.
        lists: text file with the names of a split's samples; {} stands for the split's name. None:
            all files of the folders.
        bases: where the required folders may be, below the folder that the user gives.
        image_suffixes: ends of image file names.
        mask_suffixes: ends of mask file names.
        labels: the label in the masks of each class; None for the indices of the classes.
        ignored: labels that are ignored, if `labels` is given.
    """

    title: str
    required: tuple[str, ...]
    images: str
    masks: str
    splits: tuple[str, ...] | None = ("train", "val", "test")
    split_folders: tuple[str, ...] | None = None
    lists: str | None = None
    bases: tuple[str, ...] = ("",)
    image_suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    mask_suffixes: tuple[str, ...] = MASK_SUFFIXES
    labels: Sequence[int] | None = None
    ignored: Sequence[int] = ()

    def masks_root(self, base: Path) -> Path:
        """Return the folder of the masks of all splits."""
        return base / self.masks.format("")

    def table(self, classes: Classes) -> NDArray[np.uint8]:
        """Return the train id of every label, uint8 (256,), as `Classes.table`."""
        return classes.table() if self.labels is None else label_table(self.labels, self.ignored)

    def find_samples(self, base: Path, split: str) -> tuple[list[Sample], list[FileIssue]]:
        """Return the samples of a split and issues of files without counterpart.

        Raises:
            DataError: unknown split, or a folder or list without samples.
        """
        folder = self._split_folder(base, split)
        names = None if self.lists is None else _read_names(base / self.lists.format(split), split)
        images = _find_some(base / self.images.format(folder), self.image_suffixes)
        masks = _find_some(base / self.masks.format(folder), self.mask_suffixes)
        if names is None:
            return pair(images, masks)
        samples, issues = [], []
        for name in names:
            if name in images and name in masks:
                samples.append(Sample(images[name][0], masks[name][0]))
                continue
            missing, suffix = (self.masks, ".png") if name in images else (self.images, ".jpg")
            path = base / missing.format(folder) / f"{name}{suffix}"
            issues.append(FileIssue(path, f"does not exist, but the list of {split!r} names it"))
        return samples, issues

    def _split_folder(self, base: Path, split: str) -> str:
        if self.splits is None:
            subfolders = (base / self.images.format("")).iterdir()
            folders = {path.name: path.name for path in subfolders if path.is_dir()}
            folders["all"] = ""
        else:
            folders = dict(zip(self.splits, self.split_folders or self.splits, strict=True))
        if split not in folders:
            raise DataError(
                f"{self.title} has no split {split!r}: expected one of {', '.join(folders)}, or "
                "several joined by +",
                base,
            )
        return folders[split]


def _find_some(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    found = find_files(folder, suffixes)
    if not found:
        expected = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise DataError(f"no files {expected} below {folder}; {describe_folder(folder)}", folder)
    return found


def _read_names(path: Path, split: str) -> list[str]:
    """Read VOC's list of names: one a line, or the paths of image and mask on each line."""
    if not path.is_file():
        raise DataError(
            f"no list {path.name} for the split {split!r}; {describe_folder(path.parent)}", path
        )
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", path) from error
    return [Path(line.split()[0]).stem for line in lines if line.strip()]


_FOLDER = "a folder of images and masks"

# By name, the possible layouts in the order in which they are tried.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "cityscapes": (
        Layout(
            "Cityscapes",
            ("leftImg8bit", "gtFine"),
            "leftImg8bit/{}",
            "gtFine/{}",
            image_suffixes=("_leftimg8bit.png",),
            mask_suffixes=("_gtfine_labelids.png",),
            labels=_CITYSCAPES_IDS,
            ignored=tuple(set(range(34)) - set(_CITYSCAPES_IDS)),
        ),
    ),
    "ade20k": (
        Layout(
            "ADE20K (SceneParse150)",
            ("images", "annotations"),
            "images/{}",
            "annotations/{}",
            splits=("train", "val"),
            split_folders=("training", "validation"),
            bases=("ADEChallengeData2016", ""),
            image_suffixes=(".jpg",),
            mask_suffixes=(".png",),
            labels=range(1, 151),
            ignored=(0,),
        ),
    ),
    "voc": (
        Layout(
            "PASCAL VOC 2012",
            ("JPEGImages", "ImageSets/Segmentation"),
            "JPEGImages",
            "SegmentationClass{}",
            splits=("train", "val", "trainval", "trainaug", "test"),
            split_folders=("", "", "", "Aug", ""),
            lists="ImageSets/Segmentation/{}.txt",
            bases=("VOCdevkit/VOC2012", "VOC2012", ""),
            image_suffixes=(".jpg",),
            mask_suffixes=(".png",),
        ),
    ),
    "camvid": (
        Layout(
            "CamVid (SegNet)", ("trainannot",), "{}", "{}annot", labels=range(11), ignored=(11, 255)
        ),
        Layout("CamVid", ("images", "labels"), "images/{}", "labels/{}"),
    ),
    "folder": (
        Layout(_FOLDER, ("images", "masks"), "images/{}", "masks/{}", splits=None),
        Layout(_FOLDER, ("images", "labels"), "images/{}", "labels/{}", splits=None),
    ),
}


def find_layout(name: str, root: Path) -> tuple[Layout, Path]:
    """Find the layout of a folder, and its base: the folder with the required folders.

    Raises:
        DataError: the folder has none of the dataset's layouts.
    """
    for layout in LAYOUTS[name]:
        for base in layout.bases:
            if all((root / base / folder).is_dir() for folder in layout.required):
                return layout, root / base
    expected = ", or ".join(
        " and ".join(f"{folder}/" for folder in layout.required) for layout in LAYOUTS[name]
    )
    raise DataError(
        f"{root} is not laid out as {LAYOUTS[name][-1].title}: expected {expected} in it; "
        f"{describe_folder(root)}",
        root,
    )


def find_classes(name: str, base: Path) -> Classes | None:
    """Return the classes of a known dataset or in a folder's list; None without a list.

    Raises:
        DataError: the list is invalid, or CamVid's has other classes than CamVid.
    """
    listed = [base / file for file in ("classes.json", "classes.txt") if (base / file).is_file()]
    if name == "folder":
        return class_lists.read(listed[0]) if listed else None
    known = class_lists.known(name)
    if name == "camvid" and listed and listed[0].suffix == ".json":
        names = class_lists.read(listed[0]).names
        if names != known.names:
            raise DataError(
                f"{listed[0]} has other classes than the 11 of CamVid: expected "
                f"{', '.join(known.names)}; got {', '.join(names)}; open it as 'folder'",
                listed[0],
            )
    return known
