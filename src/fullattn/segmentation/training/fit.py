"""The training of a network with Lightning."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn

from fullattn._text import digits
from fullattn.segmentation.data import SegmentationDataset
from fullattn.segmentation.evaluation.scores import Scores
from fullattn.segmentation.models import FLANet
from fullattn.segmentation.training.config import Config
from fullattn.segmentation.training.module import Segmentation, ShardedSegmentation
from fullattn.segmentation.training.saving import (
    AtomicCheckpointIO,
    LastCheckpoint,
    write_atomically,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

__all__ = ["LAST", "Progress", "Result", "fit", "list_skipped"]

LAST = "last.ckpt"


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        model: the trained network; with `average_decay` its weights are the average.
        step: the last step.
        checkpoint: file of the last step's checkpoint.
        scores: scores of the last evaluation; None without one.
        best: file of the checkpoint with the best evaluation, and its mean IoU; None without one.
        skipped: unreadable files that were skipped.
    """

    model: nn.Module
    step: int
    checkpoint: Path
    scores: Scores | None
    best: tuple[Path, float] | None
    skipped: list[str]


def fit(
    model: FLANet,
    config: Config,
    train: SegmentationDataset,
    val: SegmentationDataset | None,
    output: Path,
    machines: dict[str, Any],
    *,
    resume: bool = False,
    skip_bad: bool = False,
    skipped: Iterable[str] = (),
    console: Console | None = None,
) -> Result:
    """Train a network with its first weights, which a resumed run replaces.

    `machines` is the result of `train.check_machines`, and `skipped` lists files that are known to
    be unreadable. The other arguments, the files and the errors are those of `train.train`.
    """
    training = config.training
    kind = ShardedSegmentation if training.strategy == "fsdp" else Segmentation
    module = kind(model, config, train, val, skip_bad=skip_bad)
    if training.precision == "64-true":
        module.double()  # Lightning does so only after it made the average, a copy in float32
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / "config.yaml", config.text().encode())
    last = output / LAST
    best = ModelCheckpoint(
        output, "best", monitor="val/mean_iou", mode="max", enable_version_counter=False
    )
    with warnings.catch_warnings():
        # That the loader is not resumable, although StepSampler starts at the trainer's step, and
        # that there are few workers, although their number is the user's choice.
        warnings.simplefilter("ignore", PossibleUserWarning)
        # config.yaml is always there, and in a resumed run also the checkpoints.
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
        # Lightning 2.6 with PyTorch 2.13.
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
        trainer = _trainer(config, machines, output, best if val is not None else None, console)
        try:
            trainer.fit(
                module,
                ckpt_path=str(last) if resume and last.exists() else None,
                weights_only=True,
            )
        except SystemExit as end:  # how Lightning ends after Ctrl-C
            raise KeyboardInterrupt from end
    score = best.best_model_score
    return Result(
        model=model,
        step=trainer.global_step,
        checkpoint=last,
        scores=module.scores,
        best=None if score is None else (output / "best.ckpt", float(score)),
        skipped=list_skipped(output, {*skipped, *module.skipped}),
    )


def _trainer(
    config: Config,
    machines: dict[str, Any],
    output: Path,
    best: ModelCheckpoint | None,
    console: Console | None,
) -> Trainer:
    """Create Lightning's trainer; without `best` it does not evaluate."""
    training = config.training
    validate_every = training.validate_every or training.steps
    last = LastCheckpoint(
        output / LAST, training.checkpoint_every, validate_every if best else None
    )
    callbacks: list[Callback] = [best, last] if best else [last]
    if training.average_decay is not None:
        callbacks.append(EMAWeightAveraging(decay=training.average_decay))
    if console is not None:
        callbacks.append(Progress(console, training.log_every, training.batch_size))
    strategy: str | Strategy = training.strategy
    if strategy == "fsdp":  # PyTorch's fully_shard, which replaces what FSDPStrategy uses
        strategy = ModelParallelStrategy(
            data_parallel_size=machines["devices"] * machines["num_nodes"],
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
        )
    logs = CSVLogger(output, name="logs")
    return Trainer(
        **machines,
        strategy=strategy,
        precision=training.precision,
        max_steps=training.steps,
        max_epochs=1,  # the whole run
        accumulate_grad_batches=training.accumulate,
        sync_batchnorm=training.sync_batchnorm,
        val_check_interval=validate_every * training.accumulate,
        check_val_every_n_epoch=None,
        limit_val_batches=1.0 if best else 0,
        num_sanity_val_steps=0,
        log_every_n_steps=min(training.log_every, training.steps),
        logger=[logs, TensorBoardLogger(output, "logs", logs.version, default_hp_metric=False)],
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Progress(Callback):
    """Show step, loss, mIoU, images a second and the time left.

    On a terminal this is one line that changes, elsewhere a line for every entry of the log.

    Args:
        console: where to show it.
        every: steps between two entries of the log.
        batch_size: images in a step.
    """

    def __init__(self, console: Console, every: int, batch_size: int) -> None:
        self.console = console
        self.every = every
        self.batch_size = batch_size
        self.status: Status = console.status("")
        self.start: int = 0
        self.started: float = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to measure the time of a step."""
        self.start, self.started = trainer.global_step, time.monotonic()
        if self.console.is_terminal:
            self.status.start()

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Show what the step has found."""
        step, values = trainer.global_step, trainer.callback_metrics
        if step == self.start:  # the first of several passes of the step
            return
        seconds = (time.monotonic() - self.started) / (step - self.start)
        left = timedelta(seconds=round(seconds * (trainer.max_steps - step)))
        parts = [f"loss {values['train/loss']:.4f}"]
        if "val/mean_iou" in values:
            parts.append(f"mIoU {values['val/mean_iou']:.4f}")
        parts += [f"{digits(self.batch_size / seconds)} images/s", f"{left} left"]
        said = f"{self._step(trainer)}, {', '.join(parts)}"
        if self.console.is_terminal:
            self.status.update(said)
        elif step % self.every == 0:
            self.console.print(said, highlight=False, soft_wrap=True)
            self.start, self.started = step, time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say why no step follows for a while."""
        self.status.update(f"{self._step(trainer)}, evaluating")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the score, and measure the time of a step from here."""
        score = f"val mIoU {trainer.callback_metrics['val/mean_iou']:.4f}"
        self.console.print(f"{self._step(trainer)}, {score}", highlight=False, soft_wrap=True)
        self.start, self.started = trainer.global_step, time.monotonic()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the line away."""
        self.status.stop()

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """Take the line away before the error is told."""
        self.status.stop()

    @staticmethod
    def _step(trainer: Trainer) -> str:
        return f"step {trainer.global_step}/{trainer.max_steps}"


def list_skipped(output: Path, files: set[str]) -> list[str]:
    """Add the files of all processes to skipped.txt, and return all that it lists."""
    gathered: list[Any] = [files]
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        gathered *= torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, files)
    path = output / "skipped.txt"
    known = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    listed = sorted(set(known).union(*gathered))
    if listed:
        write_atomically(path, "".join(f"{file}\n" for file in listed).encode())
    return listed
