"""PyTorch's fused attention, fed the layouts that its fused kernels accept.

`torch.nn.functional.scaled_dot_product_attention` falls back to building the map, without a word,
when an input does not suit its fused kernels. So this module hands over 4-D inputs with stride 1 in
the last axis, pads features to what each device's kernels take (CUDA: a multiple of 8; CPU: the
same length for key and value), gives the scale explicitly, keeps it positive, and keeps batch times
slices below the 65,536 at which the CUDA grid overflows (pytorch issues 142228 and 146704).
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fullattn.attention.backend import FLOATING, Backend, Kind

__all__ = ["BACKEND", "attend"]

_CUDA_GRID = 65_535


def _pad_features(x: Tensor, features: int) -> Tensor:
    missing = features - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x.contiguous()


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """softmax(scale · query · keyᵀ) · value by `scaled_dot_product_attention`.

    Args:
        query: (B, S, N, D).
        key: (B, S or 1, M, D).
        value: (B, S or 1, M, E).
        scale: factor on the scores, of either sign.

    Returns:
        (B, S, N, E) in the query's dtype.
    """
    slices, value_features = query.shape[1], value.shape[-1]
    if scale < 0:  # a negative scale has been a source of bugs in the fused kernels
        query, scale = -query, -scale
    if query.device.type == "cuda":
        features = -(-query.shape[-1] // 8) * 8
        value_padded = -(-value_features // 8) * 8
    else:
        features = value_padded = max(query.shape[-1], value_features)
    query, key = _pad_features(query, features), _pad_features(key, features)
    value = _pad_features(value, value_padded)
    key = key.expand(-1, slices, -1, -1)
    value = value.expand(-1, slices, -1, -1)
    if query.device.type == "cuda" and query.shape[0] * slices > _CUDA_GRID:
        out = _in_parts(query, key, value, scale)
    else:
        out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return out if value_padded == value_features else out[..., :value_features]


def _in_parts(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    batch, slices = query.shape[:2]
    axis = 0 if batch >= slices else 1
    step = max(1, _CUDA_GRID // (slices if axis == 0 else batch))
    parts = zip(*(x.split(step, axis) for x in (query, key, value)), strict=True)
    return torch.cat(
        [F.scaled_dot_product_attention(*part, scale=scale) for part in parts], dim=axis
    )


def _forward_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    *slices, tokens, features = query
    return 2 * prod(slices) * tokens * key[-2] * (features + value[-1])


def _backward_flops(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    # Scores are computed again; then the gradients of scores, query, key and value.
    *slices, tokens, features = query
    return 2 * prod(slices) * tokens * key[-2] * (3 * features + 2 * value[-1])


def register_flop_formulas() -> None:
    """Teach PyTorch's FLOP counter the CPU kernel of SDPA, which it otherwise counts as 0."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in (
        ("_scaled_dot_product_flash_attention_for_cpu", _forward_flops),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", _backward_flops),
    ):
        operator = getattr(torch.ops.aten, name, None)
        if operator is not None and operator not in flop_registry:
            register_flop_formula(operator)(formula)


BACKEND = Backend(
    name="sdpa",
    summary="torch.nn.functional.scaled_dot_product_attention on copied slices",
    run={Kind.SOFTMAX: attend},
    # CUDA's fused kernels do not take float64.
    dtypes={"*": FLOATING, "cuda": FLOATING - {torch.float64}},
)
