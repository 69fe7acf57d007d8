"""What happens to an image and its mask between the file and the network."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fullattn.segmentation.data.classes import IGNORE_INDEX

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Augment", "Normalize"]

# Of images in 0..1: what most pretrained backbones were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Numbers = tuple[float, float, float]


@dataclass(frozen=True)
class Normalize:
    """(image / 255 - mean) / std in each channel, and nothing random.

    Args:
        mean: of red, green and blue of images in 0..1.
        std: of the same.

    Example:
        >>> image = torch.full((3, 4, 5), 255, dtype=torch.uint8)
        >>> mask = torch.zeros(4, 5, dtype=torch.uint8)
        >>> image, mask = Normalize(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))(image, mask)
        >>> image.unique(), mask.dtype
        (tensor([1.]), torch.int64)
    """

    mean: Numbers = IMAGENET_MEAN
    std: Numbers = IMAGENET_STD

    def __post_init__(self) -> None:
        _as_numbers(self)

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Apply it.

        Args:
            image: uint8 (3, H, W).
            mask: uint8 (H, W).

        Returns:
            float32 (3, H, W) and int64 (H, W).
        """
        mean = torch.tensor(self.mean)[:, None, None]
        std = torch.tensor(self.std)[:, None, None]
        return image.float().div_(255).sub_(mean).div_(std), mask.long()


@dataclass(frozen=True)
class Augment:
    """Random scale, crop, flip and colours, as segmentation networks are usually trained.

    In this order: both sides are resized by one factor, uniform in `scale` (image bilinear, mask
    nearest); a window of the crop's size is cut anywhere; it is mirrored with probability `flip`;
    brightness (±12.5 %), contrast (±50 %), saturation (±50 %) and hue (±18°) change, each with
    probability 1/2; the image is normalised; what is smaller than the crop is put anywhere in it,
    with the mean colour around the image and 255 around the mask.

    The random numbers are those of PyTorch's generator of the CPU, and no others.

    Args:
        crop: height and width of the window, in pixels.
        scale: smallest and largest factor.
        flip: probability that image and mask are mirrored.
        photometric: whether colours change.
        mean: of red, green and blue of images in 0..1.
        std: of the same.
        pad: take images that are smaller than the crop before they are scaled, too. Off by
            default, because such a crop is more often a mistake. `smallest_image` tells beforehand.

    Raises:
        ValueError: an option does not fit; when called, an image smaller than the crop without
            `pad`.

    Source:
        Colours: Liu et al., SSD, ECCV 2016 (arXiv 1512.02325), without the exchange of channels.

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
    mean: Numbers = IMAGENET_MEAN
    std: Numbers = IMAGENET_STD
    pad: bool = False

    def __post_init__(self) -> None:
        _as_numbers(self)
        if len(self.crop) != 2 or not all(isinstance(n, int) and n > 0 for n in self.crop):
            raise ValueError(f"crop must be a positive height and width, got {self.crop}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale must be 0 < smallest <= largest, got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must be a probability, got {self.flip}")

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Apply it.

        Args:
            image: uint8 (3, H, W).
            mask: uint8 (H, W).

        Returns:
            float32 (3, *crop) and int64 crop, 255 where nothing is known.
        """
        height, width = image.shape[1:]
        if not self.pad and (height < self.crop[0] or width < self.crop[1]):
            raise ValueError(
                f"an image of {height}×{width} (height × width) is smaller than the crop "
                f"{self.crop[0]}×{self.crop[1]}; choose a smaller crop, or pad=True"
            )
        factor = torch.empty(()).uniform_(*self.scale).item()
        size = [max(1, round(height * factor)), max(1, round(width * factor))]
        image, mask = _resized(image, mask, size)
        top, above = _placed(size[0], self.crop[0])
        left, before = _placed(size[1], self.crop[1])
        rows, columns = slice(top, top + self.crop[0]), slice(left, left + self.crop[1])
        image, mask = _recoloured(image[:, rows, columns], mask[rows, columns], self)
        image, mask = Normalize(self.mean, self.std)(image, mask)
        below = self.crop[0] - above - mask.shape[0]
        behind = self.crop[1] - before - mask.shape[1]
        margins = (before, behind, above, below)
        # The mean colour is 0 by now.
        return F.pad(image, margins), F.pad(mask, margins, value=IGNORE_INDEX)


def _placed(length: int, crop: int) -> tuple[int, int]:
    """Where the window begins in the image and where the image begins in the window, by chance."""
    place = int(torch.randint(abs(length - crop) + 1, ()))
    return (place, 0) if length >= crop else (0, place)


def _as_numbers(options: Normalize | Augment) -> None:
    """Tuples in place of the lists that come out of files, so that the options are hashable."""
    for name in ("crop", "scale", "mean", "std"):
        if hasattr(options, name):
            object.__setattr__(options, name, tuple(getattr(options, name)))
    if len(options.mean) != 3 or len(options.std) != 3 or min(options.std) <= 0:
        raise ValueError(
            f"mean and std must be three numbers, std positive, got {options.mean}, {options.std}"
        )


def _torchvision(module: str) -> Any:
    """Import a module of torchvision where it is used: the classes above must be picklable."""
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ImportError as error:
        raise ImportError(
            f"augmentation needs torchvision: pip install 'fullattn[data]' ({error})"
        ) from error


def _resized(image: Tensor, mask: Tensor, size: list[int]) -> tuple[Tensor, Tensor]:
    v2 = _torchvision("transforms.v2")
    # Not v2's own for masks, whose nearest pixel is up to a pixel off the image's bilinear one.
    nearest = v2.InterpolationMode.NEAREST_EXACT
    return (
        v2.functional.resize(image, size, antialias=True),
        v2.functional.resize(mask[None], size, interpolation=nearest)[0],
    )


def _recoloured(image: Tensor, mask: Tensor, options: Augment) -> tuple[Tensor, Tensor]:
    """Mirrored and in other colours, each by chance."""
    tensors = _torchvision("tv_tensors")
    image, mask = _pipeline(options.flip, options.photometric)(
        tensors.Image(image), tensors.Mask(mask)
    )
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


@functools.cache
def _pipeline(flip: float, photometric: bool) -> Any:
    v2 = _torchvision("transforms.v2")
    steps = [v2.RandomHorizontalFlip(flip)]
    if photometric:
        changes = {"brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05}
        steps += [
            v2.RandomApply([v2.ColorJitter(**{name: change})], 0.5)
            for name, change in changes.items()
        ]
    return v2.Compose(steps)
