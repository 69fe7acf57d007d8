"""Dot-product attention without its map: (query · keyᵀ) · value = query · (keyᵀ · value).

Without a softmax between the two products they may be bracketed the other way, and the map of N·M
numbers becomes one of D·E.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fullattn.attention.backend import Backend, Kind

__all__ = ["BACKEND", "attend"]


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Dot-product attention: scale · query · (keyᵀ · value) / M.

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        value: (B, S or 1, M, E).
        scale: factor on the scores.

    Returns:
        (B, S, N, E) in the query's dtype.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    dtype = torch.float32 if half else query.dtype
    context = key.to(dtype).mT @ value.to(dtype) * (scale / key.shape[-2])
    return (query.to(dtype) @ context).to(query.dtype)


BACKEND = Backend(
    name="reassociated",
    summary="dot-product form only: multiplies key and value first, so there is no map",
    run={Kind.DOT_PRODUCT: attend},
)
