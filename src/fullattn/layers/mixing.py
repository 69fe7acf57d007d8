"""The batch handling of the official implementation, which mixes the images of a batch.

The block in https://github.com/maggiesong7/FullyAttentional flattens the features to (b w) slices
but tiles the context with `.repeat(width, 1, 1)`, in the order (w b). At batch size 1 the two are
equal, and the code is right. In a larger batch column w of image b is compared with the key of
image (b·W + w) mod B, and row h with that of image (b·H + h) mod B, so that images influence each
other, forward and backward.

`FullyAttentional(mix_images=True)` does the same, to evaluate weights that were trained so.
"""

from __future__ import annotations

import warnings
from functools import cache

from einops import rearrange, repeat
from torch import Tensor, einsum, softmax

from fullattn.attention import AttentionCall, Operation
from fullattn.attention.reference import scaled
from fullattn.functional import FullyAttentionalSimilarity, fully_attentional_call
from fullattn.reshape import COLUMNS, ROWS

__all__ = ["MIXED_IMAGES", "mixed_call", "warn"]


@cache
def warn() -> None:
    """Warn once per process."""
    warnings.warn(
        "mix_images=True: images of a batch influence each other, as in the official "
        "implementation; use it to evaluate weights that were trained with that code, and for "
        "nothing else",
        stacklevel=3,
    )


def _similarity(
    x: Tensor, column_keys: Tensor, row_keys: Tensor, scale: float = 1.0
) -> FullyAttentionalSimilarity:
    return FullyAttentionalSimilarity(
        columns=softmax(einsum("bihw, bjhw -> bwij", x, scaled(column_keys, scale)), dim=-1),
        rows=softmax(einsum("bihw, bjhw -> bhij", x, scaled(row_keys, scale)), dim=-1),
    )


def _attended(x: Tensor, column_keys: Tensor, row_keys: Tensor, scale: float = 1.0) -> Tensor:
    similarity = _similarity(x, column_keys, row_keys, scale)
    columns = einsum("bwij, bjhw -> bihw", similarity.columns, x)
    return columns + einsum("bhij, bjhw -> bihw", similarity.rows, x)


MIXED_IMAGES = Operation(
    "axial channel attention with mixed images",
    similarity=_similarity,
    attended=_attended,
    cuts=(COLUMNS, ROWS),
    branches=lambda x, column_keys, row_keys: ((x, column_keys, x), (x, row_keys, x)),
)


def mixed_call(
    x: Tensor, column_key: Tensor, row_key: Tensor, *, scale: float | None = 1.0
) -> AttentionCall:
    """Return the call of `fully_attentional` with the keys of the official implementation.

    There is one key per column and one per row, both (B, C, H, W).
    """
    _, (x, column_key, row_key), factor, score = fully_attentional_call(
        x, column_key, row_key, scale=scale
    )
    column_keys = rearrange(_tiled(column_key, x.shape[3]), "b w c h -> b c h w")
    row_keys = rearrange(_tiled(row_key, x.shape[2]), "b h c w -> b c h w")
    return AttentionCall(MIXED_IMAGES, (x, column_keys, row_keys), factor, score)


def _tiled(key: Tensor, slices: int) -> Tensor:
    """Return a key for every slice, (B, S, C, D): tiled as (S B) and read as (B S)."""
    tiled = repeat(key, "b c d -> (slices b) c d", slices=slices)
    return rearrange(tiled, "(b slices) c d -> b slices c d", slices=slices)
