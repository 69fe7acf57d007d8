"""The three layers as functions of tensors and weights, for those who write their own modules.

Each reads as its paper does: cut, attend, put back. `scale` is a factor on the scores before the
softmax; the papers use none (1.0), and `None` stands for 1/√d with d the length of a query.
Inputs are batched, (B, C, H, W); the modules in `fullattn.layers` add shape checks and the
unbatched form.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from fullattn import attention
from fullattn.attention import Kind, reference
from fullattn.attention.backend import is_free
from fullattn.reshape import (
    from_channels,
    from_columns,
    from_positions,
    from_rows,
    to_channels,
    to_columns,
    to_positions,
    to_rows,
)

__all__ = [
    "FullyAttentionalSimilarity",
    "attend_positions",
    "channel_non_local",
    "channel_similarity",
    "fully_attentional",
    "fully_attentional_similarity",
    "position_similarity",
    "spatial_non_local",
    "spatial_similarity",
]


class FullyAttentionalSimilarity(NamedTuple):
    """The maps of the fully attentional layer.

    Attributes:
        columns: (B, W, C, C), one map per column.
        rows: (B, H, C, C), one map per row.
    """

    columns: Tensor
    rows: Tensor


def scaled(key: Tensor, scale: float | None) -> tuple[Tensor, float]:
    """A key (..., D) and the factor on the scores that is left, with 1/√D in the key."""
    # 1/√d depends on a size that may be symbolic; a tensor takes it, an operator's float may not.
    if scale is None:
        return key * key.shape[-1] ** -0.5, 1.0
    return key, float(scale)


def column_and_row_keys(
    x: Tensor,
    column_weight: Tensor,
    row_weight: Tensor,
    column_bias: Tensor | None,
    row_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The keys of all columns (B, C, H) and of all rows (B, C, W), before scaling."""
    # x.mean, not a pooling layer: it has a deterministic CUDA backward and exports with free sizes.
    column_context, row_context = x.mean(dim=3), x.mean(dim=2)
    column_key = F.linear(column_context.mT, column_weight, column_bias).mT
    row_key = F.linear(row_context.mT, row_weight, row_bias).mT
    return column_key, row_key


def _key_of_slices(key: Tensor, slices: int, mix_images: bool) -> Tensor:
    if not mix_images:
        return key.unsqueeze(1)
    # The copied code's mistake, on purpose: tiled slice by slice, read image by image.
    tiled = repeat(key, "b c d -> (slices b) c d", slices=slices)
    return rearrange(tiled, "(b slices) c d -> b slices c d", slices=slices)


def fully_attentional(
    x: Tensor,
    column_weight: Tensor,
    row_weight: Tensor,
    column_bias: Tensor | None = None,
    row_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    scale: float | None = 1.0,
    mix_images: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Channel attention with a map of its own for every column and every row.

    For columns, with k = Linear(mean of x over W):

        similarity[b, w, i, j] = softmax_j( scale · Σ_h x[b, i, h, w] · k[b, j, h] )
        columns[b, i, h, w] = Σ_j similarity[b, w, i, j] · x[b, j, h, w]

    and the same for rows with H and W exchanged. The result is gamma · (columns + rows) + x, or
    columns + rows alone where gamma is None.

    Args:
        x: feature map, (B, C, H, W).
        column_weight: weight of the Linear that makes the key of the columns, (C, C).
        row_weight: weight of the Linear that makes the key of the rows, (C, C).
        column_bias: its bias, (C,).
        row_bias: its bias, (C,).
        gamma: learnable factor of the attention, one number.
        scale: factor on the scores; None for 1/√H in the columns and 1/√W in the rows.
        mix_images: give column w of image b the key of image (b·W + w) mod B, and row h that of
            (b·H + h) mod B, as the copied public code does; for evaluating its weights alone.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, C, H, W).

    Raises:
        BackendError: the backend asked for cannot run this.

    Source:
        Song et al., Fully Attentional Network for Semantic Segmentation, AAAI 2022
        (arXiv 2112.04108), section 3.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 3, 4, 5), torch.eye(3)
        >>> fully_attentional(x, weight, weight).shape
        torch.Size([2, 3, 4, 5])
    """
    column_key, row_key = column_and_row_keys(x, column_weight, row_weight, column_bias, row_bias)
    column_key, factor = scaled(column_key, scale)
    row_key, _ = scaled(row_key, scale)
    if not mix_images:
        return attention.attend_columns_and_rows(
            x, column_key, row_key, factor, gamma=gamma, backend=backend
        )
    columns, rows = to_columns(x), to_rows(x)
    column_keys = _key_of_slices(column_key, columns.shape[1], mix_images)
    row_keys = _key_of_slices(row_key, rows.shape[1], mix_images)
    attended_columns = attention.attend(columns, column_keys, columns, factor, backend=backend)
    attended_rows = attention.attend(rows, row_keys, rows, factor, backend=backend)
    return attention.add_to(x, gamma, from_columns(attended_columns) + from_rows(attended_rows))


def fully_attentional_similarity(
    x: Tensor,
    column_weight: Tensor,
    row_weight: Tensor,
    column_bias: Tensor | None = None,
    row_bias: Tensor | None = None,
    *,
    scale: float | None = 1.0,
    mix_images: bool = False,
) -> FullyAttentionalSimilarity:
    """The maps that `fully_attentional` multiplies with x.

    Args:
        x: feature map, (B, C, H, W).
        column_weight: (C, C).
        row_weight: (C, C).
        column_bias: (C,).
        row_bias: (C,).
        scale: as in `fully_attentional`.
        mix_images: as in `fully_attentional`.

    Returns:
        columns (B, W, C, C) and rows (B, H, C, C); every row of a map sums to 1.

    Source:
        Song et al., AAAI 2022, section 3.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 3, 4, 5), torch.eye(3)
        >>> maps = fully_attentional_similarity(x, weight, weight)
        >>> maps.columns.shape, maps.rows.shape
        (torch.Size([2, 5, 3, 3]), torch.Size([2, 4, 3, 3]))
    """
    column_key, row_key = column_and_row_keys(x, column_weight, row_weight, column_bias, row_bias)
    column_key, factor = scaled(column_key, scale)
    row_key, _ = scaled(row_key, scale)
    column_keys = _key_of_slices(column_key, x.shape[3], mix_images)
    row_keys = _key_of_slices(row_key, x.shape[2], mix_images)
    return FullyAttentionalSimilarity(
        columns=attention.similarity(to_columns(x), column_keys, factor),
        rows=attention.similarity(to_rows(x), row_keys, factor),
    )


def _channel_tokens(
    x: Tensor, scale: float | None, least_similar: bool
) -> tuple[Tensor, Tensor, float]:
    tokens = to_channels(x)
    key, factor = scaled(tokens, scale)
    # softmax(max(S) - S) is softmax(-S): a softmax does not see a number added to its whole row.
    return tokens, key, -factor if least_similar else factor


def channel_non_local(
    x: Tensor,
    gamma: Tensor | None = None,
    *,
    scale: float | None = 1.0,
    least_similar: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Channel attention with one map for the whole image: space is summed away.

        similarity[b, i, j] = softmax_j( scale · Σ_p x[b, i, p] · x[b, j, p] )     p over H·W
        attended[b, i, p] = Σ_j similarity[b, i, j] · x[b, j, p]

    Args:
        x: feature map, (B, C, H, W).
        gamma: learnable factor of the attention, one number; the result is gamma · attended + x,
            or attended alone where gamma is None.
        scale: factor on the scores; None for 1/√(H·W).
        least_similar: take max(S) - S in place of the scores S, as DANet's published code does.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, C, H, W).

    Raises:
        BackendError: the backend asked for cannot run this.

    Source:
        Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019 (arXiv 1809.02983),
        section 3.3.

    Example:
        >>> import torch
        >>> channel_non_local(torch.randn(2, 3, 4, 5)).shape
        torch.Size([2, 3, 4, 5])
    """
    tokens, key, factor = _channel_tokens(x, scale, least_similar)
    attended = attention.attend(tokens, key, tokens, factor, backend=backend)
    attended = from_channels(attended, x.shape[2], x.shape[3])
    return attention.add_to(x, gamma, attended)


def channel_similarity(
    x: Tensor, *, scale: float | None = 1.0, least_similar: bool = False
) -> Tensor:
    """The map that `channel_non_local` multiplies with x.

    Args:
        x: feature map, (B, C, H, W).
        scale: as in `channel_non_local`.
        least_similar: as in `channel_non_local`.

    Returns:
        (B, C, C); every row sums to 1.

    Source:
        Fu et al., CVPR 2019, section 3.3.

    Example:
        >>> import torch
        >>> channel_similarity(torch.randn(2, 3, 4, 5)).shape
        torch.Size([2, 3, 3])
    """
    tokens, key, factor = _channel_tokens(x, scale, least_similar)
    return attention.similarity(tokens, key, factor).squeeze(1)


def position_tokens(
    query: Tensor, key: Tensor, kind: Kind, scale: float | None, score_weight: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """Query (B, 1, N, D) and key (B, 1, M, D) of the positions, and the factor on their scores.

    For `Kind.CONCATENATION` D is 1, and a score is the sum of the two numbers.
    """
    query, key = to_positions(query), to_positions(key)
    if kind is not Kind.CONCATENATION:
        key, factor = scaled(key, scale)
        return query, key, factor
    if score_weight is None:
        raise ValueError("concatenation needs score_weight of shape (2·D,), got None")
    features = query.shape[-1]
    return query @ score_weight[:features, None], key @ score_weight[features:, None], 1.0


def token_similarity(query: Tensor, key: Tensor, kind: Kind, factor: float) -> Tensor:
    """The map (B, 1, N, M) of what `position_tokens` gives."""
    if kind is Kind.DOT_PRODUCT:
        return reference.dot_product(query, key, factor)
    if kind is Kind.CONCATENATION:
        return reference.concatenation(query, key)
    return attention.similarity(query, key, factor)


def attend_positions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kind: Kind = Kind.SOFTMAX,
    scale: float | None = 1.0,
    score_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Spatial non-local attention: every position of the query looks at every position of the key.

        attended[b, :, p] = Σ_q similarity[b, p, q] · value[b, :, q]

    with similarity = softmax_q(scale · query · key) for `Kind.SOFTMAX` (both Gaussian forms),
    scale · query · key / (number of q) for `Kind.DOT_PRODUCT`, and
    ReLU(score_weight · [query, key]) / (number of q) for `Kind.CONCATENATION`.

    Args:
        query: (B, D, H, W).
        key: (B, D, H', W'), of any size.
        value: (B, E, H', W').
        kind: form of the similarity.
        scale: factor on the scores; None for 1/√D. Not used by `Kind.CONCATENATION`.
        score_weight: (2·D,), for `Kind.CONCATENATION` alone.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, E, H, W).

    Raises:
        BackendError: the backend asked for cannot run this.
        ValueError: `Kind.CONCATENATION` without `score_weight`.

    Source:
        Wang et al., Non-local Neural Networks, CVPR 2018 (arXiv 1711.07971), section 3.2.

    Example:
        >>> import torch
        >>> query, key, value = (torch.randn(2, n, 4, 5) for n in (3, 3, 7))
        >>> attend_positions(query, key, value).shape
        torch.Size([2, 7, 4, 5])
    """
    height, width = query.shape[2:]
    query, key, factor = position_tokens(query, key, kind, scale, score_weight)
    attended = attention.attend(query, key, to_positions(value), factor, kind=kind, backend=backend)
    attended = from_positions(attended, height, width)
    # Inductor cannot order the strides of a view whose free H and W are one axis underneath, which
    # it does for the convolution that follows.
    return attended.contiguous() if is_free(height) or is_free(width) else attended


def position_similarity(
    query: Tensor,
    key: Tensor,
    *,
    kind: Kind = Kind.SOFTMAX,
    scale: float | None = 1.0,
    score_weight: Tensor | None = None,
) -> Tensor:
    """The map that `attend_positions` multiplies with the value.

    Args:
        query: (B, D, H, W).
        key: (B, D, H', W').
        kind: as in `attend_positions`.
        scale: as in `attend_positions`.
        score_weight: as in `attend_positions`.

    Returns:
        (B, H·W, H'·W'); with `Kind.SOFTMAX` every row sums to 1.

    Raises:
        ValueError: `Kind.CONCATENATION` without `score_weight`.

    Source:
        Wang et al., CVPR 2018, section 3.2.

    Example:
        >>> import torch
        >>> position_similarity(torch.randn(2, 3, 4, 5), torch.randn(2, 3, 2, 2)).shape
        torch.Size([2, 20, 4])
    """
    query, key, factor = position_tokens(query, key, kind, scale, score_weight)
    return token_similarity(query, key, kind, factor).squeeze(1)


def embedded(x: Tensor, weight: Tensor | None, bias: Tensor | None, subsample: int = 1) -> Tensor:
    """A 1x1 convolution of x, or x where there is no weight, pooled by `subsample`."""
    x = x if weight is None else F.conv2d(x, weight, bias)
    return x if subsample == 1 else F.max_pool2d(x, subsample)


def spatial_non_local(
    x: Tensor,
    value_weight: Tensor,
    value_bias: Tensor | None = None,
    *,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    output_weight: Tensor | None = None,
    output_bias: Tensor | None = None,
    gamma: Tensor | None = None,
    score_weight: Tensor | None = None,
    kind: Kind = Kind.SOFTMAX,
    scale: float | None = 1.0,
    subsample: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Spatial non-local attention with its 1x1 convolutions: channels are summed away.

    query, key and value are 1x1 convolutions of x (query and key are x itself where they have no
    weight: the Gaussian form), and with `attend_positions` the result is

        x + output( attend_positions(query, key, value) )

    or, where there is no output weight, gamma · attended + x as in DANet's position attention, or
    the attended values alone where there is no gamma either.

    Args:
        x: feature map, (B, C, H, W).
        value_weight: (E, C, 1, 1).
        value_bias: (E,).
        query_weight: (D, C, 1, 1); None for the Gaussian form.
        query_bias: (D,).
        key_weight: (D, C, 1, 1); None for the Gaussian form.
        key_bias: (D,).
        output_weight: (C, E, 1, 1); None for no output convolution.
        output_bias: (C,).
        gamma: learnable factor of the attention, one number; only without an output weight, and
            with E = C.
        score_weight: (2·D,), for `Kind.CONCATENATION` alone.
        kind: form of the similarity, as in `attend_positions`.
        scale: factor on the scores; None for 1/√D.
        subsample: max-pool key and value by this factor first.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, C, H, W), or (B, E, H, W) without output weight and gamma.

    Raises:
        BackendError: the backend asked for cannot run this.
        ValueError: `Kind.CONCATENATION` without `score_weight`.

    Source:
        Wang et al., Non-local Neural Networks, CVPR 2018 (arXiv 1711.07971), section 3; with gamma
        Fu et al., CVPR 2019 (arXiv 1809.02983), section 3.2.

    Example:
        >>> import torch
        >>> x, weight = torch.randn(2, 4, 5, 6), torch.randn(4, 4, 1, 1)
        >>> spatial_non_local(x, weight, query_weight=weight, key_weight=weight).shape
        torch.Size([2, 4, 5, 6])
    """
    # Without names of their own query, key and value are free again before gamma is applied.
    attended = attend_positions(
        embedded(x, query_weight, query_bias),
        embedded(x, key_weight, key_bias, subsample),
        embedded(x, value_weight, value_bias, subsample),
        kind=kind,
        scale=scale,
        score_weight=score_weight,
        backend=backend,
    )
    if output_weight is None:
        return attention.add_to(x, gamma, attended)
    return x + F.conv2d(attended, output_weight, output_bias)


def spatial_similarity(
    x: Tensor,
    *,
    query_weight: Tensor | None = None,
    query_bias: Tensor | None = None,
    key_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    score_weight: Tensor | None = None,
    kind: Kind = Kind.SOFTMAX,
    scale: float | None = 1.0,
    subsample: int = 1,
) -> Tensor:
    """The map that `spatial_non_local` multiplies with the values.

    Args:
        x: feature map, (B, C, H, W).
        query_weight: as in `spatial_non_local`.
        query_bias: as in `spatial_non_local`.
        key_weight: as in `spatial_non_local`.
        key_bias: as in `spatial_non_local`.
        score_weight: as in `spatial_non_local`.
        kind: as in `spatial_non_local`.
        scale: as in `spatial_non_local`.
        subsample: as in `spatial_non_local`.

    Returns:
        (B, H·W, H'·W'), with H' and W' after subsampling; with `Kind.SOFTMAX` every row sums to 1.

    Raises:
        ValueError: `Kind.CONCATENATION` without `score_weight`.

    Source:
        Wang et al., CVPR 2018, section 3.

    Example:
        >>> import torch
        >>> spatial_similarity(torch.randn(2, 4, 5, 6)).shape
        torch.Size([2, 30, 30])
    """
    return position_similarity(
        embedded(x, query_weight, query_bias),
        embedded(x, key_weight, key_bias, subsample),
        kind=kind,
        scale=scale,
        score_weight=score_weight,
    )
