"""The definitions of the layers, and the same as fast functions of tensors and keys.

The definitions follow the papers, in einsum on b (image), c, i and j (channels), h (row) and
w (column). The backend `reference` runs them, and the tests compare them with a float64 oracle.
They compute in the dtype that they are given; the backend takes half precision to float32 first.
The functions after them compute the same on the backend that `fullattn.attention` chooses. All take
feature maps and keys, never weights: the modules in `fullattn.layers` make the keys with their own
Linears and convolutions, and add shape checks and the unbatched form.

`scale` is a factor on the scores before the softmax; the papers use none (1.0).
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, einsum, softmax

from fullattn import attention
from fullattn.attention import AttentionCall, Operation, ScoreFunction, dispatch, triton
from fullattn.attention.backend import is_symbolic
from fullattn.attention.reference import scaled, weights
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

# Fully attentional: a C×C map for every column and every row (Song et al., AAAI 2022, section 3).


def column_similarity(x: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """S[b, w, i, j]: what channel i of column w gives to channel j; the key is (B, C, H)."""
    return softmax(einsum("bihw, bjh -> bwij", x, scaled(key, scale)), dim=-1)


def row_similarity(x: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """S[b, h, i, j]: what channel i of row h gives to channel j; the key is (B, C, W)."""
    return softmax(einsum("bihw, bjw -> bhij", x, scaled(key, scale)), dim=-1)


def columns_and_rows(x: Tensor, column_key: Tensor, row_key: Tensor, scale: float = 1.0) -> Tensor:
    """Add columns and rows, (B, C, H, W); the layer is project( gamma · that + x )."""
    columns = einsum("bwij, bjhw -> bihw", column_similarity(x, column_key, scale), x)
    rows = einsum("bhij, bjhw -> bihw", row_similarity(x, row_key, scale), x)
    return columns + rows


# Channel non-local: one C×C map for the image (Fu et al., CVPR 2019, section 3.3).


def channel_similarity(x: Tensor, key: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """S[b, i, j]: what channel i gives to channel j; the key is x itself."""
    key = scaled(x if key is None else key, scale)
    return softmax(einsum("bihw, bjhw -> bij", x, key), dim=-1)


def channel_attention(x: Tensor, key: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """attended[b, i, h, w]; the layer is gamma · that + x."""
    return einsum("bij, bjhw -> bihw", channel_similarity(x, key, scale), x)


# Spatial non-local: one HW×HW map for the image (Wang et al., CVPR 2018, section 3).


def position_similarity(
    query: Tensor,
    key: Tensor,
    scale: float = 1.0,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
) -> Tensor:
    """S[b, p, q]: what position p gives to position q; query (B, D, H, W), key (B, D, H', W')."""
    query, key = query.flatten(2), key.flatten(2)
    if score is ScoreFunction.CONCATENATION:  # a number for each query, and one for each key
        return weights(query.transpose(1, 2) + key, score)
    return weights(einsum("bdp, bdq -> bpq", query, scaled(key, scale)), score)


def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
) -> Tensor:
    """attended[b, e, h, w] for values (B, E, H', W'); the layer is x + output( that )."""
    similarity = position_similarity(query, key, scale, score)
    attended = einsum("bpq, beq -> bpe", similarity, value.flatten(2)).transpose(1, 2)
    return attended.reshape(*attended.shape[:2], *query.shape[2:])


# For the backends: the definitions, and the same as branches of queries, keys and values.


class FullyAttentionalSimilarity(NamedTuple):
    """The maps of the fully attentional layer.

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
    """Average a feature map over W and over H: the contexts of which the layer makes its keys.

    Args:
        x: feature map, (B, C, H, W).
        backend: name of the attention backend; None for the automatic choice.

    Returns:
        x, of which the gradient of both means is added in one pass to what comes back through it;
        the mean column, (B, H, C); and the mean row, (B, W, C).
    """
    named = dispatch.forced(backend)
    means = triton.axial_means(x) if named is None or named is triton.BACKEND else None
    # x.mean, not a pooling layer: a deterministic CUDA backward, and exports with free sizes.
    return (x, x.mean(dim=3).mT, x.mean(dim=2).mT) if means is None else means


def fully_attentional_call(
    x: Tensor, column_key: Tensor, row_key: Tensor, *, scale: float | None = 1.0
) -> AttentionCall:
    """Describe the call of `fully_attentional`; scale None puts 1/√H and 1/√W into the keys."""
    if scale is None:
        column_key = column_key * x.shape[2] ** -0.5
        row_key = row_key * x.shape[3] ** -0.5
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
    """Channel attention with a map of its own for every column and every row.

    For the columns

        similarity[b, w, i, j] = softmax_j( scale · Σ_h x[b, i, h, w] · column_key[b, j, h] )
        columns[b, i, h, w] = Σ_j similarity[b, w, i, j] · x[b, j, h, w]

    and the same for rows with H and W exchanged. The result is gamma · (columns + rows) + x, or
    columns + rows alone where gamma is None.

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
        BackendError: the backend asked for cannot run this.

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
    y, added = attention.run(call, x, gamma, backend=backend)
    return y if added else attention.scaled_residual(x, gamma, y)


def channel_call(
    x: Tensor, *, scale: float | None = 1.0, least_similar: bool = False
) -> AttentionCall:
    """Describe the call of `channel_non_local`."""
    tensors: tuple[Tensor, ...] = (x,)
    if scale is None:
        features = x.shape[2] * x.shape[3]
        # A tensor takes a factor that depends on a symbolic size; an operator's float may not.
        symbolic = is_symbolic(features)
        scale = 1.0 if symbolic else features**-0.5
        tensors = (x, x * features**-0.5) if symbolic else tensors
    # softmax(max(S) - S) is softmax(-S): a softmax does not see a number added to its whole row.
    return AttentionCall(CHANNEL_ATTENTION, tensors, -scale if least_similar else scale)


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
    call = channel_call(x, scale=scale, least_similar=least_similar)
    y, added = attention.run(call, x, gamma, backend=backend)
    return y if added else attention.scaled_residual(x, gamma, y)


def spatial_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
    scale: float | None = 1.0,
) -> AttentionCall:
    """Describe the call of `spatial_non_local`."""
    scale = query.shape[1] ** -0.5 if scale is None else scale
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
    """Spatial non-local attention: every position of the query looks at every position of the key.

        attended[b, :, p] = Σ_q similarity[b, p, q] · value[b, :, q]

    with similarity = softmax_q(scale · query · key) for `ScoreFunction.SOFTMAX` (both Gaussian
    forms), scale · query · key / (number of q) for `DOT_PRODUCT`, and
    ReLU(query + key) / (number of q) for `CONCATENATION`, whose weight vector has been applied to
    the halves of its concatenation already, so that D is 1.

    Args:
        query: (B, D, H, W).
        key: (B, D, H', W'), of any size.
        value: (B, E, H', W').
        x: with gamma, what is added: gamma · attended + x as in DANet's position attention,
            (B, E, H, W).
        gamma: learnable factor of the attention, one number; None for attended alone.
        score: how scores become weights.
        scale: factor on the scores; None for 1/√D. Not used by `CONCATENATION`.
        backend: name of the backend; None for the automatic choice.

    Returns:
        (B, E, H, W).

    Raises:
        BackendError: the backend asked for cannot run this.

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
    y, added = attention.run(call, x, gamma, backend=backend)
    return ordered(y if added else attention.scaled_residual(x, gamma, y))


def ordered(x: Tensor) -> Tensor:
    """Return a feature map, contiguous where its H or W is symbolic.

    Inductor cannot order the strides of a view whose symbolic H and W are one axis underneath,
    which it does for the convolution that follows.
    """
    symbolic = is_symbolic(x.shape[2]) or is_symbolic(x.shape[3])
    return x.contiguous() if symbolic else x
