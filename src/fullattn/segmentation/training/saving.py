"""Checkpoints that are there as a whole or not at all.

A checkpoint is written to a file beside its place, forced onto the disk, and put in its place by
one renaming. Whenever the process is killed, the place holds the old checkpoint or the new one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

__all__ = ["LAST", "AtomicCheckpointIO", "LastCheckpoint", "remove_parts", "write_whole"]

LAST = "last.ckpt"
_PART = ".part"


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}{_PART}")


def remove_parts(folder: Path) -> None:
    """Remove what writing that was killed has left behind.

    Args:
        folder: of checkpoints. No other process may be writing there.
    """
    for part in folder.glob(f".*{_PART}"):
        part.unlink(missing_ok=True)


def write_whole(path: Path, write: Callable[[Any], object]) -> None:
    """Write a file so that its place never holds a part of it, and what it holds is on the disk.

    Args:
        path: of the file.
        write: called with the file to write to, opened for bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    try:
        with part.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    # The renaming itself is in the folder, which has to get onto the disk too.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to the disk, through `write_whole`."""

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any | None = None,
    ) -> None:
        """Write a checkpoint to a file of this machine."""
        if storage_options is not None:
            raise TypeError(f"expected no storage options, got {storage_options!r}")
        write_whole(Path(path), lambda file: torch.save(checkpoint, file))


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` every so many steps of the optimizer and after the last one.

    A checkpoint that falls on an evaluation is written after it, so that a run continued from it
    has everything of that step behind it.

    Args:
        folder: where it is written.
        every: steps between two.
        is_validated: whether a step ends with an evaluation.
    """

    def __init__(self, folder: Path, every: int, is_validated: Callable[[int], bool]) -> None:
        self.path = folder / LAST
        self.every = every
        self.is_validated = is_validated
        self.saved = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step of the checkpoint that a resumed run starts from."""
        self.saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Write where a checkpoint is due and no evaluation follows."""
        if trainer.global_step == trainer.max_steps:
            # Lightning then evaluates, whether or not the last step is a multiple of the interval.
            trainer.should_stop = True
        if not self.is_validated(trainer.global_step):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write where a checkpoint is due."""
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        due = step % self.every == 0 or step == trainer.max_steps
        if due and step != self.saved:
            self.saved = step
            trainer.save_checkpoint(self.path)
