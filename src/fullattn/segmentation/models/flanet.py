"""FLANet: a backbone, the head with attention, and two auxiliary heads.

Song et al., Fully Attentional Network for Semantic Segmentation, AAAI 2022 (arXiv 2112.04108).

- Details that the paper does not state are as in the official implementation: every block of a
  dilated stage uses that stage's dilation, the x2 upsampling is nearest-neighbour, and the logits
  are resized to the image bilinearly with aligned corners.
- The official implementation mixes the images of a batch. `fullattn.checkpoints` converts weights
  trained with it; single images then give the same logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fullattn.layers import _checks
from fullattn.segmentation.models import backbone as backbones
from fullattn.segmentation.models.attention_choices import Attention
from fullattn.segmentation.models.head import Norm, OutputHead, SegmentationHead

__all__ = ["FLANet"]


class FLANet(nn.Module):
    """Fully Attentional Network with any backbone of timm and any attention of `attentions()`.

    Args:
        num_classes: K.
        backbone: name of a network in timm; the paper's is a ResNet-101 with deep stem. HRNet's
            four branches are resized to the finest and concatenated.
        attention: as in `SegmentationHead`.
        attention_options: as in `SegmentationHead`.
        channels: channels of the attention and the convolutions around it.
        out_channels: channels of the last convolution before the classifier.
        auxiliary: whether there are auxiliary heads on the two stages before the last.
        auxiliary_channels: their channels.
        dropout: probability that a channel is dropped before a classifier.
        output_stride: image size over size of the last feature map: 8, 16, or 32, which every
            network supports; ignored by HRNet, whose stride is 4.
        uniform_dilation: whether every block of a ResNet's dilated stage has that stage's dilation;
            otherwise the first one has that of the stage before, as in timm.
        pretrained: whether timm downloads weights for the backbone.
        norm_layer: normalisation in the heads; the backbone has its own.
        backbone_options: further keywords for `timm.create_model`.

    Shape:
        x: (B, 3, H, W).
        output: in evaluation mode logits, (B, K, H, W); in training mode a list of logits: the
            head's and, with `auxiliary`, those of the earlier and the later stage.

    Raises:
        ImportError: timm is not installed.
        ValueError: a count below 1, an unknown backbone or attention, or a stride that the backbone
            cannot have.
        TypeError: an argument of the wrong type.

    Source:
        Song et al., AAAI 2022 (arXiv 2112.04108), figure 2 and section 4.1, and the official
        implementation (maggiesong7/FullyAttentional).

    Example:
        >>> net = FLANet(19, "resnet18", channels=32, out_channels=32)  # doctest: +SKIP
        >>> net.eval()(torch.randn(1, 3, 64, 96)).shape  # doctest: +SKIP
        torch.Size([1, 19, 64, 96])
    """

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet101s.gluon_in1k",
        attention: Attention = "fully",
        *,
        attention_options: Mapping[str, Any] | None = None,
        channels: int = 512,
        out_channels: int = 512,
        auxiliary: bool = True,
        auxiliary_channels: int = 64,
        dropout: float = 0.1,
        output_stride: int = 8,
        uniform_dilation: bool = True,
        pretrained: bool = False,
        norm_layer: Norm = nn.BatchNorm2d,
        backbone_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        #: Arguments that build the same architecture.
        self.arguments: dict[str, Any] = dict(locals())
        for name in ("self", "__class__", "pretrained"):
            del self.arguments[name]
        for name in ("attention_options", "backbone_options"):
            self.arguments[name] = dict(self.arguments[name] or {})
        _checks.positive(num_classes, "num_classes")
        _checks.positive(auxiliary_channels, "auxiliary_channels")
        _checks.option(output_stride, "output_stride", (8, 16, 32))
        _checks.option(auxiliary, "auxiliary", (False, True))
        _checks.option(uniform_dilation, "uniform_dilation", (False, True))
        _checks.option(pretrained, "pretrained", (False, True))
        if not isinstance(backbone, str):
            raise TypeError(f"backbone must be a name in timm, got {type(backbone).__name__}")
        self.num_classes = num_classes
        self.backbone: nn.Module = backbones.build(
            backbone,
            output_stride=output_stride,
            uniform_dilation=uniform_dilation,
            pretrained=pretrained,
            options=backbone_options or {},
        )
        self._stages = backbones.Stages(self.backbone)
        earlier, later, last = self._stages.channels
        self.auxiliary: nn.ModuleList = nn.ModuleList(
            OutputHead(width, num_classes, auxiliary_channels, dropout, norm_layer)
            for width in ((earlier, later) if auxiliary else ())
        )
        self.head: SegmentationHead = SegmentationHead(
            last,
            num_classes,
            attention=attention,
            attention_options=attention_options,
            channels=channels,
            out_channels=out_channels,
            dropout=dropout,
            norm_layer=norm_layer,
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Compute the logits (B, K, H, W) of normalised images; in training a list of them."""
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"expected images of shape (B, 3, H, W), got {tuple(x.shape)}")
        *earlier, last = self._stages(self.backbone(x))
        logits = [self.head(last)]
        if self.training:
            logits += [head(each) for head, each in zip(self.auxiliary, earlier, strict=False)]
        size = x.shape[-2:]
        resized = [F.interpolate(y, size, mode="bilinear", align_corners=True) for y in logits]
        return resized if self.training else resized[0]
