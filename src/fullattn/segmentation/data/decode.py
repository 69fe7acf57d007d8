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
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fullattn.segmentation.data.files import DataError

__all__ = ["image_size", "mask_size", "read_image", "read_labels", "read_scaled"]

_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSED = (5, 6, 7, 8)  # its values that exchange height and width
_MAX_PIXELS = 2**28  # 800 MB of RGB


def read_image(path: Path) -> Tensor:
    """Read an image.

    Args:
        path: the file.

    Returns:
        uint8 (3, H, W), red, green and blue.

    Raises:
        DataError: the file is missing, truncated, not an image, or has other than 8 or 16 bits per
            channel.
    """
    with _opened(path) as image:
        return _to_tensor(_as_rgb(image, path))


def read_scaled(path: Path, longest: int) -> tuple[Tensor, tuple[int, int]]:
    """Read an image and scale it down so that no side exceeds `longest` pixels.

    Returns:
        uint8 (3, H, W), and the height and width in the file, which may exceed Pillow's limit.

    Raises:
        DataError: as `read_image`, or the image has too many pixels.
    """
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
    """Read a mask's labels, integers (H, W): uint8 unless the file has more than 8 bits.

    Raises:
        DataError: the file is missing, truncated, not an image, or in colour.
    """
    with _opened(path) as image:
        labels = np.array(image)
        mode = image.mode
    if labels.dtype == np.bool_:
        labels = labels.astype(np.uint8)
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{path} is not a mask: expected integers, got {labels.dtype}", path)
    if labels.ndim == 3:
        alpha = mode in ("LA", "PA", "La", "RGBA", "RGBa")
        colours = labels[..., :-1] if alpha else labels
        labels = colours[..., 0]
        if (colours != labels[..., None]).any():
            raise DataError(
                f"{path} is a colour image ({mode}): expected a mask of class indices",
                path,
            )
    return labels


def image_size(path: Path) -> tuple[int, int]:
    """Read (H, W) of `read_image`'s result from the file's header.

    Raises:
        DataError: the file is missing or not an image.
    """
    with _opened(path) as image:
        width, height = image.size
        transposed = "exif" in image.info and image.getexif().get(_ORIENTATION) in _TRANSPOSED
    return (width, height) if transposed else (height, width)


def mask_size(path: Path) -> tuple[int, int]:
    """Read the height and width (H, W) of a mask from the file's header, as `image_size`."""
    with _opened(path) as image:
        return image.height, image.width


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
        return "not a valid image file (Pillow cannot identify it)"
    return f"it is truncated or damaged ({error})"
