"""Linear attention, for the form without softmax: (query · keyᵀ) · value = query · (keyᵀ · value).

keyᵀ · value, the context, has D·E elements, where the map query · keyᵀ has N·M.
"""

from __future__ import annotations

from math import prod

from torch import Tensor

from fullattn.attention.backend import (
    Backend,
    BranchSizes,
    ScoreFunction,
    Setting,
    Workspace,
    work_dtype,
)
from fullattn.attention.sizes import maximum

__all__ = ["BACKEND", "attend"]


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Compute scale · query · (keyᵀ · value) / M, (B, S, N, E), in the query's dtype."""
    dtype = work_dtype(query.dtype)
    context = key.to(dtype).transpose(-2, -1) @ value.to(dtype) * scale / key.shape[-2]
    return (query.to(dtype) @ context).to(query.dtype)


def _workspace(a: BranchSizes, setting: Setting) -> Workspace:
    half, work = setting.half, setting.work_size
    query, key, value = (prod(x) * work for x in (a.query, a.key, a.value))
    query_cast, other_casts = half * query, half * (key + value)
    casts = query_cast + other_casts
    context = a.query[0] * a.query[1] * a.query[3] * a.value[3] * work
    output = prod(a.out) * setting.size
    output_work = prod(a.out) * work
    output_cast = half * output
    products = 2 * a.query[0] * a.query[1] * a.query[3] * a.value[3] * (a.query[2] + a.key[2])
    backward = casts + 3 * context + query + key + value + half * output_work
    return Workspace(
        flops=products,
        backward_flops=2 * products,
        output=output,
        inference=maximum(
            other_casts + context,
            2 * context,
            context + output_work + maximum(query_cast, output_cast),
        ),
        saved=casts + context,
        forward=casts + context + maximum(context, output_work + output_cast),
        backward=backward + output,
        backward_shared=backward,
        keeps_inputs=1 - half,  # their casts are saved
    )


BACKEND = Backend(
    name="linear",
    summary="dot-product form only: multiplies key and value first, so there is no map",
    attend={ScoreFunction.DOT_PRODUCT: attend},
    workspace=_workspace,
)
