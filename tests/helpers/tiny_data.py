"""Tiny datasets of coloured rectangles in the layouts of the real ones.

A pixel has its class's colour with a little noise, so that a very small network can be trained on a
few images. Every function creates `root`, writes below it and returns it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CAMVID = {
    "Sky": (128, 128, 128),
    "Building": (128, 0, 0),
    "Pole": (192, 192, 128),
    "Road": (128, 64, 128),
    "Pavement": (60, 40, 222),
    "Tree": (128, 128, 0),
    "SignSymbol": (192, 128, 128),
    "Fence": (64, 64, 128),
    "Car": (64, 0, 128),
    "Pedestrian": (64, 64, 0),
    "Bicyclist": (0, 128, 192),
}

Array = NDArray[np.uint8]


def picture(
    size: tuple[int, int],
    labels: list[int],
    random: np.random.Generator,
    colours: dict[int, tuple[int, int, int]] | None = None,
) -> tuple[Array, Array]:
    """Return an image (H, W, 3) of rectangles and its labels (H, W)."""
    height, width = size
    mask = np.full(size, labels[0], np.uint8)
    for label in random.permutation(labels):
        top, left = random.integers(0, height), random.integers(0, width)
        mask[top : top + height // 3 + 1, left : left + width // 3 + 1] = label
    table = np.array([[37 * i % 256, 91 * i % 256, 153 * i % 256] for i in range(256)])
    for label, colour in (colours or {}).items():
        table[label] = colour
    noisy = table[mask] + random.integers(-8, 9, (*size, 3))
    return noisy.clip(0, 255).astype(np.uint8), mask


def save(path: Path, pixels: Array, mode: str | None = None) -> None:
    """Write an array as an image in the format of the suffix, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    image.save(path, **({"quality": 92} if path.suffix == ".jpg" else {}))


def camvid(root: Path, images: int = 6, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """Make CamVid with `images` images in each of train, val and test.

    The first half of test is named as the sequence 0001TP, the rest as Seq05VD. Void is 255.
    """
    random = np.random.default_rng(seed)
    names = {
        "train": [f"0016E5_{390 + 30 * i:05}" for i in range(images)],
        "val": [f"0016E5_{7959 + 2 * i:05}" for i in range(images)],
        "test": [f"0001TP_{8550 + 30 * i:06}" for i in range(images // 2)]
        + [f"Seq05VD_f{30 * i:05}" for i in range(images - images // 2)],
    }
    colours = dict(enumerate(CAMVID.values()))
    for split, stems in names.items():
        for stem in stems:
            image, mask = picture(size, [*range(len(CAMVID)), 255], random, colours)
            save(root / "images" / split / f"{stem}.jpg", image)
            save(root / "labels" / split / f"{stem}.png", mask)
    classes = [
        {"index": i, "name": name, "color": list(colour)}
        for i, (name, colour) in enumerate(CAMVID.items())
    ]
    listed = {"classes": classes, "num_classes": len(classes), "ignore_index": 255}
    (root / "classes.json").write_text(json.dumps(listed))
    return root


def cityscapes(
    root: Path, images: int = 2, size: tuple[int, int] = (32, 64), seed: int = 0
) -> Path:
    """Make Cityscapes with `images` images in each of two cities of train, one of val and of test.

    The colour, instance and polygon files of the real dataset are included.
    """
    random = np.random.default_rng(seed)
    cities = {"train": ("aachen", "zurich"), "val": ("frankfurt",), "test": ("berlin",)}
    for split, names in cities.items():
        for city in names:
            for i in range(images):
                stem = f"{city}_{i:06}_000019"
                image, mask = picture(size, list(range(34)), random)
                truth = root / "gtFine" / split / city
                save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", image)
                save(truth / f"{stem}_gtFine_labelIds.png", mask)
                save(truth / f"{stem}_gtFine_color.png", image)
                save(truth / f"{stem}_gtFine_instanceIds.png", mask.astype(np.uint16) * 1000)
                (truth / f"{stem}_gtFine_polygons.json").write_text("{}")
    return root


def ade20k(root: Path, images: int = 3, size: tuple[int, int] = (40, 30), seed: int = 0) -> Path:
    """Make SceneParse150 as in its archive, with the lists beside it."""
    random = np.random.default_rng(seed)
    base = root / "ADEChallengeData2016"
    for folder, part in (("training", "train"), ("validation", "val")):
        for i in range(1, images + 1):
            stem = f"ADE_{part}_{i:08}"
            image, mask = picture(size, [0, 1, 2, 75, 149, 150], random)
            save(base / "images" / folder / f"{stem}.jpg", image)
            save(base / "annotations" / folder / f"{stem}.png", mask)
    (base / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tName\n")
    (base / "sceneCategories.txt").write_text("ADE_train_00000001 airport_terminal\n")
    return root


def voc(
    root: Path,
    images: int = 3,
    size: tuple[int, int] = (30, 40),
    seed: int = 0,
    augmented: bool = True,
) -> Path:
    """Make PASCAL VOC 2012: palette masks with void 255, lists, and images in no list.

    With `augmented` also the grey masks of SegmentationClassAug and trainaug.txt.
    """
    random = np.random.default_rng(seed)
    base = root / "VOCdevkit" / "VOC2012"
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    stems = {
        "train": [f"2007_{i:06}" for i in range(images)],
        "val": [f"2008_{i:06}" for i in range(images)],
        "extra": [f"2009_{i:06}" for i in range(images)],
        "unlisted": ["2010_000000"],
    }
    for split, names in stems.items():
        for stem in names:
            image, mask = picture(size, [0, 1, 15, 20, 255], random)
            save(base / "JPEGImages" / f"{stem}.jpg", image)
            if split in ("train", "val"):
                save(base / "SegmentationClass" / f"{stem}.png", mask, mode="P")
            if augmented:
                save(base / "SegmentationClassAug" / f"{stem}.png", mask)
    listed = {
        "train": stems["train"],
        "val": stems["val"],
        "trainval": stems["train"] + stems["val"],
    }
    if augmented:
        listed["trainaug"] = stems["train"] + stems["extra"]
    for split, names in listed.items():
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def folder(
    root: Path,
    images: int = 3,
    size: tuple[int, int] = (24, 32),
    seed: int = 0,
    splits: tuple[str, ...] = ("train", "val"),
    classes: int = 4,
    masks: str = "masks",
) -> Path:
    """Make a folder of images and masks without a class list, with subfolders in the splits.

    Args:
        splits: names of the splits; empty for no splits.
    """
    random = np.random.default_rng(seed)
    for split in splits or (".",):
        for i in range(images):
            image, mask = picture(size, [*range(classes), 255], random)
            mask[0, 0] = classes - 1  # the highest label is always there
            save(root / "images" / split / f"day{i % 2}" / f"{i}.jpg", image)
            save(root / masks / split / f"day{i % 2}" / f"{i}.png", mask)
    return root


def truncate(path: Path, part: float = 0.6) -> None:
    """Keep the first part of a file, as an interrupted download does."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
