"""Results as a picture: ratios to the baseline, or how cost grows along a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from fullattn._cli.conditions import MODES, Mode
from fullattn.bench import table
from fullattn.bench.results import Quantity, Results, Row
from fullattn.plot.style import BLUE, COLOURS, GRID, ORANGE, QUIET, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

__all__ = ["draw"]

_MODE_COLOURS: dict[Mode, str] = {"inference": BLUE, "training": ORANGE}
_MARKERS = "os^Dv<>"
_UNITS: dict[Quantity, tuple[int, str]] = {
    "time": (1, "ms"),
    "memory": (2**20, "MiB over the inputs"),
}
# The ratio of each quantity, as in the tables, and where it is better.
_RATIOS: dict[Quantity, tuple[str, str]] = {
    "time": ("speed", "right"),
    "memory": ("peak memory", "left"),
}


@styled
def draw(results: Results, file: Path | IO[bytes]) -> None:
    """Draw results as a PNG.

    Args:
        results: what to draw; a sweep is drawn as growth, anything else as ratios.
        file: to write, or its path.
    """
    figure = _growth(results) if results.sweep else _ratios(results)
    figure.supxlabel("\n".join(results.caption()), fontsize=7, color=QUIET, x=0.01, ha="left")
    FigureCanvasAgg(figure)
    figure.savefig(file, format="png", dpi=150)


def _label(row: Row) -> str:
    backend = row.implementation.backend
    return row.implementation.title + (f", {backend}" if backend else "")


def _ratios(results: Results) -> Figure:
    """Draw a line of panels per shape: speed left, memory right, a bar per implementation."""
    shapes = results.shapes
    heights = [0.8 + 0.32 * len(results.at(shape)) for shape in shapes]
    figure = Figure(figsize=(10, sum(heights) + 1.5), layout="constrained")
    panels = figure.subplots(
        len(shapes), 2, squeeze=False, sharex="col", height_ratios=heights, sharey="row"
    )
    for line, shape in zip(panels, shapes, strict=True):
        for panel, quantity in zip(line, _UNITS, strict=True):
            _bars(panel, results, results.at(shape), quantity)
            panel.set_title(f"{shape}: {_RATIOS[quantity][0]}", loc="left", fontweight="bold")
    for panel, (ratio, better) in zip(panels[-1], _RATIOS.values(), strict=True):
        panel.set_xlabel(f"{ratio} over that of the baseline ({better} is better)")
    figure.suptitle(
        f"Speed and memory against the baseline: {results.baseline_title()}",
        x=0.01,
        ha="left",
        fontsize=12,
    )
    handles = [Patch(color=_MODE_COLOURS[mode], label=mode) for mode in results.modes]
    figure.legend(handles=handles, loc="outside upper right", ncols=2, frameon=False)
    return figure


def _bars(panel: Axes, results: Results, rows: list[Row], quantity: Quantity) -> None:
    panel.set_xscale("log")
    panel.axvline(1, color=QUIET, linewidth=1)
    height = 0.38
    for place, row in enumerate(rows):
        modes = [mode for mode in MODES if mode in row.measured]
        for number, mode in enumerate(modes):
            y = place + height * (number - (len(modes) - 1) / 2)
            ratio = results.ratio(row, quantity, mode)
            if ratio and quantity == "time":
                ratio = 1 / ratio  # the speed, as in the tables
            if ratio:  # from 1 outwards
                panel.barh(y, ratio - 1, height, left=1, color=_MODE_COLOURS[mode])
            _write_at(panel, y, ratio, _text(row, ratio, quantity, mode))
    panel.set_yticks(range(len(rows)), [_label(row) for row in rows])
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.margins(x=0.25)
    _label_ticks(panel.xaxis, "×")
    panel.grid(axis="x", which="both", color=GRID, linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)


def _label_ticks(axis: Axis, unit: str = "") -> None:
    """Label 1, 2 and 5 of every decade with plain numbers."""
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    for formatted in (axis.set_major_formatter, axis.set_minor_formatter):
        formatted(lambda value, _: f"{value:g}{unit}")
    axis.set_tick_params(which="both", labelsize=8, length=3, pad=3)


def _text(row: Row, ratio: float | None, quantity: Quantity, mode: Mode) -> str:
    measurement = row.measured[mode]
    if measurement.failure is not None:
        return measurement.failure.kind
    return table.ratio(ratio) if ratio else f"no ratio of {quantity}"


def _write_at(panel: Axes, y: float, ratio: float | None, text: str) -> None:
    left = ratio is not None and ratio < 1
    panel.annotate(
        text,
        (ratio or 1, y),
        xytext=(-3 if left else 3, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=7,
    )


def _growth(results: Results) -> Figure:
    """Draw time and memory along the sweep, a line per implementation, logarithmic axes."""
    figure = Figure(figsize=(12, 4 * len(results.modes) + 1.2), layout="constrained")
    panels = figure.subplots(len(results.modes), 2, squeeze=False, sharex=True)
    labels = list(dict.fromkeys(_label(row) for row in results.rows))
    axis = "channels" if results.sweep == "channels" else "positions (H·W)"
    for line, mode in zip(panels, results.modes, strict=True):
        for panel, (quantity, (unit, unit_name)) in zip(line, _UNITS.items(), strict=True):
            for number, label in enumerate(labels):
                points = [
                    (_size(results, row), value / unit)
                    for row in results.rows
                    if _label(row) == label and (value := row.value(quantity, mode))
                ]
                if points:
                    panel.plot(
                        *zip(*points, strict=True),
                        color=COLOURS[number % len(COLOURS)],
                        marker=_MARKERS[number % len(_MARKERS)],
                        linestyle="-" if number < len(COLOURS) else "--",
                        markersize=4,
                        label=label,
                    )
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.set_title(f"{mode}: {quantity}", loc="left", fontweight="bold")
            panel.set_ylabel(f"{quantity}, {unit_name}")
            panel.set_xlabel(axis)
            ticks = sorted({_size(results, row) for row in results.rows})
            panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            panel.xaxis.set_minor_locator(NullLocator())
            _label_ticks(panel.yaxis)
            panel.grid(color=GRID, linewidth=0.6)
            panel.spines[["top", "right"]].set_visible(False)
    first, last = results.shapes[0], results.shapes[-1]
    figure.suptitle(f"How cost grows from {first} to {last}", x=0.01, ha="left", fontsize=12)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    return figure


def _size(results: Results, row: Row) -> int:
    return row.shape.channels if results.sweep == "channels" else row.shape.height * row.shape.width
