"""The regroupings against plain index arithmetic, and each against its inverse."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fullattn.reshape import CHANNELS, COLUMNS, POSITIONS, ROWS, Cut

# Every way to give each axis to slices, tokens or features.
CUTS = [
    Cut(
        "any",
        *(
            "".join(a for a, place in zip("chw", places, strict=True) if place == g)
            for g in range(3)
        ),
    )
    for places in itertools.product(range(3), repeat=3)
]
sizes = st.integers(1, 5)
shapes = st.tuples(st.integers(0, 3), sizes, sizes, sizes)


def numbered(shape: tuple[int, ...]) -> Tensor:
    """A feature map whose every number is another one."""
    count = torch.Size(shape).numel()
    return torch.arange(count).reshape(shape)


@given(shape=shapes)
def test_columns_rows_channels_and_positions_are_where_the_indices_say(
    shape: tuple[int, int, int, int],
) -> None:
    batch, channels, height, width = shape
    x = numbered(shape)
    columns, rows = COLUMNS(x), ROWS(x)
    tokens, positions = CHANNELS(x), POSITIONS(x)
    assert columns.shape == (batch, width, channels, height)
    assert rows.shape == (batch, height, channels, width)
    assert tokens.shape == (batch, 1, channels, height * width)
    assert positions.shape == (batch, 1, height * width, channels)
    for b in range(batch):
        for c in range(channels):
            for h in range(height):
                for w in range(width):
                    number = x[b, c, h, w]
                    assert columns[b, w, c, h] == number
                    assert rows[b, h, c, w] == number
                    assert tokens[b, 0, c, h * width + w] == number
                    assert positions[b, 0, h * width + w, c] == number


@given(shape=shapes)
def test_every_regrouping_has_its_inverse(shape: tuple[int, int, int, int]) -> None:
    _, _, height, width = shape
    x = numbered(shape)
    for cut in CUTS:
        slices = cut(x)
        assert slices.shape[1:] == cut.sizes(shape)
        assert torch.equal(cut.inverse(slices, height, width), x)


@pytest.mark.parametrize("axes", [("w", "c", ""), ("h", "c", "h"), ("x", "c", "hw")])
def test_a_cut_names_each_axis_once(axes: tuple[str, str, str]) -> None:
    with pytest.raises(ValueError, match="names each of the axes c, h and w once, got slices="):
        Cut("bad", *axes)


@given(shape=shapes.filter(all))
def test_regrouping_copies_nothing(shape: tuple[int, int, int, int]) -> None:
    x = numbered(shape)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    for view in (
        COLUMNS(x),
        ROWS(x),
        CHANNELS(x),
        POSITIONS(x),
    ):
        assert view.data_ptr() == x.data_ptr()
    assert POSITIONS(channels_last).data_ptr() == channels_last.data_ptr()
