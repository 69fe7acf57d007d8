"""What layers attend to in a photograph: what they are given for it, and the pictures of it.

The layers are those of a trained network, or untrained ones that compare the features as they are
(`AttentionLayer.untrained`). Features then come from a backbone of timm, or from a small random
convolutional stem.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullattn._cli.inputs import through_stem
from fullattn.layers import LAYERS, AttentionLayer, ChannelNonLocal
from fullattn.plot import figures, inputs_of, layers_with_maps, page, similarity
from fullattn.plot.tokens import has_channel_maps
from fullattn.segmentation.data.decode import read_scaled
from fullattn.segmentation.data.files import DataError
from fullattn.segmentation.evaluation.loop import evaluating, normalised

if TYPE_CHECKING:
    from fullattn.segmentation.models.files import Trained

__all__ = ["Photograph", "Seen", "of_backbone", "of_network", "of_stem", "read", "write"]

# Scores of untrained layers are means over the features that are compared, times this: the larger,
# the more a map is one weight of nearly 1 in each row, which shows nothing.
_SHARPNESS = 4.0
_SMALLEST = 16  # pixels of a side, of which a stem of stride 8 leaves two positions


@dataclass(frozen=True)
class Photograph:
    """A photograph, scaled down if it was large.

    Attributes:
        path: of its file.
        pixels: uint8, (3, H, W).
        size: height and width in the file.
    """

    path: Path
    pixels: Tensor
    size: tuple[int, int]

    @property
    def scaled(self) -> str | None:
        """A sentence that says so, if it was scaled."""
        height, width = self.pixels.shape[1:]
        if (height, width) == self.size:
            return None
        return f"{self.path} is scaled from {self.size[1]}x{self.size[0]} to {width}x{height}"

    def scale_point(self, point: tuple[int, int]) -> tuple[int, int]:
        """A point of the file in pixels of what was read.

        Args:
            point: x and y.

        Returns:
            x and y.

        Raises:
            ValueError: it is outside.
        """
        return figures.cell_of(point, torch.empty(3, *self.size), self.pixels)


@dataclass(frozen=True)
class Seen:
    """Layers and what they are given for a photograph.

    Attributes:
        layers: by name, each with its feature map, (1, C, h, w).
        note: a sentence on where they and the features come from.
        beside: the channel layer that one of columns or rows is compared with; None for one of the
            same scale.
    """

    layers: Mapping[str, tuple[nn.Module, Tensor]]
    note: str
    beside: ChannelNonLocal | None = None


def read(path: Path, longest: int) -> Photograph:
    """Read a photograph.

    Args:
        path: of the file.
        longest: pixels that its longer side may have; it is scaled down to that.

    Returns:
        The photograph.

    Raises:
        DataError: it cannot be read, or is too small to show anything.
    """
    pixels, size = read_scaled(path, longest)
    if min(pixels.shape[1:]) < _SMALLEST:
        raise DataError(
            f"{path} is {pixels.shape[2]}x{pixels.shape[1]} pixels here; expected at least "
            f"{_SMALLEST} each way",
            path,
        )
    return Photograph(path, pixels, size)


def of_network(trained: Trained, photograph: Photograph) -> Seen:
    """The layers of a trained network.

    Args:
        trained: the network, and how its images are normalised.
        photograph: what it looks at.

    Returns:
        Its layers with maps, by their names.

    Raises:
        ValueError: it has none.
    """
    model, described = trained.model, trained.description
    layers = {
        name or _name_of(layer): layer
        for name, layer in layers_with_maps(model.get_submodule("head.attention")).items()
    }
    if not layers:
        raise ValueError(
            f"the network's attention, {described.model.get('attention')!r}, has no similarity maps"
        )
    with evaluating(model):
        images = normalised(photograph.pixels[None], described.mean, described.std)
        inputs = inputs_of(model, layers, images)
    note = (
        f"Layers of a network trained on {described.dataset} for {described.step} steps, with what "
        "it gives them."
    )
    return Seen({name: (layer, inputs[name]) for name, layer in layers.items()}, note)


def _heading(key: str, layer: nn.Module) -> str:
    """A layer's type, and its name in the network where that says more."""
    kind = type(layer).__name__
    return kind if key in LAYERS else f"{kind} {key}"


def _name_of(layer: nn.Module) -> str:
    assert isinstance(layer, AttentionLayer)
    return layer.layer_name


def of_stem(
    photograph: Photograph, layers: Sequence[str], channels: int, scale: float | None, seed: int
) -> Seen:
    """Untrained layers, given what a random stem makes of the photograph.

    Args:
        photograph: what is looked at.
        layers: names of registered layers.
        channels: C of the stem's features.
        scale: the layers' factor on their scores; None for 4/d, with d the features compared.
        seed: of the stem's weights.

    Returns:
        The layers with the same features for all.
    """
    pixels = photograph.pixels.float()
    images = (pixels - pixels.mean()) / pixels.std().clamp(min=1e-3)
    features = through_stem(images[None], channels, seed)
    note = f"Features: a random convolutional stem (seed {seed}) of {channels} channels."
    return _untrained(features, layers, scale, note)


def of_backbone(
    photograph: Photograph,
    layers: Sequence[str],
    name: str,
    weights: Path | None,
    scale: float | None,
) -> Seen:
    """Untrained layers, given what a backbone of timm makes of the photograph.

    Args:
        photograph: what is looked at.
        layers: names of registered layers.
        name: timm's name.
        weights: a file of the backbone's weights; None for those that timm downloads.
        scale: the layers' factor on their scores; None for 4/d, with d the features compared.

    Returns:
        The layers with the same features for all: the map of stride 8, or the nearest there is.

    Raises:
        CheckpointError: the file does not hold weights of this backbone.
        FileNotFoundError: there is no such file.
        ImportError: timm is not installed.
        ValueError: timm does not know the name, or cannot get its weights.
    """
    from fullattn.segmentation.data.transforms import IMAGENET_MEAN, IMAGENET_STD
    from fullattn.segmentation.models import backbone as backbones

    try:
        backbone = backbones.build(
            name,
            output_stride=32,
            uniform_dilation=False,
            pretrained=weights is None,
            options={},
        )
    except OSError as error:  # no connection
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"timm could not get the weights of {name!r}: {reason}; give a file of them"
        ) from error
    if weights is not None:
        holder = nn.Module()
        holder.backbone = backbone
        backbones.load_weights(holder, weights)
    with torch.no_grad(), evaluating(backbone):
        stages = backbone(normalised(photograph.pixels[None], IMAGENET_MEAN, IMAGENET_STD))
    if getattr(backbone, "output_fmt", None) is not None and str(backbone.output_fmt) == "NHWC":
        stages = [stage.permute(0, 3, 1, 2).contiguous() for stage in stages]
    stride = [round(photograph.pixels.shape[2] / stage.shape[3]) for stage in stages]
    features = stages[min(range(len(stages)), key=lambda i: abs(stride[i] - 8))]
    note = f"Features: {name}, {features.shape[1]} channels."
    return _untrained(features, layers, scale, note)


def _untrained(features: Tensor, layers: Sequence[str], scale: float | None, note: str) -> Seen:
    # Each channel of mean 0 and deviation 1, as behind a normalisation: a loud one drowns no other.
    features = F.batch_norm(features, None, None, training=True)
    channels = features.shape[1]

    def untrained(layer: type[AttentionLayer]) -> AttentionLayer:
        if scale is not None:
            return layer.untrained(channels, scale)
        # Of several branches the geometric mean of their lengths.
        lengths = [cut.sizes(features.shape)[2] for cut in layer.operation.cuts]
        return layer.untrained(channels, _SHARPNESS / math.prod(lengths) ** (1 / len(lengths)))

    note += " Layers without trained weights, which compare the features as they are; scale "
    note += f"{_SHARPNESS:g}/d." if scale is None else f"{scale:g}."
    beside = untrained(ChannelNonLocal)
    assert isinstance(beside, ChannelNonLocal)
    return Seen({name: (untrained(LAYERS[name]), features) for name in layers}, note, beside)


def write(
    seen: Seen,
    photograph: Photograph,
    folder: Path,
    *,
    point: tuple[int, int] | None = None,
    channel: int | None = None,
) -> list[Path]:
    """Write a picture of each layer's maps at a point, and one page of all.

    For street.jpg these are street_spatial.png, street_channel.png, street_fully.png, or the names
    of the layers that were given; street_maps.html; and with a channel also, of the layers that
    have maps of channels, street_fully_channel_5.png and so on.

    Args:
        seen: the layers.
        photograph: that they look at.
        folder: where to write.
        point: x and y in pixels of the file; None for the middle.
        channel: index of a channel.

    Returns:
        The files that were written.

    Raises:
        ValueError: a point or channel that is not there.
    """
    height, width = photograph.size
    point = (width // 2, height // 2) if point is None else point
    at = photograph.scale_point(point)
    name = photograph.path.name
    stem = photograph.path.stem
    made = {
        f"{stem}_{key}.png": similarity(
            layer,
            x,
            photograph.pixels,
            point=at,
            beside=seen.beside,
            title=f"{type(layer).__name__}, {name}, point {point[0]},{point[1]}",
        )
        for key, (layer, x) in seen.layers.items()
    }
    if channel is not None:
        of_channels = {
            key: (layer, x)
            for key, (layer, x) in seen.layers.items()
            if isinstance(layer, AttentionLayer) and has_channel_maps(layer)
        }
        if not of_channels:
            raise ValueError(
                f"expected a layer with a map of channels, got {', '.join(seen.layers)} alone"
            )
        made |= {
            f"{stem}_{key}_channel_{channel}.png": similarity(
                layer,
                x,
                photograph.pixels,
                channel=channel,
                title=f"{type(layer).__name__}, {name}",
            )
            for key, (layer, x) in of_channels.items()
        }
    text = page(
        {_heading(key, layer): (layer, x) for key, (layer, x) in seen.layers.items()},
        photograph.pixels,
        point=point,
        size=photograph.size,
        beside=seen.beside,
        title=f"Similarity maps, {name}",
        notes=[note for note in (seen.note, photograph.scaled) if note],
    )
    written = []
    for file, figure in made.items():
        written.append(folder / file)
        figure.savefig(written[-1])
    written.append(folder / f"{stem}_maps.html")
    written[-1].write_text(text, "utf-8")
    return written
