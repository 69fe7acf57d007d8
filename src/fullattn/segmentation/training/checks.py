"""Checks before the first step."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fullattn.checkpoints import CheckpointError
from fullattn.checkpoints.files import contents
from fullattn.segmentation.data import DataError, SegmentationDataset, smallest_image
from fullattn.segmentation.training.config import Config, ConfigError, DataConfig, differences

__all__ = ["check_crop", "check_machines", "check_resumable"]


def check_machines(
    config: Config, devices: int | None = None, nodes: int | None = None
) -> dict[str, Any]:
    """Choose the devices, and check that the configuration can be run on them.

    Args:
        config: configuration of the run.
        devices: as in `train.train`.
        nodes: as in `train.train`.

    Returns:
        Arguments of Lightning's Trainer.

    Raises:
        ConfigError: PyTorch or Lightning does not support the combination, or the batch cannot be
            divided evenly.
    """
    training = config.training
    cuda = torch.cuda.is_available()
    available = torch.cuda.device_count() if cuda else 1
    if cuda and (devices or 1) > available:
        raise ConfigError(f"expected at most {available} devices, got {devices}")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun started the processes
        available = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = nodes or int(os.environ["WORLD_SIZE"]) // available
    devices, nodes = devices or available, nodes or 1
    if not cuda and (training.sync_batchnorm or training.precision == "16-mixed"):
        raise ConfigError(
            "no GPU is available: expected training.sync_batchnorm=false and training.precision="
            f"32-true or bf16-mixed, got {training.sync_batchnorm} and {training.precision}"
        )
    if training.strategy == "fsdp" and not (
        training.average_decay is None and training.precision in ("32-true", "bf16-mixed")
    ):
        raise ConfigError(
            "training.strategy fsdp: expected training.average_decay=null and training.precision="
            f"32-true or bf16-mixed, got {training.average_decay} and {training.precision}"
        )
    batches = devices * nodes * training.accumulate
    if training.batch_size % batches:
        raise ConfigError(
            f"training.batch_size: expected a multiple of {batches} = devices · nodes · "
            f"training.accumulate, got {training.batch_size}"
        )
    return {"accelerator": "cuda" if cuda else "cpu", "devices": devices, "num_nodes": nodes}


def check_resumable(path: Path, config: Config, classes: Sequence[str]) -> int:
    """Check that a run can continue from a checkpoint.

    Args:
        path: path of the checkpoint.
        config: configuration of the run.
        classes: names of the run's classes.

    Returns:
        The step of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or of other classes or settings; the message
            names the file and the difference.
    """
    found = contents(path)
    if not isinstance(found, dict) or "fullattn_config" not in found or "loops" not in found:
        raise CheckpointError(f"cannot resume from {path}: not a checkpoint of `fullattn train`")
    pairs = enumerate(itertools.zip_longest(found["fullattn"]["classes"], classes))
    changed = ((f"class {i}", old, new) for i, (old, new) in pairs if old != new)
    for name, old, new in itertools.chain(differences(found["fullattn_config"], config), changed):
        raise CheckpointError(
            f"cannot resume from {path}: it was saved with {name} {old}, and this run has {new}"
        )
    step: int = found["global_step"]
    return step


def check_crop(dataset: SegmentationDataset, config: DataConfig) -> None:
    """Check that no image is smaller than the crop, unless `pad` is on. Only headers are read.

    Raises:
        DataError: an image is smaller than the crop.
    """
    if config.pad:
        return
    smallest = smallest_image(dataset)
    height, width = config.crop
    if height > smallest.height or width > smallest.width:
        path = smallest.lowest if height > smallest.height else smallest.narrowest
        raise DataError(
            f"{path} is smaller than the crop of {height}×{width} (height × width): the smallest "
            f"height and width in {dataset.name} {dataset.split} are {smallest.height} and "
            f"{smallest.width}; choose a smaller data.crop, or data.pad=true",
            path,
        )
