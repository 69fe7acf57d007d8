"""Images of labels: an overlay of colours with a legend, and a palette image of class indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["overlay", "palette_image"]

_TEXT, _EDGE = "#222222", "#888888"
_MIN_FONT_SIZE = 12  # pixels; smaller letters are not legible


def overlay(
    image: Tensor,
    labels: Tensor,
    palette: Sequence[Sequence[int]],
    classes: Sequence[str],
    alpha: float = 0.5,
) -> Image:
    """Blend an image with the colours of its classes and add a legend with their shares below.

    Args:
        image: uint8, (3, H, W).
        labels: class indices, (H, W); pixels without a valid index keep their colour.
        palette: (red, green, blue) from 0 to 255 of each class.
        classes: names of the classes.
        alpha: opacity of the colours, 0 to 1.

    Returns:
        An RGB image of at least (H, W) with the given one at its top left.

    Raises:
        ValueError: alpha is out of range, or shapes or counts do not match.

    Example:
        >>> image = torch.zeros(3, 20, 30, dtype=torch.uint8)
        >>> labels = torch.ones(20, 30, dtype=torch.uint8)
        >>> overlay(image, labels, [(0, 0, 0), (100, 200, 50)], ["Road", "Tree"]).getpixel((0, 0))
        (50, 100, 25)
    """
    from PIL import Image

    if not 0 <= alpha <= 1:
        raise ValueError(f"expected alpha from 0 to 1, got {alpha}")
    if len(palette) != len(classes):
        raise ValueError(
            f"expected a colour for each of {len(classes)} classes, got {len(palette)}"
        )
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[0] != 3:
        raise ValueError(
            f"expected a uint8 image (3, H, W), got {image.dtype} {tuple(image.shape)}"
        )
    if labels.shape != image.shape[1:]:
        raise ValueError(
            f"expected labels of shape {tuple(image.shape[1:])}, got {tuple(labels.shape)}"
        )
    labels = labels.long()
    known = (labels >= 0) & (labels < len(classes))
    colours = torch.tensor([list(colour) for colour in palette], dtype=torch.float32)
    pixels = image.permute(1, 2, 0).clone()
    blended = (1 - alpha) * pixels[known] + alpha * colours[labels[known]]
    pixels[known] = blended.round().to(torch.uint8)
    shares = (torch.bincount(labels[known], minlength=len(classes)) / labels.numel()).tolist()
    entries = [
        (f"{name} {'<1%' if share < 0.01 else f'{share:.0%}'}", tuple(colour))
        for name, colour, share in zip(classes, palette, shares, strict=True)
        if share
    ]
    return _above_legend(Image.fromarray(pixels.numpy()), entries)


def palette_image(labels: Tensor, palette: Sequence[Sequence[int]]) -> Image:
    """Convert labels (H, W) to an image of mode "P", as PASCAL VOC's masks; invalid ones are black.

    Example:
        >>> palette_image(torch.tensor([[0, 1]]), [(0, 0, 0), (100, 200, 50)]).getpixel((1, 0))
        1
    """
    from PIL import Image

    # With fewer than 256 colours Pillow writes fewer bits, and 255 becomes another index.
    image = Image.fromarray(labels.to(torch.uint8).numpy())
    image.putpalette(b"".join(map(bytes, palette)).ljust(3 * 256, b"\0"))
    return image


def _above_legend(image: Image, entries: Sequence[tuple[str, tuple[int, ...]]]) -> Image:
    """Draw the image on white and the entries below it, in as many lines as needed."""
    from PIL import Image, ImageDraw, ImageFont

    letters = max(_MIN_FONT_SIZE, image.height // 40)
    font = ImageFont.load_default(letters)
    widths = [letters * 3 + round(font.getlength(text)) for text, _ in entries]
    width = max([image.width, *(letters + width for width in widths)])
    places = []
    x, y = letters, image.height + letters
    for wide in widths:
        if x + wide > width and x > letters:
            x, y = letters, y + 2 * letters
        places.append((x, y))
        x += wide
    sheet = Image.new("RGB", (width, y + 2 * letters), "white")
    sheet.paste(image)
    draw = ImageDraw.Draw(sheet)
    for (text, colour), (left, top) in zip(entries, places, strict=True):
        draw.rectangle((left, top, left + letters, top + letters), colour, _EDGE)
        draw.text((left + letters * 3 // 2, top), text, _TEXT, font)
    return sheet
