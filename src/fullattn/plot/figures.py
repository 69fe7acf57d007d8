"""Matplotlib figures of similarity maps, given as tensors.

Weights within a factor of ten are shown on a linear scale from 0, others on a logarithmic scale of
at most four decades: without a scale in the softmax, one weight is often close to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from matplotlib.colors import CenteredNorm, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from fullattn.plot.style import BLUE, QUIET, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

__all__ = [
    "cell_of",
    "difference_norm",
    "distances",
    "draw_channel",
    "draw_channels",
    "draw_positions",
    "draw_profiles",
    "draw_slices",
    "stamp",
    "weight_norm",
]

_COLOURS, _SIGNED_COLOURS = "viridis", "berlin"  # perceptually uniform
_MARK = "#D55E00"
_DECADES = 4
_PANEL = 3.6  # inches
_MAX_HEIGHT = 4 * _PANEL  # for photographs of any aspect ratio
_PAIRS = 4  # number of pairs of channels that are shown


def cell_of(point: tuple[int, int], photograph: Tensor, features: Tensor) -> tuple[int, int]:
    """Return the column and row of a feature map at a point (x, y) of a photograph.

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


def distances(maps: Tensor, single: Tensor) -> Tensor:
    """Return the total variation between rows of maps (n, C, C) and a map (C, C), averaged.

    The rows sum to 1. A distance (n) of 0 means equal maps, of 1 no channel with weight in both.

    Example:
        >>> distances(torch.eye(2)[None], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([0.5000])
    """
    return torch.stack([(each - single).abs().sum(-1).mean() / 2 for each in maps])


@styled
def draw_positions(
    photograph: Tensor, weights: Tensor, point: tuple[int, int], *, title: str = ""
) -> Figure:
    """Draw the weights (h, w) of a point over a photograph (3, H, W), beside the photograph."""
    height, width = photograph.shape[1:]
    panel_width = 1.3 * _PANEL
    figure = _figure(title, 2 * panel_width, panel_width * height / width)
    plain, over = figure.subplots(1, 2)
    _show_photograph(plain, photograph, point, "the point")
    grey = photograph.float().mean(0, keepdim=True)
    _show_photograph(over, grey, point, "where it looks", cmap="gray", vmin=0, vmax=255)
    shown = _show_weights(over, weights, extent=(0, width, height, 0), alpha=0.75)
    _add_bar(figure, shown, [over], weights.numel())
    return figure


@styled
def draw_slices(
    photograph: Tensor,
    maps: Mapping[str, Tensor],
    single: Tensor,
    point: tuple[int, int],
    size: Sequence[int],
    *,
    title: str = "",
) -> Figure:
    """Draw the maps of a point's column and row, and their differences from a channel layer's map.

    The upper panels show the photograph, with the `distances` of all columns' and rows' maps along
    its edges, and the maps at the point. The lower ones show the single map and the differences.
    The photograph is uint8, (3, H, W); the maps are by "column" (w, C, C), by "row" (h, C, C), or
    both; the single one is (C, C); the point is x and y in pixels; the size is (h, w).
    """
    x, y = cell_of(point, photograph, torch.empty(*size))
    at = {slices: x if slices == "column" else y for slices in maps}
    own = torch.stack([maps[slices][index] for slices, index in at.items()])
    figure = _figure(title, 1.2 * (1 + len(maps)) * _PANEL, 2 * _PANEL)
    (plain, *upper), (one, *lower) = figure.subplots(2, 1 + len(maps))
    _show_photograph(
        plain, photograph, point, "the point, " + " and ".join(f"its {s}" for s in maps)
    )
    _show_distances(plain, {s: distances(each, single) for s, each in maps.items()}, at, size)

    norm = weight_norm(torch.cat([own, single[None]]))
    for panel, weights in zip((*upper, one), (*own, single), strict=True):
        shown = _show_map(panel, weights, norm)
    one.set_title("the channel layer's only map")
    _add_bar(figure, shown, upper, len(single))
    norm, cut = difference_norm(own - single)
    for above, below, weights, name in zip(upper, lower, own, at.items(), strict=True):
        above.set_title("map of {} {}".format(*name))
        below.set_title("{} {} less that map".format(*name))
        shown = _show_map(below, weights - single, norm)
    _add_bar(figure, shown, lower, extend="both" if cut else "neither")
    return figure


def _show_distances(
    panel: Axes, distances: Mapping[str, Tensor], at: Mapping[str, int], size: Sequence[int]
) -> None:
    """Frame a column or row, or both; draw distances below the photograph and beside it."""
    (_, width), (height, _) = panel.get_xlim(), panel.get_ylim()
    limits = 0, max(*(float(each.max()) for each in distances.values()), 1e-3)
    # The same thickness in inches for any aspect ratio.
    high, wide = (side / max(height, width) for side in (height, width))
    for slices, index in at.items():
        lengths = distances[slices].tolist()
        count = len(lengths)
        colours = [BLUE] * count
        colours[index] = _MARK
        label = f"distance of each {slices}'s map\nfrom the channel layer's only one"
        if slices == "column":
            frame = Rectangle((index * width / size[1], 0), width / size[1], height)
            edge = panel.inset_axes((0, -0.24 / high, 1, 0.2 / high))
            edge.bar(range(count), lengths, width=1, color=colours)
            edge.set(xlim=(-0.5, count - 0.5), ylim=limits, xticks=[])
        else:
            frame = Rectangle((0, index * height / size[0]), width, height / size[0])
            edge = panel.inset_axes((1 + 0.03 / wide, 0, 0.2 / wide, 1))
            edge.barh(range(count), lengths, height=1, color=colours)
            edge.set(ylim=(count - 0.5, -0.5), xlim=limits, yticks=[])
            label = "of each\nrow's" if "column" in distances else label
        panel.add_patch(frame).set(fill=False, edgecolor=_MARK)
        edge.set_xlabel(label)
        edge.spines[["top", "right"]].set_visible(False)
        edge.tick_params(labelsize=7)


@styled
def draw_channels(similarity: Tensor, features: Tensor, *, title: str = "") -> Figure:
    """Draw a map (C, C), and the pairs of channels with the largest weights as pictures.

    Row i of the map holds the weights that channel i gives; features are the channels, (C, h, w).
    """
    figure = _figure(title, 2.5 * _PANEL, 1.1 * _PANEL)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.3, 1))
    panel = parts[0].subplots()
    shown = _show_map(panel, similarity)
    panel.set_title("map of the whole image")
    _add_bar(parts[0], shown, [panel], len(similarity))
    # Each channel's largest weight for another channel.
    largest, attended = similarity.clone().fill_diagonal_(-torch.inf).max(1)
    pairs = largest.argsort(descending=True)[:_PAIRS].tolist() if len(similarity) > 1 else []
    if pairs:
        panels = parts[1].subplots(len(pairs), 2, squeeze=False)
        for line, channel in zip(panels, pairs, strict=True):
            for place, number in zip(line, (channel, int(attended[channel])), strict=True):
                place.imshow(features[number].float().numpy(force=True), cmap="gray")
                place.set(xticks=[], yticks=[])
                place.spines[:].set_visible(False)
                place.set_ylabel(f"{number}", rotation=0, ha="right", va="center", fontsize=8)
            weight, where = f"{float(largest[channel]):.2g} →", line[0].transAxes
            line[0].text(1.04, 0.5, weight, transform=where, va="center", fontsize=8)
        panels[0][0].set_title("attends", fontsize=9)
        panels[0][1].set_title("attended to", fontsize=9)
    return figure


@styled
def draw_channel(weights: Tensor, channel: int, *, title: str = "") -> Figure:
    """Draw the weights (C) that a channel gives as bars, and label the three largest."""
    figure = _figure(title, 2.4 * _PANEL, _PANEL * 0.9)
    panel = figure.subplots()
    values = weights.float().cpu()
    norm = weight_norm(values)
    panel.set_yscale("log" if isinstance(norm, LogNorm) else "linear")
    panel.margins(x=0.01, y=0.15)
    panel.bar(range(len(values)), values.tolist(), width=1, color=BLUE)
    panel.set_ylim(bottom=norm.vmin)
    label: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    for index in values.topk(min(3, len(values))).indices.tolist():
        panel.annotate(str(index), (index, float(values[index])), (0, 2), **label)
    panel.set(title=f"channel {channel} attends to", xlabel="channel")
    panel.set_ylabel(f"attention weight\n(uniform: 1/{len(values)})")
    panel.spines[["top", "right"]].set_visible(False)
    return figure


@styled
def draw_profiles(
    photograph: Tensor, weights: Mapping[str, Tensor], channel: int, *, title: str = ""
) -> Figure:
    """Draw the weights that a channel gives in each column below the photograph, row beside it.

    Weights are by "column" (w, C), by "row" (h, C), or both.
    """
    height, width = photograph.shape[1:]
    high = _PANEL * height / width
    figure = _figure(title, 2.4 * _PANEL, min(high, _MAX_HEIGHT) + _PANEL)
    panels = figure.subplots(2, 2, width_ratios=(1, 1), height_ratios=(high, _PANEL))
    (plain, right), (below, corner) = panels
    corner.set_axis_off()
    _show_photograph(plain, photograph)
    plain.set_aspect("auto")  # so that it is aligned with its columns and rows
    norm = weight_norm(torch.cat(list(weights.values())))
    for slices, panel in {"column": below, "row": right}.items():
        if slices not in weights:
            panel.set_axis_off()
            continue
        number = weights[slices].shape[1]
        labels = ["channel attended to", f"{slices} of the feature map"]
        across = slices == "column"
        each = weights[slices].T if across else weights[slices]
        shown = _show_weights(panel, each, norm, aspect="auto")
        panel.set(title=f"channel {channel} in each {slices}")
        panel.set(xlabel=labels[across], ylabel=labels[not across])
    _add_bar(figure, shown, [corner], number, location="left")
    return figure


def stamp(figure: Figure, text: str) -> None:
    """Write a text in a frame below the panels, so that it is wherever the picture is."""
    frame = {"facecolor": "none", "edgecolor": _MARK, "boxstyle": "round,pad=0.2"}
    label: Any = {"color": _MARK, "fontsize": 10, "fontweight": "bold", "bbox": frame}
    figure.supxlabel(text, x=0.99, ha="right", **label)


def _figure(title: str, width: float, height: float) -> Figure:
    """Create a figure for panels of a size in inches."""
    size = (width, min(height, _MAX_HEIGHT) + 0.8)
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _show_photograph(
    panel: Axes,
    photograph: Tensor,
    point: tuple[int, int] | None = None,
    title: str = "",
    **options: Any,
) -> None:
    """Show a photograph (3 or 1, H, W), with a ring around the centre of a pixel."""
    height, width = photograph.shape[1:]
    panel.imshow(photograph.permute(1, 2, 0).numpy(), extent=(0, width, height, 0), **options)
    panel.set_title(title)
    panel.set_axis_off()
    if point is not None:  # visible on dark and on bright colours
        for colour, thick in (("white", 3.2), (_MARK, 1.5)):
            x, y = point[0] + 0.5, point[1] + 0.5
            panel.plot(x, y, "o", markersize=13, mfc="none", markeredgecolor=colour, mew=thick)


def weight_norm(weights: Tensor) -> Normalize:
    """Return the colour scale for weights of any shape.

    It is symmetric around 0 if there are negative weights, linear from 0 if all are within a factor
    of ten, and otherwise logarithmic over at most four decades.
    """
    least, most = float(weights.min()), float(weights.max())
    if least < 0:
        return CenteredNorm(halfrange=max(-least, most))
    if least > most / 10 or most == 0:
        return Normalize(0, most or 1)
    return LogNorm(max(least, most / 10**_DECADES), most, clip=True)


def difference_norm(differences: Tensor) -> tuple[CenteredNorm, bool]:
    """Return the colour scale for differences of maps (n, C, C), and whether they exceed it.

    It is symmetric around 0 and ends at the largest difference off the diagonal. On the diagonal a
    channel is compared with itself, which often gives far larger weights.
    """
    sizes = differences.abs()
    most = float(sizes.max())
    off_diagonal = sizes[:, ~torch.eye(sizes.shape[-1], dtype=torch.bool)]
    half = (float(off_diagonal.max()) if off_diagonal.numel() else most) or most or 1.0
    return CenteredNorm(halfrange=half), half < most


def _show_weights(
    panel: Axes, weights: Tensor, norm: Normalize | None = None, **options: Any
) -> AxesImage:
    norm = norm or weight_norm(weights)
    colours = _SIGNED_COLOURS if isinstance(norm, CenteredNorm) else _COLOURS
    return panel.imshow(weights.float().numpy(force=True), cmap=colours, norm=norm, **options)


def _show_map(panel: Axes, weights: Tensor, norm: Normalize | None = None) -> AxesImage:
    panel.set(xlabel="channel attended to", ylabel="channel that attends")
    return _show_weights(panel, weights, norm)


def _add_bar(
    figure: Any, shown: AxesImage, panels: list[Axes], number: int | None = None, **options: Any
) -> None:
    """Add a colour bar of weights for a number of keys, by default of differences."""
    uniform = f"attention weight (uniform: 1/{number})"
    bar = figure.colorbar(shown, ax=panels, **options)
    bar.set_label("difference of weights" if number is None else uniform)
    bar.outline.set_edgecolor(QUIET)
