"""Files to tensors, with Pillow.

Pictures become 8-bit RGB whatever they were:

- turned as their EXIF orientation says, as viewers and annotation tools do;
- grey is repeated in three channels; palettes become their colours; transparency is dropped;
- 16-bit grey keeps its upper 8 bits (Pillow does that itself for 16-bit colour).

Masks are read as numbers: the index of a palette picture, not its colour; the values of 8- or
16-bit grey; colour pictures only where the three channels agree, which is grey saved as colour.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fullattn.segmentation.data.errors import DataError

__all__ = ["image_size", "mask_size", "read_image", "read_labels", "read_scaled"]

_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that exchange height and width
_MOST_PIXELS = 2**28  # that are decoded at once: 800 MB of RGB


def read_image(path: Path) -> Tensor:
    """Read a picture.

    Args:
        path: of the file.

    Returns:
        uint8 (3, H, W), red, green and blue.

    Raises:
        DataError: the file is missing, truncated, no picture, or of numbers that are not 8 or 16
            bit wide.
    """
    with _opened(path) as image:
        return _to_tensor(_as_rgb(image, path))


def read_scaled(path: Path, longest: int) -> tuple[Tensor, tuple[int, int]]:
    """Read a picture, scaled down where a side is longer than what is wanted.

    Args:
        path: of the file, which may be larger than Pillow reads by itself.
        longest: the longest that a side may be, in pixels.

    Returns:
        uint8 (3, H, W), and the height and width that the picture had.

    Raises:
        DataError: as `read_image`, or the picture has too many pixels to be decoded.
    """
    with _any_size(), _opened(path) as image:
        height, width = image_size(path)
        image.draft("RGB", (longest, longest))  # JPEG is decoded at 1/2, 1/4 or 1/8 where it can be
        if image.width * image.height > _MOST_PIXELS:
            raise DataError(
                f"{path} has {width}x{height} pixels, too many to be read; scale it down first",
                path,
            )
        picture = _as_rgb(image, path)
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return _to_tensor(picture), (height, width)


@contextmanager
def _any_size() -> Iterator[None]:
    """Without Pillow's own limit on the number of pixels."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    """An opened picture in 8-bit RGB, turned as its EXIF orientation says."""
    if "exif" in image.info:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{path} has pixels of 32 bits; expected 8 or 16", path)
    if "transparency" in image.info:  # straight to RGB Pillow would warn
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_labels(path: Path) -> NDArray[Any]:
    """Read a mask's numbers as they are in the file.

    Args:
        path: of the file.

    Returns:
        Integers (H, W): uint8 unless the file has more than 8 bits.

    Raises:
        DataError: the file is missing, truncated, no picture, or a picture in colours.
    """
    with _opened(path) as image:
        labels = np.array(image)
        mode = image.mode
    if labels.dtype == np.bool_:
        labels = labels.astype(np.uint8)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path} is no mask: its pixels are {labels.dtype}, not integers", path)
    if labels.ndim == 3:
        alpha = mode in ("LA", "PA", "La", "RGBA", "RGBa")
        colours = labels[..., :-1] if alpha else labels
        labels = colours[..., 0]
        if (colours != labels[..., None]).any():
            raise DataError(
                f"{path} is a picture in colours ({mode}); expected a mask with the index of a "
                "class in each pixel",
                path,
            )
    return labels


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture as `read_image` gives it, from the head of the file alone.

    Args:
        path: of the file.

    Returns:
        (H, W) in pixels.

    Raises:
        DataError: the file is missing or no picture.
    """
    with _opened(path) as image:
        width, height = image.size
        turned = "exif" in image.info and image.getexif().get(_ORIENTATION) in _TURNED
    return (width, height) if turned else (height, width)


def mask_size(path: Path) -> tuple[int, int]:
    """Height and width of a mask, from the head of the file alone.

    Args:
        path: of the file.

    Returns:
        (H, W) in pixels.

    Raises:
        DataError: the file is missing or no picture.
    """
    with _opened(path) as image:
        width, height = image.size
    return height, width


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist", path) from error
    except Exception as error:  # a damaged file makes its decoder raise anything
        raise DataError(f"{path} cannot be read: {_reason(path, error)}", path) from error


def _reason(path: Path, error: Exception) -> str:
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture of a format that Pillow knows, or damaged at its beginning"
    return f"it is truncated or damaged ({error})"
