"""Drawings of similarity maps, each a matplotlib figure of its own; they know no layer.

Weights that lie within a factor of ten are shown on a linear scale from 0, others on a logarithmic
one of at most four decades: without a scale in the softmax one weight often has nearly everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

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
    "weight_norm",
]

Slices: TypeAlias = Literal["column", "row"]  # what a map of its own is of

# Perceptually uniform; the second for numbers of both signs.
_COLOURS, _SIGNED_COLOURS = "viridis", "berlin"
_MARK = "#D55E00"
_DECADES = 4
_PANEL = 3.6  # inches
_TALLEST = 4 * _PANEL  # whatever the photograph's form
_PAIRS = 4  # of channels that are shown as pictures


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


def distances(maps: Tensor, single: Tensor) -> Tensor:
    """How far maps are from one map: the total variation between their rows, averaged.

    Args:
        maps: (n, C, C), whose rows sum to 1.
        single: (C, C), whose rows sum to 1.

    Returns:
        For each map a number from 0, the same, to 1, no channel attended to by both; (n).

    Example:
        >>> distances(torch.eye(2)[None], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        tensor([0.5000])
    """
    return torch.stack([(each - single).abs().sum(-1).mean() / 2 for each in maps])


@styled
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
    panel_width = 1.3 * _PANEL
    figure = _figure(title, 2 * panel_width, panel_width * height / width)
    plain, over = figure.subplots(1, 2)
    _show_photograph(plain, photograph, point)
    plain.set_title("the point")
    over.imshow(_grey(photograph), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
    shown = _show_weights(over, weights, extent=(0, width, height, 0), alpha=0.75)
    _mark(over, point)
    over.set_title("where it looks")
    over.set_axis_off()
    _explain(figure, shown, [over], weights.numel())
    return figure


@styled
def draw_slices(
    photograph: Tensor,
    maps: Mapping[Slices, Tensor],
    single: Tensor,
    point: tuple[int, int],
    size: tuple[int, int],
    *,
    title: str = "",
) -> Figure:
    """The channel maps of a layer of columns or rows at a point, and the channel layer's one.

    Args:
        photograph: uint8, (3, H, W).
        maps: of all columns, (w, C, C), of all rows, (h, C, C), or both.
        single: the channel layer's map, (C, C).
        point: x and y in pixels.
        size: of the feature map, (h, w).
        title: of the figure.

    Returns:
        Above, the photograph with the point's column and row, and the map of each; along its edges
        how far each column's and row's map is from the single one, as `distances` says. Below, the
        single map, and each of the others less the single one.
    """
    x, y = cell_of(point, photograph, torch.empty(size))
    at: dict[Slices, int] = {"column": x, "row": y}
    names = {slices: f"{slices} {at[slices]}" for slices in maps}
    own = [maps[slices][at[slices]] for slices in maps]
    figure = _figure(title, 1.2 * (1 + len(maps)) * _PANEL, 2 * _PANEL)
    (plain, *upper), (one, *lower) = figure.subplots(2, 1 + len(maps))
    _show_photograph(plain, photograph, point)
    plain.set_title(f"the point, {' and '.join(f'its {slices}' for slices in maps)}")
    _frame_slices(plain, photograph, {slices: at[slices] for slices in maps}, size)
    away = {slices: distances(each, single) for slices, each in maps.items()}
    _show_distances(plain, photograph, away, at)

    norm = weight_norm(torch.stack([*own, single]))
    for panel, weights, name in zip(
        (*upper, one),
        (*own, single),
        (*(f"map of {name}" for name in names.values()), "the channel layer's only map"),
        strict=True,
    ):
        shown = _show_weights(panel, weights, norm)
        panel.set_title(name)
        _label_channels(panel)
    _explain(figure, shown, upper, single.shape[1])
    differences = torch.stack(own) - single
    norm, cut = difference_norm(differences)
    for panel, difference, name in zip(lower, differences, names.values(), strict=True):
        shown = _show_weights(panel, difference, norm)
        panel.set_title(f"{name} less that map")
        _label_channels(panel)
    bar = figure.colorbar(shown, ax=lower, extend="both" if cut else "neither")
    bar.set_label("difference of weights")
    bar.outline.set_edgecolor(QUIET)
    return figure


def _frame_slices(
    panel: Axes, photograph: Tensor, at: Mapping[Slices, int], size: tuple[int, int]
) -> None:
    """A frame around one column or row of the feature map, or both, in the photograph."""
    height, width = photograph.shape[1:]
    high, wide = height / size[0], width / size[1]
    for slices, index in at.items():
        corner = (index * wide, 0) if slices == "column" else (0, index * high)
        extent = (wide, height) if slices == "column" else (width, high)
        panel.add_patch(Rectangle(corner, *extent, fill=False, edgecolor=_MARK))


def _show_distances(
    panel: Axes,
    photograph: Tensor,
    distances: Mapping[Slices, Tensor],
    at: Mapping[Slices, int],
) -> None:
    """Along the photograph's edges, how far each column's and row's map is from the single one."""
    most = max(*(float(each.max()) for each in distances.values()), 1e-3)
    # As thick beside a long photograph as beside a square one.
    high, wide = (side / max(photograph.shape[1:]) for side in photograph.shape[1:])
    for slices, values in distances.items():
        lengths, index = values.tolist(), at[slices]
        label = f"distance of each {slices}'s map\nfrom the channel layer's only one"
        if slices == "column":
            edge = panel.inset_axes((0, -0.24 / high, 1, 0.2 / high))
            edge.bar(range(len(lengths)), lengths, width=1, color=BLUE)
            edge.bar(index, lengths[index], width=1, color=_MARK)
            edge.set(xlim=(-0.5, len(lengths) - 0.5), ylim=(0, most), xticks=[])
        else:
            edge = panel.inset_axes((1 + 0.03 / wide, 0, 0.2 / wide, 1))
            edge.barh(range(len(lengths)), lengths, height=1, color=BLUE)
            edge.barh(index, lengths[index], height=1, color=_MARK)
            edge.set(ylim=(len(lengths) - 0.5, -0.5), xlim=(0, most), yticks=[])
            label = "of each\nrow's" if "column" in distances else label
        edge.set_xlabel(label)
        edge.spines[["top", "right"]].set_visible(False)
        edge.tick_params(labelsize=7)


@styled
def draw_channels(similarity: Tensor, features: Tensor, *, title: str = "") -> Figure:
    """A map between channels, and the pairs that call each other loudest.

    Args:
        similarity: (C, C); row i holds the weights of the channels that i attends to.
        features: the channels themselves, (C, h, w).
        title: of the figure.

    Returns:
        The map, and beside it the pairs of different channels with the largest weights, as
        pictures: the one that attends, and the one that it attends to.
    """
    number = len(similarity)
    pairs = _loudest_pairs(similarity)
    figure = _figure(title, 2.5 * _PANEL, 1.1 * _PANEL)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1.3, 1))
    map_part, pairs_part = parts
    panel = map_part.subplots()
    shown = _show_weights(panel, similarity)
    panel.set_title("map of the whole image")
    _label_channels(panel)
    _explain(map_part, shown, [panel], number)
    if pairs:
        panels = pairs_part.subplots(len(pairs), 2, squeeze=False)
        for line, (attends, to) in zip(panels, pairs, strict=True):
            for place, channel in zip(line, (attends, to), strict=True):
                _show_channel(place, features[channel], channel)
            line[0].annotate(
                f"{float(similarity[attends, to]):.2g} →",
                (1.04, 0.5),
                xycoords="axes fraction",
                va="center",
                fontsize=8,
                annotation_clip=False,
            )
        panels[0][0].set_title("attends", fontsize=9)
        panels[0][1].set_title("attended to", fontsize=9)
    return figure


def _loudest_pairs(similarity: Tensor) -> list[tuple[int, int]]:
    """The pairs of different channels with the largest weights, each channel attending once."""
    others = similarity.detach().clone().fill_diagonal_(-torch.inf)
    if len(others) < 2:
        return []
    weights, attended = others.max(1)
    order = weights.argsort(descending=True)[:_PAIRS].tolist()
    return [(attends, int(attended[attends])) for attends in order]


def _show_channel(panel: Axes, channel: Tensor, number: int) -> None:
    panel.imshow(channel.float().numpy(force=True), cmap="gray")
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_ylabel(f"{number}", rotation=0, ha="right", va="center", fontsize=8)


@styled
def draw_channel(weights: Tensor, channel: int, *, title: str = "") -> Figure:
    """Which channels one channel attends to.

    Args:
        weights: of every channel, (C).
        channel: the one that attends.
        title: of the figure.

    Returns:
        A bar for each channel, the three largest with their numbers.
    """
    figure = _figure(title, 2.4 * _PANEL, _PANEL * 0.9)
    panel = figure.subplots()
    values = weights.float().cpu()
    norm = weight_norm(values)
    panel.set_yscale("log" if isinstance(norm, LogNorm) else "linear")
    panel.margins(x=0.01, y=0.15)
    panel.bar(range(len(values)), values.tolist(), width=1, color=BLUE)
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
    panel.set_title(f"channel {channel} attends to")
    panel.set_xlabel("channel")
    panel.set_ylabel(f"attention weight\n(uniform: 1/{len(values)})")
    panel.spines[["top", "right"]].set_visible(False)
    return figure


@styled
def draw_profiles(
    photograph: Tensor, weights: Mapping[Slices, Tensor], channel: int, *, title: str = ""
) -> Figure:
    """Which channels one channel of a layer attends to, column by column or row by row.

    Args:
        photograph: uint8, (3, H, W).
        weights: the channel's in every column, (w, C), in every row, (h, C), or both.
        channel: the one that attends.
        title: of the figure.

    Returns:
        The photograph; below it the weights of each of its columns, at its right those of each of
        its rows.
    """
    height, width = photograph.shape[1:]
    high = _PANEL * height / width
    figure = _figure(title, 2.4 * _PANEL, min(high, _TALLEST) + _PANEL)
    panels = figure.subplots(2, 2, width_ratios=(1, 1), height_ratios=(high, _PANEL))
    (plain, right), (below, corner) = panels
    corner.set_axis_off()
    _show_photograph(plain, photograph)
    plain.set_aspect("auto")  # so that it lies exactly over its columns and beside its rows
    norm = weight_norm(torch.cat(list(weights.values())))
    panels_of: dict[Slices, Axes] = {"column": below, "row": right}
    for slices, panel in panels_of.items():
        if slices not in weights:
            panel.set_axis_off()
            continue
        each = weights[slices]
        shown = _show_weights(panel, each.T if slices == "column" else each, norm, aspect="auto")
        place, channels = f"{slices} of the feature map", "channel attended to"
        across, up = (place, channels) if slices == "column" else (channels, place)
        panel.set(xlabel=across, ylabel=up)
        panel.set_title(f"channel {channel} in each {slices}")
    number = next(iter(weights.values())).shape[1]
    _explain(figure, shown, [corner], number, location="left")
    return figure


def _figure(title: str, width: float, height: float) -> Figure:
    """A figure for panels of so many inches."""
    figure = Figure(figsize=(width, min(height, _TALLEST) + 0.8), layout="constrained", dpi=150)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def _grey(photograph: Tensor) -> Any:
    return photograph.float().mean(0).numpy()


def _show_photograph(panel: Axes, photograph: Tensor, point: tuple[int, int] | None = None) -> None:
    height, width = photograph.shape[1:]
    panel.imshow(photograph.permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
    panel.set_axis_off()
    if point is not None:
        _mark(panel, point)


def _mark(panel: Axes, point: tuple[int, int]) -> None:
    """A ring around the pixel's centre, seen on dark and on bright."""
    x, y = point[0] + 0.5, point[1] + 0.5
    panel.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor="white", mew=3.2)
    panel.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=_MARK, mew=1.5)


def weight_norm(weights: Tensor) -> Normalize:
    """The scale of colours for weights.

    Args:
        weights: of any shape.

    Returns:
        Around 0 where there are negative ones; from 0 where all lie within a factor of ten;
        otherwise logarithmic over at most four decades.
    """
    least, most = float(weights.min()), float(weights.max())
    if least < 0:
        return CenteredNorm(halfrange=max(-least, most))
    if least > most / 10 or most == 0:
        return Normalize(0, most or 1)
    return LogNorm(max(least, most / 10**_DECADES), most, clip=True)


def difference_norm(differences: Tensor) -> tuple[CenteredNorm, bool]:
    """The scale of colours for differences of weights.

    Args:
        differences: of maps, (n, C, C).

    Returns:
        A scale around 0, and whether it is exceeded: it ends at the largest difference outside of
        the diagonal, where a channel meets itself and often stands far out.
    """
    sizes = differences.abs()
    most = float(sizes.max())
    apart = ~torch.eye(sizes.shape[-1], dtype=torch.bool)
    half = float(sizes[:, apart].max()) if apart.any() else most
    half = half or most or 1.0
    return CenteredNorm(halfrange=half), half < most


def _show_weights(
    panel: Axes, weights: Tensor, norm: Normalize | None = None, **options: Any
) -> AxesImage:
    norm = norm or weight_norm(weights)
    colours = _SIGNED_COLOURS if isinstance(norm, CenteredNorm) else _COLOURS
    return panel.imshow(weights.float().numpy(force=True), cmap=colours, norm=norm, **options)


def _label_channels(panel: Axes) -> None:
    panel.set_xlabel("channel attended to")
    panel.set_ylabel("channel that attends")


def _explain(
    figure: Any,
    shown: AxesImage,
    panels: Sequence[Axes],
    number: int,
    *,
    location: str = "right",
) -> None:
    bar = figure.colorbar(shown, ax=list(panels), location=location)
    bar.set_label(f"attention weight (uniform: 1/{number})")
    bar.outline.set_edgecolor(QUIET)
