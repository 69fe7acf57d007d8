"""The layouts of the data sets on disk: where each keeps images, masks and splits.

cityscapes   leftImg8bit/{train,val,test}/<city>/*_leftImg8bit.png
             gtFine/{train,val,test}/<city>/*_gtFine_labelIds.png   33 ids -> 19 train ids
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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fullattn.segmentation.data import classes as class_lists
from fullattn.segmentation.data.classes import IGNORE_INDEX, STRAY, Classes
from fullattn.segmentation.data.errors import DataError
from fullattn.segmentation.data.listing import (
    Listing,
    Problem,
    Sample,
    contents,
    files,
    pair,
    stems,
)

__all__ = ["LAYOUTS", "MASKS", "Layout", "masks_folder"]

PHOTOS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# No JPEG: what it stores is not exactly what was drawn.
MASKS = (".png", ".bmp", ".tif", ".tiff", ".gif")

# Cityscapes' ids of its 19 classes in the order of their train ids; there are ids 0 to 33.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

Table = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """How to find a data set's files.

    Args:
        base: the folder that the others are in, from the folder that the user named.
        list_split: the pairs of one split, from the base.
        splits: names of the splits; empty where the folders decide.
        classes: the classes, from the base; None where the masks decide.
        table: train id of every label 0 to 255, from the base and the classes.
    """

    base: Callable[[Path], Path]
    list_split: Callable[[Path, str], Listing]
    splits: tuple[str, ...]
    classes: Callable[[Path], Classes | None]
    table: Callable[[Path, Classes], Table]


def _below(*places: str, holding: Sequence[str], layout: str) -> Callable[[Path], Path]:
    """The first of some places below a folder that holds these folders, or an error."""

    def find(root: Path) -> Path:
        for place in places:
            if all((root / place / name).is_dir() for name in holding):
                return root / place
        expected = " and ".join(f"{name}/" for name in holding)
        raise DataError(
            f"{root} is not laid out as {layout}: expected {expected} in it; {contents(root)}", root
        )

    return find


def _tree(
    images: Path, image_endings: Sequence[str], masks: Path, mask_endings: Sequence[str]
) -> Listing:
    """The pairs below two folders, both of which must hold something."""
    found = []
    for folder, endings in ((images, image_endings), (masks, mask_endings)):
        named = files(folder, endings)
        if not named:
            expected = " or ".join(f"*{ending}" for ending in endings)
            raise DataError(
                f"no files {expected} below {folder}; {_nearest_contents(folder)}", folder
            )
        found.append(named)
    return pair(*found)


def _nearest_contents(folder: Path) -> str:
    """What a folder holds, or the nearest one above it that exists."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return contents(folder)


# Cityscapes


def _cityscapes_split(root: Path, split: str) -> Listing:
    return _tree(
        root / "leftImg8bit" / split,
        ("_leftimg8bit.png",),
        root / "gtFine" / split,
        ("_gtfine_labelids.png",),
    )


def _cityscapes_table(root: Path, classes: Classes) -> Table:
    table = np.full(256, STRAY, np.uint8)
    table[:34] = IGNORE_INDEX
    table[list(_CITYSCAPES_IDS)] = range(len(_CITYSCAPES_IDS))
    return table


# ADE20K


def _ade20k_split(root: Path, split: str) -> Listing:
    folder = {"train": "training", "val": "validation"}[split]
    return _tree(root / "images" / folder, (".jpg",), root / "annotations" / folder, (".png",))


def _ade20k_table(root: Path, classes: Classes) -> Table:
    table = np.full(256, STRAY, np.uint8)
    table[0] = IGNORE_INDEX
    table[1 : len(classes.names) + 1] = range(len(classes.names))
    return table


# PASCAL VOC


def _voc_split(root: Path, split: str) -> Listing:
    lists = root / "ImageSets" / "Segmentation"
    names = lists / f"{split}.txt"
    if not names.is_file():
        raise DataError(f"no list {names.name} for the split {split!r}; {contents(lists)}", names)
    image_folder = root / "JPEGImages"
    mask_folder = root / ("SegmentationClassAug" if split == "trainaug" else "SegmentationClass")
    images, masks = files(image_folder, (".jpg",)), files(mask_folder, (".png",))
    if not masks:
        found = _nearest_contents(mask_folder)
        raise DataError(f"no masks *.png in {mask_folder}; {found}", mask_folder)
    listing = Listing()
    for stem in stems(names):
        if stem in images and stem in masks:
            listing.samples.append(Sample(images[stem][0], masks[stem][0]))
            continue
        missing = mask_folder / f"{stem}.png" if stem in images else image_folder / f"{stem}.jpg"
        listing.problems.append(Problem(missing, f"does not exist, but {names} lists it"))
    return listing


# CamVid


def _camvid_base(root: Path) -> Path:
    if (root / "trainannot").is_dir():
        return root
    return _below("", holding=("images", "labels"), layout="CamVid")(root)


def _camvid_split(root: Path, split: str) -> Listing:
    if (root / f"{split}annot").is_dir():
        return _tree(root / split, PHOTOS, root / f"{split}annot", MASKS)
    return _tree(root / "images" / split, PHOTOS, root / "labels" / split, MASKS)


def _camvid_classes(root: Path) -> Classes:
    known = class_lists.known("camvid")
    listed = root / "classes.json"
    if listed.is_file() and (names := class_lists.read(listed).names) != known.names:
        raise DataError(
            f"{listed} has other classes than the 11 of CamVid: expected "
            f"{', '.join(known.names)}; found {', '.join(names)}; read it as 'folder'",
            listed,
        )
    return known


def _camvid_table(root: Path, classes: Classes) -> Table:
    void = 11 if (root / "trainannot").is_dir() else IGNORE_INDEX
    return replace(classes, void=void).table()


# Any folder


def masks_folder(root: Path) -> Path:
    """Where a folder of images and masks has its masks: masks/, or labels/.

    Args:
        root: the folder of the data set.

    Returns:
        The folder of the masks.
    """
    return root / ("masks" if (root / "masks").is_dir() else "labels")


def _folder_base(root: Path) -> Path:
    if (root / "images").is_dir() and masks_folder(root).is_dir():
        return root
    raise DataError(
        f"{root} is not laid out as a folder of images and masks: expected images/ and masks/ (or "
        f"labels/) in it; {contents(root)}",
        root,
    )


def _folder_split(root: Path, split: str) -> Listing:
    images, masks = root / "images", masks_folder(root)
    if split != "all":
        if split not in {path.name for path in images.iterdir() if path.is_dir()}:
            raise DataError(
                f"no split {split!r}: expected the name of a folder in {images}, or 'all' for all "
                f"of it; {contents(images)}",
                root,
            )
        images, masks = images / split, masks / split
    return _tree(images, PHOTOS, masks, MASKS)


def _folder_classes(root: Path) -> Classes | None:
    for name in ("classes.json", "classes.txt"):
        if (root / name).is_file():
            return class_lists.read(root / name)
    return None


def _plain_table(root: Path, classes: Classes) -> Table:
    return classes.table()


LAYOUTS = {
    "cityscapes": Layout(
        _below("", holding=("leftImg8bit", "gtFine"), layout="Cityscapes"),
        _cityscapes_split,
        ("train", "val", "test"),
        lambda root: class_lists.known("cityscapes"),
        _cityscapes_table,
    ),
    "ade20k": Layout(
        _below(
            "ADEChallengeData2016",
            "",
            holding=("images", "annotations"),
            layout="ADE20K (SceneParse150)",
        ),
        _ade20k_split,
        ("train", "val"),
        lambda root: class_lists.known("ade20k"),
        _ade20k_table,
    ),
    "voc": Layout(
        _below(
            "VOCdevkit/VOC2012",
            "VOC2012",
            "",
            holding=("JPEGImages", "ImageSets/Segmentation"),
            layout="PASCAL VOC 2012",
        ),
        _voc_split,
        ("train", "val", "trainval", "trainaug", "test"),
        lambda root: class_lists.known("voc"),
        _plain_table,
    ),
    "camvid": Layout(
        _camvid_base,
        _camvid_split,
        ("train", "val", "test"),
        _camvid_classes,
        _camvid_table,
    ),
    "folder": Layout(_folder_base, _folder_split, (), _folder_classes, _plain_table),
}
