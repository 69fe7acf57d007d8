"""The drawn figures of the site: what the layers compare, and the steps of a column's map.

Each is SVG out of squares and words. Inside a page they take its colours, light or dark, from the
style sheet; as files of their own they carry those with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape

__all__ = ["FIGURES", "standalone"]

_CHANNELS, _ROWS, _COLUMNS = 4, 4, 6  # of the feature map that is drawn
_CELL = 14
_STEP = 11  # from one channel's sheet to the next, to the right and up

_COLOURS = """
svg { font: 13px system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
.sheet { fill: #ffffff; stroke: #7a8794; }
.cell { fill: none; stroke: #c5ccd3; stroke-width: .6; }
.fully { fill: #0072b2; } .channel { fill: #e69f00; } .spatial { fill: #009e73; }
.mean { fill: #8a5aa8; }
.ink { fill: #222222; } .quiet { fill: #5d6872; }
.line { stroke: #5d6872; fill: none; stroke-width: 1.4; }
.small { font-size: 11px; }
.big { font-weight: 600; font-size: 15px; }
"""
_DARK = """
.sheet { fill: #2a2f38; stroke: #8894a0; } .cell { stroke: #4a525d; }
.ink { fill: #e8e8e8; } .quiet { fill: #aab4be; } .line { stroke: #aab4be; }
.fully { fill: #56b4e9; } .channel { fill: #f0b429; } .spatial { fill: #2cc295; }
.mean { fill: #c39bd8; }
"""


def _text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "middle") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def _rectangle(x: float, y: float, w: float, h: float, kind: str, opacity: float = 1) -> str:
    faded = "" if opacity == 1 else f' fill-opacity="{opacity:.2f}"'
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" class="{kind}"{faded}/>'


def _grid(x: float, y: float, rows: int, columns: int, cell: float = _CELL) -> Iterator[str]:
    """Empty cells."""
    yield _rectangle(x, y, columns * cell, rows * cell, "sheet")
    lines = [f"M{x + i * cell:g} {y:g}v{rows * cell:g}" for i in range(1, columns)]
    lines += [f"M{x:g} {y + i * cell:g}h{columns * cell:g}" for i in range(1, rows)]
    yield f'<path d="{"".join(lines)}" class="cell"/>'


def _features(
    x: float, y: float, marked: Callable[[int, int, int], bool], kind: str
) -> Iterator[str]:
    """Draw a feature map: a sheet a channel, the last behind; marked(channel, row, column)."""
    for channel in reversed(range(_CHANNELS)):
        left, top = x + channel * _STEP, y + (_CHANNELS - 1 - channel) * _STEP
        yield from _grid(left, top, _ROWS, _COLUMNS)
        for row in range(_ROWS):
            for column in range(_COLUMNS):
                if marked(channel, row, column):
                    at = left + column * _CELL, top + row * _CELL
                    yield _rectangle(*at, _CELL, _CELL, kind, 0.85)


def _map(x: float, y: float, tokens: int, cell: float, kind: str, seed: int) -> Iterator[str]:
    """Draw a similarity map: cells of many strengths, the same in every drawing."""
    yield _rectangle(x, y, tokens * cell, tokens * cell, "sheet")
    for i in range(tokens):
        for j in range(tokens):
            strength = ((i * 37 + j * 91 + seed * 53 + (i * j * 29) % 41) % 17) / 17
            opacity = 0.08 + 0.5 * strength + (0.4 if i == j else 0)
            yield _rectangle(x + j * cell, y + i * cell, cell, cell, kind, min(opacity, 1))


def _arrow(x: float, y: float, length: float) -> str:
    end = x + length
    return (
        f'<path class="line" d="M{x:g} {y:g}H{end:g}M{end - 5:g} {y - 4:g}L{end:g} {y:g}'
        f'L{end - 5:g} {y + 4:g}"/>'
    )


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


_LAYERS: dict[str, tuple[str, str, str, Callable[[int, int, int], bool]]] = {
    "channel": (
        "ChannelNonLocal",
        "one C×C map",
        "sums over positions",
        lambda channel, row, column: channel == 0,
    ),
    "spatial": (
        "SpatialNonLocal",
        "one HW×HW map",
        "sums over channels",
        lambda channel, row, column: row == 1 and column == 2,
    ),
    "fully": (
        "FullyAttentional",
        "W + H maps of C×C",
        "sums inside a column or a row",
        lambda channel, row, column: column == 2,
    ),
}


def _layer(kind: str) -> str:
    """Draw a layer: what it compares, marked in a feature map, and the resulting maps."""
    name, maps, loss, marked = _LAYERS[kind]
    parts = [_text(150, 22, name, "ink big")]
    parts += _features(24, 56, marked, kind)
    parts += [_arrow(154, 101, 26)]
    if kind == "channel":
        parts += _map(206, 73, _CHANNELS, _CELL, kind, 1)
    elif kind == "spatial":
        parts += _map(190, 49, _ROWS * _COLUMNS, 4.3, kind, 2)
    else:
        parts += _means()
        for i in reversed(range(4)):
            parts += _map(190 + i * 13, 82 - i * 12, _CHANNELS, _CELL, kind, 3 + i)
    also = " and its means" if kind == "fully" else ""
    parts += [_text(70, 176, f"C × H × W{also}", "quiet small")]
    parts += [_text(150, 210, maps, "quiet"), _text(150, 232, loss, "ink")]
    return _svg(300, 244, f"{name}: {maps}; it {loss}.", parts)


def _means() -> Iterator[str]:
    """Draw the mean column and row beside the features, and the key made of one, on its way."""
    for i in range(_ROWS):
        yield _rectangle(4, 89 + i * _CELL, 12, _CELL, "mean", 0.5 + 0.12 * i)
    for i in range(_COLUMNS):
        yield _rectangle(24 + i * _CELL, 149, _CELL, 12, "mean", 0.4 + 0.1 * i)
    for i in range(_CHANNELS):
        yield _rectangle(149 + i * 9, 136, 9, 36, "mean", 0.35 + 0.15 * i)
    yield '<path class="line" d="M112 155H143M138 151L143 155L138 159M167 132V107"/>'
    yield _text(127, 147, "Linear", "quiet small")
    yield _text(167, 186, "key", "quiet small")


def _column(_: int, __: int, column: int) -> bool:
    return column == 2


def _vectors(x: float, kind: str) -> Iterator[str]:
    """Draw a vector of length H for each channel, side by side."""
    for i in range(_CHANNELS):
        yield from _grid(x + i * _CELL, 70, _ROWS, 1)
        strength = 0.85 if kind == "fully" else 0.35 + 0.15 * i
        yield _rectangle(x + i * _CELL, 70, _CELL, _ROWS * _CELL, kind, strength)


def _context() -> str:
    """Step 1 and 2: the mean over the columns, and the key made of it."""
    parts = [_text(150, 20, "context and key", "ink big")]
    parts += _features(6, 54, lambda *_: False, "mean")
    parts += [_arrow(131, 98, 34), _text(148, 114, "mean", "quiet small")]
    parts += [*_vectors(170, "mean"), _text(198, 146, "C × H", "quiet")]
    parts += [_arrow(231, 98, 34), _text(248, 114, "Linear", "quiet small"), _text(283, 102, "key")]
    parts += [_text(150, 182, "x averaged over all columns:", "quiet")]
    parts += [_text(150, 200, "a vector of length H for each channel", "quiet")]
    return _svg(300, 214, "Context: the mean of x over W. Key: a Linear over its channels.", parts)


def _similarity() -> str:
    """Step 3 and 4: one column compared with the key."""
    parts = [_text(150, 20, "the map of column w", "ink big")]
    parts += [*_vectors(22, "fully"), _text(50, 146, "x[:, :, w]", "quiet")]
    parts += [
        _text(96, 103, "·", "ink big"),
        *_vectors(114, "mean"),
        _text(142, 146, "key", "quiet"),
    ]
    parts += [_arrow(178, 98, 30), _text(193, 114, "softmax", "quiet small")]
    parts += [*_map(222, 70, _CHANNELS, _CELL, "fully", 3), _text(250, 146, "C × C", "quiet")]
    parts += [_text(150, 182, "each channel of the column against", "quiet")]
    parts += [_text(150, 200, "each channel of the key", "quiet")]
    return _svg(300, 214, "The column's C vectors of length H against the key's.", parts)


def _attended() -> str:
    """Step 5: the map times the column."""
    parts = [_text(150, 20, "the column attended", "ink big")]
    parts += [*_map(4, 70, _CHANNELS, _CELL, "fully", 3), _text(32, 146, "C × C", "quiet")]
    parts += [_text(70, 103, "×"), *_vectors(80, "fully"), _text(108, 146, "x[:, :, w]", "quiet")]
    parts += [_arrow(142, 98, 24), *_features(174, 54, _column, "fully")]
    parts += [_text(150, 182, "all W columns alike; then the H rows,", "quiet")]
    parts += [_text(150, 200, "with a Linear of their own", "quiet")]
    return _svg(300, 214, "The map times the column gives the column of the result.", parts)


def _panels(*drawings: str) -> str:
    return f'<div class="panels">{"".join(f"<div>{drawing}</div>" for drawing in drawings)}</div>'


# What a page can ask for by name.
FIGURES: dict[str, Callable[[], str]] = {
    "layers": lambda: _panels(*map(_layer, _LAYERS)),
    "column": lambda: _panels(_context(), _similarity(), _attended()),
}


def style() -> str:
    """Return the figures' colours for the site, whose switch sets the scheme."""
    rules = [line for line in _COLOURS.strip().splitlines() if not line.startswith("svg ")]
    light = "\n".join(rules)
    return f".panels svg {{\n{light}\n}}\n[data-md-color-scheme=slate] .panels svg {{{_DARK}}}\n"


def standalone() -> str:
    """Draw the three layers side by side as one SVG, light or dark by the reader's scheme."""
    drawings = [
        _layer(kind).replace("<svg ", f'<svg x="{300 * i}" width="300" height="244" ', 1)
        for i, kind in enumerate(_LAYERS)
    ]
    style_ = f"<style>{_COLOURS}@media (prefers-color-scheme: dark) {{{_DARK}}}</style>"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 250" width="900" height="250">'
        f"{style_}{''.join(drawings)}</svg>\n"
    )
