"""Checkpoints that exist completely or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from fullattn import _files

__all__ = ["AtomicCheckpointIO", "LastCheckpoint", "write_atomically"]


@rank_zero_only
def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write a file completely or not at all, on the process of rank 0 alone."""
    _files.write_atomically(path, content)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Save checkpoints with `write_atomically`.

    Lightning's own way is not atomic: it writes to the system's temporary folder, from where a
    file may have to be copied to another file system, and does not sync it to the disk.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save a checkpoint to a local file."""
        if storage_options is not None:
            raise TypeError(f"expected no storage options, got {storage_options!r}")
        write_atomically(Path(path), lambda file: torch.save(checkpoint, file))


class LastCheckpoint(Checkpoint):
    """Save a checkpoint every so many steps and after the last one.

    A step's checkpoint is saved after its evaluation, if there is one, so that a resumed run need
    not repeat it.

    Args:
        path: path of the checkpoint.
        every: steps between two checkpoints.
        validate_every: steps between two evaluations; None for no evaluations.
    """

    def __init__(self, path: Path, every: int, validate_every: int | None) -> None:
        self.path = path
        self.every = every
        self.validate_every = validate_every
        self.saved: int = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step from which a run is resumed."""
        self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Save a checkpoint if one is due and no evaluation follows."""
        step, last = trainer.global_step, trainer.global_step == trainer.max_steps
        if last:
            # Lightning then evaluates, also if the last step is no multiple of the interval.
            trainer.should_stop = True
        if self.validate_every is None or (step % self.validate_every and not last):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a checkpoint if one is due."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step != self.saved and (step % self.every == 0 or step == trainer.max_steps):
            self.saved = step
            trainer.save_checkpoint(self.path)
