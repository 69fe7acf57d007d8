"""Shapes of feature maps: how they are written, the common ones by name, and sweeps over them."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from fullattn._cli.errors import UsageError

__all__ = [
    "DEFAULT_BUDGET",
    "DEFAULT_SHAPES",
    "NAMED",
    "Shape",
    "SweepAxis",
    "parse_shape",
    "sweep_shapes",
]

SweepAxis = Literal["resolution", "channels"]


class Shape(NamedTuple):
    """Shape of a batch of feature maps; written 512x97x97, or 4x128x64x64 for a batch of 4."""

    batch: int
    channels: int
    height: int
    width: int

    def __str__(self) -> str:
        sizes = self if self.batch != 1 else self[1:]
        return "x".join(map(str, sizes))


NAMED: dict[str, tuple[Shape, str]] = {
    "voc-769": (Shape(1, 512, 97, 97), "A 769 crop at output stride 8, the paper's setting."),
    "voc-513": (Shape(1, 512, 65, 65), "A 513 crop at output stride 8."),
    "65": (Shape(1, 512, 65, 65), "Short for voc-513."),
    "97": (Shape(1, 512, 97, 97), "Short for voc-769."),
    "ade-512": (Shape(1, 512, 64, 64), "A 512 crop at output stride 8."),
    "cityscapes-768": (Shape(1, 512, 96, 96), "A 768 crop of Cityscapes at output stride 8."),
    "cityscapes": (Shape(1, 512, 128, 256), "A full Cityscapes frame at output stride 8."),
    "batch": (Shape(4, 128, 64, 64), "Four images of a small head."),
    "small": (Shape(1, 64, 16, 16), "A small map, where overhead counts most."),
}

# What `fullattn bench` runs when no shape is given, and how many seconds the shapes share: all rows
# are measured in that time on two slow cores. Training at the paper's size alone would take longer.
DEFAULT_SHAPES: list[tuple[str, tuple[Literal["inference", "training"], ...]]] = [
    ("512x97x97", ("inference",)),
    ("4x128x64x64", ("inference", "training")),
]
DEFAULT_BUDGET = 120.0


def parse_shape(text: str) -> Shape:
    """Read a shape.

    Args:
        text: CxHxW, BxCxHxW or a name of `NAMED`.

    Returns:
        The shape, with a batch of 1 where none is given.

    Raises:
        UsageError: text is none of these.

    Example:
        >>> parse_shape("512x97x97")
        Shape(batch=1, channels=512, height=97, width=97)
    """
    if text in NAMED:
        return NAMED[text][0]
    parts = text.lower().split("x")
    sizes = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(sizes) != len(parts) or len(sizes) not in (3, 4) or 0 in sizes:
        raise UsageError(
            f"expected a shape CxHxW or BxCxHxW of positive numbers, such as 512x97x97, "
            f"or one of {', '.join(NAMED)}, got {text!r}"
        )
    if math.prod(sizes) >= 2**63:
        raise UsageError(
            f"expected a shape of fewer than 2**63 elements, got {text!r}: {math.prod(sizes):.3g}"
        )
    return Shape(*([1] * (4 - len(sizes)) + sizes))


def sweep_shapes(largest: Shape, axis: SweepAxis) -> list[Shape]:
    """List the shapes of a sweep that ends at `largest`.

    Args:
        largest: the last shape.
        axis: "resolution" scales H and W together by 1/4, 3/8, 1/2, 3/4 and 1; "channels" scales C
            by 1/8, 1/4, 1/2, 3/4 and 1.

    Returns:
        Shapes in growing order, each once.

    Example:
        >>> [str(shape) for shape in sweep_shapes(Shape(1, 64, 32, 32), "resolution")]
        ['64x8x8', '64x12x12', '64x16x16', '64x24x24', '64x32x32']
    """
    if axis == "channels":
        eighths = (1, 2, 4, 6, 8)
        shapes = [largest._replace(channels=max(1, largest.channels * n // 8)) for n in eighths]
    else:
        shapes = [
            largest._replace(
                height=max(1, largest.height * n // 8), width=max(1, largest.width * n // 8)
            )
            for n in (2, 3, 4, 6, 8)
        ]
    return list(dict.fromkeys(shapes))
