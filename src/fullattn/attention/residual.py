"""The residual of the layers, gamma · attended + x."""

from __future__ import annotations

import torch
from torch import Tensor

from fullattn.attention.tracing import is_jit_traced, is_transformed

__all__ = ["scaled_residual"]


def scaled_residual(x: Tensor | None, gamma: Tensor | None, attended: Tensor) -> Tensor:
    """Return gamma · attended + x, or attended alone without gamma.

    Args:
        x: (B, C, H, W); None without gamma.
        gamma: one number, or None.
        attended: (B, C, H, W); without gradients it may be overwritten with the result.

    Returns:
        (B, C, H, W).
    """
    if gamma is None or x is None:
        return attended
    recorded = torch.compiler.is_compiling() or is_jit_traced() or is_transformed()
    if torch.is_grad_enabled() or recorded:
        return torch.addcmul(x, gamma, attended)
    fits = attended.dtype == torch.promote_types(x.dtype, gamma.dtype)
    # Written in place to save memory, but not in another layout than x's, which the next module
    # would copy.
    if fits and attended.stride() == x.stride():
        return torch.addcmul(x, gamma, attended, out=attended)
    return torch.addcmul(x, gamma, attended)
