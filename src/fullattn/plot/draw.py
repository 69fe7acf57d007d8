"""The drawing of a layer: which of its maps are shown, at a point or at a channel."""

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

__all__ = ["as_photograph", "channel_map_beside", "check_layer", "similarity"]


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
    """Draw what a layer's similarity maps hold, at a point of the image or at a channel.

    At a point: of a layer that compares positions (`SpatialNonLocal`), where that point looks; of
    one that compares the channels of columns or rows (`FullyAttentional`), the maps of the point's
    column and row, and how they differ from the one map of a channel layer; of one that compares
    the channels of the image (`ChannelNonLocal`), its only map, and the pairs of channels that call
    each other loudest. At a channel: which channels it attends to, of a `FullyAttentional` in each
    column and row.

    Args:
        layer: a registered layer.
        x: what the layer is given, (C, h, w) or (1, C, h, w).
        photograph: that x was made from, of any size: uint8, a tensor (3, H, W), an array (H, W, 3)
            or a Pillow image; None to show how strong x is at each position instead.
        point: column and row, in pixels of the photograph from its top left corner, or in
            positions of x where there is none; None, with no channel either, for the middle.
        channel: index of a channel of x, in place of a point.
        beside: the channel layer that one of columns or rows is compared with; None for one of the
            same scale.
        title: of the figure; the layer's name where it is empty.

    Returns:
        A matplotlib figure, which pyplot does not know; `figure.savefig(path)` writes it.

    Raises:
        TypeError: not a layer with maps, or not a photograph.
        ValueError: both a point and a channel, one out of range, more than one feature map, or a
            layer without a map of channels where a channel is given.

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
    shown = _strength(features) if photograph is None else as_photograph(photograph)
    title = title or type(layer).__name__
    with torch.no_grad():
        if channel is not None:
            return _of_channel(layer, features, shown, channel, title)
        point = (shown.shape[2] // 2, shown.shape[1] // 2) if point is None else point
        return _at_point(layer, features, shown, point, beside, title)


def check_layer(layer: nn.Module) -> AttentionLayer:
    """Raise TypeError unless a layer has maps that can be drawn.

    Args:
        layer: any module.

    Returns:
        The layer.

    Raises:
        TypeError: it is no layer of this package; the message names those that are inside it.
    """
    if isinstance(layer, AttentionLayer):
        return layer
    inside = layers_with_maps(layer) if isinstance(layer, nn.Module) else {}
    hint = ""
    if inside:
        names = ", ".join(map(repr, list(inside)[:3]))
        hint = f"; the layers inside it that have are {names}: draw one with what it is given"
    *others, last = (each.__name__ for each in LAYERS.values())
    raise TypeError(
        f"{type(layer).__name__} has no similarity maps; expected a {', '.join(others)} or "
        f"{last}{hint}"
    )


def one_feature_map(x: Tensor) -> Tensor:
    """A feature map with a batch axis of 1.

    Args:
        x: (C, h, w) or (1, C, h, w).

    Returns:
        (1, C, h, w), without gradient.

    Raises:
        TypeError: not a tensor.
        ValueError: another rank, or several feature maps.
    """
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
    """A photograph as a tensor.

    Args:
        picture: uint8: a tensor (3, H, W), an array (H, W, 3), or a Pillow image.

    Returns:
        uint8, (3, H, W).

    Raises:
        TypeError: it is none of these.
    """
    if not isinstance(picture, Tensor):
        convert = getattr(picture, "convert", None)  # of Pillow's images
        picture = torch.as_tensor(np.array(picture if convert is None else convert("RGB")))
        picture = picture.permute(2, 0, 1) if picture.dim() == 3 else picture
    if picture.dtype != torch.uint8 or picture.dim() != 3 or picture.shape[0] != 3:
        raise TypeError(
            "expected a uint8 photograph, a tensor (3, H, W), an array (H, W, 3) or a Pillow "
            f"image, got {picture.dtype} {tuple(picture.shape)}"
        )
    tensor: Tensor = picture.cpu()
    return tensor


def _strength(features: Tensor) -> Tensor:
    """How strong a feature map is at each position, as a grey picture."""
    strength = torch.linalg.vector_norm(features[0].float(), dim=0).cpu()
    shades: Tensor = (strength / strength.max().clamp(min=1e-12) * 255).round().to(torch.uint8)
    return shades.expand(3, -1, -1)


def channel_map_beside(
    layer: AttentionLayer, features: Tensor, beside: ChannelNonLocal | None
) -> Tensor:
    """The one map of a channel layer, to compare with.

    Args:
        layer: the layer whose maps are compared with it.
        features: (1, C, h, w).
        beside: the channel layer; None for one with the layer's scale.

    Returns:
        (C, C).
    """
    if beside is not None:
        map_beside: Tensor = beside.similarity(features)[0]
        return map_beside
    single: Tensor = attention.maps(functional.channel_call(features, scale=layer.scale))[0]
    return single


def _at_point(
    layer: AttentionLayer,
    features: Tensor,
    photograph: Tensor,
    point: tuple[int, int],
    beside: ChannelNonLocal | None,
    title: str,
) -> Figure:
    column, row = figures.cell_of(point, photograph, features)
    call, branches = branches_of(layer, features)
    if not has_channel_maps(layer):
        weights = sum(weights_at(call, branch, column, row) for branch in branches)
        assert isinstance(weights, Tensor)
        return figures.draw_positions(photograph, weights, point, title=title)
    maps = {slices_of(branch): whole_maps(call, branch).cpu() for branch in branches}
    if None in maps:
        return figures.draw_channels(maps[None][0], features[0], title=title)
    single = channel_map_beside(layer, features, beside).float().cpu()
    of_slices = {slices: each for slices, each in maps.items() if slices is not None}
    size = (features.shape[2], features.shape[3])
    return figures.draw_slices(photograph, of_slices, single, point, size, title=title)


def _of_channel(
    layer: AttentionLayer, features: Tensor, photograph: Tensor, channel: int, title: str
) -> Figure:
    if not has_channel_maps(layer):
        raise ValueError(f"{type(layer).__name__} has a map of positions and none of channels")
    if not 0 <= channel < features.shape[1]:
        raise ValueError(f"expected a channel from 0 to {features.shape[1] - 1}, got {channel}")
    call, branches = branches_of(layer, features)
    weights = {slices_of(each): whole_maps(call, each)[:, channel].cpu() for each in branches}
    if None in weights:
        return figures.draw_channel(weights[None][0], channel, title=title)
    of_slices = {slices: each for slices, each in weights.items() if slices is not None}
    return figures.draw_profiles(photograph, of_slices, channel, title=title)
