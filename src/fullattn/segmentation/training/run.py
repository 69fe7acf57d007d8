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
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from fullattn.checkpoints import CheckpointError
from fullattn.checkpoints.files import contents
from fullattn.segmentation.data import SegmentationDataset
from fullattn.segmentation.evaluation.scores import Scores
from fullattn.segmentation.training.config import Config, ConfigError, differences
from fullattn.segmentation.training.loaders import Loaders
from fullattn.segmentation.training.module import Segmentation
from fullattn.segmentation.training.sampling import StepSampler
from fullattn.segmentation.training.saving import (
    LAST,
    AtomicCheckpointIO,
    LastCheckpoint,
    remove_parts,
    write_whole,
)

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Machines", "Result", "check_machines", "check_resumable", "fit"]

CONFIG = "config.yaml"
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


@dataclass(frozen=True)
class Machines:
    """What a run is computed on.

    Attributes:
        accelerator: "cuda" or "cpu".
        devices: of each machine.
        nodes: how many machines.
    """

    accelerator: str
    devices: int
    nodes: int

    @property
    def processes(self) -> int:
        """One for each device."""
        return self.devices * self.nodes


def check_machines(
    config: Config, devices: int | None = None, nodes: int | None = None
) -> Machines:
    """Check that a configuration goes with the machines, before anything is started.

    Args:
        config: of the run.
        devices: as in `fit`.
        nodes: as in `fit`.

    Returns:
        What the run is computed on.

    Raises:
        ConfigError: PyTorch or Lightning cannot do it, or the batch cannot be divided.
    """
    training = config.training
    cuda = torch.cuda.is_available()
    there = torch.cuda.device_count() if cuda else 1
    if cuda and (devices or 1) > there:
        raise ConfigError(f"expected at most {there} devices, which are here, got {devices}")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started the processes
        there = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = nodes or int(os.environ["WORLD_SIZE"]) // there
    machines = Machines("cuda" if cuda else "cpu", devices or there, nodes or 1)
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
        StepSampler(
            1,
            training.batch_size,
            training.steps,
            processes=machines.processes,
            parts=training.accumulate,
        )
    except ValueError as error:
        raise ConfigError(f"training.batch_size: {error}") from error
    return machines


def check_resumable(
    path: Path, config: Config, description: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Check that a run with this configuration can continue from a checkpoint.

    Args:
        path: of the checkpoint.
        config: of the run.
        description: of the network and its classes; None where it has none.

    Returns:
        The checkpoint.

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
    return found


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
    skipped: Iterable[str] = (),
    devices: int | None = None,
    nodes: int | None = None,
    console: Console | None = None,
) -> Result:
    """Train a network.

    `output` gets config.yaml; last.ckpt, every `checkpoint_every` steps and after the last;
    best.ckpt, after the evaluation with the highest mean IoU; logs/ with CSV files and those of
    TensorBoard; and skipped.txt, if files were left out. A run that was killed continues with
    `resume` from last.ckpt; on CPUs its weights are then bit for bit those of an unbroken one.

    Args:
        model: as `Segmentation` takes it, with its first weights; a resumed run replaces them.
        config: of the run.
        train: data set to train on.
        val: data set that is evaluated during training; None for none.
        output: folder.
        description: of the network and its classes, for `models.files.load`; None leaves it out of
            the checkpoints.
        resume: continue from `output`/last.ckpt if it is there.
        skip_bad: leave unreadable files out.
        skipped: files of which that is known already.
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
    if training.precision == "64-true":
        module.double()  # Lightning does so only after the average has been made a float32 copy
    loaders = Loaders(config, train, val, skip_bad=skip_bad)
    machines = check_machines(config, devices, nodes)
    last = output / LAST
    continued = resume and last.exists()
    found = check_resumable(last, config, description) if continued else None
    if _is_first():
        output.mkdir(parents=True, exist_ok=True)
        remove_parts(output)
        write_whole(output / CONFIG, lambda file: file.write(config.text().encode()))
    if found is not None and found["global_step"] == training.steps:
        module.load_state_dict(found["state_dict"])
        return Result(model, training.steps, last, None, None, _note_skipped(output, skipped))
    best = ModelCheckpoint(
        output, BEST, monitor="val/mean_iou", mode="max", enable_version_counter=False
    )
    with _quiet():
        trainer = _trainer(config, machines, output, best if val is not None else None, console)
        try:
            trainer.fit(
                module,
                datamodule=loaders,
                ckpt_path=str(last) if continued else None,
                weights_only=True,
            )
        except SystemExit as end:  # how Lightning ends after Ctrl-C
            raise KeyboardInterrupt from end
    return Result(
        model=model,
        step=trainer.global_step,
        checkpoint=last,
        scores=module.scores,
        best=_best(best, output),
        skipped=_note_skipped(output, _of_all_processes({*skipped, *module.skipped})),
    )


def _trainer(
    config: Config,
    machines: Machines,
    output: Path,
    best: ModelCheckpoint | None,
    console: Console | None,
) -> Trainer:
    """Lightning's trainer; `best` is None in a run without evaluations."""
    training = config.training
    every = training.validate_every or training.steps

    def is_validated(step: int) -> bool:
        return best is not None and (step % every == 0 or step == training.steps)

    callbacks: list[Callback] = []
    if training.average_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=training.average_decay))
    if best is not None:
        callbacks.append(best)
    callbacks.append(LastCheckpoint(output, training.checkpoint_every, is_validated))
    terminal = console is not None and console.is_terminal
    if console is not None and not terminal:
        callbacks.append(_Lines(console, training.log_every))
    logs = CSVLogger(output, name="logs")
    return Trainer(
        accelerator=machines.accelerator,
        devices=machines.devices,
        num_nodes=machines.nodes,
        strategy=_strategy(training.strategy, machines.processes),
        precision=training.precision,  # type: ignore[arg-type]
        max_steps=training.steps,
        max_epochs=1,  # the sampler has all steps in one
        accumulate_grad_batches=training.accumulate,
        sync_batchnorm=training.sync_batchnorm,
        val_check_interval=every * training.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if best is not None else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=training.log_every,
        logger=[logs, TensorBoardLogger(output, "logs", logs.version, default_hp_metric=False)],
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_progress_bar=terminal,
        enable_model_summary=False,
    )


def _is_first() -> bool:
    """Whether this is the first of all processes, or will be once they are started."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _best(callback: ModelCheckpoint, output: Path) -> tuple[Path, float] | None:
    if callback.best_model_score is None:
        return None
    return output / f"{BEST}.ckpt", float(callback.best_model_score)


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


def _of_all_processes(found: set[str]) -> set[str]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, found)
        found = set().union(*everyone)
    return found


def _note_skipped(output: Path, files: Iterable[str]) -> list[str]:
    """Add files to the list in the folder, which an earlier part of the run may have begun."""
    path = output / SKIPPED
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    listed = sorted({*files, *known})
    if listed and _is_first():
        text = "".join(f"{file}\n" for file in listed)
        write_whole(path, lambda file: file.write(text.encode()))
    return listed
