"""The layers in NumPy float64, written as the sums of their papers: the measure of all backends.

Nothing here is fast and nothing is shared with the package: every index of a paper's formula is an
index of an einsum, and H and W, columns and rows, are spelt out one by one.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def softmax(scores: Array) -> Array:
    """Softmax over the last axis, of scores of any size."""
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def fully_attentional_maps(
    x: Array,
    column_weight: Array,
    column_bias: Array,
    row_weight: Array,
    row_bias: Array,
    scale: float | None = 1.0,
) -> tuple[Array, Array]:
    """Song et al., section 3: (B, W, C, C) of the columns and (B, H, C, C) of the rows."""
    batch, channels, height, width = x.shape
    column_maps = np.empty((batch, width, channels, channels))
    row_maps = np.empty((batch, height, channels, channels))
    for b in range(batch):
        # Linear over the channels: key[o, h] = Σ_i weight[o, i] · context[i, h] + bias[o].
        column_context = sum(x[b, :, :, w] for w in range(width)) / width
        column_key = column_weight @ column_context + column_bias[:, None]
        for w in range(width):
            scores = np.einsum("ih,jh->ij", x[b, :, :, w], column_key)
            column_maps[b, w] = softmax(scores * (height**-0.5 if scale is None else scale))
        row_context = sum(x[b, :, h, :] for h in range(height)) / height
        row_key = row_weight @ row_context + row_bias[:, None]
        for h in range(height):
            scores = np.einsum("iw,jw->ij", x[b, :, h, :], row_key)
            row_maps[b, h] = softmax(scores * (width**-0.5 if scale is None else scale))
    return column_maps, row_maps


def fully_attentional_attended(x: Array, column_maps: Array, row_maps: Array) -> Array:
    """columns + rows: every column and every row of x mixed by its own map."""
    columns = np.einsum("bwij,bjhw->bihw", column_maps, x)
    rows = np.einsum("bhij,bjhw->bihw", row_maps, x)
    return columns + rows


def channel_map(x: Array, scale: float | None = 1.0, least_similar: bool = False) -> Array:
    """Fu et al., section 3.3: (B, C, C); least_similar is literally their code's max(S) - S."""
    height, width = x.shape[2:]
    scores = np.einsum("bihw,bjhw->bij", x, x)
    scores = scores * ((height * width) ** -0.5 if scale is None else scale)
    if least_similar:
        scores = scores.max(axis=-1, keepdims=True) - scores
    return softmax(scores)


def channel_attended(x: Array, similarity: Array) -> Array:
    """Every position's channels mixed by the one map."""
    return np.einsum("bij,bjhw->bihw", similarity, x)


def convolution_1x1(x: Array, weight: Array, bias: Array) -> Array:
    """weight (O, I), bias (O,): the same Linear at every position."""
    return np.einsum("oi,bihw->bohw", weight, x) + bias[:, None, None]


def max_pool(x: Array, size: int) -> Array:
    """The largest number of every whole size x size window; what does not fill one is left out."""
    batch, channels, height, width = x.shape
    pooled = np.empty((batch, channels, height // size, width // size))
    for h in range(height // size):
        for w in range(width // size):
            window = x[:, :, h * size : (h + 1) * size, w * size : (w + 1) * size]
            pooled[:, :, h, w] = window.max(axis=(2, 3))
    return pooled


def positions(x: Array) -> Array:
    """(B, H·W, C): position p = h · W + w."""
    batch, channels, height, width = x.shape
    out = np.empty((batch, height * width, channels))
    for h in range(height):
        for w in range(width):
            out[:, h * width + w] = x[:, :, h, w]
    return out


def spatial_map(
    query: Array,
    key: Array,
    mode: str,
    scale: float | None = 1.0,
    score_weight: Array | None = None,
) -> Array:
    """Wang et al., section 3.2: (B, H·W, H'·W') for a query and a (pooled) key."""
    query, key = positions(query), positions(key)
    if mode == "concatenation":
        assert score_weight is not None
        batch, count, features = query.shape
        similarity = np.empty((batch, count, key.shape[1]))
        for p in range(count):
            repeated = np.broadcast_to(query[:, p, None], (batch, key.shape[1], features))
            pairs = np.concatenate([repeated, key], axis=-1)
            similarity[:, p] = np.maximum(pairs @ score_weight, 0.0) / key.shape[1]
        return similarity
    scores = np.einsum("bpd,bqd->bpq", query, key)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mode == "dot_product":
        return scores / key.shape[1]
    return softmax(scores)


def spatial_attended(value: Array, similarity: Array, height: int, width: int) -> Array:
    """(B, E, H, W): every position the sum of the value's positions, weighed by its row."""
    attended = np.einsum("bpq,bqe->bpe", similarity, positions(value))
    out = np.empty((value.shape[0], value.shape[1], height, width))
    for h in range(height):
        for w in range(width):
            out[:, :, h, w] = attended[:, h * width + w]
    return out


def columns_and_rows_attended(x: Array, column_key: Array, row_key: Array, scale: float) -> Array:
    """Columns plus rows for given keys (B, C, H) and (B, C, W)."""
    column_maps = softmax(scale * np.einsum("bihw,bjh->bwij", x, column_key))
    row_maps = softmax(scale * np.einsum("bihw,bjw->bhij", x, row_key))
    return fully_attentional_attended(x, column_maps, row_maps)
