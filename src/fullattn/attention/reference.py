"""The definition: attention that builds its similarity map.

Every other backend is tested against this one, and this one against a NumPy float64 oracle. It is
also the backend that runs where the map is smaller than the tensors that it relates (see
`fullattn.attention.dispatch`), and the only one that can hand the map out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fullattn.attention.backend import Backend, Kind

__all__ = ["BACKEND", "attend", "concatenation", "dot_product", "similarity"]


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    # A float16 score overflows at 65504 before any softmax sees it, so scores are float32 at least.
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def similarity(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """The similarity map: softmax over the key tokens of scale · query · keyᵀ.

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D); a slice axis of 1 is shared by all slices.
        scale: factor on the scores, of either sign.

    Returns:
        (B, S, N, M), in float32 for float16 and bfloat16 inputs, otherwise in the input's dtype.
    """
    dtype = _accumulation_dtype(query.dtype)
    query, key = query.to(dtype), key.to(dtype)
    if scale != 1.0:
        query = query * scale
    return torch.softmax(query @ key.mT, dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """similarity(query, key) · value.

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        value: (B, S or 1, M, E).
        scale: factor on the scores.

    Returns:
        (B, S, N, E) in the query's dtype.
    """
    weights = similarity(query, key, scale)
    return (weights @ value.to(weights.dtype)).to(query.dtype)


def dot_product(query: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """The similarity map of Wang et al.'s dot-product form: scale · query · keyᵀ / M, no softmax.

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        scale: factor on the scores.

    Returns:
        (B, S, N, M), in float32 for float16 and bfloat16 inputs.
    """
    dtype = _accumulation_dtype(query.dtype)
    return query.to(dtype) @ key.to(dtype).mT * (scale / key.shape[-2])


def concatenation(query_score: Tensor, key_score: Tensor) -> Tensor:
    """The similarity map of Wang et al.'s concatenation form: ReLU(a_i + b_j) / M.

    The form weighs the concatenation of a query and a key by one vector; that is the sum of a
    number for the query and a number for the key, so the concatenation itself is never built.

    Args:
        query_score: a, (B, S, N, 1).
        key_score: b, (B, S or 1, M, 1).

    Returns:
        (B, S, N, M), in float32 for float16 and bfloat16 inputs.
    """
    dtype = _accumulation_dtype(query_score.dtype)
    scores = query_score.to(dtype) + key_score.to(dtype).mT
    return torch.relu(scores) / key_score.shape[-2]


def _attend_dot_product(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    weights = dot_product(query, key, scale)
    return (weights @ value.to(weights.dtype)).to(query.dtype)


def _attend_concatenation(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    weights = concatenation(query, key)
    return (weights @ value.to(weights.dtype)).to(query.dtype)


BACKEND = Backend(
    name="reference",
    summary="builds the similarity map; the definition the others are tested against",
    run={
        Kind.SOFTMAX: attend,
        Kind.DOT_PRODUCT: _attend_dot_product,
        Kind.CONCATENATION: _attend_concatenation,
    },
    builds_map=True,
)
