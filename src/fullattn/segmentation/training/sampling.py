"""Samplers of training and evaluation.

They have no state that a checkpoint would have to hold, so a run that is resumed at any step sees
the images that an uninterrupted one sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import BatchSampler, DistributedSampler, Sampler

from fullattn.segmentation.seeding import random_seed

__all__ = ["StepSampler", "is_repeated"]


@dataclass(frozen=True)
class StepSampler(Sampler[list[tuple[int, int]]]):
    """The batches of one process, as keys (epoch, index), from a step on to the last one.

    The epochs form one sequence, each a permutation that depends on (seed, epoch). A step takes the
    next `batch_size` keys for any number of processes and accumulation steps: one batch for each
    rank in order, then the same for the next accumulation step.

    Args:
        images: images in an epoch.
        batch_size: images in a step, over all processes and accumulation steps.
        steps: steps of the whole run.
        start: number of steps already done.
        seed: seed of the permutations.
        rank: rank of this process.
        world_size: number of processes.
        accumulation_steps: batches that each process takes in a step.

    Raises:
        ValueError: the batch size is not a multiple of the number of batches, or `images` is 0.

    Example:
        >>> [len(batch) for batch in StepSampler(10, batch_size=8, steps=3)]
        [8, 8, 8]
        >>> list(StepSampler(10, batch_size=8, steps=3, start=2)) == list(
        ...     StepSampler(10, batch_size=8, steps=3)
        ... )[2:]
        True
    """

    images: int
    batch_size: int
    steps: int
    start: int = 0
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    accumulation_steps: int = 1

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError("expected at least one image to train on, got none")
        if self.batch_size % (self.world_size * self.accumulation_steps):
            raise ValueError(
                "expected a multiple of world_size · accumulation_steps = "
                f"{self.world_size} · {self.accumulation_steps}, got {self.batch_size}"
            )

    def __len__(self) -> int:
        # Batches of the whole run, from which Lightning counts down also in a resumed one.
        return self.steps * self.accumulation_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        in_step = self.world_size * self.accumulation_steps
        batches: Any = BatchSampler(self._keys(), self.batch_size // in_step, drop_last=True)
        end = (self.steps - self.start) * in_step
        return itertools.islice(batches, self.rank, end, self.world_size)

    def _keys(self) -> Iterator[Any]:
        """Yield the keys of all images from `start` on, without end."""
        first, skipped = divmod(self.start * self.batch_size, self.images)
        for epoch in itertools.count(first):
            generator = torch.Generator().manual_seed(random_seed(self.seed, epoch))
            order = torch.randperm(self.images, generator=generator).tolist()
            for index in order[skipped if epoch == first else 0 :]:
                yield epoch, index


def is_repeated(sampler: DistributedSampler[Any], i: int) -> bool:
    """Return whether the i-th index is one that PyTorch's sampler repeats to fill all ranks."""
    return i * sampler.num_replicas + sampler.rank >= len(sampler.dataset)  # type: ignore[arg-type]
