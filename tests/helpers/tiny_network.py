"""A tiny network in a file, and a photograph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fullattn.segmentation.evaluation.loop import normalised
from fullattn.segmentation.models import FLANet
from fullattn.segmentation.models.files import Description, describe
from helpers import tiny_data

CLASSES = ["Sky", "Road", "Pole"]
PALETTE = [(128, 130, 132), (200, 10, 30), (1, 255, 77)]
MEAN, STD = (0.4, 0.5, 0.3), (0.2, 0.3, 0.25)


def street() -> Tensor:
    """Return a photograph, (3, 48, 80)."""
    pixels, _ = tiny_data.picture((48, 80), list(range(9)), np.random.default_rng(0))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def save(path: Path, attention: str) -> Path:
    """Save an untrained network of three classes as `fullattn train` does."""
    torch.manual_seed(0)
    model = FLANet(
        3, "test_resnet", attention=attention, channels=8, out_channels=8, auxiliary=False
    )
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    # With random weights and no balanced bias, all pixels would get the same class.
    with torch.no_grad():
        logits = model.eval()(normalised(street()[None], MEAN, STD))
        model.head.output.classifier.bias -= logits.mean((0, 2, 3))
    description = Description(
        model=describe(model),
        dataset="tiny",
        classes=CLASSES,
        palette=PALETTE,
        groups={},
        mean=MEAN,
        std=STD,
    )
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": weights, "fullattn": description.plain()}, path)
    return path
