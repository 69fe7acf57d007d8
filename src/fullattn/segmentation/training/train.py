"""Training runs, from a configuration and a dataset to a trained network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fullattn.segmentation.data import DataError, SegmentationDataset, open_dataset
from fullattn.segmentation.models import FLANet
from fullattn.segmentation.models.backbone import load_weights
from fullattn.segmentation.models.files import load
from fullattn.segmentation.training.checks import check_crop, check_machines, check_resumable
from fullattn.segmentation.training.config import Config, ConfigError
from fullattn.segmentation.training.fit import LAST, Result, fit, list_skipped

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["train"]


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
    step = check_resumable(last, config, train_set.classes) if resumed else 0
    if step == training.steps:
        return Result(load(last).model, step, last, None, None, list_skipped(output, set()))
    model = _build(config, len(train_set.classes), initialise=not resumed)
    skipped: list[str] = []
    for dataset in datasets:
        readable = dataset if console is None or not check else _check(dataset, console, skip_bad)
        skipped += [str(issue.path) for issue in readable.dropped]
        if console is not None and dataset is train_set:
            check_crop(readable, data)
    if console is not None:
        console.print(_summary(config, model, datasets), highlight=False)
        if resume and not resumed:
            console.print(f"{last} does not exist: training starts at the first step")
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
        console.print(f"skipped: {path} {reason}", markup=False, highlight=False)
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
