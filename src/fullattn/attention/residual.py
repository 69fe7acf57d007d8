"""gamma · attended + x, with which the layers end."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["scaled_residual"]


def scaled_residual(x: Tensor | None, gamma: Tensor | None, attended: Tensor) -> Tensor:
    """Return gamma · attended + x, or attended alone without gamma.

    Args:
        x: (B, C, H, W); None without gamma.
        gamma: one number, or None.
        attended: (B, C, H, W), held by nobody but the caller.

    Returns:
        (B, C, H, W).
    """
    if gamma is None or x is None:
        return attended
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.addcmul(x, gamma, attended)
    fits = attended.dtype == torch.promote_types(x.dtype, gamma.dtype)
    # In another layout than x's the result would only be copied again by whatever follows.
    if fits and attended.stride() == x.stride():
        # Nobody else holds the attended values: in inference their memory becomes the result's.
        return torch.addcmul(x, gamma, attended, out=attended)
    return torch.addcmul(x, gamma, attended)
