"""The fully attentional layer as its authors' code computes it, with its batch handling corrected.

In our own words: the block of https://github.com/maggiesong7/FullyAttentional, the official
implementation, flattens the features into one batch of columns and one of rows, pools the contexts,
tiles every context once for each slice, and builds every similarity map. `fullattn bench` takes it
as the baseline, because it is what most people run, often copied into a repository of their own.

One thing is corrected. The official implementation flattens the features as (b w) but tiles the
context as (w b): right at batch size 1, but at larger ones it compares images with each other's
contexts. Here every slice is compared with the context of its own image, so that both sides of the
comparison compute the same function. The amount of work is the same either way.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["OfficialFLANetBlock"]


class OfficialFLANetBlock(nn.Module):
    """Equal to `fullattn.FullyAttentional` with the same state dict, computed the official way.

    Args:
        channels: C.
        project: whether to end with the 3x3 convolution, batch normalisation and ReLU.

    Shape:
        x: (B, C, H, W).
        output: as x.

    Source:
        Song et al., AAAI 2022 (arXiv 2112.04108), section 3, and their code,
        https://github.com/maggiesong7/FullyAttentional.

    Example:
        >>> import torch
        >>> OfficialFLANetBlock(16)(torch.randn(2, 16, 9, 7)).shape
        torch.Size([2, 16, 9, 7])
    """

    def __init__(self, channels: int, *, project: bool = False) -> None:
        super().__init__()
        self.column_key: nn.Linear = nn.Linear(channels, channels)
        self.row_key: nn.Linear = nn.Linear(channels, channels)
        self.gamma: nn.Parameter = nn.Parameter(torch.zeros(1))
        self.project: nn.Sequential | None = None
        if project:
            steps: OrderedDict[str, nn.Module] = OrderedDict()
            steps["conv"] = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            steps["norm"] = nn.BatchNorm2d(channels)
            steps["act"] = nn.ReLU()
            self.project = nn.Sequential(steps)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (B, C, H, W)."""
        # As in the official implementation every intermediate has a name, so that the scores and
        # maps of both branches stay in memory until the function returns.
        batch, _, height, width = x.shape
        columns = rearrange(x, "b c h w -> (b w) c h").contiguous()
        rows = rearrange(x, "b c h w -> (b h) c w").contiguous()

        column_context = F.avg_pool2d(x, [1, width])
        row_context = F.avg_pool2d(x, [height, 1])
        column_key = self.column_key(rearrange(column_context, "b c h 1 -> b h c"))
        row_key = self.row_key(rearrange(row_context, "b c 1 w -> b w c"))
        column_keys = column_key.repeat_interleave(width, dim=0)
        row_keys = row_key.repeat_interleave(height, dim=0)

        column_scores = torch.matmul(columns, column_keys)
        row_scores = torch.matmul(rows, row_keys)
        column_maps = torch.softmax(column_scores, dim=-1)
        row_maps = torch.softmax(row_scores, dim=-1)

        attended_columns = torch.bmm(column_maps, columns)
        attended_rows = torch.bmm(row_maps, rows)
        attended_columns = rearrange(attended_columns, "(b w) c h -> b c h w", b=batch)
        attended_rows = rearrange(attended_rows, "(b h) c w -> b c h w", b=batch)
        out: Tensor = self.gamma * (attended_columns + attended_rows) + x
        return out if self.project is None else self.project(out)
