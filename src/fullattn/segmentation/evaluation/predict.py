"""Segment photographs and write figures: overlays, labels and similarity maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fullattn.plot import figures, inputs_of, similarity
from fullattn.segmentation.data.decode import read_image
from fullattn.segmentation.evaluation.loop import evaluating, normalised
from fullattn.segmentation.evaluation.maps import attention_layers, with_channel_maps
from fullattn.segmentation.evaluation.overlay import overlay, palette_image
from fullattn.segmentation.evaluation.passes import PassOptions, check_options, segment
from fullattn.segmentation.models.files import Trained

if TYPE_CHECKING:
    from typing_extensions import Unpack  # in typing from Python 3.11

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
    **passes: Unpack[PassOptions],
) -> Iterator[list[Path]]:
    """Segment photographs and write the results as PNG files.

    For street.jpg these are street_overlay.png; with `labels` street_labels.png; and with a point
    or channel, for each layer in the network's attention, street_point_30_20.png or
    street_channel_5.png, followed by the layer's name if there are several.

    Args:
        trained: the network with its classes, colours and normalisation.
        photographs: files, whose names without extensions differ.
        folder: the output folder.
        alpha: as in `overlay`.
        labels: whether to write the class indices too.
        point: x and y, in pixels, at which similarity maps are drawn. They are always from one pass
            over the whole photograph at its own size.
        channel: index of a channel whose maps are drawn.
        device: device to run on, to which the network is moved.
        passes: keywords of `segment`: scales, flip, window and stride.

    Yields:
        The written files of each photograph.

    Raises:
        DataError: a photograph cannot be read.
        ValueError: an option is invalid, a point or channel does not exist, the network has no such
            maps, or two photographs have the same name. Everything that can be checked is checked
            before the first file is written.
    """
    check_options(**passes)
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
    layers = {} if point is None and channel is None else attention_layers(trained)
    if channel is not None:
        layers = {name: layers[name] for name in with_channel_maps(layers)}
    maps = f"channel_{channel}" if point is None else f"point_{point[0]}_{point[1]}"
    description, model = trained.description, trained.model.to(device)
    with evaluating(model):
        for path in photographs:
            photograph = read_image(path)
            images = normalised(photograph[None].to(device), description.mean, description.std)
            found = segment(model, images, **passes)[0].argmax(0).cpu()
            written = [folder / f"{path.stem}_overlay.png"]
            drawn = overlay(photograph, found, description.palette, description.classes, alpha)
            drawn.save(written[-1])
            if labels:
                written.append(folder / f"{path.stem}_labels.png")
                palette_image(found, description.palette).save(written[-1])
            for name, features in (inputs_of(model, layers, images) if layers else {}).items():
                title = f"{type(layers[name]).__name__}, {path.name}"
                at: Any = {"point": point, "channel": channel, "title": title}
                suffix = f"{maps}_{name}" if name else maps
                written.append(folder / f"{path.stem}_{suffix}.png")
                similarity(layers[name], features, photograph, **at).savefig(written[-1])
            yield written
