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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fullattn.segmentation.data import classes as class_lists
from fullattn.segmentation.data.classes import Classes
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
    """The folders of a dataset and the labels in its masks."""

    title: str  # the dataset's name in error messages
    required: tuple[str, ...]  # folders that identify the layout
    images: str  # folder of images; {} stands for the split's folder
    masks: str  # folder of masks, likewise
    # The folder of each split; None if the subfolders of the images' folder are the splits.
    splits: Mapping[str, str] | None = field(
        default_factory=lambda: {"train": "train", "val": "val", "test": "test"}
    )
    # Text file with the names of a split's samples, {} for its name; None: all files.
    lists: str | None = None
    bases: tuple[str, ...] = ("",)  # where the required folders may be, below the user's folder
    image_suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    mask_suffixes: tuple[str, ...] = MASK_SUFFIXES
    labels: Sequence[int] | None = None  # of each class in the masks; None for the indices
    ignored: Sequence[int] = ()  # labels that are ignored, if `labels` is given

    def find_samples(self, base: Path, split: str) -> tuple[list[Sample], list[FileIssue]]:
        """Return the samples of a split and issues of files without counterpart, or raise."""
        folders = self.splits
        if folders is None:
            subfolders = (base / self.images.format("")).iterdir()
            folders = {path.name: path.name for path in subfolders if path.is_dir()} | {"all": ""}
        if split not in folders:
            raise DataError(
                f"{self.title} has no split {split!r}: expected one of {', '.join(folders)}, or "
                "several joined by +",
                base,
            )
        folder = folders[split]
        names = None if self.lists is None else _read_names(base / self.lists.format(split), split)
        images = find_files(base / self.images.format(folder), self.image_suffixes)
        masks = find_files(base / self.masks.format(folder), self.mask_suffixes)
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
            splits={"train": "training", "val": "validation"},
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
            splits={"train": "", "val": "", "trainval": "", "trainaug": "Aug", "test": ""},
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
    """Find the layout of a folder and its base, which has the required folders, or raise."""
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
    """Return the classes of a known dataset or in a folder's list; None without a list."""
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
