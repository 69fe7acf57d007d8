"""The definitions of the layers, and functions that compute the same on a fused backend.

The definitions come first. They follow the papers, in einsum over b (image), i and j (channels),
h (row), w (column), p and q (positions); `scale` is a factor on the scores before the softmax,
which the papers do not use (1.0). The backend `reference` runs them, in float32 for half precision,
and the tests compare them with a float64 oracle.

The functions after them run on the backend that `fullattn.attention` chooses. All take feature maps
and keys, but no weights: the modules in `fullattn.layers` compute the keys with their Linears and
convolutions, check shapes, and accept unbatched inputs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, einsum, softmax

from fullattn import attention
from fullattn.attention import AttentionCall, Operation, ScoreFunction, dispatch, triton
from fullattn.attention.reference import scaled, weights
from fullattn.attention.tracing import inverse_root, is_symbolic, with_plain_sizes
from fullattn.reshape import CHANNELS, COLUMNS, POSITIONS, ROWS

__all__ = [
    "AXIAL_CHANNEL_ATTENTION",
    "CHANNEL_ATTENTION",
    "POSITION_ATTENTION",
    "FullyAttentionalSimilarity",
    "axial_means",
    "channel_attention",
    "channel_call",
    "channel_non_local",
    "channel_similarity",
    "column_similarity",
    "columns_and_rows",
    "fully_attentional",
    "fully_attentional_call",
    "position_attention",
    "position_similarity",
    "row_similarity",
    "spatial_call",
    "spatial_non_local",
]

# Fully attentional: a C×C map per column and per row (Song et al., AAAI 2022, section 3). The keys
# are Linear(mean of x over W) for the columns and Linear(mean of x over H) for the rows.


def column_similarity(x: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """Compute S[b, w, i, j], the weight of channel j for channel i in column w; key (B, C, H)."""
    return softmax(einsum("bihw, bjh -> bwij", x, scaled(key, scale)), dim=-1)


def row_similarity(x: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """Compute S[b, h, i, j], the weight of channel j for channel i in row h; key (B, C, W)."""
    return softmax(einsum("bihw, bjw -> bhij", x, scaled(key, scale)), dim=-1)


def columns_and_rows(x: Tensor, column_key: Tensor, row_key: Tensor, scale: float = 1.0) -> Tensor:
    """Compute columns + rows; the layer is project( gamma · (columns + rows) + x )."""
    columns = einsum("bwij, bjhw -> bihw", column_similarity(x, column_key, scale), x)
    rows = einsum("bhij, bjhw -> bihw", row_similarity(x, row_key, scale), x)
    return columns + rows


# Channel non-local: one C×C map per image (Fu et al., CVPR 2019, section 3.3).


def channel_similarity(x: Tensor, key: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Compute S[b, i, j], the weight of channel j for channel i; without a key it is x itself."""
    key = scaled(x if key is None else key, scale)
    return softmax(einsum("bihw, bjhw -> bij", x, key), dim=-1)


def channel_attention(x: Tensor, key: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """Compute attended[b, i, h, w]; the layer is gamma · attended + x."""
    return einsum("bij, bjhw -> bihw", channel_similarity(x, key, scale), x)


# Spatial non-local: one HW×HW map per image (Wang et al., CVPR 2018, section 3).


def position_similarity(
    query: Tensor,
    key: Tensor,
    scale: float = 1.0,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
) -> Tensor:
    """Compute S[b, p, q], the weight of position q for p, from (B, D, H, W) and (B, D, H', W')."""
    query, key = query.flatten(2), key.flatten(2)
    if score is ScoreFunction.CONCATENATION:  # D is 1: a scalar for each query and for each key
        return weights(query.transpose(1, 2) + key, score)
    return weights(einsum("bdp, bdq -> bpq", query, scaled(key, scale)), score)


def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
) -> Tensor:
    """Compute attended[b, e, h, w] for values (B, E, H', W'); the layer is x + output(attended)."""
    similarity = position_similarity(query, key, scale, score)
    attended = einsum("bpq, beq -> bpe", similarity, value.flatten(2)).transpose(1, 2)
    return attended.reshape(*attended.shape[:2], *query.shape[2:])


# Operations: for the backends, the definitions and the queries, keys and values of each branch.


class FullyAttentionalSimilarity(NamedTuple):
    """Similarity maps of the fully attentional layer.

    Attributes:
        columns: (B, W, C, C), one map per column.
        rows: (B, H, C, C), one map per row.
    """

    columns: Tensor
    rows: Tensor


AXIAL_CHANNEL_ATTENTION = Operation(
    "axial channel attention",
    similarity=lambda x, column_key, row_key, scale: FullyAttentionalSimilarity(
        column_similarity(x, column_key, scale), row_similarity(x, row_key, scale)
    ),
    attended=columns_and_rows,
    cuts=(COLUMNS, ROWS),
    branches=lambda x, column_key, row_key: ((x, column_key, x), (x, row_key, x)),
)
CHANNEL_ATTENTION = Operation(
    "channel attention",
    similarity=channel_similarity,
    attended=channel_attention,
    cuts=(CHANNELS,),
    branches=lambda x, key=None: ((x, x if key is None else key, x),),
)
POSITION_ATTENTION = Operation(
    "position attention",
    similarity=lambda query, key, value, **options: position_similarity(query, key, **options),
    attended=position_attention,
    cuts=(POSITIONS,),
    branches=lambda query, key, value: ((query, key, value),),
)


def axial_means(x: Tensor, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Average a feature map over W and over H; the layer computes its keys from the means.

    Args:
        x: feature map, (B, C, H, W).
        backend: name of the attention backend; None for the automatic choice.

    Returns:
        x, the mean column (B, H, C), and the mean row (B, W, C). Using the returned x lets backward
        add its gradient and those of the means in one pass.
    """
    named = dispatch.forced(backend)
    means = triton.axial_means(x) if named is None or named is triton.BACKEND else None
    # x.mean, not a pooling layer: a deterministic CUDA backward, and exports with free sizes.
    return (
        (x, x.mean(dim=3).transpose(-2, -1), x.mean(dim=2).transpose(-2, -1))
        if means is None
        else means
    )


def fully_attentional_call(
    x: Tensor, column_key: Tensor, row_key: Tensor, *, scale: float | None = 1.0
) -> AttentionCall:
    """Return the call of `fully_attentional`; scale None multiplies the keys by 1/√H and 1/√W."""
    if scale is None:
        column_key = column_key * inverse_root(x.shape[2], x)
        row_key = row_key * inverse_root(x.shape[3], x)
        scale = 1.0
    return AttentionCall(AXIAL_CHANNEL_ATTENTION, (x, column_key, row_key), scale)


def fully_attentional(
    x: Tensor,
    column_key: Tensor,
    row_key: Tensor,
    gamma: Tensor | None = None,
    *,
    scale: float | None = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Compute channel attention with one map per column and one per row.

    For the columns

        similarity[b, w, i, j] = softmax_j( scale · Σ_h x[b, i, h, w] · column_key[b, j, h] )
        columns[b, i, h, w] = Σ_j similarity[b, w, i, j] · x[b, j, h, w]

    and the same for rows with H and W exchanged. The result is gamma · (columns + rows) + x, or
    columns + rows if gamma is None.

    Args:
        x: feature map, (B, C, H, W).
        column_key: shared by all columns, (B, C, H); the layer's is Linear(mean of x over W).
        row_key: shared by all rows, (B, C, W); the layer's is another Linear(mean of x over H).
        gamma: learnable factor of the attention, one number.
        scale: factor on the scores; None for 1/√H in the columns and 1/√W in the rows.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, C, H, W).

    Raises:
        BackendError: the named backend cannot run this.

    Source:
        Song et al., Fully Attentional Network for Semantic Segmentation, AAAI 2022
        (arXiv 2112.04108), section 3.

    Example:
        >>> import torch
        >>> x, key = torch.randn(2, 3, 4, 5), torch.nn.Linear(3, 3)
        >>> fully_attentional(x, key(x.mean(3).mT).mT, key(x.mean(2).mT).mT).shape
        torch.Size([2, 3, 4, 5])
    """
    call = fully_attentional_call(x, column_key, row_key, scale=scale)
    return _run(call, x, gamma, backend)


def _run(
    call: AttentionCall, x: Tensor | None, gamma: Tensor | None, backend: str | None
) -> Tensor:
    y, added = attention.run(call, x, gamma, backend=backend)
    return y if added else attention.scaled_residual(x, gamma, y)


def channel_call(
    x: Tensor, *, scale: float | None = 1.0, least_similar: bool = False
) -> AttentionCall:
    """Return the call of `channel_non_local`."""
    tensors: tuple[Tensor, ...] = (x,)
    if scale is None:
        features = x.shape[2] * x.shape[3]
        scale = inverse_root(features, x)
        if is_symbolic(features):
            # A symbolic size may multiply a tensor, but not be the float argument of an operator.
            tensors, scale = (x, x * scale), 1.0
    # softmax(max(S) - S) is softmax(-S), because a softmax ignores a constant added to its row.
    return AttentionCall(CHANNEL_ATTENTION, tensors, -scale if least_similar else scale)


def channel_non_local(
    x: Tensor,
    gamma: Tensor | None = None,
    *,
    scale: float | None = 1.0,
    least_similar: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compute channel attention with one map per image.

        similarity[b, i, j] = softmax_j( scale · Σ_p x[b, i, p] · x[b, j, p] )     p over H·W
        attended[b, i, p] = Σ_j similarity[b, i, j] · x[b, j, p]

    Args:
        x: feature map, (B, C, H, W).
        gamma: learnable factor of the attention, one number; the result is gamma · attended + x,
            or attended if gamma is None.
        scale: factor on the scores; None for 1/√(H·W).
        least_similar: use max(S) - S in place of the scores S, as DANet's published code does.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, C, H, W).

    Raises:
        BackendError: the named backend cannot run this.

    Source:
        Fu et al., Dual Attention Network for Scene Segmentation, CVPR 2019 (arXiv 1809.02983),
        section 3.3.

    Example:
        >>> import torch
        >>> channel_non_local(torch.randn(2, 3, 4, 5)).shape
        torch.Size([2, 3, 4, 5])
    """
    call = channel_call(x, scale=scale, least_similar=least_similar)
    return _run(call, x, gamma, backend)


def spatial_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
    scale: float | None = 1.0,
) -> AttentionCall:
    """Return the call of `spatial_non_local`."""
    if scale is None:
        with with_plain_sizes():  # the number of channels
            scale = query.shape[1] ** -0.5
    return AttentionCall(POSITION_ATTENTION, (query, key, value), scale, score)


def spatial_non_local(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    x: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
    scale: float | None = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Compute attention of every position of the query to every position of the key.

        attended[b, :, p] = Σ_q similarity[b, p, q] · value[b, :, q]

    with similarity = softmax_q(scale · query · key) for `ScoreFunction.SOFTMAX` (both Gaussian
    forms), scale · query · key / (number of q) for `DOT_PRODUCT`, and
    ReLU(query + key) / (number of q) for `CONCATENATION`, where query and key are the products with
    the two halves of the paper's weight vector, so that D is 1.

    Args:
        query: (B, D, H, W).
        key: (B, D, H', W'), of any size.
        value: (B, E, H', W').
        x: residual, (B, E, H, W); with gamma the result is gamma · attended + x, as in DANet's
            position attention.
        gamma: learnable factor of the attention, one number; None for attended alone.
        score: how scores become weights.
        scale: factor on the scores; None for 1/√D. Not used by `CONCATENATION`.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, E, H, W).

    Raises:
        BackendError: the named backend cannot run this.

    Source:
        Wang et al., Non-local Neural Networks, CVPR 2018 (arXiv 1711.07971), section 3; with gamma
        Fu et al., CVPR 2019 (arXiv 1809.02983), section 3.2.

    Example:
        >>> import torch
        >>> query, key, value = (torch.randn(2, n, 4, 5) for n in (3, 3, 7))
        >>> spatial_non_local(query, key, value).shape
        torch.Size([2, 7, 4, 5])
    """
    call = spatial_call(query, key, value, score=score, scale=scale)
    return ordered(_run(call, x, gamma, backend))


def ordered(x: Tensor) -> Tensor:
    """Return a feature map, contiguous if its H or W is symbolic.

    Before a convolution, Inductor orders strides, which fails for a view that splits one symbolic
    axis into H and W.
    """
    symbolic = is_symbolic(x.shape[2]) or is_symbolic(x.shape[3])
    return x.contiguous() if symbolic else x
