"""Similarity maps of a photograph: the layers' inputs for it, and figures of their maps.

The layers are those of a trained network, or untrained ones (`AttentionLayer.untrained`) that
compare the features of a timm backbone or of a small random convolutional stem as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullattn._cli.inputs import through_stem
from fullattn.layers import LAYERS, AttentionLayer, ChannelNonLocal
from fullattn.plot import figures, inputs_of, layers_with_maps, page, similarity
from fullattn.plot.layers import has_channel_maps
from fullattn.segmentation.data.decode import read_scaled
from fullattn.segmentation.data.files import DataError
from fullattn.segmentation.evaluation.loop import evaluating, normalised

if TYPE_CHECKING:
    from fullattn.segmentation.models.files import Trained

__all__ = [
    "LayerInputs",
    "Photograph",
    "attention_layers",
    "of_backbone",
    "of_network",
    "of_stem",
    "read",
    "with_channel_maps",
    "write",
]

# Untrained layers scale their scores by this over the number of features compared. With a larger
# factor each row of a map has one weight near 1 and the others near 0.
_SHARPNESS = 4.0
_MIN_SIDE = 16  # pixels; a stem of stride 8 leaves two positions


class Photograph(NamedTuple):
    """A photograph, scaled down if it was large."""

    path: Path
    pixels: Tensor  # uint8, (3, H, W)
    size: tuple[int, int]  # height and width in the file

    @property
    def scaled(self) -> str | None:
        """A sentence about the scaling; None if the photograph was not scaled."""
        height, width = self.pixels.shape[1:]
        if (height, width) == self.size:
            return None
        return f"{self.path} is scaled from {self.size[1]}x{self.size[0]} to {width}x{height}"

    def scale_point(self, point: tuple[int, int]) -> tuple[int, int]:
        """Convert a point (x, y) of the file to pixels of the scaled photograph.

        Raises:
            ValueError: the point is outside.
        """
        return figures.cell_of(point, torch.empty(3, *self.size), self.pixels)


class LayerInputs(NamedTuple):
    """Layers and their inputs for a photograph."""

    layers: Mapping[str, tuple[nn.Module, Tensor]]  # by name, each with its input, (1, C, h, w)
    note: str  # a sentence on the origin of the layers and features
    beside: ChannelNonLocal | None = None  # as in `similarity`
    stamp: str = ""  # what every picture says of layers that are not trained


def read(path: Path, longest: int) -> Photograph:
    """Read a photograph and scale it down so that no side exceeds `longest` pixels.

    Raises:
        DataError: it cannot be read or is too small.
    """
    pixels, size = read_scaled(path, longest)
    height, width = pixels.shape[1:]
    if min(height, width) < _MIN_SIDE:
        message = f"{path} is {width}x{height} pixels here; expected at least {_MIN_SIDE} each way"
        raise DataError(message, path)
    return Photograph(path, pixels, size)


def attention_layers(trained: Trained) -> dict[str, nn.Module]:
    """Find the layers with similarity maps in a network's attention, which itself is named "".

    Raises:
        ValueError: there are none.
    """
    layers = layers_with_maps(trained.model.get_submodule("head.attention"))
    if not layers:
        attention = trained.description.model.get("attention")
        raise ValueError(f"the network's attention, {attention!r}, has no similarity maps")
    return layers


def with_channel_maps(layers: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the layers with maps of channels.

    Raises:
        ValueError: there are none.
    """
    found = [
        name
        for name, layer in layers.items()
        if isinstance(layer, AttentionLayer) and has_channel_maps(layer)
    ]
    if not found:
        types = ", ".join(type(layer).__name__ for layer in layers.values())
        raise ValueError(f"expected a layer with a map of channels, got only {types}")
    return found


def of_network(trained: Trained, photograph: Photograph) -> LayerInputs:
    """Compute the inputs of a trained network's layers for a photograph.

    Raises:
        ValueError: the network has no layers with maps.
    """
    described = trained.description
    found = attention_layers(trained)
    layers = {name or str(layer.layer_name): layer for name, layer in found.items()}
    with evaluating(trained.model):
        images = normalised(photograph.pixels[None], described.mean, described.std)
        inputs = inputs_of(trained.model, layers, images)
    note = (
        f"Layers of a network trained on {described.dataset} for {described.step} steps, with "
        "their inputs in it."
    )
    return LayerInputs({name: (layer, inputs[name]) for name, layer in layers.items()}, note)


def of_stem(
    photograph: Photograph, layers: Sequence[str], channels: int, scale: float | None, seed: int
) -> LayerInputs:
    """Build untrained layers, by their registered names, with C features from a random stem.

    `scale` is the layers' factor on their scores; None for 4/d, with d the features compared.
    """
    pixels = photograph.pixels.float()
    images = (pixels - pixels.mean()) / pixels.std().clamp(min=1e-3)
    features = through_stem(images[None], channels, seed)
    note = f"Features: a random convolutional stem (seed {seed}) of {channels} channels."
    return _untrained(features, layers, scale, note, "untrained layer on random features")


def of_backbone(
    photograph: Photograph,
    layers: Sequence[str],
    name: str,
    weights: Path | None,
    scale: float | None,
) -> LayerInputs:
    """Build untrained layers, as `of_stem`, with features of a timm backbone.

    The features are those of stride 8 or the nearest. The weights are of a file, or else downloaded
    by timm.

    Raises:
        CheckpointError: the file does not hold weights of this backbone.
        FileNotFoundError: the file does not exist.
        ImportError: timm is not installed.
        ValueError: timm does not know the name or cannot download its weights.
    """
    from fullattn.segmentation.data.transforms import IMAGENET_MEAN, IMAGENET_STD
    from fullattn.segmentation.models import backbone as backbones

    try:
        backbone = backbones.build(name, pretrained=weights is None)
    except OSError as error:  # no connection
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"timm could not download the weights of {name!r}: {reason}; give a file of them"
        ) from error
    if weights is not None:
        backbones.load_weights(backbone, weights)
    with torch.no_grad(), evaluating(backbone):
        images = normalised(photograph.pixels[None], IMAGENET_MEAN, IMAGENET_STD)
        output_format = getattr(backbone, "output_fmt", None)
        stages = backbones.channels_first(backbone(images), output_format)
    width = photograph.pixels.shape[2]
    features = min(stages, key=lambda stage: abs(round(width / stage.shape[3]) - 8))
    note = f"Features: {name}, {features.shape[1]} channels."
    return _untrained(features, layers, scale, note, f"untrained layer on features of {name}")


def _untrained(
    features: Tensor, layers: Sequence[str], scale: float | None, note: str, stamp: str
) -> LayerInputs:
    # Mean 0 and deviation 1 in each channel, so that none dominates the scores.
    features = F.batch_norm(features, None, None, training=True)

    def untrained(layer: type[AttentionLayer]) -> Any:
        # For several branches, the geometric mean of their lengths.
        lengths = [cut.sizes(features.shape)[2] for cut in layer.operation.cuts]
        softer = _SHARPNESS / math.prod(lengths) ** (1 / len(lengths))
        return layer.untrained(features.shape[1], softer if scale is None else scale)

    note += " Layers without trained weights, which compare the features as they are; scale "
    note += f"{_SHARPNESS:g}/d." if scale is None else f"{scale:g}."
    inputs = {name: (untrained(LAYERS[name]), features) for name in layers}
    return LayerInputs(inputs, note, untrained(ChannelNonLocal), stamp)


def write(
    seen: LayerInputs,
    photograph: Photograph,
    folder: Path,
    *,
    point: tuple[int, int] | None = None,
    channel: int | None = None,
) -> list[Path]:
    """Write a figure of each layer's maps at a point (the middle), and one page of all layers.

    For street.jpg these are street_spatial.png, street_channel.png and so on, by the layers' names,
    and street_maps.html; with a channel also street_fully_channel_5.png and so on for the layers
    with maps of channels. The point is in pixels of the file. Each figure, and each layer's heading
    in the page, has the stamp.

    Raises:
        ValueError: the point is outside or the channel does not exist.
    """
    height, width = photograph.size
    x, y = point = (width // 2, height // 2) if point is None else point
    name, stem = photograph.path.name, photograph.path.stem
    scaled, made = photograph.scale_point(point), {}

    def draw(key: str, file: str, at: str = "", **options: Any) -> None:
        layer, features = seen.layers[key]
        title = f"{type(layer).__name__}, {name}{at}"
        figure = similarity(layer, features, photograph.pixels, title=title, **options)
        if seen.stamp:
            figures.stamp(figure, seen.stamp)
        made[folder / f"{stem}_{file}.png"] = figure

    for key in seen.layers:
        draw(key, key, f", point {x},{y}", point=scaled, beside=seen.beside)
    if channel is not None:
        for key in with_channel_maps({key: layer for key, (layer, _) in seen.layers.items()}):
            draw(key, f"{key}_channel_{channel}", channel=channel)
    # By the type of each layer, followed by its name in the network if that differs, and the stamp.
    stamp = f", {seen.stamp}" if seen.stamp else ""
    headed = {
        type(each[0]).__name__ + ("" if key in LAYERS else f" {key}") + stamp: each
        for key, each in seen.layers.items()
    }
    text = page(
        headed,
        photograph.pixels,
        point=point,
        size=photograph.size,
        beside=seen.beside,
        title=f"Similarity maps, {name}",
        notes=[note for note in (seen.note, photograph.scaled) if note],
    )
    for path, figure in made.items():
        figure.savefig(path)
    html = folder / f"{stem}_maps.html"
    html.write_text(text, "utf-8")
    return [*made, html]
