"""A training run: from a configuration, a network and data sets to checkpoints in a folder."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fullattn.checkpoints import CheckpointError
from fullattn.checkpoints.files import contents
from fullattn.data import SegmentationDataset
from fullattn.evaluation.scores import Scores
from fullattn.integrations.torchvision import ensure_importable
from fullattn.training.checkpoints import (
    LAST,
    AtomicCheckpointIO,
    LastCheckpoint,
    remove_parts,
    write_whole,
)
from fullattn.training.config import Config, ConfigError, differences
from fullattn.training.loaders import Loaders
from fullattn.training.module import Segmentation

ensure_importable()  # Lightning imports torchvision

from lightning.pytorch import Callback, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy  # noqa: E402
from lightning.pytorch.utilities import rank_zero_only  # noqa: E402

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Result", "check_resumable", "fit"]

SKIPPED = "skipped.txt"
BEST = "best"


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    Attributes:
        model: the trained network; with `average_decay` its weights are the average.
        step: the last step.
        checkpoint: the file that holds the last step.
        scores: of the last evaluation; None without one.
        best: the file of the best evaluation, and its mean IoU; None without one.
        skipped: files that could not be read and were left out.
    """

    model: nn.Module
    step: int
    checkpoint: Path
    scores: Scores | None
    best: tuple[Path, float] | None
    skipped: list[str]


class _Lines(Callback):
    """A line for every entry of the log, where there is no terminal for a progress bar."""

    def __init__(self, console: Console, every: int) -> None:
        self.console = console
        self.every = every
        self.since = (0, 0.0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = (trainer.global_step, time.monotonic())

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        step, (before, then) = trainer.global_step, self.since
        if step == before or step % self.every:
            return
        now = time.monotonic()
        values = trainer.callback_metrics
        self._print(
            f"step {step}/{trainer.max_steps}, loss {values['train/loss']:.4f}, "
            f"learning rate {values['train/learning_rate']:.3g}, "
            f"{(now - then) / (step - before):.2f} s a step"
        )
        self.since = (step, now)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mean = float(trainer.callback_metrics["val/mean_iou"])
        self._print(f"step {trainer.global_step}/{trainer.max_steps}, val mIoU {mean:.4f}")
        self.since = (trainer.global_step, time.monotonic())

    @rank_zero_only
    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False)


def check_resumable(path: Path, config: Config, description: Mapping[str, Any] | None) -> int:
    """Check that a run with this configuration can continue from a checkpoint.

    Args:
        path: of the checkpoint.
        config: of the run.
        description: of the network and its classes; None where it has none.

    Returns:
        The checkpoint's step.

    Raises:
        CheckpointError: it is damaged, of another network, other classes or other settings; the
            message names the file and what differs.
        FileNotFoundError: there is no such file.
    """
    found = contents(path)
    if not isinstance(found, dict) or "fullattn_config" not in found or "loops" not in found:
        raise CheckpointError(f"{path} cannot be continued: it is no checkpoint of fullattn train")
    before = found.get("fullattn") or {}
    if description is not None:
        for key, what in (("classes", "classes"), ("model", "a network")):
            old, new = before.get(key), description[key]
            if old != new:
                raise CheckpointError(
                    f"{path} cannot be continued: it is of {what} with {_brief(old, new)}, and "
                    f"this run's has {_brief(new, old)}"
                )
    for name, old, new in differences(found["fullattn_config"], config):
        raise CheckpointError(
            f"{path} cannot be continued: it was made with {name} {old}, and this run has {new}"
        )
    return int(found["global_step"])


def _brief(one: Any, other: Any) -> str:
    """What of the one differs from the other, in a few words."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return ", ".join(f"{key}={one[key]!r}" for key in one if one[key] != other.get(key))
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{len(one)} of them"
        return ", ".join(mine for mine, theirs in zip(one, other, strict=True) if mine != theirs)
    return repr(one)


def fit(
    model: nn.Module,
    config: Config,
    train: SegmentationDataset,
    val: SegmentationDataset | None,
    output: Path,
    *,
    description: Mapping[str, Any] | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    devices: int | None = None,
    nodes: int | None = None,
    console: Console | None = None,
) -> Result:
    """Train a network.

    `output` gets last.ckpt, every `checkpoint_every` steps and after the last; best.ckpt, after the
    evaluation with the highest mean IoU; logs/ with CSV files and those of TensorBoard; and
    skipped.txt, if files were left out. A run that was killed continues with `resume` from
    last.ckpt; on CPUs its weights are then bit for bit those of an unbroken one.

    Args:
        model: as `Segmentation` takes it, with its first weights; a resumed run replaces them.
        config: of the run.
        train: data set to train on.
        val: data set that is evaluated during training; None for none.
        output: folder.
        description: of the network and its classes, for `fullattn.models.files.load`; None leaves
            it out of the checkpoints.
        resume: continue from `output`/last.ckpt if it is there.
        skip_bad: leave unreadable files out.
        devices: how many of each machine are used; None for all GPUs, one CPU process, or as
            torchrun has started them.
        nodes: machines; None for one, or as torchrun has started them.
        console: where lines about the progress go if it is no terminal; None for none and no bar.

    Returns:
        What has come out, in every process the same but for `skipped` of the others.

    Raises:
        ConfigError: the configuration does not go with the devices.
        CheckpointError: last.ckpt cannot be continued.
        DataError: a file cannot be read.
        NonFiniteError: the loss or the gradient is not a number.
    """
    training = config.training
    module = Segmentation(
        model,
        training,
        train.classes,
        groups=train.groups,
        description=description,
        plain=config.plain(),
    )
    loaders = Loaders(config, train, val, skip_bad=skip_bad)
    started = _started_by_torchrun()
    devices = devices or started.get("devices")
    nodes = nodes or started.get("nodes", 1)
    _check_devices(config, loaders, devices, nodes)
    last = output / LAST
    if _is_first():
        output.mkdir(parents=True, exist_ok=True)
        remove_parts(output)
    continued = resume and last.exists()
    if continued:
        check_resumable(last, config, description)

    every = training.validate_every or training.steps

    def is_validated(step: int) -> bool:
        return val is not None and (step % every == 0 or step == training.steps)

    best = ModelCheckpoint(
        output, BEST, monitor="val/mean_iou", mode="max", enable_version_counter=False
    )
    callbacks: list[Callback] = [LastCheckpoint(output, training.checkpoint_every, is_validated)]
    if val is not None:
        callbacks.insert(0, best)
    if training.average_decay is not None:
        callbacks.insert(0, EMAWeightAveraging(decay=training.average_decay))
    terminal = console is not None and console.is_terminal
    if console is not None and not terminal:
        callbacks.append(_Lines(console, training.log_every))
    logs = CSVLogger(output, name="logs")
    with _quiet():
        trainer = Trainer(
            accelerator="auto",
            devices=devices or "auto",
            num_nodes=nodes,
            strategy=_strategy(training.strategy, (devices or 1) * nodes),
            precision=training.precision,  # type: ignore[arg-type]
            max_steps=training.steps,
            max_epochs=-1,
            accumulate_grad_batches=training.accumulate,
            sync_batchnorm=training.sync_batchnorm,
            val_check_interval=every * training.accumulate,
            check_val_every_n_epoch=None,
            limit_val_batches=1.0 if val is not None else 0,
            num_sanity_val_steps=0,
            log_every_n_steps=training.log_every,
            logger=[
                logs,
                TensorBoardLogger(output, "logs", logs.version, default_hp_metric=False),
            ],
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            use_distributed_sampler=False,
            enable_checkpointing=True,
            enable_progress_bar=terminal,
            enable_model_summary=False,
        )
        try:
            trainer.fit(
                module,
                datamodule=loaders,
                ckpt_path=str(last) if continued else None,
                weights_only=True,
            )
        except SystemExit as end:  # how Lightning ends after Ctrl-C
            raise KeyboardInterrupt from end
    skipped = _note_skipped(output, _of_all_processes(module.skipped))
    return Result(
        model=model,
        step=trainer.global_step,
        checkpoint=last,
        scores=module.scores,
        best=_best(best),
        skipped=skipped,
    )


def _is_first() -> bool:
    """Whether this is the first of all processes, or will be once they are started."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _best(callback: ModelCheckpoint) -> tuple[Path, float] | None:
    if callback.best_model_score is None:
        return None
    return Path(callback.best_model_path), float(callback.best_model_score)


def _started_by_torchrun() -> dict[str, int]:
    """How many processes torchrun has started on each machine, and on how many machines."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    return {"devices": local, "nodes": int(os.environ["WORLD_SIZE"]) // local}


def _check_devices(config: Config, loaders: Loaders, devices: int | None, nodes: int) -> None:
    """Refuse before anything is started what PyTorch or Lightning would refuse in the midst."""
    training = config.training
    cuda = torch.cuda.is_available()
    processes = (devices or (torch.cuda.device_count() if cuda else 1)) * nodes
    if not cuda and training.sync_batchnorm:
        raise ConfigError(
            "PyTorch synchronises batch normalisation on GPUs only, and there is none here: "
            "--set training.sync_batchnorm=false"
        )
    if not cuda and training.precision == "16-mixed":
        raise ConfigError(
            "training.precision 16-mixed needs a GPU, and there is none here: "
            "--set training.precision=32-true or bf16-mixed"
        )
    if training.strategy == "fsdp" and training.average_decay is not None:
        raise ConfigError("training.average_decay does not go with training.strategy fsdp")
    if training.strategy == "fsdp" and training.precision not in ("32-true", "bf16-mixed"):
        raise ConfigError(
            f"training.strategy fsdp goes with training.precision 32-true or bf16-mixed, "
            f"not with {training.precision}"
        )
    try:
        loaders.sampler(processes=processes)
    except ValueError as error:
        raise ConfigError(f"training.batch_size: {error}") from error


def _strategy(name: str, processes: int) -> str | Strategy:
    if name == "fsdp":
        # PyTorch's second implementation: fully_shard, in Segmentation.configure_model.
        return ModelParallelStrategy(
            data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    return name


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's advertisements and the warnings that do not apply from being shown."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            # StepSampler starts at the step that the checkpoint is of.
            ".*your dataloader is not resumable.*",
            # The number of workers is the configuration's.
            ".*does not have many workers.*",
            # A resumed run writes to the folder of the first.
            ".*Checkpoint directory .* exists and is not empty.*",
            ".*is smaller than the logging interval.*",
            # `configure_model` does nothing without the strategy that shards.
            ".*WeightAveraging callback with a model that overrides.*",
            # Lightning 2.6 with PyTorch 2.13.
            ".*LeafSpec.* is deprecated.*",
        ):
            warnings.filterwarnings("ignore", message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _of_all_processes(files: Iterable[str]) -> list[str]:
    found = set(files)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, found)
        found = set().union(*everyone)
    return sorted(found)


def _note_skipped(output: Path, files: list[str]) -> list[str]:
    """Add files to the list in the folder, which an earlier part of the run may have begun."""
    path = output / SKIPPED
    if path.exists():
        files = sorted({*files, *path.read_text(encoding="utf-8").splitlines()})
    if files and _is_first():
        text = "".join(f"{file}\n" for file in files)
        write_whole(path, lambda file: file.write(text.encode()))
    return files
