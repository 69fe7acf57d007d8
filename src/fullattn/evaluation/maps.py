"""Drawings of what a layer attends to, each a matplotlib figure of its own.

`draw` looks at a layer and chooses; the others draw one kind of map each and know no layer. Weights
that lie within a factor of ten are shown on a linear scale from 0, others on a logarithmic one of
at most four decades: without a scale in the softmax one weight often has nearly everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from matplotlib.colors import CenteredNorm, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from fullattn.layers import ChannelNonLocal, FullyAttentional, SpatialNonLocal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = [
    "cell_of",
    "draw",
    "draw_channel",
    "draw_channels",
    "draw_column_and_row",
    "draw_positions",
    "draw_profiles",
]

# Perceptually uniform; the second for weights of both signs, which softmax never gives.
_COLOURS, _SIGNED_COLOURS = "viridis", "berlin"
_MARK = "#D55E00"
_BAR = "#0072B2"
_DECADES = 4
_PANEL = 4.5  # inches
_TALLEST = 4 * _PANEL  # whatever the photograph's form
_MOST_NUMBERS = 2**30  # of a spatial map: 4 GiB of float32


def draw(
    layer: nn.Module,
    features: Tensor,
    photograph: Tensor,
    *,
    point: tuple[int, int] | None = None,
    channel: int | None = None,
    title: str = "",
) -> Figure:
    """Draw the similarity maps of a layer at a point of a photograph or at a channel.

    At a point: of a `SpatialNonLocal`, where in the photograph that pixel looks; of a
    `FullyAttentional`, the maps of the point's column and row; of a `ChannelNonLocal`, its only
    map. At a channel: which channels it attends to, of a `FullyAttentional` in each column and row.

    Args:
        layer: one of the three layers.
        features: what the layer was given for the photograph, (1, C, h, w).
        photograph: uint8, (3, H, W).
        point: x and y in pixels of the photograph from its top left corner; or give a channel.
        channel: index of a channel of the features.
        title: of the figure.

    Returns:
        The figure; `figure.savefig(path)` writes it.

    Raises:
        ValueError: not one of point and channel, one out of range, a layer without such maps, or
            a map that is too large to be built.

    Example:
        >>> photograph = torch.zeros(3, 40, 60, dtype=torch.uint8)
        >>> features = torch.randn(1, 8, 5, 7)
        >>> figure = draw(FullyAttentional(8), features, photograph, point=(30, 20))
        >>> [panel.get_title(loc="left") for panel in figure.axes[:3]]
        ['point (30, 20)', 'map of column 3', 'map of row 2']
    """
    if (point is None) == (channel is None):
        raise ValueError("expected either a point or a channel")
    with torch.no_grad():
        if point is not None:
            return _at_point(layer, features, photograph, point, title)
        assert channel is not None
        return _of_channel(layer, features, photograph, channel, title)


def _at_point(
    layer: nn.Module, features: Tensor, photograph: Tensor, point: tuple[int, int], title: str
) -> Figure:
    x, y = cell_of(point, photograph, features)
    if isinstance(layer, FullyAttentional):
        maps = layer.similarity(features)
        return draw_column_and_row(photograph, maps.columns[0], maps.rows[0], point, title=title)
    if isinstance(layer, ChannelNonLocal):
        return draw_channels(layer.similarity(features)[0], title=title)
    if isinstance(layer, SpatialNonLocal):
        height, width = features.shape[2:]
        below = height // layer.subsample, width // layer.subsample
        if height * width * below[0] * below[1] > _MOST_NUMBERS:
            raise ValueError(
                f"the map between {width}x{height} positions is too large to be built; "
                "use a smaller photograph"
            )
        weights = layer.similarity(features)[0, y * width + x]
        return draw_positions(photograph, weights.reshape(below), point, title=title)
    raise ValueError(f"{type(layer).__name__} has no similarity maps that can be drawn")


def _of_channel(
    layer: nn.Module, features: Tensor, photograph: Tensor, channel: int, title: str
) -> Figure:
    if not 0 <= channel < features.shape[1]:
        raise ValueError(f"expected a channel from 0 to {features.shape[1] - 1}, got {channel}")
    if isinstance(layer, FullyAttentional):
        maps = layer.similarity(features)
        columns, rows = maps.columns[0, :, channel], maps.rows[0, :, channel]
        return draw_profiles(photograph, columns, rows, channel, title=title)
    if isinstance(layer, ChannelNonLocal):
        return draw_channel(layer.similarity(features)[0, channel], channel, title=title)
    if isinstance(layer, SpatialNonLocal):
        raise ValueError("SpatialNonLocal has a map of positions and none of channels")
    raise ValueError(f"{type(layer).__name__} has no similarity maps that can be drawn")


def cell_of(point: tuple[int, int], photograph: Tensor, features: Tensor) -> tuple[int, int]:
    """The position of a feature map that lies at a point of a photograph.

    Args:
        point: x and y in pixels from the top left corner.
        photograph: (3, H, W).
        features: (..., h, w).

    Returns:
        Column and row of the feature map.

    Raises:
        ValueError: the point is outside the photograph.

    Example:
        >>> cell_of((59, 0), torch.zeros(3, 40, 60), torch.zeros(8, 5, 7))
        (6, 0)
    """
    height, width = photograph.shape[-2:]
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ValueError(
            f"expected a point inside the {width}x{height} photograph, x from 0 to {width - 1} and "
            f"y from 0 to {height - 1}, got {point[0]},{point[1]}"
        )
    rows, columns = features.shape[-2:]
    return point[0] * columns // width, point[1] * rows // height


def draw_positions(
    photograph: Tensor, weights: Tensor, point: tuple[int, int], *, title: str = ""
) -> Figure:
    """Where in a photograph a pixel looks.

    Args:
        photograph: uint8, (3, H, W).
        weights: of the positions that the point attends to, (h, w); laid over the photograph.
        point: x and y in pixels.
        title: of the figure.

    Returns:
        The photograph with the point, and beside it the weights over the photograph in grey.
    """
    height, width = photograph.shape[1:]
    figure = _figure(title, 2, _PANEL * height / width)
    plain, over = figure.subplots(1, 2)
    _show_photograph(plain, photograph, point)
    grey = photograph.float().mean(0).numpy()
    over.imshow(grey, cmap="gray", vmin=0, vmax=255)
    shown = _show_weights(over, weights, extent=(0, width, height, 0), alpha=0.7)
    _mark(over, point)
    over.set_title("where it looks", loc="left")
    over.set_axis_off()
    _explain(figure, shown, over, weights.numel())
    return figure


def draw_column_and_row(
    photograph: Tensor, columns: Tensor, rows: Tensor, point: tuple[int, int], *, title: str = ""
) -> Figure:
    """The two channel maps of a fully attentional layer at a point.

    Args:
        photograph: uint8, (3, H, W).
        columns: maps of all columns, (w, C, C).
        rows: maps of all rows, (h, C, C).
        point: x and y in pixels.
        title: of the figure.

    Returns:
        The photograph with the point's column and row, and the map of each.
    """
    height, width = photograph.shape[1:]
    wide, high = width / len(columns), height / len(rows)
    x, y = cell_of(point, photograph, torch.empty(len(rows), len(columns)))
    figure = _figure(title, 3, _PANEL)
    plain, column, row = figure.subplots(1, 3)
    _show_photograph(plain, photograph, point)
    for corner, size in (((x * wide, 0), (wide, height)), ((0, y * high), (width, high))):
        plain.add_patch(Rectangle(corner, *size, fill=False, edgecolor=_MARK))
    for panel, weights, name in ((column, columns[x], f"column {x}"), (row, rows[y], f"row {y}")):
        shown = _show_weights(panel, weights)
        panel.set_title(f"map of {name}", loc="left")
        _label_channels(panel)
        _explain(figure, shown, panel, weights.shape[1])
    return figure


def draw_channels(similarity: Tensor, *, title: str = "") -> Figure:
    """A map between channels.

    Args:
        similarity: (C, C); row i holds the weights of the channels that i attends to.
        title: of the figure.

    Returns:
        The map.
    """
    figure = _figure(title, 1.3, _PANEL)
    panel = figure.subplots()
    shown = _show_weights(panel, similarity)
    panel.set_title("map of the whole image", loc="left")
    _label_channels(panel)
    _explain(figure, shown, panel, similarity.shape[1])
    return figure


def draw_channel(weights: Tensor, channel: int, *, title: str = "") -> Figure:
    """Which channels one channel attends to.

    Args:
        weights: of every channel, (C).
        channel: the one that attends.
        title: of the figure.

    Returns:
        A bar for each channel, the three largest with their numbers.
    """
    figure = _figure(title, 2, _PANEL * 0.7)
    panel = figure.subplots()
    values = weights.float().cpu()
    norm = _norm(values)
    panel.set_yscale("log" if isinstance(norm, LogNorm) else "linear")
    panel.margins(x=0.01, y=0.15)
    panel.bar(range(len(values)), values.tolist(), width=1, color=_BAR)
    panel.set_ylim(bottom=norm.vmin)
    for place in values.topk(min(3, len(values))).indices.tolist():
        panel.annotate(
            str(place),
            (place, float(values[place])),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    panel.set_title(f"channel {channel} attends to", loc="left")
    panel.set_xlabel("channel")
    panel.set_ylabel(f"attention weight (uniform: 1/{len(values)})")
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def draw_profiles(
    photograph: Tensor, columns: Tensor, rows: Tensor, channel: int, *, title: str = ""
) -> Figure:
    """Which channels one channel of a fully attentional layer attends to, column by column.

    Args:
        photograph: uint8, (3, H, W).
        columns: the channel's weights in every column, (w, C).
        rows: the channel's weights in every row, (h, C).
        channel: the one that attends.
        title: of the figure.

    Returns:
        The photograph; below it the weights of each of its columns, at its right those of each of
        its rows.
    """
    height, width = photograph.shape[1:]
    high = _PANEL * height / width
    figure = _figure(title, 2.2, high + _PANEL)
    panels = figure.subplots(2, 2, width_ratios=(1, 1), height_ratios=(high, _PANEL))
    (plain, right), (below, corner) = panels
    corner.set_axis_off()
    _show_photograph(plain, photograph)
    plain.set_aspect("auto")  # so that it lies exactly over its columns and beside its rows
    number = columns.shape[1]
    norm = _norm(torch.cat([columns, rows]))
    _show_weights(below, columns.T, norm, extent=(0, width, number - 0.5, -0.5), aspect="auto")
    shown = _show_weights(right, rows, norm, extent=(-0.5, number - 0.5, height, 0), aspect="auto")
    below.set(xlabel="column of the photograph", ylabel="channel attended to")
    right.set(ylabel="row of the photograph", xlabel="channel attended to")
    below.set_title(f"channel {channel} in each column", loc="left")
    right.set_title(f"channel {channel} in each row", loc="left")
    _explain(figure, shown, corner, number, location="left")
    return figure


def _figure(title: str, panels: float, height: float) -> Figure:
    height = min(height, _TALLEST) + 0.8
    figure = Figure(figsize=(_PANEL * panels, height), layout="compressed", dpi=150)
    figure.suptitle(title, x=0.01, ha="left")
    return figure


def _show_photograph(panel: Axes, photograph: Tensor, point: tuple[int, int] | None = None) -> None:
    height, width = photograph.shape[1:]
    panel.imshow(photograph.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    panel.set_axis_off()
    if point is not None:
        _mark(panel, point)
        panel.set_title(f"point ({point[0]}, {point[1]})", loc="left")


def _mark(panel: Axes, point: tuple[int, int]) -> None:
    """A ring around the pixel's centre, seen on dark and on bright."""
    x, y = point[0] + 0.5, point[1] + 0.5
    panel.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor="white", mew=3)
    panel.plot(x, y, "o", markersize=9, markerfacecolor="none", markeredgecolor=_MARK, mew=1.5)


def _norm(weights: Tensor) -> Normalize:
    """The scale of colours for weights."""
    least, most = float(weights.min()), float(weights.max())
    if least < 0:
        return CenteredNorm(halfrange=max(-least, most))
    if least > most / 10 or most == 0:
        return Normalize(0, most or 1)
    return LogNorm(max(least, most / 10**_DECADES), most, clip=True)


def _show_weights(
    panel: Axes, weights: Tensor, norm: Normalize | None = None, **options: Any
) -> AxesImage:
    norm = norm or _norm(weights)
    colours = _SIGNED_COLOURS if isinstance(norm, CenteredNorm) else _COLOURS
    return panel.imshow(weights.float().numpy(force=True), cmap=colours, norm=norm, **options)


def _label_channels(panel: Axes) -> None:
    panel.set_xlabel("channel attended to")
    panel.set_ylabel("channel that attends")


def _explain(
    figure: Figure, shown: AxesImage, panel: Axes, number: int, *, location: str = "right"
) -> None:
    bar = figure.colorbar(shown, ax=panel, location=location)
    bar.set_label(f"attention weight (uniform: 1/{number})")
