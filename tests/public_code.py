"""Layers of other projects that no package has, in our own words: same parameters, same sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fully_attentional(
    x: Tensor, column_linear: nn.Module, row_linear: nn.Module, gamma: Tensor
) -> Tensor:
    """The attention of the copied FLANet code: features flattened (b w), contexts tiled (w b)."""
    batch, channels, height, width = x.shape

    def branch(features: Tensor, context: Tensor, linear: nn.Module, copies: int) -> Tensor:
        # features (b w, c, h), context (b, c, h) -> (b w, c, h)
        key = linear(context.mT)
        scores = torch.matmul(features, key.repeat(copies, 1, 1))
        return torch.bmm(torch.softmax(scores, dim=-1), features)

    columns = x.permute(0, 3, 1, 2).reshape(batch * width, channels, height)
    rows = x.permute(0, 2, 1, 3).reshape(batch * height, channels, width)
    columns = branch(columns, x.mean(3), column_linear, width)
    rows = branch(rows, x.mean(2), row_linear, height)
    columns = columns.view(batch, width, channels, height).permute(0, 2, 3, 1)
    rows = rows.view(batch, height, channels, width).permute(0, 2, 1, 3)
    return gamma * (columns + rows) + x


class FullyAttentionalBlock(nn.Module):
    """The block of the public FLANet code."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Linear(channels, channels)
        self.conv2 = nn.Linear(channels, channels)
        convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv = nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(fully_attentional(x, self.conv1, self.conv2, self.gamma))
        return y


class PositionAttention(nn.Module):
    """DANet's position attention, with the names of its authors' code."""

    def __init__(self, channels: int, inner_channels: int) -> None:
        super().__init__()
        self.query_conv = nn.Conv2d(channels, inner_channels, 1)
        self.key_conv = nn.Conv2d(channels, inner_channels, 1)
        self.value_conv = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            convolution(x).flatten(2)
            for convolution in (self.query_conv, self.key_conv, self.value_conv)
        )
        attention = torch.softmax(torch.bmm(query.mT, key), dim=-1)
        return self.gamma * torch.bmm(value, attention.mT).view(x.shape) + x


class ChannelAttention(nn.Module):
    """DANet's channel attention as its authors' code has it, with max(S) - S."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        energy = torch.bmm(flat, flat.mT)
        attention = torch.softmax(energy.max(-1, keepdim=True)[0] - energy, dim=-1)
        return self.gamma * torch.bmm(attention, flat).view(x.shape) + x
