"""Inputs of measurements: noise, or a photograph through a random stem."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullattn._cli.conditions import Conditions, available_bytes
from fullattn._cli.errors import UsageError, describe
from fullattn._cli.shapes import Shape

__all__ = [
    "check_fits",
    "check_image",
    "feature_map",
    "noise",
    "photograph",
    "random_like",
    "through_stem",
]

_STRIDE = 8  # of the stem: three convolutions of stride 2


def feature_map(shape: Shape, conditions: Conditions) -> Tensor:
    """Make the input of a layer, the same for every implementation.

    Args:
        shape: (B, C, H, W).
        conditions: image or noise, seed, dtype, device and memory format.

    Returns:
        The feature map, without gradient.

    Raises:
        UsageError: the image cannot be read.
    """
    if conditions.image is None:
        x = noise(shape, conditions.seed)
    else:
        larger = shape._replace(height=shape.height * _STRIDE, width=shape.width * _STRIDE)
        x = through_stem(photograph(conditions.image, larger), shape.channels, conditions.seed)
    return conditions.placed_tensor(x)


def random_like(x: Tensor, seed: int) -> Tensor:
    """Draw normal noise like x: the gradient of the output."""
    return torch.empty_like(x).copy_(noise(Shape(*x.shape), seed + 1))


def noise(shape: Shape, seed: int) -> Tensor:
    """Draw normal noise, float32 on the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_fits(shape: Shape, parameters: int = 0) -> None:
    """Raise UsageError where an input or parameters, with gradients, exceed the free memory.

    Args:
        shape: of the input.
        parameters: elements of a layer's parameters.
    """
    free = available_bytes()
    for what, elements in (("input", math.prod(shape)), ("parameters", parameters)):
        needed = 2 * 4 * elements
        if free is not None and needed > free:
            raise UsageError(
                f"expected shapes whose {what} and gradient fit into the {free / 2**30:.1f} GiB of "
                f"free memory, got {shape}, which needs {needed / 2**30:.1f} GiB"
            )


def check_image(path: str) -> None:
    """Raise UsageError unless the file at `path` is an image that can be read."""
    photograph(path, Shape(1, 3, 8, 8))


def photograph(path: str, shape: Shape) -> Tensor:
    """Read an image file as a batch.

    Args:
        path: of the file.
        shape: (B, 3, H, W) that the image is scaled to.

    Returns:
        (B, 3, H, W) of mean 0 and deviation 1; every image of the batch is shifted further to the
        side.

    Raises:
        UsageError: the file cannot be read as an image.
    """
    import numpy as np
    from PIL import Image

    size = (shape.width, shape.height)
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or describe(error)
        raise UsageError(f"expected an image that can be read at {path!r}: {reason}") from error
    x = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
    x = (x - x.mean()) / x.std().clamp(min=1e-3)
    shift = size[0] // shape.batch
    return torch.stack([x.roll(n * shift, dims=2) for n in range(shape.batch)])


def through_stem(images: Tensor, channels: int, seed: int) -> Tensor:
    """Apply three random stages of convolution, normalisation, ReLU; then 1×1 to C channels.

    Args:
        images: normalised, (B, 3, H, W).
        channels: C.
        seed: of the weights.

    Returns:
        (B, C, H/8, W/8), both rounded up.
    """
    generator = torch.Generator().manual_seed(seed)

    def weight(outputs: int, inputs: int, size: int) -> Tensor:
        kernel = torch.empty(outputs, inputs, size, size)
        return nn.init.kaiming_normal_(kernel, generator=generator)

    x, inputs = images, 3
    for outputs in (32, 64, 128):
        x = F.conv2d(x, weight(outputs, inputs, 3), stride=2, padding=1)
        # Normalised by its own statistics, as a batch normalisation in training does.
        x = F.relu(F.batch_norm(x, None, None, training=True))
        inputs = outputs
    return F.conv2d(x, weight(channels, inputs, 1))
