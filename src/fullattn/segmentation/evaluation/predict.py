"""Photographs to pictures: the classes over the photograph, the labels, the similarity maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fullattn.plot import figures, inputs_of, layers_with_maps, similarity
from fullattn.plot.tokens import has_channel_maps
from fullattn.segmentation.data.decode import read_image
from fullattn.segmentation.evaluation.loop import evaluating, normalised
from fullattn.segmentation.evaluation.overlay import index_picture, overlay
from fullattn.segmentation.evaluation.passes import check_options, segment
from fullattn.segmentation.models.files import Trained

__all__ = ["predict"]


def predict(
    trained: Trained,
    photographs: Sequence[Path],
    folder: Path,
    *,
    alpha: float = 0.5,
    labels: bool = False,
    point: tuple[int, int] | None = None,
    channel: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Iterator[list[Path]]:
    """Segment photographs and write what is seen in them as PNG files.

    For street.jpg these are street_overlay.png and, where asked for, street_labels.png and, of each
    layer in the network's attention, street_point_30_20.png or street_channel_5.png; where there
    are several layers, their names follow.

    Args:
        trained: the network with its classes, colours and normalisation.
        photographs: files, whose names without endings differ.
        folder: where to write.
        alpha: as in `overlay`.
        labels: whether to write the class indices too.
        point: x and y, in pixels, of which similarity maps are drawn; from one pass over the whole
            photograph at its own size, whatever the options.
        channel: index of a channel of which they are drawn.
        device: to run on, to which the network is moved.
        options: keywords of `segment`.

    Yields:
        For each photograph the files that were written.

    Raises:
        DataError: a photograph cannot be read.
        ValueError: an option cannot be used, a point or channel is not there, the network has no
            such maps, or two photographs have the same name. As all that can be, this is checked
            before the first file is written.
    """
    _check(trained, photographs, alpha, point, options)
    layers = {} if point is None and channel is None else _layers(trained, channel)
    description = trained.description
    model = trained.model.to(device)
    with evaluating(model):
        for path in photographs:
            photograph = read_image(path)
            images = normalised(photograph[None].to(device), description.mean, description.std)
            found = segment(model, images, **options)[0].argmax(0).cpu()
            pictures = {
                "overlay": overlay(
                    photograph, found, description.palette, description.classes, alpha
                )
            }
            if labels:
                pictures["labels"] = index_picture(found, description.palette)
            written = []
            for name, picture in pictures.items():
                written.append(folder / f"{path.stem}_{name}.png")
                picture.save(written[-1])
            inputs = inputs_of(model, layers, images) if layers else {}
            for name, features in inputs.items():
                figure = similarity(
                    layers[name],
                    features,
                    photograph,
                    point=point,
                    channel=channel,
                    title=f"{type(layers[name]).__name__}, {path.name}",
                )
                what = f"channel_{channel}" if point is None else f"point_{point[0]}_{point[1]}"
                ending = f"_{name}" if name else ""
                written.append(folder / f"{path.stem}_{what}{ending}.png")
                figure.savefig(written[-1])
            yield written


def _check(
    trained: Trained,
    photographs: Sequence[Path],
    alpha: float,
    point: tuple[int, int] | None,
    options: dict[str, Any],
) -> None:
    check_options(**{name: value for name, value in options.items() if name != "flip"})
    if not 0 <= alpha <= 1:
        raise ValueError(f"expected alpha from 0 to 1, got {alpha}")
    first: dict[str, Path] = {}
    for path in photographs:
        photograph = read_image(path)
        if path.stem in first:
            raise ValueError(
                f"{first[path.stem]} and {path} would be written to the same files; "
                "use an output folder for each"
            )
        first[path.stem] = path
        if point is not None:
            try:
                figures.cell_of(point, photograph, photograph)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error


def _layers(trained: Trained, channel: int | None) -> dict[str, nn.Module]:
    """The layers whose maps can be drawn."""
    layers: dict[str, Any] = layers_with_maps(trained.model.get_submodule("head.attention"))
    if not layers:
        raise ValueError(
            f"the network's attention, {trained.description.model.get('attention')!r}, has no "
            "similarity maps"
        )
    if channel is None:
        return layers
    of_channels = {n: layer for n, layer in layers.items() if has_channel_maps(layer)}
    if not of_channels:
        raise ValueError("the network's attention has a map of positions and none of channels")
    return of_channels
