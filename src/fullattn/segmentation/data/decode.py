"""Decode image and mask files with Pillow.

Images become 8-bit RGB:

- the EXIF orientation is applied, as viewers and annotation tools do;
- grey is repeated in three channels; palettes become their colours; transparency is dropped;
- 16-bit grey keeps its upper 8 bits (Pillow does that itself for 16-bit colour).

Masks are read as integers: the index of a palette image, not its colour; the values of 8- or
16-bit grey; colour images only if the three channels are equal (grey saved as colour).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fullattn.segmentation.data.files import DataError

__all__ = ["image_size", "read_image", "read_labels", "read_scaled"]

_MAX_PIXELS = 2**28  # 800 MB of RGB


def read_image(path: Path) -> Tensor:
    """Read an image: uint8 (3, H, W), red, green and blue.

    Raises:
        DataError: the file is missing, truncated, not an image, or has other than 8 or 16 bits per
            channel.
    """
    with _opened(path) as image:
        return _to_tensor(_as_rgb(image, path))


def read_scaled(path: Path, longest: int) -> tuple[Tensor, tuple[int, int]]:
    """Read an image scaled down to at most `longest` pixels a side, and its (H, W) in the file."""
    with _no_pixel_limit(), _opened(path) as image:
        height, width = image_size(path)
        image.draft("RGB", (longest, longest))  # decode JPEG at 1/2, 1/4 or 1/8
        if image.width * image.height > _MAX_PIXELS:
            raise DataError(
                f"{path} has {width}x{height} pixels: expected at most {_MAX_PIXELS}; "
                "scale it down first",
                path,
            )
        scaled = _as_rgb(image, path)
        scaled.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        return _to_tensor(scaled), (height, width)


@contextmanager
def _no_pixel_limit() -> Iterator[None]:
    """Disable Pillow's own limit on the number of pixels."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _as_rgb(image: Image.Image, path: Path) -> Image.Image:
    """Convert an opened image to 8-bit RGB and apply its EXIF orientation."""
    if "exif" in image.info:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DataError(f"{path} has 32 bits per channel: expected 8 or 16", path)
    if "transparency" in image.info:  # Pillow warns if it is converted to RGB directly
        image = image.convert("RGBA")
    return image.convert("RGB")


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_labels(path: Path) -> NDArray[Any]:
    """Read a mask's labels, integers (H, W): uint8 unless the file has more than 8 bits."""
    with _opened(path) as image:
        labels, mode = np.array(image), image.mode
    if labels.dtype == np.bool_:
        labels = labels.astype(np.uint8)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path} is not a mask: expected integers, got {labels.dtype}", path)
    if labels.ndim == 3:
        colours = labels[..., :-1] if mode in ("LA", "PA", "La", "RGBA", "RGBa") else labels
        labels = colours[..., 0]
        if (colours != labels[..., None]).any():
            expected = "expected a mask of class indices"
            raise DataError(f"{path} is a colour image ({mode}): {expected}", path)
    return labels


def image_size(path: Path, oriented: bool = True) -> tuple[int, int]:
    """Read (H, W) from the file's header: `read_image`'s, or with oriented=False a mask's."""
    with _opened(path) as image:
        exif = image.getexif() if oriented and "exif" in image.info else {}
        transposed = exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        return (image.width, image.height) if transposed else (image.height, image.width)


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
        if path.is_file() and path.stat().st_size == 0:
            reason = "the file is empty"
        elif isinstance(error, UnidentifiedImageError):
            reason = "not a valid image file (Pillow cannot identify it)"
        else:
            reason = f"it is truncated or damaged ({error})"
        raise DataError(f"{path} cannot be read: {reason}", path) from error
