"""What a run needs, made from its configuration and checked before the first step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fullattn.segmentation.data import (
    Augment,
    DataError,
    DatasetReport,
    SegmentationDataset,
    open_dataset,
    smallest_image,
)
from fullattn.segmentation.models import FLANet
from fullattn.segmentation.models.backbone import load_weights
from fullattn.segmentation.models.files import Description, describe
from fullattn.segmentation.training.config import Config, ConfigError, DataConfig

__all__ = [
    "augmentation",
    "check",
    "check_crop",
    "datasets",
    "describe_network",
    "describe_run",
    "network",
    "start_backbone",
]


def augmentation(config: DataConfig) -> Augment:
    """The random changes that a configuration asks for."""
    return Augment(
        crop=config.crop,
        scale=config.scale,
        flip=config.flip,
        photometric=config.photometric,
        mean=config.mean,
        std=config.std,
        pad=config.pad,
    )


def datasets(
    config: Config, root: Path, *, skip_bad: bool = False
) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    """Find the files that are trained on and those that are evaluated.

    Args:
        config: of the run.
        root: folder of the data set.
        skip_bad: leave out images without masks and masks without images.

    Returns:
        The data set to train on, and that of the evaluations or None.

    Raises:
        DataError: another layout than expected, an empty split or missing counterparts.
    """
    data = config.data
    train = open_dataset(data.name, root, data.train, skip_bad=skip_bad)
    val = open_dataset(data.name, root, data.val, skip_bad=skip_bad) if data.val else None
    return train, val


def check(
    dataset: SegmentationDataset, config: DataConfig, *, trained: bool, skip_bad: bool = False
) -> DatasetReport:
    """Decode every file, and compare the sizes of images with the crop.

    Args:
        dataset: the files.
        config: with the crop.
        trained: whether the images are cropped; those of an evaluation are not.
        skip_bad: leave bad files to be skipped, as long as some are good.

    Returns:
        Counts, and the bad files.

    Raises:
        DataError: a file is bad, no pixel has a label, or an image is smaller than the crop.
    """
    report = dataset.check()
    if not skip_bad:
        report.raise_for_problems()
    if not any(report.pixels.values()):
        raise DataError(f"no pixel of {dataset.name} {dataset.split} has a label")
    if trained:
        check_crop(dataset.without(report.problems), config)
    return report


def check_crop(dataset: SegmentationDataset, config: DataConfig) -> None:
    """Compare the sizes of images, from the heads of their files, with the crop.

    Args:
        dataset: the images.
        config: with the crop.

    Raises:
        DataError: an image is smaller than the crop, and `pad` is off.
    """
    if config.pad:
        return
    smallest = smallest_image(dataset)
    height, width = config.crop
    if height > smallest.height or width > smallest.width:
        path = smallest.lowest if height > smallest.height else smallest.narrowest
        raise DataError(
            f"{path} is smaller than the crop of {height}×{width} (height × width): the images of "
            f"{dataset.name} {dataset.split} are down to {smallest.height} high and "
            f"{smallest.width} wide; choose a smaller data.crop, or data.pad=true",
            path,
        )


def network(config: Config, num_classes: int, *, weights: bool = True) -> FLANet:
    """The network of a configuration, with first weights from its seed.

    Args:
        config: of the run.
        num_classes: K.
        weights: whether the backbone gets timm's weights where the configuration asks for them.

    Returns:
        The network in training mode.

    Raises:
        ConfigError: it cannot be built so, or timm's weights cannot be had.
        ImportError: timm is missing.
    """
    model = config.model
    arguments = {
        key: value
        for key, value in config.plain()["model"].items()
        if key not in ("backbone_weights", "pretrained")
    }
    pretrained = model.pretrained and weights
    torch.manual_seed(config.training.seed)
    try:
        built = FLANet(num_classes, pretrained=pretrained, **arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the network of the configuration cannot be built: {error}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ConfigError(
            f"the weights of {model.backbone} cannot be had "
            f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); name a file "
            "with model.backbone_weights, or start at random with model.pretrained=false"
        ) from error
    return built.train()


def start_backbone(model: FLANet, config: Config) -> None:
    """Load the weights that the configuration names, if it does, into the backbone.

    Args:
        model: the network.
        config: of the run.

    Raises:
        ConfigError: there is no such file.
        CheckpointError: it does not hold weights of this backbone.
    """
    if config.model.backbone_weights is None:
        return
    path = Path(config.model.backbone_weights)
    if not path.is_file():
        raise ConfigError(f"model.backbone_weights: there is no file {path}")
    load_weights(model.backbone, path)


def describe_network(
    model: FLANet, dataset: SegmentationDataset, config: DataConfig
) -> dict[str, Any]:
    """Describe the network as plain values, from which `models.files.load` builds it again."""
    return Description(
        model=describe(model),
        dataset=dataset.name,
        classes=dataset.classes,
        palette=dataset.palette,
        groups=dataset.groups,
        mean=config.mean,
        std=config.std,
    ).plain()


def describe_run(
    config: Config, model: FLANet, train: SegmentationDataset, val: SegmentationDataset | None
) -> str:
    """What is going to be done, in two lines."""
    training = config.training
    parameters = sum(each.numel() for each in model.parameters()) / 1e6
    epochs = training.steps * training.batch_size / len(train)
    evaluated = f", {len(val)} of {val.split} evaluated" if val is not None else ""
    return (
        f"{config.model.backbone} with attention {config.model.attention!r}: "
        f"{parameters:.1f} million parameters, {len(train.classes)} classes\n"
        f"{train.name}: {len(train)} images of {train.split}{evaluated}; {training.steps} steps of "
        f"{training.batch_size} images, {math.ceil(10 * epochs) / 10:g} epochs"
    )
