"""The matplotlib style of all figures: legible in a paper, on a slide and in grey."""

from __future__ import annotations

from contextlib import ContextDecorator
from typing import Any

import matplotlib

__all__ = ["BLUE", "COLOURS", "GRID", "INK", "ORANGE", "QUIET", "styled"]

# Okabe and Ito's colours, which remain distinct for colour-blind readers and in grey.
BLUE, ORANGE = "#0072B2", "#E69F00"
COLOURS = ("#000000", BLUE, "#56B4E9", "#D55E00", ORANGE, "#009E73", "#CC79A7")
INK, QUIET, GRID = "#222222", "#555555", "#dddddd"

_SETTINGS: Any = {  # names that matplotlib lists as literals
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), QUIET),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor", "text.color"), INK),
    "legend.frameon": False,
}

# A decorator for functions that draw.
styled: ContextDecorator = matplotlib.rc_context(_SETTINGS)
