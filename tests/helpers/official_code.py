"""Layers of other projects that no package has, in our own words: same parameters, same sums."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def fully_attentional(
    x: Tensor, column_linear: nn.Module, row_linear: nn.Module, gamma: Tensor
) -> Tensor:
    """The attention of the official implementation: features (b w), contexts (w b)."""
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
    """The block of the official FLANet."""

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


class OfficialBottleneck(nn.Module):
    """A residual block of the official FLANet's backbone."""

    def __init__(self, channels: int, inner: int, stride: int, dilation: int) -> None:
        super().__init__()
        out = 4 * inner
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels != out:
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class OfficialBackbone(nn.Module):
    """The official FLANet's dilated ResNet; gives its last three stages."""

    def __init__(self, blocks: tuple[int, int, int, int], deep_stem: bool) -> None:
        super().__init__()
        width = 128 if deep_stem else 64
        self.conv1: nn.Module = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        if deep_stem:
            steps: list[nn.Module] = []
            for channels, out, stride in ((3, 64, 2), (64, 64, 1), (64, 128, 1)):
                steps += [nn.Conv2d(channels, out, 3, stride, 1, bias=False)]
                steps += [nn.BatchNorm2d(out), nn.ReLU()]
            self.conv1 = nn.Sequential(*steps[:-2])
        self.bn1 = nn.BatchNorm2d(width)
        stages = ((64, 1, 1), (128, 2, 1), (256, 1, 2), (512, 1, 4))
        for number, (count, (inner, stride, dilation)) in enumerate(
            zip(blocks, stages, strict=True), start=1
        ):
            stage = []
            for index in range(count):
                stage.append(
                    OfficialBottleneck(width, inner, 1 if index else stride, dilation=dilation)
                )
                width = 4 * inner
            setattr(self, f"layer{number}", nn.Sequential(*stage))

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        features = []
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
            features.append(x)
        return features[1:]


class OfficialOutput(nn.Module):
    """An output of the official FLANet."""

    def __init__(self, channels: int, inner: int, classes: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(channels, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(inner, classes, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return y


class OfficialFLANet(nn.Module):
    """The official FLANet: logits of the head, of the 512- and of the 1024-channel stage."""

    def __init__(
        self,
        classes: int,
        blocks: tuple[int, int, int, int] = (3, 4, 23, 3),
        deep_stem: bool = True,
        channels: int = 512,
    ) -> None:
        super().__init__()
        self.backbone = OfficialBackbone(blocks, deep_stem)
        steps: list[nn.Module] = []
        for width in (2048, channels):
            convolution = nn.Conv2d(width, channels, 3, padding=1, bias=False)
            steps += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
        self.conv = nn.Sequential(*steps)
        self.fully = FullyAttentionalBlock(channels)
        self.conv_out1 = OfficialOutput(2048 + channels, channels, classes)
        self.conv_out2 = OfficialOutput(512, 64, classes)
        self.conv_out3 = OfficialOutput(1024, 64, classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        early, late, last = self.backbone(x)
        logits = [
            self.conv_out1(torch.cat([last, self.fully(self.conv(last))], dim=1)),
            self.conv_out2(early),
            self.conv_out3(late),
        ]
        return [
            nn.functional.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True)
            for y in logits
        ]
