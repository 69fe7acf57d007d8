"""timm's networks as backbones: the last three feature maps, and weights for them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullattn import checkpoints

__all__ = ["Stages", "build", "load_weights"]


class Stages:
    """What a head needs to know of a backbone, and how its feature maps come out.

    The last map of a high-resolution network (HRNet) is its four branches, resized to the finest
    and concatenated, as in the authors' networks for segmentation; others end with their last
    stage. The two maps before are those of the stages before, HRNet's of strides 8 and 16.

    Attributes:
        channels: of the three maps, from early to late.
    """

    def __init__(self, backbone: nn.Module) -> None:
        info: Any = backbone.feature_info
        widths = [int(width) for width in info.channels()]
        if len(widths) < 3:
            raise ValueError(f"expected a backbone of at least 3 feature maps, got {len(widths)}")
        self._branches = "HighResolution" in type(backbone).__name__
        self._channels_last = str(getattr(backbone, "output_fmt", "")).endswith("NHWC")
        if self._branches:
            self.channels = (widths[1], widths[2], sum(widths))
        else:
            self.channels = (widths[-3], widths[-2], widths[-1])

    def __call__(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The three maps, (B, C, H, W) each, of what the backbone gives."""
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2).contiguous() for feature in features]
        if self._branches:
            size = features[0].shape[-2:]
            finest, *others = features
            resized = [
                F.interpolate(other, size, mode="bilinear", align_corners=False) for other in others
            ]
            return features[1], features[2], torch.cat([finest, *resized], dim=1)
        return features[-3], features[-2], features[-1]


def build(
    name: str,
    *,
    output_stride: int,
    uniform_dilation: bool,
    pretrained: bool,
    options: Mapping[str, Any],
) -> nn.Module:
    """A network of timm that gives its feature maps.

    Args:
        name: timm's name, with or without the tag of its weights.
        output_stride: of the last map: 8, 16 or 32, or what the network has where it cannot change.
        uniform_dilation: whether the first block of a ResNet's dilated stage is dilated like the
            others, as in the official FLANet; timm's keeps the dilation of the stage before.
        pretrained: whether timm loads the weights that it has for this name.
        options: further keywords for `timm.create_model`.

    Returns:
        The network.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm does not know the name, or the network cannot have this stride.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("backbones are timm's: pip install 'fullattn[models]'") from error
    if not timm.is_model(name):
        architecture = name.partition(".")[0]
        near = timm.list_models(f"*{architecture[:6]}*")[:5]
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")
    keywords = dict(options)
    if name.startswith("hrnet"):  # four branches of fixed strides
        keywords |= {"feature_location": "", "out_indices": (1, 2, 3, 4)}
    elif output_stride != 32:  # what every network has by itself
        keywords.setdefault("output_stride", output_stride)
    try:
        backbone: nn.Module = timm.create_model(
            name, features_only=True, pretrained=pretrained, **keywords
        )
    except (TypeError, NotImplementedError, AssertionError, RuntimeError) as error:
        reason = f"timm cannot build {name!r} as a backbone with {keywords}: {error}"
        if "output_stride" in keywords:
            reason += "; output_stride=32 leaves its strides as they are"
        raise ValueError(reason) from error
    if uniform_dilation:
        _dilate_first_blocks(backbone)
    return backbone


def _dilate_first_blocks(backbone: nn.Module) -> None:
    """Give a ResNet's first block of each stage the dilation of the others in it."""
    for name, stage in backbone.named_children():
        if name.startswith("layer") and isinstance(stage, nn.Sequential) and len(stage) > 1:
            for path, convolution in stage[0].named_modules():
                if not isinstance(convolution, nn.Conv2d) or "downsample" in path:
                    continue
                later = dict(stage[1].named_modules()).get(path)
                if isinstance(later, nn.Conv2d) and convolution.kernel_size == later.kernel_size:
                    convolution.dilation = later.dilation
                    convolution.padding = later.padding


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights into the backbone of a FLANet.

    Args:
        model: a FLANet.
        path: a checkpoint as `fullattn.checkpoints.load` reads it, with timm's names; its
            classifier is left out.

    Raises:
        FileNotFoundError: there is no such file.
        checkpoints.CheckpointError: the file does not hold weights of this backbone.
    """
    backbone: Any = model.backbone
    weights = _without_prefix(checkpoints.load(path), ("backbone.", "model.backbone.", "module."))
    own = backbone.state_dict()
    if missing := sorted(own.keys() - weights.keys()):
        counters = [name for name in missing if name.endswith("num_batches_tracked")]
        missing = [name for name in missing if name not in counters]
    wrong = [
        f"{name!r} is {tuple(own[name].shape)} in it and {tuple(weights[name].shape)} in the file"
        for name in own
        if name in weights and own[name].shape != weights[name].shape
    ]
    if missing or wrong:
        lacking = [f"{len(missing)} are missing, the first {missing[0]!r}"] if missing else []
        raise checkpoints.CheckpointError(
            f"{path} does not hold the weights of this backbone: {'; '.join(lacking + wrong[:3])}"
        )
    backbone.load_state_dict({name: weights.get(name, own[name]) for name in own})


def _without_prefix(weights: Mapping[str, Tensor], prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors below the first of these prefixes that there is, or all of them."""

    def below(prefix: str) -> Iterator[tuple[str, Tensor]]:
        return (
            (name.removeprefix(prefix), x) for name, x in weights.items() if name.startswith(prefix)
        )

    for prefix in prefixes:
        if found := dict(below(prefix)):
            return found
    return dict(weights)
