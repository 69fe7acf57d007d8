"""Scores as a table for a terminal."""

from __future__ import annotations

import math

from rich import box
from rich.table import Table

from fullattn.segmentation.evaluation.scores import Scores

__all__ = ["table"]

_NOTHING = "–"


def table(scores: Scores) -> Table:
    """IoU, accuracy and share of the pixels of each class; then the means.

    Args:
        scores: what to show.

    Returns:
        The table, in per cent; a dash where a class is nowhere.
    """
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("class")
    for heading in ("IoU %", "accuracy %", "of pixels %"):
        shown.add_column(heading, justify="right", no_wrap=True)
    shares = scores.pixels / scores.pixels.sum()
    columns = (scores.classes, scores.iou.tolist(), scores.accuracy.tolist(), shares.tolist())
    for name, *values in zip(*columns, strict=True):
        shown.add_row(name, *map(_percent, values))
    shown.add_section()
    for group, mean in scores.group_means.items():
        shown.add_row(f"mean of {group}", _percent(mean))
    shown.add_section()
    shown.add_row("mean", _percent(scores.mean_iou), _percent(scores.mean_accuracy))
    shown.add_row("all pixels", "", _percent(scores.pixel_accuracy))
    return shown


def _percent(value: float) -> str:
    return _NOTHING if math.isnan(value) else f"{100 * value:.2f}"
