"""Names, colours and groups of classes: those of the known data sets, and those in a folder's list.

`classes/*.json` beside this module hold the known ones, in the form of CamVid's classes.json with
the groups added. Two groups let a comparison look where the layers are said to differ:

- "thin": classes whose regions are a few pixels across or have such parts (poles, signs, people
  far away, railings, bicycles): few of their pixels are far from another class.
- "large": the classes that fill most of a picture (road, sky, building, wall).

CamVid's groups come first; Cityscapes' are the same kinds of things. ADE20K's large group is the
ten background classes with most pixels in its published table; its thin group is the lamps, poles,
rails and columns among its 150. VOC has objects only: thin are those with thin parts, large those
that fill the picture.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullattn.segmentation.data.errors import DataError

__all__ = ["IGNORE_INDEX", "STRAY", "Classes", "colour", "known", "numbered", "read"]

IGNORE_INDEX = 255
# Train ids are bytes: 255 is ignored, 254 marks a label that the data set does not have, and the
# classes are below.
STRAY = 254

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their indices.

    Args:
        names: of the classes.
        palette: (red, green, blue) of each, 0 to 255.
        groups: names of classes by the name of their group.
        void: the label in the files that means ignored.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    void: int = IGNORE_INDEX

    def table(self) -> NDArray[np.uint8]:
        """The train id of every label, for files whose labels are the indices of the classes.

        Returns:
            uint8 (256,): 255 for `void` and 255, 254 for labels that there must not be.
        """
        table = np.full(256, STRAY, np.uint8)
        table[: len(self.names)] = range(len(self.names))
        table[[self.void, IGNORE_INDEX]] = IGNORE_INDEX
        return table


def known(name: str) -> Classes:
    """The classes of a data set that has a file in this package.

    Args:
        name: "ade20k", "camvid", "cityscapes" or "voc".

    Returns:
        Its classes with the groups "thin" and "large".

    Example:
        >>> known("camvid").groups["thin"]
        ('Pole', 'SignSymbol', 'Pedestrian')
    """
    text = (
        resources.files("fullattn.segmentation.data")
        .joinpath("classes", f"{name}.json")
        .read_text("utf-8")
    )
    return _from_json(json.loads(text))


def numbered(count: int) -> Classes:
    """Classes that nobody named: "0", "1", … in the colours of VOC's colour map.

    Args:
        count: how many.

    Returns:
        The classes.
    """
    return Classes(tuple(map(str, range(count))), tuple(map(colour, range(count))))


def read(path: Path) -> Classes:
    """Read a list of classes.

    Args:
        path: a JSON file in the form of CamVid's classes.json ({"classes": [{"index", "name",
            "color"}, …]}, and if wanted "ignore_index" and "groups"; colours may be left out), or
            a text file with one name a line.

    Returns:
        The classes.

    Raises:
        DataError: the file is not of that form.
    """
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            return _from_json(json.loads(text))
        names = [line.strip() for line in text.splitlines() if line.strip()]
        return _checked(Classes(tuple(names), tuple(map(colour, range(len(names))))))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no list of classes: {error}", path) from error
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f'{path} is no list of classes: expected {{"classes": [{{"index": 0, "name": …, '
            f'"color": [red, green, blue]}}, …]}}',
            path,
        ) from error


def colour(index: int) -> Colour:
    """A class's colour in VOC's colour map, which spreads the bits of the index over the channels.

    Args:
        index: of the class, 0 to 255.

    Returns:
        (red, green, blue), 0 to 255.

    Example:
        >>> colour(1)
        (128, 0, 0)
    """
    red = green = blue = 0
    for bit in range(7, -1, -1):
        red |= (index & 1) << bit
        green |= (index >> 1 & 1) << bit
        blue |= (index >> 2 & 1) << bit
        index >>= 3
    return red, green, blue


def _from_json(content: dict[str, Any]) -> Classes:
    listed = sorted(content["classes"], key=lambda entry: int(entry["index"]))
    indices = [entry["index"] for entry in listed]
    if indices != list(range(len(listed))):
        raise ValueError(f"expected the indices 0, 1, 2, … once each, got {indices}")
    groups = {name: tuple(members) for name, members in content.get("groups", {}).items()}
    return _checked(
        Classes(
            tuple(entry["name"] for entry in listed),
            tuple(_colour(entry) for entry in listed),
            groups,
            content.get("ignore_index", IGNORE_INDEX),
        )
    )


def _colour(entry: dict[str, Any]) -> Colour:
    match entry.get("color", colour(entry["index"])):
        case (int(red), int(green), int(blue)) if all(0 <= n <= 255 for n in (red, green, blue)):
            return red, green, blue
    raise ValueError(f"expected a colour of three whole numbers 0 to 255 for {entry['name']!r}")


def _checked(classes: Classes) -> Classes:
    names = classes.names
    if not 1 <= len(names) <= STRAY:
        raise ValueError(f"expected 1 to {STRAY} classes, got {len(names)}")
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"expected a name for every class, got {list(names)}")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two classes have the name {repeated[0]!r}")
    for group, members in classes.groups.items():
        if strangers := [member for member in members if member not in names]:
            raise ValueError(f"group {group!r} names no class of the list: {strangers[0]!r}")
    if not isinstance(classes.void, int) or not 0 <= classes.void <= 255:
        raise ValueError(f"expected an ignore_index of 0 to 255, got {classes.void!r}")
    return classes
