"""A whole training run: from a configuration and the folder of a data set to a trained network."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from fullattn.segmentation.data import SegmentationDataset
from fullattn.segmentation.training import prepare
from fullattn.segmentation.training.config import Config
from fullattn.segmentation.training.run import Result, check_machines, check_resumable, fit
from fullattn.segmentation.training.saving import LAST

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
    """Check everything, build the network and train it: what `fullattn train` does.

    Args:
        config: of the run.
        root: folder of the data set.
        output: folder that checkpoints and logs are written to; see `training.run.fit`.
        resume: continue from `output`/last.ckpt if it is there.
        skip_bad: leave out files that cannot be read.
        check: read every file before the first step. Only where there is a console, so that one
            process of several does it.
        devices: as in `fit`.
        nodes: as in `fit`.
        console: for what there is to say; None for the processes that are to be silent.

    Returns:
        What has come out.

    Raises:
        ConfigError: the configuration does not go with the devices or cannot be built.
        CheckpointError: last.ckpt cannot be continued, or the backbone's weights do not fit.
        DataError: the data are laid out otherwise, a file is bad, or an image is too small.
        NonFiniteError: the loss or the gradient is not a number.

    Example:
        >>> from fullattn.segmentation.training import config
        >>> settings = config.read("camvid_small", ["training.steps=100"])
        >>> train(settings, Path("data/camvid"), Path("out/camvid"))  # doctest: +SKIP
    """
    check_machines(config, devices, nodes)
    train_set, val = prepare.datasets(config, root, skip_bad=skip_bad)
    last = output / LAST
    resumed = resume and last.exists()
    model = prepare.network(config, len(train_set.classes), weights=not resumed)
    description = prepare.describe_network(model, train_set, config.data)
    if resumed:
        check_resumable(last, config, description)
    bad = [str(problem.path) for each in (train_set, val) if each for problem in each.dropped]
    if console is not None and check:
        for dataset in (train_set, val):
            if dataset is not None:
                bad += _check(dataset, config, console, dataset is train_set, skip_bad)
    elif console is not None:
        prepare.check_crop(train_set, config.data)
    if not resumed:
        prepare.start_backbone(model, config)
    if console is not None:
        console.print(prepare.describe_run(config, model, train_set, val), highlight=False)
        if resume and not resumed:
            console.print(f"{last} is not there: this run begins at the first step")
    return fit(
        model,
        config,
        train_set,
        val,
        output,
        description=description,
        resume=resumed,
        skip_bad=skip_bad,
        skipped=bad,
        devices=devices,
        nodes=nodes,
        console=console,
    )


def _check(
    dataset: SegmentationDataset, config: Config, console: Console, trained: bool, skip_bad: bool
) -> list[str]:
    """The bad files of a data set, which will be skipped; an error if they are not to be."""
    reading = f"reading {len(dataset)} images of {dataset.split}"
    with console.status(reading) if console.is_terminal else contextlib.nullcontext():
        report = prepare.check(dataset, config.data, trained=trained, skip_bad=skip_bad)
    for path, reason in report.problems:
        console.print(f"left out: {path} {reason}", markup=False, highlight=False)
    return [str(problem.path) for problem in report.problems]
