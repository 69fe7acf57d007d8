"""A layer in one file, such as a user writes: channel attention with a map for every row alone."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor, einsum, nn

from fullattn.attention import AttentionCall, BranchSizes, Operation
from fullattn.layers import AttentionLayer, Work
from fullattn.reshape import ROWS


def row_similarity(x: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """S[b, h, i, j], the definition."""
    return torch.softmax(scale * einsum("bihw, bjw -> bhij", x, key), dim=-1)


def row_attention(x: Tensor, key: Tensor, scale: float = 1.0) -> Tensor:
    """What every channel of every row attends to, the definition."""
    return einsum("bhij, bjhw -> bihw", row_similarity(x, key, scale), x)


class RowAttention(AttentionLayer):
    """y = gamma · rows + x, with one map of channels for every row."""

    layer_name = "rows"
    paper = "none: a toy"
    operation = Operation(
        "row attention",
        similarity=row_similarity,
        attended=row_attention,
        cuts=(ROWS,),
        branches=lambda x, key: ((x, key, x),),
    )

    def __init__(
        self,
        channels: int,
        *,
        scale: float = 1.0,
        gamma_init: float = 0.0,
        backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.channels, self.scale, self.backend = channels, scale, backend
        self.gamma_init = gamma_init
        self.key = nn.Linear(channels, channels, device=device, dtype=dtype)
        self.gamma = nn.Parameter(torch.full((1,), gamma_init, device=device, dtype=dtype))

    def attention(self, x: Tensor) -> AttentionCall:
        """Compare the channels of every row with those of the mean row."""
        return AttentionCall(self.operation, (x, self.key(x.mean(dim=2).mT).mT), self.scale)

    def work(self, shape: Any, size: Any) -> Work:
        """One Linear, and attention over rows."""
        batch, channels, _, width = shape
        x = prod(shape) * size
        keys = batch * channels * width * size
        linear = channels * channels + channels
        return Work(
            branches=(BranchSizes.of(ROWS, shape, shared_key=True, scale=self.scale),),
            flops=2 * batch * channels * channels * width,
            parameters=linear + 1,
            inputs=keys,
            kept=keys,
            gradients=keys + linear * size + x,
            branch_gradient=x,
        )
