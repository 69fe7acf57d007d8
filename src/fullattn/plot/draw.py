"""Draw a layer's similarity maps, at a point or at a channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fullattn.plot import figures
from fullattn.plot.layers import LayerMaps, has_channel_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image

    from fullattn.layers import ChannelNonLocal

__all__ = ["as_photograph", "similarity"]


def similarity(
    layer: nn.Module,
    x: Tensor,
    photograph: Tensor | NDArray[np.uint8] | Image | None = None,
    *,
    point: tuple[int, int] | None = None,
    channel: int | None = None,
    beside: ChannelNonLocal | None = None,
    title: str = "",
) -> Figure:
    """Draw a layer's similarity maps, at a point of the image or at a channel.

    At a point, the figure shows for a layer that compares positions (`SpatialNonLocal`) the weights
    of the point; for one that compares the channels of columns and rows (`FullyAttentional`) the
    maps of the point's column and row, and their differences from a channel layer's map; for one
    that compares the channels of the image (`ChannelNonLocal`) its map, and the pairs of channels
    with the largest weights. At a channel, it shows the weights of that channel, for a
    `FullyAttentional` in each column and row.

    Args:
        layer: a layer of this package.
        x: the layer's input, (C, h, w) or (1, C, h, w).
        photograph: the image that x was computed from, of any size: uint8, a tensor (3, H, W), an
            array (H, W, 3) or a Pillow image; None to show the norm of x at each position.
        point: column and row, in pixels of the photograph from its top left corner, or in
            positions of x without a photograph; default the centre, unless a channel is given.
        channel: index of a channel of x, instead of a point.
        beside: the channel layer that maps of columns and rows are compared with; None for one of
            the same scale.
        title: title of the figure; default the layer's class.

    Returns:
        A matplotlib figure, not registered with pyplot; `figure.savefig(path)` writes it.

    Raises:
        TypeError: not a layer of this package, or not a photograph.
        ValueError: both a point and a channel, or one out of range; several feature maps; a
            channel for a layer that compares positions.

    Example:
        >>> from fullattn import FullyAttentional
        >>> layer, x = FullyAttentional(8), torch.randn(8, 5, 7)
        >>> figure = similarity(layer, x, point=(3, 2))
        >>> [panel.get_title(loc="left") for panel in figure.axes[1:3]]
        ['map of column 3', 'map of row 2']
    """
    if point is not None and channel is not None:
        raise ValueError("expected a point or a channel, got both")
    with torch.no_grad():
        seen = LayerMaps(layer, x)
        features = seen.features
        shown = _norms(features) if photograph is None else as_photograph(photograph)
        title = title or type(layer).__name__
        if point is None and channel is None:
            point = shown.shape[2] // 2, shown.shape[1] // 2
        if point is not None:
            column, row = figures.cell_of(point, shown, features)
        if not has_channel_maps(seen.layer):
            if point is None:
                name = type(layer).__name__
                raise ValueError(f"{name} has a map of positions and none of channels")
            weights = torch.stack([seen.at(each, column, row) for _, each in seen.branches]).sum(0)
            return figures.draw_positions(shown, weights, point, title=title)
        maps = {slices: seen.whole(branch) for slices, branch in seen.branches}
        if point is not None:
            if "" in maps:
                return figures.draw_channels(maps[""][0], features[0], title=title)
            single = seen.beside(beside)
            return figures.draw_slices(shown, maps, single, point, features.shape[2:], title=title)
        if channel is None or not 0 <= channel < features.shape[1]:
            raise ValueError(f"expected a channel from 0 to {features.shape[1] - 1}, got {channel}")
        given = {slices: each[:, channel] for slices, each in maps.items()}
        if "" in given:
            return figures.draw_channel(given[""][0], channel, title=title)
        return figures.draw_profiles(shown, given, channel, title=title)


def as_photograph(picture: Any) -> Tensor:
    """Return a uint8 tensor (3, H, W), array (H, W, 3) or Pillow image as a tensor (3, H, W)."""
    if not isinstance(picture, Tensor):
        convert = getattr(picture, "convert", None)  # of a Pillow image
        picture = torch.as_tensor(np.array(picture if convert is None else convert("RGB")))
        picture = picture.permute(2, 0, 1) if picture.dim() == 3 else picture
    if picture.dtype != torch.uint8 or picture.dim() != 3 or picture.shape[0] != 3:
        raise TypeError(
            "expected a uint8 photograph, a tensor (3, H, W), an array (H, W, 3) or a Pillow "
            f"image, got {picture.dtype} {tuple(picture.shape)}"
        )
    tensor: Tensor = picture.cpu()
    return tensor


def _norms(features: Tensor) -> Tensor:
    """Draw the norm of a feature map at each position in shades of grey."""
    norms = torch.linalg.vector_norm(features[0].float(), dim=0).cpu()
    shades: Tensor = (norms / norms.max().clamp(min=1e-12) * 255).round().to(torch.uint8)
    return shades.expand(3, -1, -1)
