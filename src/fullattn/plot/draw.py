"""Draw a layer's similarity maps, at a point or at a channel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fullattn import attention, functional
from fullattn.layers import LAYERS, AttentionLayer, ChannelNonLocal
from fullattn.plot import figures
from fullattn.plot.capture import layers_with_maps
from fullattn.plot.tokens import (
    branches_of,
    has_channel_maps,
    slices_of,
    weights_at,
    whole_maps,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from PIL.Image import Image

__all__ = ["as_photograph", "channel_map_beside", "check_layer", "one_feature_map", "similarity"]


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
    layer = check_layer(layer)
    if point is not None and channel is not None:
        raise ValueError("expected a point or a channel, got both")
    features = one_feature_map(x)
    shown = _norms(features) if photograph is None else as_photograph(photograph)
    title = title or type(layer).__name__
    with torch.no_grad():
        if channel is not None:
            return _draw_channel(layer, features, shown, channel, title)
        point = (shown.shape[2] // 2, shown.shape[1] // 2) if point is None else point
        column, row = figures.cell_of(point, shown, features)
        call, branches = branches_of(layer, features)
        if not has_channel_maps(layer):
            weights = torch.stack([weights_at(call, b, column, row) for b in branches]).sum(0)
            return figures.draw_positions(shown, weights, point, title=title)
        maps = {slices_of(branch): whole_maps(call, branch).cpu() for branch in branches}
        if "" in maps:
            return figures.draw_channels(maps[""][0], features[0], title=title)
        single = channel_map_beside(layer, features, beside).cpu()
        return figures.draw_slices(shown, maps, single, point, features.shape[2:], title=title)


def check_layer(layer: nn.Module) -> AttentionLayer:
    """Return the layer, or raise TypeError if it is not a layer of this package."""
    if isinstance(layer, AttentionLayer):
        return layer
    inside = layers_with_maps(layer) if isinstance(layer, nn.Module) else {}
    hint = ""
    if inside:
        names = ", ".join(map(repr, list(inside)[:3]))
        hint = f"; layers inside it that have them are {names}: draw one of these with its input"
    *others, last = (each.__name__ for each in LAYERS.values())
    raise TypeError(
        f"{type(layer).__name__} has no similarity maps; expected a {', '.join(others)} or "
        f"{last}{hint}"
    )


def one_feature_map(x: Tensor) -> Tensor:
    """Return a feature map (C, h, w) or (1, C, h, w) as (1, C, h, w), or raise an error."""
    if not isinstance(x, Tensor):
        raise TypeError(f"expected a feature map (C, h, w), got {type(x).__name__}")
    if x.dim() == 3:
        x = x[None]
    if x.dim() != 4 or len(x) != 1:
        raise ValueError(
            f"expected one feature map, (C, h, w) or (1, C, h, w), got shape {tuple(x.shape)}"
        )
    return x.detach()


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


def channel_map_beside(
    layer: AttentionLayer, features: Tensor, beside: ChannelNonLocal | None
) -> Tensor:
    """Return the map (C, C) of a channel layer; by default of one with the layer's scale."""
    if beside is not None:
        maps: Tensor = beside.similarity(features)
    else:
        maps = attention.maps(functional.channel_call(features, scale=layer.scale))
    return maps[0].float()


def _draw_channel(
    layer: AttentionLayer, features: Tensor, photograph: Tensor, channel: int, title: str
) -> Figure:
    if not has_channel_maps(layer):
        raise ValueError(f"{type(layer).__name__} has a map of positions and none of channels")
    if not 0 <= channel < features.shape[1]:
        raise ValueError(f"expected a channel from 0 to {features.shape[1] - 1}, got {channel}")
    call, branches = branches_of(layer, features)
    weights = {slices_of(each): whole_maps(call, each)[:, channel].cpu() for each in branches}
    if "" in weights:
        return figures.draw_channel(weights[""][0], channel, title=title)
    return figures.draw_profiles(photograph, weights, channel, title=title)
