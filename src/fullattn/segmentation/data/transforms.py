"""Transforms of an image and its mask: normalisation and augmentation."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fullattn._text import installing
from fullattn.segmentation.data.classes import IGNORE_INDEX

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Augment", "Normalize"]

# Of images in 0..1, as most pretrained backbones expect.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Normalize:
    """Normalise an image: (image / 255 - mean) / std in each channel.

    Args:
        mean: mean of red, green and blue of images in 0..1.
        std: their standard deviation.

    Example:
        >>> image = torch.full((3, 4, 5), 255, dtype=torch.uint8)
        >>> mask = torch.zeros(4, 5, dtype=torch.uint8)
        >>> image, mask = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))(image, mask)
        >>> image.unique(), mask.dtype
        (tensor([1.]), torch.int64)
    """

    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    def __post_init__(self) -> None:
        _to_tuples(self)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return an image, uint8 (3, H, W), as float32, and its mask, uint8 (H, W), as int64."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return image.float().div_(255).sub_(mean).div_(std), mask.long()


@dataclass(frozen=True)
class Augment:
    """Random scale, crop, flip and colours, as usual in the training of segmentation networks.

    In this order: both sides are resized by one factor, uniform in `scale` (image bilinear, mask
    nearest); a random crop is taken; it is mirrored with probability `flip`; brightness (±12.5 %),
    contrast (±50 %), saturation (±50 %) and hue (±18°) change, each with probability 1/2; the image
    is normalised; a scaled image smaller than the crop is placed in it at random and padded with
    the mean colour, its mask with 255.

    Random numbers come from PyTorch's CPU generator only.

    Args:
        crop: height and width of the crop, in pixels.
        scale: smallest and largest factor.
        flip: probability that image and mask are mirrored.
        photometric: whether colours change.
        mean: mean of red, green and blue of images in 0..1.
        std: their standard deviation.
        pad: accept images that are smaller than the crop before scaling. Off by default, because
            such a crop is usually a mistake; `smallest_image` returns the largest one that fits.

    Raises:
        ValueError: an option is invalid; when called, an image is smaller than the crop and `pad`
            is off.

    Source:
        Colours: Liu et al., SSD, ECCV 2016 (arXiv 1512.02325), without the channel swap.

    Example:
        >>> image = torch.zeros(3, 40, 60, dtype=torch.uint8)
        >>> mask = torch.zeros(40, 60, dtype=torch.uint8)
        >>> image, mask = Augment(crop=(32, 32))(image, mask)
        >>> image.shape, mask.shape
        (torch.Size([3, 32, 32]), torch.Size([32, 32]))
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    photometric: bool = True
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    pad: bool = False

    def __post_init__(self) -> None:
        _to_tuples(self)
        if len(self.crop) != 2 or not all(isinstance(n, int) and n > 0 for n in self.crop):
            raise ValueError(f"expected a positive height and width for crop, got {self.crop}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"expected scale with 0 < smallest <= largest, got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"expected a probability for flip, got {self.flip}")

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Augment an image, uint8 (3, H, W), and its mask, uint8 (H, W).

        They become float32 (3, *crop) and int64 crop, 255 in the padding.
        """
        height, width = image.shape[1:]
        if not self.pad and (height < self.crop[0] or width < self.crop[1]):
            raise ValueError(
                f"an image of {height}×{width} (height × width) is smaller than the crop "
                f"{self.crop[0]}×{self.crop[1]}; use a smaller crop, or pad=True"
            )
        factor = torch.empty(()).uniform_(*self.scale).item()
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
        v2, tensors = _torchvision()
        image = v2.functional.resize(image, size, antialias=True)
        # v2's default for masks, NEAREST, is shifted against the bilinear image by up to a pixel.
        nearest = v2.InterpolationMode.NEAREST_EXACT
        mask = v2.functional.resize(mask[None], size, interpolation=nearest)[0]
        rows, above, below = _random_placement(size[0], self.crop[0])
        columns, left, right = _random_placement(size[1], self.crop[1])
        image, mask = _pipeline(self.flip, self.photometric)(
            tensors.Image(image[:, rows, columns]), tensors.Mask(mask[rows, columns])
        )
        normalize = Normalize(self.mean, self.std)
        image, mask = normalize(image.as_subclass(Tensor), mask.as_subclass(Tensor))
        padding = (left, right, above, below)
        # The mean colour is 0 after normalisation.
        return F.pad(image, padding), F.pad(mask, padding, value=IGNORE_INDEX)


def _random_placement(length: int, crop: int) -> tuple[slice, int, int]:
    """Return a random crop of an axis, and the padding before and after it."""
    start = int(torch.randint(abs(length - crop) + 1, ()))
    if length >= crop:
        return slice(start, start + crop), 0, 0
    return slice(None), start, crop - length - start


def _to_tuples(options: Normalize | Augment) -> None:
    """Convert lists, as configuration files have, to tuples, and check mean and std."""
    for name in ("crop", "scale", "mean", "std"):
        if hasattr(options, name):
            object.__setattr__(options, name, tuple(getattr(options, name)))
    if len(options.mean) != 3 or len(options.std) != 3 or min(options.std) <= 0:
        raise ValueError(
            f"expected three numbers for mean and std, std positive, got {options.mean} and "
            f"{options.std}"
        )


def _torchvision() -> Any:
    """Import torchvision's v2 and tv_tensors on use, so that the classes above can be pickled."""
    try:
        modules = ("torchvision.transforms.v2", "torchvision.tv_tensors")
        return tuple(map(importlib.import_module, modules))
    except ImportError as error:
        raise ImportError(
            f"augmentation needs torchvision: {installing('data')} ({error})"
        ) from error


@functools.cache
def _pipeline(flip: float, photometric: bool) -> Any:
    v2, _ = _torchvision()
    changes = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}
    jitters = [v2.RandomApply([v2.ColorJitter(**{name: by})], 0.5) for name, by in changes.items()]
    return v2.Compose([v2.RandomHorizontalFlip(flip), *(jitters if photometric else ())])
