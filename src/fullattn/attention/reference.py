"""The backend that runs the definitions, and builds the similarity map.

An operation has its definition (see `fullattn.functional`), which this backend runs; the definition
for slices of tokens is here. Every other backend is tested against this one, and this one against a
NumPy float64 oracle. It is chosen if the map is smaller than the tensors that it relates (see
`fullattn.attention.dispatch`), and the only one that returns the map.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, einsum

from fullattn.attention import flops
from fullattn.attention.backend import (
    AttentionCall,
    Backend,
    BranchSizes,
    ScoreFunction,
    Setting,
    Workspace,
    work_dtype,
)
from fullattn.attention.sizes import less, maximum
from fullattn.reshape import COLUMNS, ROWS

__all__ = [
    "BACKEND",
    "attend",
    "attend_columns_and_rows",
    "attended",
    "maps",
    "scaled",
    "similarity",
    "weights",
]


def scaled(key: Tensor, scale: float) -> Tensor:
    """Multiply a key, and thereby its scores, by a number of either sign."""
    return key if scale == 1.0 else key * scale


def weights(scores: Tensor, score: ScoreFunction = ScoreFunction.SOFTMAX) -> Tensor:
    """Turn scores (..., M) of M keys into weights (..., M).

    They are softmax(scores), or Wang et al.'s scores / M (dot product) or ReLU(scores) / M
    (concatenation, whose scores are sums of a scalar of the query and a scalar of the key).
    """
    if score is ScoreFunction.SOFTMAX:
        return torch.softmax(scores, dim=-1)
    if score is ScoreFunction.CONCATENATION:
        scores = torch.relu(scores)
    return scores / scores.shape[-1]


def similarity(
    query: Tensor,
    key: Tensor,
    scale: float = 1.0,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
) -> Tensor:
    """Compute the similarity maps (B, S, N, M) of (B, S, N, D) and (B, S or 1, M, D).

    The maps of float16 and bfloat16 inputs are float32. For the concatenation form D is 1.
    """
    query, key = _accumulated(query, key)
    if score is ScoreFunction.CONCATENATION:
        return weights(query + key.transpose(-2, -1), score)
    return weights(einsum("bsnd, bsmd -> bsnm", query, scaled(key, scale)), score)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    score: ScoreFunction = ScoreFunction.SOFTMAX,
) -> Tensor:
    """Compute similarity(query, key) · value, (B, S, N, E), in the query's dtype."""
    maps = similarity(query, key, scale, score)
    return einsum("bsnm, bsme -> bsne", maps, value.to(maps.dtype)).to(query.dtype)


def attend_columns_and_rows(
    x: Tensor, column_key: Tensor, row_key: Tensor, scale: float = 1.0
) -> Tensor:
    """Compute attention over the columns of x plus attention over its rows, (B, C, H, W)."""
    attended = [
        cut.inverse(attend(cut(x), key.unsqueeze(1), cut(x), scale), *x.shape[2:])
        for cut, key in ((COLUMNS, column_key), (ROWS, row_key))
    ]
    return attended[0] + attended[1]


def attended(call: AttentionCall) -> Tensor:
    """Compute an operation's result by its definition, in the dtype of the tensors.

    Scores and weights are computed in float32 at least.
    """
    result = call.operation.attended(*_accumulated(*call.tensors), **_options(call))
    return result.to(call.tensors[0].dtype)


def maps(call: AttentionCall) -> Tensor | tuple[Tensor, ...]:
    """Compute an operation's similarity maps by its definition, in float32 at least.

    Returns:
        A tensor, or a named tuple of tensors.
    """
    result: Tensor | tuple[Tensor, ...] = call.operation.similarity(
        *_accumulated(*call.tensors), **_options(call)
    )
    return result


def _options(call: AttentionCall) -> dict[str, Any]:
    """Return the keyword arguments of a definition; `score` only if it is not the softmax."""
    if call.score is ScoreFunction.SOFTMAX:
        return {"scale": call.scale}
    return {"scale": call.scale, "score": call.score}


def _accumulated(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = work_dtype(tensors[0].dtype)
    return tensors if dtype == tensors[0].dtype else tuple(x.to(dtype) for x in tensors)


def _workspace(a: BranchSizes, setting: Setting) -> Workspace:
    half, work = setting.half, setting.work_size
    numel = a.map_numel * work
    query, key, value, out = (prod(x) * work for x in (a.query, a.key, a.value, a.out))
    others = (0 if a.key_is_query else key) + (0 if a.value_is_query else value)
    casts = half * (query + others)
    saved_casts = casts - half * less(1, a.query[1]) * less(1, a.query[0]) * query
    scaled_key = key if a.scale != 1.0 and a.score is not ScoreFunction.CONCATENATION else 0
    # einsum merges slices and tokens into one axis, which copies the query, and images and slices,
    # which copies the value; for one image the batched product copies what BLAS cannot read.
    sliced, images = less(1, a.query[1]), less(1, a.query[0])
    query_copy, value_copy = sliced * query, sliced * images * value
    value_read = sliced * value * (images if a.in_place else 1)
    output = prod(a.out) * setting.size
    output_cast = half * output
    # Maps alive while one is built, kept for backward, and made in backward after the first.
    built, kept, made = {
        ScoreFunction.SOFTMAX: (2, 1, 2),
        ScoreFunction.DOT_PRODUCT: (2, 1, 1),
        ScoreFunction.CONCATENATION: (2, 2, 1),
    }[a.score]
    copies = casts + scaled_key + query_copy
    saved = kept * numel + copies - casts + saved_casts + value_copy
    building = casts + scaled_key + maximum(query_copy + numel, built * numel)
    grad_value = saved + numel + value + sliced * out
    grad_key = half * key if a.key_is_query else 0  # held until the query's is made
    grad_others = saved - value_copy + value + maximum(made * numel, numel + query + grad_key)
    if a.score is ScoreFunction.CONCATENATION:  # its scores are sums
        products = 2 * a.map_numel * a.value[3]
    else:
        products = flops.attend(a.query, a.key, a.value)
    return Workspace(
        flops=products,
        backward_flops=2 * products,
        output=output,
        inference=maximum(building, casts + numel + out + value_read, numel + out + output_cast),
        saved=saved,
        forward=maximum(copies + built * numel, saved + out + maximum(value_read, output_cast)),
        backward=maximum(grad_value + output, grad_others),
        backward_shared=maximum(grad_value, grad_others),
        keeps_inputs=1 - half,  # their casts are saved
    )


BACKEND = Backend(
    name="reference",
    summary="builds the similarity map, by the definition that the others are tested against",
    attend={
        ScoreFunction.SOFTMAX: attend,
        ScoreFunction.DOT_PRODUCT: partial(attend, score=ScoreFunction.DOT_PRODUCT),
        ScoreFunction.CONCATENATION: partial(attend, score=ScoreFunction.CONCATENATION),
    },
    workspace=_workspace,
    builds_map=True,
)
