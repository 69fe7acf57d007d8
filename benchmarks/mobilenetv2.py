"""TensorFlow's quantised MobileNetV2 1.0 as weights of timm's mobilenetv2_100.

    python benchmarks/mobilenetv2.py FILE.npz WEIGHTS.pt [--camvid DATA]

The .npz holds 8-bit weights with their scales, batch normalisation folded into them. Padding is
TensorFlow's SAME and inputs are in -1 to 1, so timm's network needs pad_type="same" and images
normalised with mean 0.5 and standard deviation 0.5. With --camvid the folded batch normalisations
get statistics from 16 images of that data set, for training; without, mean 0 and variance 1, which
is right for a backbone that stays in evaluation mode.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fullattn.checkpoints import CheckpointError
from fullattn.segmentation.data import open_dataset
from fullattn.segmentation.evaluation.loop import evaluating, normalised
from fullattn.segmentation.models import backbone as backbones

__all__ = ["convert", "load_into", "unfold_batch_norm"]

# How many blocks each of timm's stages has, in the order of the file's block1 to block17.
_STAGES = (1, 2, 3, 4, 3, 3, 1)


def _layers() -> Iterator[tuple[str, str, str]]:
    """Yield the file's name of each layer, and timm's of its convolution and normalisation."""
    yield "stem", "conv_stem", "bn1"
    number = 0
    for stage, blocks in enumerate(_STAGES):
        for block in range(blocks):
            number += 1
            theirs, ours = f"block{number}", f"blocks.{stage}.{block}"
            if number == 1:  # has no expansion
                yield f"{theirs}.dw", f"{ours}.conv_dw", f"{ours}.bn1"
                yield f"{theirs}.project", f"{ours}.conv_pw", f"{ours}.bn2"
            else:
                yield f"{theirs}.expand", f"{ours}.conv_pw", f"{ours}.bn1"
                yield f"{theirs}.dw", f"{ours}.conv_dw", f"{ours}.bn2"
                yield f"{theirs}.project", f"{ours}.conv_pwl", f"{ours}.bn3"


def convert(path: str | os.PathLike[str], *, eps: float = 1e-5) -> dict[str, Tensor]:
    """Read the file as the state dict of timm's features-only mobilenetv2_100.

    The normalisations have mean 0 and variance 1 - eps, weight 1 and the folded bias, so that in
    evaluation mode they add the bias alone.

    Args:
        path: of the .npz, with NAME.weight.q, .scale and .zp and NAME.bias for each layer.
        eps: of the network's normalisations.

    Returns:
        The state dict, float32.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: numpy is not installed.
        CheckpointError: it is not such a file.
    """
    import numpy

    weights: dict[str, Tensor] = {}
    try:
        with open(path, "rb") as opened, numpy.load(opened) as file:
            for theirs, convolution, norm in _layers():
                quantised = file[f"{theirs}.weight.q"].astype(numpy.float32)
                shape = (-1, *[1] * (quantised.ndim - 1))
                scale = file[f"{theirs}.weight.scale"].reshape(shape)
                zero = file[f"{theirs}.weight.zp"].astype(numpy.float32).reshape(shape)
                bias = torch.from_numpy(file[f"{theirs}.bias"].astype(numpy.float32))
                weight = ((quantised - zero) * scale).astype(numpy.float32)
                weights[f"{convolution}.weight"] = torch.from_numpy(weight)
                weights[f"{norm}.weight"] = torch.ones_like(bias)
                weights[f"{norm}.bias"] = bias
                weights[f"{norm}.running_mean"] = torch.zeros_like(bias)
                weights[f"{norm}.running_var"] = torch.full_like(bias, 1 - eps)
                weights[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file makes its reader raise anything
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{path} is not a file of MobileNetV2 weights with their scales: {reason}"
        ) from error
    return weights


def load_into(backbone: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load the file into timm's features-only mobilenetv2_100.

    Args:
        backbone: the network, with pad_type="same".
        path: as in `convert`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is not such a file, or this is another network.
    """
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    weights = convert(path, eps=norms[0].eps if norms else 1e-5)
    own = {name: tuple(x.shape) for name, x in backbone.state_dict().items()}
    if own != {name: tuple(x.shape) for name, x in weights.items()}:
        raise CheckpointError(
            f"{path} holds the weights of mobilenetv2_100, and the backbone is another network"
        )
    stem: Any = backbone.conv_stem
    if type(stem) is nn.Conv2d:
        raise CheckpointError(
            f"the weights in {path} were trained with TensorFlow's padding: "
            "build the backbone with backbone_options={'pad_type': 'same'}"
        )
    backbone.load_state_dict(weights)


@torch.no_grad()
def unfold_batch_norm(backbone: nn.Module, images: Tensor) -> None:
    """Give the normalisations the statistics of images, and leave the function as it is.

    Running mean and variance become those of the convolution's output, and weight and bias undo
    them, so that training mode starts near evaluation mode instead of far from it.

    Args:
        backbone: as `load_into` leaves it.
        images: normalised as the network takes them, (B, 3, H, W).
    """
    statistics: dict[nn.BatchNorm2d, tuple[Tensor, Tensor]] = {}

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, nn.BatchNorm2d):
            variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3), correction=0)
            statistics[module] = mean, variance

    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(record) for norm in norms]
    try:
        with evaluating(backbone):
            backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    for norm, (mean, variance) in statistics.items():
        if norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.weight.copy_((variance + norm.eps).sqrt())
            norm.bias.add_(mean)


def main() -> None:
    """Convert a file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--camvid", type=Path, metavar="DATA")
    args = parser.parse_args()
    backbone = backbones.build(
        "mobilenetv2_100",
        output_stride=32,
        uniform_dilation=False,
        pretrained=False,
        options={"pad_type": "same"},
    )
    load_into(backbone, args.file)
    if args.camvid is not None:
        dataset = open_dataset("camvid", args.camvid, "train")
        # Spread over the data set, since neighbours are frames of one clip.
        chosen = [dataset.read(i * len(dataset) // 16)[0] for i in range(16)]
        half = (0.5, 0.5, 0.5)
        unfold_batch_norm(backbone, normalised(torch.stack(chosen), half, half))
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    torch.save(backbone.state_dict(), args.weights)


if __name__ == "__main__":
    main()
