"""Tiny data sets in the exact layouts of the real ones, made of coloured rectangles.

A pixel's colour is its class's colour with a little noise, so that even a very small network learns
something from a few of them. Every function writes below `root`, which it makes, and returns it.
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
    """A picture (H, W, 3) of rectangles and the label of each of its pixels (H, W)."""
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
    """Write an array as a picture of the format that the name says, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (i, 255 - i, i // 2)])
    image.save(path, **({"quality": 92} if path.suffix == ".jpg" else {}))


def camvid(root: Path, images: int = 6, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """CamVid as in shared/data/camvid: `images` pictures in each of train, val and test.

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
