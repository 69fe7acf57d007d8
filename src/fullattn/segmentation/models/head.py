"""FLANet's heads: feature maps to logits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fullattn.layers import _checks
from fullattn.segmentation.models import attention_choices
from fullattn.segmentation.models.attention_choices import Attention

__all__ = ["Norm", "OutputHead", "SegmentationHead", "convolution"]

Norm: TypeAlias = Callable[..., nn.Module] | None


def convolution(in_channels: int, out_channels: int, norm_layer: Norm) -> nn.Sequential:
    """Build a 3x3 convolution with normalisation and ReLU."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm_layer is None)
    nn.init.kaiming_normal_(conv.weight, a=1)
    norm = {} if norm_layer is None else {"norm": norm_layer(out_channels)}
    return nn.Sequential(OrderedDict(conv=conv, **norm, act=nn.ReLU()))


class OutputHead(nn.Sequential):
    """Nearest-neighbour x2 upsampling, 3x3 convolution, 2-D dropout and a 1x1 classifier."""

    def __init__(
        self, in_channels: int, num_classes: int, channels: int, dropout: float, norm_layer: Norm
    ) -> None:
        if not 0 <= _checks.number(dropout, "dropout") <= 1:
            raise ValueError(f"dropout must be from 0 to 1, got {dropout}")
        steps = OrderedDict[str, nn.Module](upsample=nn.Upsample(scale_factor=2, mode="nearest"))
        steps["reduce"] = convolution(in_channels, channels, norm_layer)
        steps["dropout"] = nn.Dropout2d(dropout)
        steps["classifier"] = classifier = nn.Conv2d(channels, num_classes, 1)
        nn.init.kaiming_normal_(classifier.weight, a=1)
        super().__init__(steps)


class SegmentationHead(nn.Module):
    """FLANet's head for the last feature map of any backbone.

    reduced = two 3x3 convolutions of x, each with normalisation and ReLU
    attended = 3x3 convolution, normalisation and ReLU of attention(reduced)
    logits = output( concatenation of x and attended )

    where output is nearest-neighbour x2 upsampling, a 3x3 convolution with normalisation and ReLU,
    2-D dropout and a 1x1 convolution to the classes. With the same seed, heads that differ only in
    `attention` have the same initial parameters everywhere else.

    Args:
        in_channels: channels of x.
        num_classes: K.
        attention: name of a registered layer, such as "fully" (the paper's), "channel", "spatial";
            "dual" (sum of channel and spatial), "channel_spatial" (one after the other), "none",
            "convolution" (a baseline with the parameters of "fully" and no attention); or a
            callable that builds, from the channel count, a module from (B, C, H, W) to the same
            shape. The convolution after it, the projection of the paper's layer, is always there.
        attention_options: keywords for a registered layer, such as {"scale": None}.
        channels: channels of the attention and the convolutions around it.
        out_channels: channels of the output's convolution.
        dropout: probability that a channel is dropped before the classifier.
        norm_layer: class or callable of the channel count; None for none.

    Shape:
        x: (B, in_channels, H, W).
        output: (B, K, 2H, 2W), not resized to the image.

    Raises:
        ValueError: a count below 1, dropout outside 0 to 1, or an unknown attention.
        TypeError: an argument of the wrong type, or an option that the layer does not have.

    Source:
        Song et al., AAAI 2022 (arXiv 2112.04108), section 3, and the official implementation
        (maggiesong7/FullyAttentional).

    Example:
        >>> import torch
        >>> head = SegmentationHead(32, num_classes=11, channels=16, out_channels=16)
        >>> head(torch.randn(2, 32, 9, 7)).shape
        torch.Size([2, 11, 18, 14])
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        attention: Attention = "fully",
        attention_options: Mapping[str, Any] | None = None,
        channels: int = 512,
        out_channels: int = 512,
        dropout: float = 0.1,
        norm_layer: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        _checks.positive(in_channels, "in_channels")
        _checks.positive(num_classes, "num_classes")
        _checks.positive(channels, "channels")
        _checks.positive(out_channels, "out_channels")
        _checks.module_factory(norm_layer, "norm_layer")
        self.reduce: nn.Sequential = nn.Sequential(
            convolution(in_channels, channels, norm_layer),
            convolution(channels, channels, norm_layer),
        )
        self.project: nn.Sequential = convolution(channels, channels, norm_layer)
        self.output: OutputHead = OutputHead(
            in_channels + channels, num_classes, out_channels, dropout, norm_layer
        )
        # Last, so that the other modules draw the same random numbers.
        self.attention: nn.Module = attention_choices.build(
            attention, channels, attention_options or {}
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of a feature map, at twice its size."""
        attended = self.project(self.attention(self.reduce(x)))
        y: Tensor = self.output(torch.cat([x, attended], dim=1))
        return y
