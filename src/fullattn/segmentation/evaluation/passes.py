"""Class probabilities of images with test-time augmentation: scales, flips and sliding windows.

- The logits of overlapping windows are averaged at each pixel.
- The logits of a pass over scaled or flipped images are resized and flipped back, and the softmax
  is taken there.
- The probabilities of all passes are averaged.

Images are scaled bilinearly with antialiasing, as in training; logits bilinearly without it; both
with align_corners=False.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PassOptions", "check_options", "segment", "starts"]


class PassOptions(TypedDict, total=False):
    """Keywords of `segment`."""

    scales: Sequence[float]
    flip: bool
    window: tuple[int, int] | None
    stride: tuple[int, int] | None


def check_options(
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> None:
    """Check the options of `segment`; raise a ValueError if one is invalid."""
    if not scales:
        raise ValueError("expected at least one scale, got none")
    for scale in scales:
        if not 0 < scale < math.inf:
            raise ValueError(f"expected scales above 0, got {scale}")
    if stride is not None and window is None:
        raise ValueError("expected a window for the stride, got none")
    for name, pair in (("window", window), ("stride", stride)):
        if pair is not None and (len(pair) != 2 or min(pair) < 1):
            raise ValueError(f"expected a {name} of two lengths of at least 1, got {pair}")
    if window and stride and (stride[0] > window[0] or stride[1] > window[1]):
        raise ValueError(
            f"a stride of {stride} over windows of {window} would leave pixels out: expected one "
            "not longer than the window"
        )


def segment(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    window: tuple[int, int] | None = None,
    stride: tuple[int, int] | None = None,
) -> Tensor:
    """Compute the probability of each class at each pixel, averaged over scales, flips and windows.

    With scale 1, no flip and no window this is `model(images).softmax(1)`. The model runs once for
    every scale, flip and window, without gradients.

    Args:
        model: maps (B, 3, h, w) of any size to logits (B, K, h, w); a network in evaluation mode.
        images: normalised, (B, 3, H, W).
        scales: factors on H and W; each is a pass over the scaled images.
        flip: whether to repeat each pass with horizontally flipped images.
        window: height and width, in pixels of the scaled images, of a sliding window, clipped to
            the images' size. None for whole images.
        stride: vertical and horizontal step of the window, not longer than the window; None for two
            thirds of it. The last window of a row or column ends at the edge.

    Returns:
        (B, K, H, W), at least float32, with sum 1 over K.

    Raises:
        ValueError: an option or an input is invalid, or the model's output has another shape or
            nan.

    Example:
        >>> model = torch.nn.Conv2d(3, 5, 1)
        >>> images = torch.randn(2, 3, 24, 32)
        >>> segment(model, images, scales=(0.5, 1.0), flip=True, window=(16, 16)).shape
        torch.Size([2, 5, 24, 32])
    """
    check_options(scales, flip, window, stride)
    if images.dim() != 4 or 0 in images.shape:
        raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(images.shape)}")
    size = images.shape[2:]
    total: Tensor | None = None
    with torch.no_grad():
        for scale in scales:
            scaled = images
            if (scaled_size := [max(1, round(side * scale)) for side in size]) != [*size]:
                scaled = F.interpolate(images, scaled_size, mode="bilinear", antialias=True)
            for flipped in (False, True) if flip else (False,):
                logits = _logits(model, scaled.flip(3) if flipped else scaled, window, stride)
                if flipped:
                    logits = logits.flip(3)
                if logits.shape[2:] != size:
                    logits = F.interpolate(logits, size, mode="bilinear")
                probabilities = logits.softmax(1)
                total = probabilities if total is None else total.add_(probabilities)
    assert total is not None
    if total.isnan().any():
        raise ValueError(
            "the network's output is nan: its weights are damaged, or the precision is too low"
        )
    return total.div_(len(scales) * (2 if flip else 1))


def starts(size: int, window: int, stride: int) -> list[int]:
    """Compute where windows of one length start along an axis, the last one ending at the edge.

    Example:
        >>> starts(10, 4, 3), starts(11, 4, 3), starts(4, 4, 3)
        ([0, 3, 6], [0, 3, 6, 7], [0])
    """
    return [*range(0, size - window, stride), size - window]


def _logits(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int] | None,
    stride: tuple[int, int] | None,
) -> Tensor:
    """Compute logits at the images' size, (B, K, H, W), at least float32."""
    if window is None:
        return _checked(model(images), images)
    height, width = map(min, window, images.shape[2:])
    down, right = stride or (max(1, length * 2 // 3) for length in window)
    total: Tensor | None = None
    seen = images.new_zeros(images.shape[2:], dtype=torch.float32)
    for top in starts(images.shape[2], height, down):
        for left in starts(images.shape[3], width, right):
            part = (..., slice(top, top + height), slice(left, left + width))
            logits = _checked(model(images[part]), images[part])
            if total is None:
                total = logits.new_zeros(*logits.shape[:2], *images.shape[2:])
            total[part] += logits
            seen[part] += 1
    assert total is not None
    return total.div_(seen)


def _checked(logits: object, images: Tensor) -> Tensor:
    """Check the model's output; return it in float32 at least."""
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"expected logits from the network, got {type(logits).__name__}; call its eval() "
            "first, if it returns auxiliary logits in training mode"
        )
    batch, _, height, width = images.shape
    if logits.dim() != 4 or (logits.shape[0], *logits.shape[2:]) != (batch, height, width):
        raise ValueError(
            f"expected logits of shape ({batch}, K, {height}, {width}), got {tuple(logits.shape)}"
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
