"""Backbones from timm: their last three feature maps, and weights for them."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fullattn import checkpoints
from fullattn._text import installing

__all__ = ["Stages", "build", "channels_first", "load_state_dict", "load_weights"]

_PREFIXES = ("backbone.", "model.backbone.", "module.")


class Stages:
    """The last three feature maps of a backbone, with their channel counts in `channels`.

    The last map of a high-resolution network (HRNet) is its four branches, resized to the finest
    and concatenated, as in the HRNet authors' segmentation networks; the two maps before are those
    of strides 8 and 16. Other backbones' maps are those of their last three stages.
    """

    def __init__(self, backbone: nn.Module) -> None:
        info: Any = backbone.feature_info
        widths = [int(width) for width in info.channels()]
        if len(widths) < 3:
            raise ValueError(f"expected a backbone of at least 3 feature maps, got {len(widths)}")
        self._output_format = getattr(backbone, "output_fmt", None)
        self._high_resolution = "HighResolution" in type(backbone).__name__
        if self._high_resolution:
            widths = [widths[1], widths[2], sum(widths)]
        self.channels: tuple[int, ...] = tuple(widths[-3:])

    def __call__(self, features: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the three maps, (B, C, H, W) each, from the backbone's output."""
        features = channels_first(features, self._output_format)
        if not self._high_resolution:
            return features[-3:]
        size = features[0].shape[-2:]
        resized = [F.interpolate(feature, size, mode="bilinear") for feature in features[1:]]
        return features[1], features[2], torch.cat([features[0], *resized], dim=1)


def channels_first(features: Sequence[Tensor], output_format: object) -> Sequence[Tensor]:
    """Permute feature maps to (B, C, H, W), if timm's `output_fmt` of their backbone is NHWC."""
    if not str(output_format).endswith("NHWC"):
        return features
    return [feature.permute(0, 3, 1, 2).contiguous() for feature in features]


def build(
    name: str,
    *,
    output_stride: int = 32,
    uniform_dilation: bool = False,
    pretrained: bool = False,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network of timm that returns its feature maps; the arguments are as in `FLANet`."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"backbones need timm: {installing('models')}") from error
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.partition('.')[0][:6]}*")[:5]
        hint = f"; similar names are {', '.join(near)}" if near else ""
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint}")
    keywords = dict(options or {})
    if name.startswith("hrnet"):  # four branches of fixed strides
        keywords |= {"feature_location": "", "out_indices": (1, 2, 3, 4)}
    elif output_stride != 32:  # the stride without the keyword, which not every network accepts
        keywords.setdefault("output_stride", output_stride)
    try:
        backbone: nn.Module = timm.create_model(
            name, features_only=True, pretrained=pretrained, **keywords
        )
    except (TypeError, NotImplementedError, AssertionError, RuntimeError) as error:
        reason = f"timm cannot build {name!r} as a backbone with {keywords}: {error}"
        if "output_stride" in keywords:
            reason += "; output_stride=32 keeps the network's own strides"
        raise ValueError(reason) from error
    if uniform_dilation:
        _dilate_first_blocks(backbone)
    return backbone


def _dilate_first_blocks(backbone: nn.Module) -> None:
    """Give a ResNet's first block of each stage the dilation of the others in it."""
    for name, stage in backbone.named_children():
        if not (name.startswith("layer") and isinstance(stage, nn.Sequential) and len(stage) > 1):
            continue
        second = dict(stage[1].named_modules())
        for path, first in stage[0].named_modules():
            later = second.get(path)
            if "downsample" in path or not isinstance(first, nn.Conv2d):
                continue
            if isinstance(later, nn.Conv2d) and first.kernel_size == later.kernel_size:
                first.dilation, first.padding = later.dilation, later.padding


def load_weights(backbone: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load weights with timm's names into a backbone, ignoring other keys (a classifier's)."""
    found = checkpoints.load(path)
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in found)), "")
    own = backbone.state_dict()
    # Converted weights often lack these counters, which only momentum=None uses.
    optional = {name: own[name] for name in own if name.endswith("num_batches_tracked")}
    weights = {name: found[prefix + name] for name in own if prefix + name in found}
    load_state_dict(backbone, optional | weights, path)


def load_state_dict(
    module: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]
) -> None:
    """Load weights, or raise PyTorch's list of mismatches and leave the module unchanged."""
    own, given = ({k: x.shape for k, x in w.items()} for w in (module.state_dict(), weights))
    try:
        # PyTorch copies the tensors that fit before it raises.
        (module if own == given else copy.deepcopy(module)).load_state_dict(weights)
    except RuntimeError as error:
        mismatches = "; ".join(line.strip() for line in str(error).splitlines()[1:])
        raise checkpoints.CheckpointError(
            f"cannot load {path} into {type(module).__name__}: {mismatches[:300]}"
        ) from error
