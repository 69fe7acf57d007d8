"""Training runs, from a configuration and a dataset to a trained network."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fullattn.checkpoints import CheckpointError
from fullattn.checkpoints.files import contents
from fullattn.segmentation.data import (
    DataError,
    SegmentationDataset,
    open_dataset,
    smallest_image,
)
from fullattn.segmentation.models import FLANet
from fullattn.segmentation.models.backbone import load_weights
from fullattn.segmentation.models.files import load
from fullattn.segmentation.training.config import Config, ConfigError, DataConfig, differences
from fullattn.segmentation.training.fit import LAST, Result, fit, list_skipped

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["check_machines", "train"]


def train(
    config: Config,
    root: Path,
    output: Path,
    *,
    resume: bool = False,
    skip_bad: bool = False,
    check: bool = True,
    devices: int | None = None,
    nodes: int | None = None,
    console: Console | None = None,
) -> Result:
    """Check everything, build the network and train it, as `fullattn train` does.

    `output` gets config.yaml; last.ckpt, every `checkpoint_every` steps and after the last step;
    best.ckpt, after the evaluation with the highest mean IoU; logs/ with CSV and TensorBoard files;
    and skipped.txt, if files were skipped. A killed run can be resumed from last.ckpt; on CPUs its
    weights are then bit for bit those of an uninterrupted run.

    Args:
        config: configuration of the run.
        root: folder of the dataset.
        output: folder of checkpoints and logs.
        resume: continue from `output`/last.ckpt if it exists.
        skip_bad: skip unreadable files.
        check: read every file before the first step. Only with a console, so that one process of
            several does it.
        devices: devices of each machine; None for all GPUs, one CPU process, or the processes that
            torchrun started.
        nodes: number of machines; None for one, or as torchrun started them.
        console: console for messages and progress; None for processes that print nothing.

    Returns:
        The result, which is the same in all processes.

    Raises:
        ConfigError: the configuration does not fit the devices, or the network cannot be built.
        CheckpointError: the run cannot be resumed, or the backbone's weights do not fit.
        DataError: the layout of the dataset is wrong, a file is bad, or an image is too small.
        NonFiniteError: the loss or the gradient is not finite.

    Example:
        >>> from fullattn.segmentation.training import config
        >>> settings = config.read("camvid_small", ["training.steps=100"])
        >>> train(settings, Path("data/camvid"), Path("out/camvid"))  # doctest: +SKIP
    """
    machines = check_machines(config, devices, nodes)
    data, training = config.data, config.training
    datasets = [
        open_dataset(data.name, root, split, skip_bad=skip_bad)
        for split in (data.train, data.val)
        if split is not None
    ]
    train_set, val_set = datasets[0], datasets[1] if data.val is not None else None
    last = output / LAST
    resumed = resume and last.exists()
    step = _check_resumable(last, config, train_set.classes) if resumed else 0
    if step == training.steps:
        return Result(load(last).model, step, last, None, None, list_skipped(output, set()))
    model = _build(config, len(train_set.classes), initialise=not resumed)
    skipped: list[str] = []
    for dataset in datasets:
        readable = dataset if console is None or not check else _check(dataset, console, skip_bad)
        skipped += [str(issue.path) for issue in readable.dropped]
        if console is not None and dataset is train_set:
            _check_crop(readable, data)
    if console is not None:
        console.print(_summary(config, model, datasets), highlight=False)
        if resume and not resumed:
            said = f"{last} does not exist: training starts at the first step"
            console.print(said, markup=False, soft_wrap=True)
    return fit(
        model,
        config,
        train_set,
        val_set,
        output,
        machines,
        resume=resumed,
        skip_bad=skip_bad,
        skipped=skipped,
        console=console,
    )


def check_machines(
    config: Config, devices: int | None = None, nodes: int | None = None
) -> dict[str, Any]:
    """Choose the devices, and check that the configuration can be run on them.

    Args:
        config: configuration of the run.
        devices: as in `train`.
        nodes: as in `train`.

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


def _check_resumable(path: Path, config: Config, classes: Sequence[str]) -> int:
    """Check that a run can continue from a checkpoint, and return its step."""
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


def _check_crop(dataset: SegmentationDataset, config: DataConfig) -> None:
    """Check that no image is smaller than the crop, unless `pad` is on. Only headers are read."""
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


def _build(config: Config, num_classes: int, *, initialise: bool) -> FLANet:
    """Build the network, with its first weights if `initialise`."""
    model = config.model
    pretrained = model.pretrained and initialise
    torch.manual_seed(config.training.seed)
    try:
        arguments = model.model_dump(exclude={"pretrained", "backbone_weights"})
        network = FLANet(num_classes, pretrained=pretrained, **arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"cannot build the network of the configuration: {error}") from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"cannot load the weights of {model.backbone}: {type(error).__name__}: {reason}; name "
            "a file with model.backbone_weights, or set model.pretrained=false"
        ) from error
    if initialise and model.backbone_weights is not None:
        try:
            load_weights(network.backbone, model.backbone_weights)
        except FileNotFoundError as error:
            raise ConfigError(
                f"model.backbone_weights: file {model.backbone_weights} does not exist"
            ) from error
    return network.train()


def _check(dataset: SegmentationDataset, console: Console, skip_bad: bool) -> SegmentationDataset:
    """Decode every file, and leave out the bad ones or raise a DataError."""
    with console.status(f"reading {len(dataset)} images of {dataset.split}"):
        report = dataset.check()
    if not skip_bad:
        report.raise_for_problems()
    if not any(report.pixels.values()):
        raise DataError(f"no pixel of {dataset.name} {dataset.split} has a label")
    for path, reason in report.problems:
        console.print(f"skipped: {path} {reason}", markup=False, highlight=False, soft_wrap=True)
    return dataset.without(report.problems)


def _summary(config: Config, model: FLANet, datasets: Sequence[SegmentationDataset]) -> str:
    train, *val = datasets
    steps, batch_size = config.training.steps, config.training.batch_size
    parameters = sum(each.numel() for each in model.parameters()) / 1e6
    evaluated = "".join(f", {len(each)} of {each.split} evaluated" for each in val)
    epochs = math.ceil(10 * steps * batch_size / len(train)) / 10
    return (
        f"{config.model.backbone} with attention {config.model.attention!r}: "
        f"{parameters:.1f} million parameters, {len(train.classes)} classes\n"
        f"{train.name}: {len(train)} images of {train.split}{evaluated}; {steps} steps of "
        f"{batch_size} images, {epochs:g} epochs"
    )
