"""The regroupings against plain index arithmetic, and each against its inverse."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fullattn import reshape

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
    columns, rows = reshape.to_columns(x), reshape.to_rows(x)
    tokens, positions = reshape.to_channels(x), reshape.to_positions(x)
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
    assert torch.equal(reshape.from_columns(reshape.to_columns(x)), x)
    assert torch.equal(reshape.from_rows(reshape.to_rows(x)), x)
    assert torch.equal(reshape.from_channels(reshape.to_channels(x), height, width), x)
    assert torch.equal(reshape.from_positions(reshape.to_positions(x), height, width), x)
    assert torch.equal(reshape.to_columns(reshape.from_columns(x)), x)
    assert torch.equal(reshape.to_rows(reshape.from_rows(x)), x)


@given(shape=shapes.filter(all))
def test_regrouping_copies_nothing(shape: tuple[int, int, int, int]) -> None:
    x = numbered(shape)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    for view in (
        reshape.to_columns(x),
        reshape.to_rows(x),
        reshape.to_channels(x),
        reshape.to_positions(x),
    ):
        assert view.data_ptr() == x.data_ptr()
    assert reshape.to_positions(channels_last).data_ptr() == channels_last.data_ptr()
