"""Names, colours and groups of classes, of known datasets and from a folder's class list.

`classes/*.json` beside this module hold the known ones, in the form of CamVid's classes.json with
two groups added:

- "thin": classes whose regions, or parts of them, are a few pixels across (poles, signs, distant
  people, railings, bicycles).
- "large": the classes that fill most of an image (road, sky, building, wall).

The groups of Cityscapes are analogous to CamVid's. ADE20K's large group is the ten background
classes with most pixels in its published table; its thin group is the lamps, poles, rails and
columns among its 150. VOC has objects only: thin are those with thin parts, large those that fill
the image.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fullattn.segmentation.data.files import DataError

__all__ = ["IGNORE_INDEX", "STRAY", "Classes", "colour", "known", "numbered", "read"]

# Train ids are bytes: 255 is ignored, 254 marks an invalid label, the classes are below.
IGNORE_INDEX = 255
STRAY = 254

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Classes:
    """The classes of a dataset, in the order of their indices.

    Args:
        names: names of the classes.
        palette: (red, green, blue) of each, 0 to 255.
        groups: names of classes by the name of their group.
        void: the label in the masks that is ignored, beside 255.

    Raises:
        ValueError: a name is empty or repeated, a group has an unknown class, or a number is out
            of range.
    """

    names: tuple[str, ...]
    palette: tuple[Colour, ...]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    void: int = IGNORE_INDEX

    def __post_init__(self) -> None:
        if not 1 <= len(self.names) <= STRAY:
            raise ValueError(f"expected 1 to {STRAY} classes, got {len(self.names)}")
        if not all(isinstance(name, str) and name for name in self.names):
            raise ValueError(f"expected a name for every class, got {list(self.names)}")
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"expected distinct class names, got {repeated[0]!r} twice")
        for group, members in self.groups.items():
            if unknown := [member for member in members if member not in self.names]:
                raise ValueError(f"group {group!r} has an unknown class {unknown[0]!r}")
        if not isinstance(self.void, int) or not 0 <= self.void <= 255:
            raise ValueError(f"expected an ignore_index of 0 to 255, got {self.void!r}")

    def table(
        self, labels: Sequence[int] | None = None, ignored: Sequence[int] = ()
    ) -> NDArray[np.uint8]:
        """Return the train id of every label: uint8 (256,), 255 for ignored, 254 for invalid ones.

        Args:
            labels: the label of each class; None if the labels are the indices of the classes, and
                `void` and 255 are ignored.
            ignored: the labels that are ignored beside them.
        """
        if labels is None:
            labels, ignored = range(len(self.names)), (self.void, IGNORE_INDEX, *ignored)
        table = np.full(256, STRAY, np.uint8)
        table[list(labels)] = range(len(labels))
        table[list(ignored)] = IGNORE_INDEX
        return table


def known(name: str) -> Classes:
    """Return the classes of "ade20k", "camvid", "cityscapes" or "voc".

    Example:
        >>> known("camvid").groups["thin"]
        ('Pole', 'SignSymbol', 'Pedestrian')
    """
    file = resources.files("fullattn.segmentation.data") / "classes" / f"{name}.json"
    return _from_json(json.loads(file.read_text("utf-8")))


def numbered(count: int) -> Classes:
    """Return classes named "0", "1", … in the colours of VOC's colour map."""
    return _in_vocs_colours(map(str, range(count)))


def read(path: Path) -> Classes:
    """Read a JSON file in the form of CamVid's classes.json, or a text file of one name a line.

    In JSON "ignore_index", "groups" and colours are optional. Another form raises a DataError.
    """
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".json":
            return _from_json(json.loads(text))
        return _in_vocs_colours(line.strip() for line in text.splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a class list: {error}", path) from error
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            f'{path} is not a class list: expected {{"classes": [{{"index": 0, "name": …, '
            f'"color": [red, green, blue]}}, …]}}',
            path,
        ) from error


def colour(index: int) -> Colour:
    """Return a class's (red, green, blue) in VOC's colour map, which interleaves the index's bits.

    Example:
        >>> colour(1)
        (128, 0, 0)
    """
    bits = [index >> bit & 1 for bit in range(9)]  # bit 3k + c becomes bit 7 - k of channel c
    red, green, blue = (128 * bits[c] + 64 * bits[c + 3] + 32 * bits[c + 6] for c in range(3))
    return red, green, blue


def _in_vocs_colours(names: Iterable[str]) -> Classes:
    names = tuple(names)
    return Classes(names, tuple(map(colour, range(len(names)))))


def _from_json(content: dict[str, Any]) -> Classes:
    listed = sorted(content["classes"], key=lambda entry: int(entry["index"]))
    if (indices := [entry["index"] for entry in listed]) != list(range(len(listed))):
        raise ValueError(f"expected the indices 0, 1, 2, … once each, got {indices}")
    return Classes(
        tuple(entry["name"] for entry in listed),
        tuple(_colour(entry) for entry in listed),
        {name: tuple(members) for name, members in content.get("groups", {}).items()},
        content.get("ignore_index", IGNORE_INDEX),
    )


def _colour(entry: dict[str, Any]) -> Colour:
    match entry.get("color", colour(entry["index"])):
        case (int(red), int(green), int(blue)) if all(0 <= n <= 255 for n in (red, green, blue)):
            return red, green, blue
    raise ValueError(f"expected a colour of three integers 0 to 255 for {entry['name']!r}")
